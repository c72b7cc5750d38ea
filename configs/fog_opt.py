"""FOG-opt: frozen RMSNorm on queries and keys, GeLU."""

from fp8jax.presets.fog_opt import get_config

__all__ = ["get_config"]
