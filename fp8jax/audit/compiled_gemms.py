"""List the GEMMs of a compiled program: what the compiler made of each dot, with which operands and
kernel.

    gemms = compiled_gemms(hlo.parse(compiled.as_text()))

Shapes and FLOPs are those of one device. The module knows cuBLASLt and cuBLAS calls, cuDNN
attention, dots inside fusions (Triton, CPU) and the convolutions into which XLA turns dots for a
TPU. A Pallas kernel is listed with the GEMMs and FLOPs that its named scope gives (gemms.py), or
with 0 FLOPs.
"""

import math
from typing import Any

from fp8jax.audit import hlo
from fp8jax.audit.gemms import Gemm, is_fp8, read_fused, read_scope
from fp8jax.audit.hlo import Executed, Instruction, Module
from fp8jax.audit.jaxpr import gemm_shape

_KINDS = {"bfloat16": "BF16", "float32": "F32"}
_FP8, _PALLAS = "FP8", ("__gpu$xla.gpu.triton", "tpu_custom_call", "mosaic_gpu", "mosaic_gpu_v2")
Shape = tuple[int, int, int, int]


def compiled_gemms(module: Module) -> list[Gemm]:
    """Return every GEMM that the program runs, in program order; those in loops once, with `count`
    executions.
    """
    found = []
    for run in hlo.executed(module):
        inside = [
            inner
            for inner in hlo.nested(module, run)
            if inner.instruction.opcode in ("dot", "convolution")
        ]
        found += [_dot(inner, run.instruction) for inner in inside]
        if run.instruction.opcode in ("dot", "convolution"):
            found.append(_dot(run, run.instruction))
        elif run.instruction.opcode == "custom-call":
            found += _library_call(run)
    return found


def is_gemm(module: Module, run: Executed) -> bool:
    """Return whether an executed instruction is, or holds, a GEMM."""
    if run.instruction.opcode == "custom-call":
        return bool(_library_call(run))
    return any(
        r.instruction.opcode in ("dot", "convolution") for r in (run, *hlo.nested(module, run))
    )


def _library_call(run: Executed) -> list[Gemm]:
    target = run.instruction.target
    if target.startswith("__cublas$") or target.startswith("__onednn$matmul"):
        return [_cublas(run)]
    if target.startswith("__cudnn$fmha"):
        return [_fused_attention(run)]
    if target in _PALLAS and "fp8jax." in run.instruction.scope:
        return _pallas(run)
    return []


def _cublas(run: Executed) -> Gemm:
    config = run.instruction.backend_config().get("gemm_backend_config", {})
    dims = config.get("dot_dimension_numbers", {})
    lhs, rhs = (operand.shapes[0] for operand in run.operands()[:2])
    contract, batch = (
        [[int(i) for i in dims.get(f"{side}_{kind}_dimensions", [])] for side in ("lhs", "rhs")]
        for kind in ("contracting", "batch")
    )
    library = "cuBLASLt" if "$lt$" in run.instruction.target else "cuBLAS"
    return _gemm(run, gemm_shape(lhs.dims, rhs.dims, (contract, batch)), library)


def _dot(run: Executed, kernel: Instruction) -> Gemm:
    """Return the GEMM of a dot, alone or inside the fusion `kernel`."""
    lhs, rhs = (operand.shapes[0] for operand in run.operands()[:2])
    if run.instruction.opcode == "convolution":
        return _gemm(run, _convolution_shape(run), "MXU")
    contract, batch = (
        [run.instruction.dimensions(f"{side}_{kind}_dims") for side in ("lhs", "rhs")]
        for kind in ("contracting", "batch")
    )
    name = "Triton" if "triton" in kernel.attributes else "dot"
    return _gemm(run, gemm_shape(lhs.dims, rhs.dims, (contract, batch)), name)


def _convolution_shape(run: Executed) -> Shape:
    """Return (batch, m, n, k) of a matrix product written as a convolution.

    Each operand and the result has the batch dimensions and two of m, n, k, so their sizes
    determine all but the batch, which is a window over a dilated operand that meets each element
    once, or groups.
    """
    lhs, rhs = (operand.shapes[0].size for operand in run.operands()[:2])
    out, attributes = run.instruction.shapes[0].size, run.instruction.attributes
    window = {key: sizes.split("x") for key, sizes in hlo.window(attributes).items()}
    sizes, ones = window.get("size", []), ["1"] * len(window.get("size", []))
    dilations = zip(
        sizes, window.get("lhs_dilate", ones), window.get("rhs_dilate", ones), strict=True
    )
    batch = math.prod(
        int(size) for size, left, right in dilations if size != "1" and size in (left, right)
    )
    batch *= hlo.number(attributes, "feature_group_count") * hlo.number(
        attributes, "batch_group_count"
    )
    k = math.isqrt(lhs * rhs // max(out * batch, 1))
    return batch, lhs // max(batch * k, 1), rhs // max(batch * k, 1), k


def _fused_attention(run: Executed) -> Gemm:
    """Return the GEMM of attention by cuDNN, over the whole square: two GEMMs forward, five
    backward.
    """
    config = run.instruction.backend_config().get("cudnn_fmha_backend_config", {})
    scores = [
        int(n) for n in config.get("intermediate_tensor_shape", {}).get("dimensions", [])
    ] or [0, 0, 0, 0]
    batch, m, n = scores[0] * scores[1], scores[2], scores[3]
    head_dim = run.operands()[0].shapes[0].size // max(batch * m, 1)
    return _gemm(
        run, (batch, m, n, head_dim), "cuDNN", 10 if "Backward" in run.instruction.target else 4
    )


def _pallas(run: Executed) -> list[Gemm]:
    """Return the GEMMs that a fused kernel's scope names; its first operand is a vector of factors."""
    dtypes = [operand.shapes[0].dtype for operand in run.operands()]
    return [
        _kernel(run, dtypes[1], dtypes[2], **given) for given in read_fused(run.instruction.scope)
    ] or [_kernel(run, dtypes[0], dtypes[1], flops=0, **read_scope(run.instruction.scope))]


def _kernel(run: Executed, lhs: str, rhs: str, **given: Any) -> Gemm:
    kind = _FP8 if is_fp8(lhs) and is_fp8(rhs) else _KINDS.get(lhs, lhs)
    return Gemm(
        shape=(0, 0, 0, 0),
        lhs_dtype=lhs,
        rhs_dtype=rhs,
        out_dtype=run.instruction.shapes[0].dtype,
        kernel=f"Pallas {kind}",
        count=run.count,
        count_known=run.known,
        **given,
    )


def _gemm(run: Executed, shape: Shape, library: str, factor: int = 2) -> Gemm:
    lhs, rhs = (operand.shapes[0].dtype for operand in run.operands()[:2])
    kind = _FP8 if is_fp8(lhs) and is_fp8(rhs) else _KINDS.get(lhs, lhs)
    return Gemm(
        shape=shape,
        lhs_dtype=lhs,
        rhs_dtype=rhs,
        out_dtype=run.instruction.shapes[0].dtype,
        kernel=f"{library} {kind}",
        flops=factor * math.prod(shape),
        count=run.count,
        count_known=run.known,
        **read_scope(run.instruction.scope),
    )
