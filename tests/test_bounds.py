"""Every number of a configuration at both of its ends: refused in one line, or a step that can be traced and casts that mean something."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.numerics import formats
from fp8jax.numerics.recipes import GemmRecipe
from fp8jax.plan import make_plan
from fp8jax.training.step import TrainProgram

SMALL = {
    "model": {"layers": 2, "width": 32, "ffn_width": 32, "heads": 2, "kv_heads": 1},
    "data": {"sequence_length": 16},
    "training": {"steps": 10, "batch_size": 4, "microbatches": 1, "loss_chunk": 0, "remat": "none"},
    "optimizer": {"warmup_steps": 0},
}
# Which only say how large an array is, or how many devices: at their upper ends there is no machine for them.
SIZES = {
    f"model.{name}"
    for name in (
        "layers",
        "width",
        "ffn_width",
        "ffn_hidden",
        "heads",
        "kv_heads",
        "head_dim",
        "vocab_size",
    )
} | {
    "data.sequence_length",
    "training.batch_size",
    "training.microbatches",
    *(f"mesh.{axis}" for axis in config_lib.MESH_AXES),
}


def numbers():
    for section in dataclasses.fields(config_lib.Config):
        for field in dataclasses.fields(section.type):
            kind, _ = config_lib.kind_of(field.type)
            if kind in (int, float):
                yield section.name, field, kind


def ends(field, kind):
    """The smallest and the largest value that a field takes."""
    found = field.metadata
    low = (
        found["at_least"]
        if found["at_least"] is not None
        else float(np.nextafter(found["above"], np.inf))
    )
    high = (
        found["at_most"]
        if found["at_most"] is not None
        else found["below"] - 1
        if kind is int
        else float(np.nextafter(found["below"], 0))
    )
    return kind(low), kind(high)


def built(**changes):
    """A small configuration; the message of the one line that refuses it."""
    values = {name: dict(section) for name, section in SMALL.items()}
    for path, value in changes.items():
        section, name = path.split(".")
        values.setdefault(section, {})[name] = value
    try:
        return config_lib.from_dict(values)
    except config_lib.ConfigError as error:
        message = str(error)
    assert message.startswith("config.") and "\n" not in message
    return message


FIELDS = [
    pytest.param(section, field, kind, id=f"{section}.{field.name}")
    for section, field, kind in numbers()
]


@pytest.mark.parametrize(("section", "field", "kind"), FIELDS)
def test_every_number_has_two_ends(section, field, kind):
    """And what lies beyond is refused with field, value and bound, however far it lies."""
    path, (low, high) = f"{section}.{field.name}", ends(field, kind)
    near = (
        [low - 1, high + 1]
        if kind is int
        else [low - 1e-9 * max(abs(low), 1e-290), high * (1 + 1e-9)]
    )
    far = [-(10**400), -(2**63), 2**63, 10**400] if kind is int else [-1e308, 2.0**127, 1e308]
    for value in (*near, *far):
        message = built(**{path: value})
        assert isinstance(message, str) and path in message and repr(value) in message, message


@pytest.mark.parametrize(("section", "field", "kind"), FIELDS)
def test_at_its_ends_a_number_is_taken_or_refused_in_one_line(section, field, kind):
    for value in ends(field, kind):
        found = built(**{f"{section}.{field.name}": value})
        assert not isinstance(found, str) or str(value) in found or f"{value:g}" in found, found


def traced(config):
    program = TrainProgram(make_plan(config, jax.devices()[:1], vocab_size=128))
    state, metrics, taps = jax.eval_shape(
        program.jitted_step(collect=True), program.abstract_state, program.abstract_batch
    )
    assert metrics["loss"].shape == () and state.step.dtype == jnp.int32 and taps.values.size > 100


@pytest.mark.parametrize("end", [0, 1], ids=["lower", "upper"])
def test_a_step_is_traced_with_all_numbers_at_one_end(end):
    """All that do not exclude one another."""
    changes = {}
    for section, field, kind in numbers():
        path, value = f"{section}.{field.name}", ends(field, kind)[end]
        if path not in SIZES and not isinstance(built(**changes, **{path: value}), str):
            changes[path] = value
    assert len(changes) > 40
    traced(built(**changes))


@pytest.mark.slow
@pytest.mark.parametrize(("section", "field", "kind"), FIELDS)
def test_a_step_is_traced_at_each_end(section, field, kind):
    for value in ends(field, kind)[: 1 if f"{section}.{field.name}" in SIZES else 2]:
        config = built(**{f"{section}.{field.name}": value})
        if not isinstance(config, str):
            traced(config)


@pytest.mark.parametrize("gradient_format", ["e4m3", "e5m2"])
@pytest.mark.parametrize(
    "margin", ends(next(field for _, field, _ in numbers() if field.name == "margin"), int)
)
def test_a_cast_means_something_at_the_ends_of_the_margin(margin, gradient_format):
    """Against float64: of e4m3's three bits of mantissa, and of e5m2's two, none is lost."""
    assert built(**{"fp8.margin": margin}).fp8.margin == margin
    x = jax.random.normal(jax.random.key(0), (64, 1024))
    for operand, decibels in (("x", 30), ("w", 30), ("g", 30 if gradient_format == "e4m3" else 24)):
        recipe = GemmRecipe("current", margin=margin, gradient_format=gradient_format)
        error = np.float64(x) - np.float64(formats.dequantise(recipe.quantise(x, None, operand)[0]))
        assert 10 * np.log10(np.mean(np.float64(x) ** 2) / np.mean(error**2)) > decibels, operand


@pytest.mark.parametrize(
    ("name", "operand", "size"),
    [("static_weight_scale", "w", 0.02), ("static_gradient_scale", "g", 1 / 64)],
)
def test_a_fixed_scale_means_something_as_far_as_it_is_taken(name, operand, size):
    taken = [
        2.0**k
        for k in range(-60, 30)
        if not isinstance(built(**{f"fp8.{name}": 2.0**k, "fp8.scaling": "static"}), str)
    ]
    x = size * jax.random.normal(jax.random.key(0), (64, 1024))
    assert 8 < len(taken) < 32 and min(taken) < size < max(taken)
    for scale in (taken[0], taken[-1]):
        recipe = GemmRecipe("static", **{name: scale})
        error = np.float64(x) - np.float64(formats.dequantise(recipe.quantise(x, None, operand)[0]))
        assert 10 * np.log10(np.mean(np.float64(x) ** 2) / np.mean(error**2)) > 15, scale
