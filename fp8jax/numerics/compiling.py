"""How programs are compiled, so that every rounding that JAX asks for is made and FP8 GEMMs stay FP8."""

# Triton GEMMs lose FP8 on patterns that cuBLASLt takes, and write transposes apart (measured on compiled programs). Excess precision
# leaves out roundings to bfloat16 and to FP8 between fusions, and then moves float32 through memory in their place.
_EVERYWHERE = {"xla_gpu_enable_triton_gemm": False, "xla_allow_excess_precision": False}
# XLA's CPU compiler gives reductions, with what leads to them, to a library that keeps more digits than bfloat16 has (jax 0.10.2, seen in
# the backward pass of QK norms), on one device and not on eight. GEMMs may stay there: what goes into them is rounded before.
_ON_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}


def compiler_options(platform: str) -> dict[str, str | bool]:
    """What programs that train or evaluate are compiled with, on devices of this `jax.Device.platform`."""
    return _EVERYWHERE | (_ON_CPU if platform == "cpu" else {})
