"""Llama 3 with Smooth-SwiGLU (Fishman et al. 2024), a baseline."""

import ml_collections

from fp8jax.presets import common


def get_config(size: str | None = None) -> ml_collections.ConfigDict:
    """Return the configuration of a size: tiny, 390m, 1p5b, 8b or 70b."""
    return common.make(size, architecture="llama3_smooth", recipe="fp8_dpa")
