"""FOG-max in BF16, the reference of the FP8 run."""

from fp8jax.presets.bf16_base import get_config

__all__ = ["get_config"]
