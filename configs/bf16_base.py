"""FOG-max in BF16: what the FP8 run is compared with."""

from fp8jax.presets.bf16_base import get_config

__all__ = ["get_config"]
