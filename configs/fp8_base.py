"""The main run: FOG-max with every block GEMM in FP8, attention included."""

from fp8jax.presets.fp8_base import get_config

__all__ = ["get_config"]
