"""The configuration of a run, or of a converted model, with the fields that the command line
changes.
"""

from fp8jax.presets.from_run import get_config

__all__ = ["get_config"]
