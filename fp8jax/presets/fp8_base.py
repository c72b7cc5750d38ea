"""The main run: FOG-max with every block GEMM in FP8, attention included."""

import ml_collections

from fp8jax.presets import common


def get_config(size: str | None = None) -> ml_collections.ConfigDict:
    """Return the configuration of a size: tiny, 390m, 1p5b, 8b or 70b."""
    return common.make(size, architecture="fog_max", recipe="fp8_dpa")
