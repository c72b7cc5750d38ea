"""FOG-flash, the fastest variant: tanh on queries and keys, GeLU."""

from fp8jax.presets.fog_flash import get_config

__all__ = ["get_config"]
