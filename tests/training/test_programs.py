"""Every program of a run at every size, recipe and architecture: traced, which takes no memory, whatever the size."""

import itertools

import jax
import pytest

from configs import common
from fp8jax import config as config_lib
from fp8jax.config import ARCHITECTURES, ConfigError
from fp8jax.numerics.roles import RECIPES
from fp8jax.plan import make_plan
from fp8jax.training.programs import programs

ALWAYS = {
    "init",
    "step",
    "statistics",
    "evaluation",
    "sampling weights",
    "sampling prompt",
    "sampling",
}
SIZES = tuple(common.SIZES)


def programs_of(size, architecture="fog_max", recipe="fp8_dpa", devices=1, **fields):
    """Of a preset with all its sequences in one microbatch: the largest arrays that there can be."""
    values = common.make(size, architecture=architecture, recipe=recipe)
    values.training.microbatches = 1
    values.warning.update(action="fallback", fallback="mlp_down")
    for name, value in fields.items():
        section, _, field = name.partition("__")
        values[section][field] = value
    config = config_lib.from_dict(values)
    return programs(make_plan(config, jax.devices()[:devices]))


# Each recipe and each size that no other test here traces; all of them together are slow.
FIRST = {("390m", "fp8_dpa"), ("1p5b", "bf16"), ("8b", "fp8"), ("70b", "fp8_dpa")}


@pytest.mark.parametrize(
    ("size", "recipe"),
    [
        pytest.param(*case, marks=() if case in FIRST else pytest.mark.slow)
        for case in itertools.product(SIZES, RECIPES)
    ],
)
def test_every_program_of_every_size_and_recipe(size, recipe):
    """390m and above have products of sizes beyond 2**31 in every step."""
    found = programs_of(size, recipe=recipe)
    fallback = {"fallback mlp_down=bf16", "fallback mlp_down=bf16, statistics"}
    assert found.keys() == ALWAYS | fallback | ({"calibration"} if recipe != "bf16" else set())
    for program in found.values():
        program.trace()


def test_a_probe_is_listed_where_it_is_ever_taken():
    found = programs_of("8b", monitor__probe_every=100)
    for name in ("probe", "probe, reference"):
        found[name].trace()


@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "fog_max"])
def test_every_architecture(architecture):
    found = programs_of("8b", architecture)
    for name in ("init", "calibration", "statistics", "evaluation", "sampling"):
        found[name].trace()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("architecture", [name for name in ARCHITECTURES if name != "fog_max"])
def test_every_program_of_every_architecture_size_and_recipe(architecture, size, recipe):
    for program in programs_of(size, architecture, recipe).values():
        program.trace()


@pytest.mark.parametrize(
    "fields",
    [
        {"training__loss_chunk": 8192},
        {"training__microbatches": 4, "training__remat": "full"},
        {"data__document_masks": True, "monitor__parameters": True, "monitor__kurtosis": "pooled"},
        {"data__sequence_length": 131072, "training__batch_size": 16},
        {
            "fp8__scaling": "blockwise",
            "fp8__overrides": "attention_scores=static,attention_values=current",
        },
    ],
    ids=["loss_chunk", "microbatches", "masks", "long", "blockwise"],
)
def test_other_settings_at_a_large_size(fields):
    for name, program in programs_of("8b", **fields).items():
        if name in ("calibration", "statistics", "evaluation"):
            program.trace()


def test_kernels_on_two_devices_with_statistics():
    """Kernels are not run: their shapes and how they are split are traced."""
    found = programs_of("390m", devices=2, fp8__attention_backend="pallas")
    for name in ("calibration", "step", "statistics"):
        found[name].trace()


def test_a_fallback_of_one_layer():
    """Layers before, in and after it are programs of their own."""
    found = programs_of("390m", warning__fallback="mlp_down@1")
    found["fallback mlp_down@1=bf16, statistics"].trace()


def test_every_fallback_that_a_warning_can_ask_for_is_listed():
    found = programs_of("tiny", "llama3", warning__fallback="")
    roles = (
        "qkv",
        "attention_out",
        "mlp_gate",
        "mlp_up",
        "mlp_down",
        "attention_scores",
        "attention_values",
    )
    logits = "qkv=bf16,attention_scores=bf16,attention_values=bf16"
    wanted = {
        f"fallback {overrides}" for overrides in (logits, *(f"{role}=bf16" for role in roles))
    }
    assert {
        name for name in found if name.startswith("fallback") and "statistics" not in name
    } == wanted
    assert not any(
        name.startswith("fallback") for name in programs_of("tiny", warning__action="log")
    )


def test_a_program_that_cannot_be_built_fails_alone():
    found = programs_of("tiny", warning__fallback="mlp_gate")
    found["step"].trace()
    with pytest.raises(ConfigError, match="mlp_gate: the FFN has no gate"):
        found["fallback mlp_gate=bf16"].trace()
