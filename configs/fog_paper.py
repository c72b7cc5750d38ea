"""FOG-max with the settings of the paper and its released scripts; docs/paper.md lists how our
defaults differ.
"""

from fp8jax.presets.fog_paper import get_config

__all__ = ["get_config"]
