"""OLMo 2, a baseline."""

from fp8jax.presets.olmo2 import get_config

__all__ = ["get_config"]
