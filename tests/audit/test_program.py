"""Reading a compiled training step on devices that are there: memory against what the state really holds, FLOPs, names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.audit import program, targets
from fp8jax.audit.gemms import Gemm
from fp8jax.cli.audit_step import audit
from fp8jax.plan import make_plan
from fp8jax.training.step import TrainProgram

SMALL = dict(
    model__layers=3,
    model__width=64,
    model__heads=4,
    model__kv_heads=2,
    model__ffn_width=64,
    data__sequence_length=256,
    training__batch_size=8,
)


def test_memory_and_flops_of_a_compiled_step(make_config):
    """Arguments are what every device holds; loops are multiplied out and shards divided, and nothing is computed twice."""
    config = make_config(
        "tiny", **SMALL, training__microbatches=2, mesh__data=2, mesh__fsdp=2, mesh__tensor=2
    )
    step = TrainProgram(make_plan(config))
    reading = program.read(step.compiled_step(), step.mesh)
    traced = program.traced_gemms(
        step.jitted_step().trace(step.abstract_state, step.abstract_batch).jaxpr
    )
    assert all(gemm.count_known for gemm in reading.gemms)
    assert 8 * sum(gemm.total_flops for gemm in reading.gemms) == sum(
        gemm.total_flops for gemm in traced
    )
    check_arguments(step, reading.memory)


def check_arguments(step, memory):
    state = step.init()
    batch = step.put(
        {name: np.zeros((8, 256), leaf.dtype) for name, leaf in step.abstract_batch.items()}
    )
    held = {
        "params": state.params,
        "optimizer": state.opt_state,
        "scaling": state.scaling,
        "batch": batch,
    }

    def on(device, tree):
        shards = [shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards]
        return sum(shard.data.nbytes for shard in shards if shard.device == device)

    found = dict(memory.arguments)
    rest = found.pop("counters")
    for device in jax.devices():
        assert found == {name: on(device, tree) for name, tree in held.items()}
    assert sum(found.values()) + rest == sum(on(jax.devices()[0], tree) for tree in (state, batch))
    # The step may take some arguments only by shape; what it is given is what the compiler planned for, up to alignment.
    assert memory.argument_bytes == pytest.approx(
        sum(found.values()) + rest, abs=64 * len(jax.tree.leaves(state))
    )


def test_flops_equal_the_closed_formula(make_config):
    config = make_config("tiny", **SMALL, training__remat="save_fp8", mesh__fsdp=8)
    found = audit(config, targets.resolve("local"))
    flops = found["estimate"]["model_flops"]
    # Written out once more: 6 a weight and token; attention 12 a pair of a query and a key that it sees, a layer, an inner feature.
    weights, tokens = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 64 * 96, 8 * 256
    assert flops["closed_formula_linear"] == 6 * 3 * weights * tokens
    assert flops["closed_formula_attention"] == 12 * 3 * 64 * 8 * (256 * 257 // 2)
    assert flops["closed_formula_head"] == 6 * 64 * 384 * tokens
    assert flops["other"] == 0
    # Composed attention takes chunks of 256 queries: at 256 tokens the whole square.
    assert (
        flops["masked_attention"] == 12 * 3 * 64 * 8 * 256 * 256 - flops["closed_formula_attention"]
    )
    assert flops["repeated"] >= 2 * 3 * 64 * 8 * 256 * 256  # the scores
    assert flops["counted"] == sum(
        flops[name] for name in ("closed_formula", "repeated", "masked_attention", "other")
    )
    assert not found["target"]["float64"] and found["target"]["fp8_share_asked"] == 1.0


def gemm(role, name, lhs, kernel="cuBLASLt"):
    return Gemm(role, name, (1, 8, 8, 8), lhs, "float8_e4m3fn", "bfloat16", kernel, 1024, 1)


def test_fallbacks_name_the_gemm():
    asked = [
        gemm("qkv", "fprop", "float8_e4m3fn"),
        gemm("qkv", "dgrad", "float8_e5m2"),
        gemm("mlp_up", "wgrad", "float8_e4m3fn"),
        gemm("lm_head", "fprop", "bfloat16"),
    ]
    found = [
        gemm("qkv", "fprop", "float8_e4m3fn"),
        gemm("qkv", "dgrad", "bfloat16", "cuBLASLt BF16"),
        gemm("lm_head", "fprop", "bfloat16"),
    ]
    assert program.fallbacks(asked, found) == [
        "mlp_up.wgrad: no GEMM of this name in the compiled program",
        "qkv.dgrad: bfloat16 x float8_e4m3fn, cuBLASLt BF16",
    ]
    assert program.fallbacks(asked, asked) == []


def test_origins_go_through_a_scan_s_constants_carry_and_slices():
    """Whichever JAX numbers them: w8 is a constant, x8 a carry, xs are slices."""

    def run(w8, x8, xs, total):
        def body(carry, x):
            y = jax.lax.dot_general(
                x.astype(jnp.bfloat16), w8.astype(jnp.bfloat16), (((1,), (0,)), ((), ()))
            )
            z = jax.lax.dot_general(
                carry[1], w8, (((1,), (0,)), ((), ())), preferred_element_type=jnp.bfloat16
            )
            return (carry[0] + y, carry[1]), (y, z)

        return jax.lax.scan(body, (total, x8), xs)

    e4m3 = jnp.float8_e4m3fn
    found = program.traced_gemms(
        jax.make_jaxpr(run)(
            *(
                jnp.ones(shape, kind)
                for shape, kind in (
                    ((8, 8), e4m3),
                    ((8, 8), e4m3),
                    ((5, 8, 8), e4m3),
                    ((8, 8), jnp.bfloat16),
                )
            )
        )
    )
    assert [(gemm.lhs_dtype, gemm.rhs_dtype, gemm.kernel, gemm.count) for gemm in found] == [
        ("float8_e4m3fn", "float8_e4m3fn", "dot (FP8 emulated)", 5),
        ("float8_e4m3fn", "float8_e4m3fn", "dot", 5),
    ]


def test_largest_arrays_are_results():
    """What goes on beside other work is written once, by its end; its start names the operands, too."""
    text = """HloModule m

ENTRY %main (a: f32[100]) -> f32[10] {
  %a = f32[100]{0} parameter(0)
  %s = ((f32[100]{0}), f32[10]{0}, u32[]) fusion-start(%a), kind=kLoop, calls=%some
  %d = f32[10]{0} fusion-done(%s)
  ROOT %c = f32[10]{0} copy(%d), metadata={op_name="jit(step)/loss/mul"}
}
"""
    assert program.largest_arrays(text) == [
        {"dtype": "float32", "dims": [10], "bytes": 40, "writers": 2, "where": ""}
    ]
