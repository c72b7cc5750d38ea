"""Llama 3, a baseline."""

from fp8jax.presets.llama3 import get_config

__all__ = ["get_config"]
