"""The outlier-protected block of He et al. 2024, a baseline."""

from fp8jax.presets.op import get_config

__all__ = ["get_config"]
