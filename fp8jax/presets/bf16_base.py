"""FOG-max in BF16: what the FP8 run is compared with."""

import ml_collections

from fp8jax.presets import common


def get_config(size: str | None = None) -> ml_collections.ConfigDict:
    """size: tiny, 390m, 1p5b, 8b or 70b."""
    return common.make(size, architecture="fog_max", recipe="bf16")
