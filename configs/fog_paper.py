"""FOG-max as the paper and its released scripts set it, where our defaults differ (docs/paper.md says how, and what it changes)."""

from fp8jax.presets.fog_paper import get_config

__all__ = ["get_config"]
