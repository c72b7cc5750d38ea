"""Reads a program: its GEMMs and their dtypes, its collectives, its memory and the traffic beside the GEMMs.

gemms = program.traced_gemms(traced.jaxpr)                    # before compilation, the same on every device
print(program.fp8_share(gemms, {"qkv", "mlp_up", ...}))
"""

from fp8jax.audit.gemms import Gemm, fp8_share, summary
from fp8jax.audit.jaxpr import traced_gemms

__all__ = ["Gemm", "fp8_share", "summary", "traced_gemms"]
