"""Weights under delayed scaling: whose amax makes whose scale, by role and layer, on a mesh, after a fallback."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import fog_paper, fp8_base
from fp8jax import config as config_lib
from fp8jax.config import ConfigError
from fp8jax.data import pipeline
from fp8jax.numerics.formats import dequantise
from fp8jax.training.calibration import calibrate, without_fallen
from tests.helpers.runs import EIGHT, micro, program_of
from tests.numerics import reference

DELAYED = {"weight_scaling": "delayed", "history_length": 3, "power_of_two": False}
WEIGHTS = ("qkv.w", "attention_out.w", "mlp_up.w", "mlp_down.w")


def amaxes_of(params):
    """Entry → largest magnitude of each layer's matrix, by NumPy."""
    blocks = params["blocks"]
    matrices = {
        "qkv.w": blocks["attention"]["qkv"],
        "attention_out.w": blocks["attention"]["out"],
        "mlp_up.w": blocks["feed_forward"]["up"],
        "mlp_down.w": blocks["feed_forward"]["down"],
    }
    return {
        entry: np.abs(np.asarray(leaf["w"], np.float32)).reshape(2, -1).max(axis=1)
        for entry, leaf in matrices.items()
    }


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_casts_weights_with_the_scales_of_steps_before(microbatches):
    """The amax of the weights that a step starts from enters the history at its end, once, whatever the microbatches."""
    config = micro(fp8=DELAYED, training={"microbatches": microbatches})
    program = program_of(config)
    batch = program.put(pipeline.train_batches(config)[0])
    state = calibrate(program, program.init(), batch)
    seen = [amaxes_of(state.params)]
    for _ in range(3):
        seen.append(amaxes_of(state.params))
        state, _, _ = program.step(state, batch)
        for entry in WEIGHTS:
            window = np.stack([found[entry] for found in seen[:-4:-1]])
            np.testing.assert_array_equal(
                np.asarray(state.scaling[entry]["history"])[:, 0, : len(window)].T, window
            )
            scales = [
                reference.scale_of(float(largest), reference.E4M3, power_of_two=False)
                for largest in window.max(axis=0)
            ]
            np.testing.assert_allclose(state.scaling[entry]["scale"][:, 0], scales, rtol=2e-7)
    assert (
        len({float(found["mlp_up.w"][0]) for found in seen[1:]}) == 3
    )  # or the order would not show


def test_weights_that_outgrow_their_history_saturate():
    """The scale is that of the state and not of the weight's own amax."""
    program = program_of(micro(fp8=DELAYED))
    params = program.init().params
    model = program.definition.bind(params)
    largest = amaxes_of(params)
    scales = {
        entry: jnp.asarray(largest[entry] / 448 / 2)[:, None] for entry in WEIGHTS
    }  # the largest is twice what fits
    roles = {role: jnp.ones((2, 2)) for role in ("qkv", "attention_out", "mlp_up", "mlp_down")}
    (found,) = model.prepare(program.recipes, scales | roles).weights
    for entry in WEIGHTS:
        values = np.asarray(jax.vmap(dequantise)(found[entry.removesuffix(".w")]))
        np.testing.assert_allclose(
            np.abs(values).reshape(2, -1).max(axis=1), largest[entry] / 2, rtol=1e-6
        )


def test_entries_by_role_and_layer():
    """An entry where any layer's scaling is delayed; the amax is 0 where a layer is not in FP8."""
    program = program_of(
        micro(fp8=DELAYED | {"overrides": "qkv=current,mlp_down@1=bf16,mlp_up@0=current"})
    )
    assert {entry for entry in program.abstract_state.scaling if entry.endswith(".w")} == {
        "attention_out.w",
        "mlp_up.w",
        "mlp_down.w",
    }
    params = program.init().params
    found, largest = (
        program.definition.bind(params).weight_amaxes(program.recipes),
        amaxes_of(params),
    )
    np.testing.assert_array_equal(found["mlp_up.w"][:, 0], largest["mlp_up.w"])
    np.testing.assert_array_equal(found["mlp_down.w"][:, 0], [largest["mlp_down.w"][0], 0])


def test_the_head_has_an_entry_if_it_is_in_fp8():
    config = micro(
        fp8=DELAYED | {"head": True},
        model={"layers": 2, "width": 32, "heads": 2, "kv_heads": 1, "tied_embeddings": False},
    )
    program = program_of(config)
    assert program.abstract_state.scaling["lm_head.w"]["scale"].shape == (1, 1)
    state = calibrate(program, program.init(), program.put(pipeline.train_batches(config)[0]))
    assert float(state.scaling["lm_head.w"]["history"][0, 0, 0]) == float(
        np.abs(np.asarray(state.params["head"]["w"])).max()
    )
    scales = {entry: value["scale"] for entry, value in state.scaling.items()}
    head = program.definition.bind(state.params).prepare(program.recipes, scales).head
    assert float(head.scale) == float(scales["lm_head.w"][0, 0])


def test_roles_that_fall_back_take_their_weights_along():
    program = program_of(micro(fp8=DELAYED))
    state = program.init()
    fallen = program.fallen_back("qkv=bf16")
    assert set(state.scaling) - set(without_fallen(fallen, state).scaling) == {"qkv", "qkv.w"}


def test_amaxes_of_sharded_weights_are_those_of_whole_ones():
    """Bit for bit, the same on each device; a NaN on one of them reaches all."""
    program = program_of(micro(fp8=DELAYED, mesh=EIGHT))

    def find(params):
        return program.definition.bind(params).weight_amaxes(program.recipes)

    with jax.set_mesh(program.mesh):
        params = program.init().params
        found = jax.jit(find)(params)
        broken = params | {
            "blocks": params["blocks"]
            | {
                "attention": params["blocks"]["attention"]
                | {
                    "out": {
                        "w": params["blocks"]["attention"]["out"]["w"]
                        .at[1, -1, -1, -1, -1]
                        .set(jnp.nan)
                    }
                }
            }
        }
        bad = jax.jit(find)(broken)["attention_out.w"]
    for entry, largest in amaxes_of(params).items():
        for shard in found[entry].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data)[:, 0], largest)
    for shard in bad.addressable_shards:
        np.testing.assert_array_equal(np.isposinf(shard.data)[:, 0], [False, True])


def test_weights_cannot_be_delayed_where_nothing_is():
    with pytest.raises(
        ConfigError,
        match=r"config.fp8.weight_scaling: delayed has no effect with config.fp8.scaling=current; set",
    ):
        micro(fp8={"scaling": "current", "weight_scaling": "delayed"})
    micro(fp8={"scaling": "current", "weight_scaling": "delayed", "overrides": "qkv=delayed"})


def test_the_papers_preset_differs_from_ours_only_where_it_says():
    """docs/paper.md explains each of these."""
    ours, theirs = (
        config_lib.to_dict(config_lib.from_dict(preset.get_config("8b")))
        for preset in (fp8_base, fog_paper)
    )
    changed = {
        f"{section}.{name}": value
        for section, fields in theirs.items()
        for name, value in fields.items()
        if ours[section][name] != value
    }
    assert changed == {
        "fp8.power_of_two": False,
        "fp8.weight_scaling": "delayed",
        "model.rope_scaling_factor": 8.0,
        "optimizer.gradient_dtype": "bfloat16",
        "optimizer.master_dtype": "float16",
        "optimizer.first_moment": "float16",
        "optimizer.second_moment": "float16",
    }
