"""Llama 3 with Smooth-SwiGLU (Fishman et al. 2024), a baseline."""

from fp8jax.presets.llama3_smooth import get_config

__all__ = ["get_config"]
