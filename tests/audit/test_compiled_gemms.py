"""GEMMs of compiled programs, against shapes worked out by hand."""

import jax
import jax.numpy as jnp
import pytest

from fp8jax.audit import hlo
from fp8jax.audit.compiled_gemms import compiled_gemms


def entry(*lines):
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(f"HloModule m\n\nENTRY %main (a: f32[]) -> f32[] {{\n{body}\n}}\n")


def operands(lhs, rhs):
    return f"%a = {lhs} parameter(0)", f"%b = {rhs} parameter(1)"


def cublas(target, contract, *, batch=""):
    numbers = (
        f'"lhs_contracting_dimensions":["{contract[0]}"],"rhs_contracting_dimensions":["{contract[1]}"],'
        f'"lhs_batch_dimensions":[{batch}],"rhs_batch_dimensions":[{batch}]'
    )
    name = 'metadata={op_name="jit(step)/jvp()/fp8jax.gemm[mlp_up.fprop]/dot_general"}'
    return (
        f'custom-call(%a, %b), custom_call_target="{target}", {name}, '
        f'backend_config={{"gemm_backend_config":{{"beta":0,"dot_dimension_numbers":{{{numbers}}}}}}}'
    )


@pytest.mark.parametrize(
    ("target", "lhs", "rhs", "kernel", "fp8"),
    [
        (
            "__cublas$lt$matmul$f8",
            "f8e5m2[32,64]{1,0}",
            "f8e4m3fn[64,16]{1,0}",
            "cuBLASLt FP8",
            True,
        ),
        ("__cublas$lt$matmul", "bf16[32,64]{1,0}", "bf16[64,16]{1,0}", "cuBLASLt BF16", False),
        ("__cublas$gemm", "f32[32,64]{1,0}", "f32[64,16]{1,0}", "cuBLAS F32", False),
    ],
)
def test_library_calls(target, lhs, rhs, kernel, fp8):
    [gemm] = compiled_gemms(
        entry(
            *operands(lhs, rhs),
            f"ROOT %c = (bf16[32,16]{{1,0}}, s8[99]{{0}}) {cublas(target, (1, 0))}",
        )
    )
    assert (gemm.role, gemm.pass_name, gemm.repeated) == ("mlp_up", "fprop", False)
    assert gemm.shape == (1, 32, 16, 64) and gemm.flops == 2 * 32 * 16 * 64
    assert gemm.kernel == kernel and gemm.fp8 == fp8 and gemm.out_dtype == "bfloat16"


def test_a_batched_library_call():
    lines = operands("f8e4m3fn[5,32,64]{2,1,0}", "f8e4m3fn[5,16,64]{2,1,0}")
    call = cublas("__cublas$lt$matmul$f8", (2, 2), batch='"0"')
    [gemm] = compiled_gemms(entry(*lines, f"ROOT %c = (f32[5,32,16]{{2,1,0}}, s8[9]{{0}}) {call}"))
    assert gemm.shape == (5, 32, 16, 64)


@pytest.mark.parametrize(
    ("lhs", "rhs", "out", "attributes", "shape"),
    [
        (
            "f8e4m3fn[2,256,512]",
            "f8e4m3fn[512,384,1]",
            "bf16[2,256,384]",
            "window={size=1}, dim_labels=0bf_io0->0bf",
            (1, 512, 384, 512),
        ),
        (
            "bf16[4,256,2,128]",
            "bf16[4,64,1,128]",
            "f32[4,256,2,64]",
            "window={size=4x1 stride=3x1 lhs_dilate=4x1}, dim_labels=0b1f_0oi1->0b1f",
            (4, 512, 64, 128),
        ),
        (
            "bf16[2,256,512]",
            "bf16[2,256,384]",
            "bf16[512,384,1]",
            "window={size=2}, dim_labels=0fb_0io->bf0",
            (1, 512, 384, 512),
        ),
    ],
)
def test_a_tpu_writes_gemms_as_convolutions(lhs, rhs, out, attributes, shape):
    """The second has four batches as a dilated window; the third contracts a window of size 2, which is no batch."""
    lines = operands(lhs, rhs)
    [gemm] = compiled_gemms(entry(*lines, f"ROOT %c = {out} convolution(%a, %b), {attributes}"))
    assert gemm.shape == shape and gemm.kernel.startswith("MXU")


def test_an_fp8_flash_attention_of_cudnn():
    config = '{"cudnn_fmha_backend_config":{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["2","8","512","256"]}}}'
    lines = operands("f8e4m3fn[2,512,8,128]", "f8e4m3fn[2,256,8,128]")
    for target, flops in (("__cudnn$fmhaSoftmaxF8", 4), ("__cudnn$fmhaSoftmaxBackwardF8", 10)):
        call = f'custom-call(%a, %b), custom_call_target="{target}", backend_config={config}'
        [gemm] = compiled_gemms(entry(*lines, f"ROOT %c = (f8e4m3fn[2,512,8,128], f32[]) {call}"))
        assert gemm.flops == flops * 16 * 512 * 256 * 128 and gemm.kernel == "cuDNN FP8"


def test_loops_and_fusions_of_a_compiled_program():
    def layers(x, w):
        with jax.named_scope("fp8jax.gemm[qkv.fprop]"):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    shapes = (
        jax.ShapeDtypeStruct((64, 128), jnp.float32),
        jax.ShapeDtypeStruct((6, 128, 128), jnp.float32),
    )
    gemms = compiled_gemms(hlo.parse(jax.jit(layers).lower(*shapes).compile().as_text()))
    assert {gemm.role for gemm in gemms} == {"qkv"} and all(gemm.count_known for gemm in gemms)
    assert sum(gemm.total_flops for gemm in gemms) == 6 * 2 * 64 * 128 * 128
