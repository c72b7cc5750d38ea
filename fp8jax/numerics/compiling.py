"""Options to compile programs with, so that every rounding that JAX asks for is made and FP8 GEMMs
stay FP8.
"""

# Triton GEMMs lose FP8 on patterns that cuBLASLt takes, and write transposes separately (measured
# on compiled programs). Excess precision leaves out roundings to bfloat16 and to FP8 between
# fusions, and then moves float32 through memory in their place.
_EVERYWHERE = {"xla_gpu_enable_triton_gemm": False, "xla_allow_excess_precision": False}
# XLA's CPU compiler gives reductions, with their inputs' computation, to a library that keeps more
# digits than bfloat16 has (jax 0.10.2, seen in the backward pass of QK norms), on one device and
# not on eight. GEMMs may stay there: their inputs are rounded before.
_ON_CPU = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}


def compiler_options(platform: str) -> dict[str, str | bool]:
    """Return the options for programs that train or evaluate, on devices of this
    `jax.Device.platform`.
    """
    return _EVERYWHERE | (_ON_CPU if platform == "cpu" else {})
