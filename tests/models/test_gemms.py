"""Recipes as the config asks for them, every scaling running in a model, and weights quantised once a step."""

import functools
import math
from collections import Counter

import jax
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.config import ConfigError
from fp8jax.models import layers
from fp8jax.models.model_recipes import model_recipes
from fp8jax.monitor import outliers
from fp8jax.numerics import statistics
from fp8jax.numerics.gemm import dot_general
from fp8jax.numerics.roles import LINEAR_ROLES
from fp8jax.parallel import mesh as mesh_lib
from fp8jax.plan import make_plan
from fp8jax.training.calibration import calibrate
from fp8jax.training.step import TrainProgram

# No two weights have the same shape, and no weight that of an activation.
TINY = {"layers": 2, "width": 48, "ffn_width": 80, "heads": 4, "kv_heads": 2, "head_dim": 16}


def make(fp8=None, training=None, **model):
    return config_lib.from_dict(
        {
            "model": TINY | model,
            "data": {"sequence_length": 32},
            "fp8": fp8 or {},
            "training": {"batch_size": 8} | (training or {}),
            "optimizer": {"warmup_steps": 0},
        }
    )


def recipes(fp8, *, emulated=True):
    return model_recipes(make(fp8), gated=False, emulated=emulated)


def test_scalings_by_role_and_layer():
    found = recipes(
        {
            "scaling": "static",
            "overrides": "mlp_down@1=blockwise,attention_values=delayed,qkv@0-0=bf16",
        }
    )
    assert [layer["mlp_down"].scaling for layer in found.blocks] == ["static", "blockwise"]
    assert [layer["qkv"].scaling for layer in found.blocks] == ["bf16", "static"]
    assert {layer["attention_values"].scaling for layer in found.blocks} == {"delayed"}
    assert len(found.segments()) == 2


def test_the_head_is_overridden_too():
    found = model_recipes(
        make({"head": True, "overrides": "lm_head=current"}, tied_embeddings=False),
        gated=False,
        emulated=True,
    )
    assert found.head.scaling == "current" and {layer["qkv"].scaling for layer in found.blocks} == {
        "delayed"
    }
    assert recipes({"overrides": "lm_head=bf16"}).head.scaling == "bf16"
    evaluated = model_recipes(
        make({"head": True}, tied_embeddings=False), gated=False, emulated=True, recipe="bf16"
    )
    assert evaluated.head.scaling == "bf16" and not any(
        recipe.fp8 for layer in evaluated.blocks for recipe in layer.values()
    )


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ("lm_head=current", "lm_head=current needs config.fp8.head=True: the head is in BF16"),
        ("lm_head@1=bf16", "lm_head has no layers; write lm_head=bf16"),
        ("mlp_gate=bf16", "mlp_gate: the FFN has no gate"),
    ],
)
def test_overrides_that_would_change_nothing_are_refused(overrides, fault):
    with pytest.raises(ConfigError) as caught:
        recipes({"overrides": overrides})
    assert f"config.fp8.overrides: {fault}" in str(caught.value)


def test_static_scales_come_from_the_config():
    """Weights: sigma0; gradients: 1 / tokens a step; or as set."""
    recipe = recipes({"scaling": "static"}).blocks[0]["qkv"]
    assert [float(recipe.static_scale(name)) for name in ("x", "w", "g")] == [1, 2.0**-5, 2.0**-8]
    recipe = recipes(
        {"scaling": "static", "static_weight_scale": 0.25, "static_gradient_scale": 2.0**-14}
    ).blocks[0]["qkv"]
    assert [float(recipe.static_scale(name)) for name in ("x", "w", "ds")] == [1, 0.25, 2.0**-14]
    with pytest.raises(ConfigError, match=r"config.fp8.static_weight_scale: 0.0 is not above 0.0"):
        make({"static_weight_scale": 0.0})


@pytest.mark.parametrize(
    ("choice", "precise"),
    [("fprop", [False, True, True]), ("all", [False] * 3), ("none", [True] * 3)],
)
def test_fast_accumulation(choice, precise):
    recipe = recipes({"fast_accumulation": choice}).blocks[0]["qkv"]
    assert [recipe.precise(gemm_pass) for gemm_pass in ("fprop", "dgrad", "wgrad")] == precise


@pytest.mark.parametrize(
    ("fp8", "backend"),
    [
        ({"recipe": "bf16"}, "cudnn"),
        ({"recipe": "fp8"}, "cudnn"),
        ({"recipe": "fp8_dpa"}, "composed"),
        ({"recipe": "fp8", "overrides": "attention_scores@1=delayed"}, "composed"),
        ({"recipe": "fp8", "attention_backend": "emulated"}, "emulated"),
    ],
)
def test_attention_is_cudnns_where_it_may_be_and_none_of_it_is_in_fp8(fp8, backend):
    config = make(fp8)
    assert (
        model_recipes(config, gated=False, emulated=True, cudnn=True).attention_backend == backend
    )
    assert model_recipes(config, gated=False, emulated=True).attention_backend != "cudnn"


@pytest.mark.parametrize(
    ("overrides", "backends"),
    [
        ("attention_scores@1=bf16", ["pallas", "composed"]),
        ("attention_scores=bf16", ["composed"] * 2),
        ("attention_scores@0=bf16,attention_values@0=bf16", ["cudnn", "pallas"]),
        ("qkv=bf16", ["pallas"] * 2),
        ("attention_scores=bf16,attention_values=bf16", ["cudnn"] * 2),
    ],
)
@pytest.mark.parametrize("asked", ["auto", "pallas"])
def test_attention_that_leaves_fp8_takes_the_best_backend_for_bf16(asked, overrides, backends):
    """Layer by layer: what stays in FP8 keeps its kernel."""
    config = make(
        {"recipe": "fp8_dpa", "attention_backend": asked, "overrides": overrides}, head_dim=64
    )
    found = model_recipes(config, gated=False, emulated=False, fused=True, cudnn=True)
    assert [found.backend_of(layer) for layer in range(2)] == backends


def test_a_kernel_for_fp8_alone_is_refused_where_no_attention_is_in_fp8():
    with pytest.raises(
        ConfigError, match=r"attention_backend: pallas has no role in BF16, .*recipe=fp8_dpa"
    ):
        model_recipes(
            make({"recipe": "fp8", "attention_backend": "pallas"}, head_dim=64),
            gated=False,
            emulated=False,
            fused=True,
        )


def test_cudnn_is_refused_for_fp8_and_without_a_gpu():
    with pytest.raises(
        ConfigError, match="config.fp8.attention_backend: attention_scores: cudnn is for BF16 alone"
    ):
        model_recipes(
            make({"recipe": "fp8_dpa", "attention_backend": "cudnn"}),
            gated=False,
            emulated=False,
            cudnn=True,
        )
    with pytest.raises(
        ConfigError, match="config.fp8.attention_backend: cudnn needs a GPU at hand"
    ):
        mesh_lib.has_cudnn_attention(
            make({"recipe": "bf16", "attention_backend": "cudnn"}), jax.devices()[0]
        )


def test_blockwise_is_refused_where_it_cannot_run():
    """In one line that says what to set: on devices with FP8 units, and in attention."""
    with pytest.raises(
        ConfigError,
        match=r"config.fp8.scaling: blockwise has no FP8 kernel on this device; .*config.fp8.backend=emulated",
    ):
        recipes({"recipe": "fp8", "scaling": "blockwise"}, emulated=False)
    with pytest.raises(ConfigError, match="blockwise has no FP8 kernel"):
        recipes({"recipe": "fp8", "overrides": "qkv=blockwise"}, emulated=False)
    with pytest.raises(
        ConfigError,
        match=r"config.fp8.scaling: attention_scores has no blockwise .*overrides='attention_scores=current,",
    ):
        recipes({"recipe": "fp8_dpa", "scaling": "blockwise"})
    with pytest.raises(ConfigError, match="attention_values has no blockwise scaling"):
        recipes({"recipe": "fp8_dpa", "overrides": "attention_values@1=blockwise"})
    mixed = recipes(
        {
            "recipe": "fp8_dpa",
            "scaling": "blockwise",
            "overrides": "attention_scores=current,attention_values=static",
        }
    )
    assert mixed.blocks[0]["qkv"].scaling == "blockwise"
    model_recipes(
        make({"scaling": "blockwise"}), gated=False, emulated=False, recipe="bf16"
    )  # evaluation


def batch_for(program):
    tokens = np.random.default_rng(0).integers(0, 120, (8, 33)).astype(np.int32)
    return program.put(
        {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((8, 32), np.float32)}
    )


def program_of(config):
    return TrainProgram(make_plan(config, jax.devices()[:1], vocab_size=128))


def test_a_step_reports_the_health_of_every_operand():
    """Of a model with a role that leaves FP8, over two microbatches: names, and numbers that a healthy model has."""
    config = make(
        {"scaling": "current", "head": True, "overrides": "mlp_up@1=bf16"},
        {"microbatches": 2, "steps": 10},
        tied_embeddings=False,
    )
    program = program_of(config)
    _, metrics, taps = program.step(program.init(), batch_for(program), collect=True)
    assert int(metrics["bad_step"]) == 0
    linear = ("qkv", "attention_out", "mlp_up", "mlp_down", "lm_head")
    operands = {f"{role}.{name}" for role in linear for name in ("x", "w", "g")} | {
        "attention_scores.q",
        "attention_scores.k",
        "attention_scores.ds",
        "attention_values.v",
        "attention_values.do",
    }
    assert {name for name in taps if "." in name} == operands
    logged = outliers.flatten(jax.tree.map(np.asarray, taps))
    for name in operands:
        layers = 1 if name.startswith("lm_head") else 2
        for layer in range(layers):
            found = {
                key: logged.get(f"{key}/{name}_layer{layer:03d}")
                for key in (*statistics.HEALTH[:6], "snr")
            }
            if name.startswith("mlp_up") and layer == 1:
                assert found.pop("amax") > 0 and set(found.values()) == {None}
                continue
            assert found["amax"] > 0 and math.log2(found["scale"]).is_integer()
            assert (
                found["overflow"] == 0 and found["underflow"] < 0.1
            )  # the scale is that of the tensor itself
            assert (15 if name.split(".")[1] in ("g", "ds", "do") else 20) < found["snr"] < 60
    assert logged["fp8/saturated_fraction"] == 0


@functools.cache
def loss_after_ten_steps(**fp8):
    """On one batch."""
    program = program_of(make(fp8, {"steps": 10}))
    batch = batch_for(program)
    state = calibrate(program, program.init(), batch)
    for _ in range(10):
        state, metrics, _ = program.step(state, batch)
        assert int(metrics["bad_step"]) == 0
    return float(metrics["loss"])


@pytest.mark.parametrize(
    "fp8",
    [
        {"scaling": "static"},
        {"scaling": "blockwise", "overrides": "attention_scores=static,attention_values=current"},
        {
            "scaling": "static",
            "overrides": "mlp_up=delayed,qkv@1=current,attention_scores@0=bf16,mlp_down=blockwise",
        },
    ],
    ids=["static", "blockwise", "mixed"],
)
def test_every_scaling_trains(fp8):
    """The loss falls as in bf16, within 3%."""
    plain = loss_after_ten_steps(recipe="bf16")
    assert plain < 4.6  # from log(128) = 4.85
    assert abs(loss_after_ten_steps(**fp8) - plain) < 0.03 * plain


def casts(jaxpr, times=1, kinds=("convert_element_type", "bitcast_convert_type")):
    """Dtype, shape and executions of every cast to float8 in a step."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in kinds and str(eqn.outvars[0].aval.dtype).startswith("float8"):
            yield str(eqn.outvars[0].aval.dtype), eqn.outvars[0].aval.shape, times
        inner = times * eqn.params["length"] if eqn.primitive.name == "scan" else times
        for part in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield from casts(part, inner, kinds)


def weight_casts(closed_jaxpr, matrices):
    """Casts to float8 of arrays that end in a weight's shape: role → how many layers' weights are cast in one step."""
    counts = dict.fromkeys(matrices, 0)
    for _, shape, times in casts(closed_jaxpr.jaxpr):
        for role, matrix in matrices.items():
            counts[role] += times * math.prod(shape[:-2]) * (shape[-2:] == matrix)
    return counts


def test_rematerialisation_quantises_nothing_twice():
    """`save_fp8` casts just what a step without rematerialisation casts; `full` casts every forward operand again."""
    found = {}
    for remat in ("none", "save_fp8", "full"):
        # Native: there casts are conversions, and bytes that become FP8 again are not.
        program = program_of(make({"backend": "native"}, {"remat": remat, "steps": 1}))
        jaxpr = (
            program.jitted_step().trace(program.abstract_state, program.abstract_batch).jaxpr.jaxpr
        )
        found[remat] = Counter()
        for dtype, shape, times in casts(jaxpr, kinds=("convert_element_type",)):
            found[remat][dtype, shape] += times
    assert found["save_fp8"] == found["none"] and sum(found["none"].values()) > 20
    again = found["full"] - found["none"]
    assert (
        again["float8_e4m3fn", (8, 32, 48)] == 2 * 2 and again["float8_e4m3fn", (8, 32, 120)] == 2
    )  # x of qkv and mlp_up; of mlp_down
    assert all(dtype == "float8_e4m3fn" for dtype, _ in again)


@pytest.mark.parametrize(
    ("recipe", "remat", "roles"),
    [
        ("fp8_dpa", "none", set()),
        ("fp8_dpa", "save_branches", {"qkv", "mlp_up"}),
        ("fp8_dpa", "save_fp8", {"qkv", "attention_out", "mlp_up", "mlp_down"}),
        ("bf16", "save_branches", {"qkv", "mlp_up"}),
    ],
)
def test_what_is_kept_decides_which_gemms_are_repeated(recipe, remat, roles):
    """In the compiled step: `save_branches` repeats only the GEMMs into the branches. Unrolled: tests/audit/test_gate.py."""
    config = make({"recipe": recipe}, {"remat": remat, "steps": 1})
    text = program_of(config).compiled_step().as_text()
    found = {
        role
        for role in LINEAR_ROLES
        for line in text.splitlines()
        if " dot(" in line and f"gemm[{role}.fprop]" in line and "rematted_computation" in line
    }
    assert found == roles


@pytest.mark.parametrize("backend", ["native", "emulated"])
@pytest.mark.parametrize(
    ("microbatches", "remat"), [(1, "none"), (4, "none"), (4, "full"), (4, "save_fp8")]
)
def test_weights_are_quantised_once_a_step(microbatches, remat, backend):
    """However many microbatches, and whatever the backward pass recomputes: each of two layers' weights is cast once."""
    config = make(
        {"backend": backend, "head": True},
        {"microbatches": microbatches, "remat": remat, "steps": 1},
        tied_embeddings=False,
    )
    program = program_of(config)
    traced = program.jitted_step().trace(program.abstract_state, program.abstract_batch)
    matrices = {
        "qkv": (48, 128),
        "attention_out": (64, 48),
        "mlp_up": (48, 120),
        "mlp_down": (120, 48),
    }
    assert weight_casts(traced.jaxpr, matrices) == dict.fromkeys(matrices, 2)
    assert weight_casts(traced.jaxpr, {"lm_head": (128, 48)}) == {"lm_head": 1}


def test_a_weight_quantised_in_the_layer_would_be_counted(monkeypatch):
    """The count above sees what it is meant to see: quantising inside of the microbatch loop gives one cast a microbatch."""
    monkeypatch.setattr(
        layers, "dot_general", lambda *args, quantised_w, **options: dot_general(*args, **options)
    )
    program = program_of(make({}, {"microbatches": 4, "steps": 1}))
    traced = program.jitted_step().trace(program.abstract_state, program.abstract_batch)
    assert weight_casts(traced.jaxpr, {"mlp_up": (48, 120)})["mlp_up"] == 2 + 4 * 2


@pytest.mark.slow
def test_tensors_that_wait_on_the_host_come_back_as_they_were():
    """`offload_fp8` and `save_fp8`: the same step to the bit."""
    found = []
    for remat in ("save_fp8", "offload_fp8"):
        program = program_of(make({}, {"remat": remat, "steps": 1}))
        batch = batch_for(program)
        state, metrics, _ = program.step(calibrate(program, program.init(), batch), batch)
        found.append(jax.tree.map(np.asarray, (state.params, metrics)))
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(a, b)
