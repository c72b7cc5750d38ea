"""FOG-max with the settings of the paper and its released scripts; docs/paper.md lists how our
defaults differ.
"""

from typing import Any

import ml_collections

from fp8jax.presets import common


def get_config(size: str | None = None) -> ml_collections.ConfigDict:
    """Return the configuration of a size: tiny, 390m, 1p5b, 8b or 70b."""
    # Any: by its own types a field of a ConfigDict may always be None.
    config: Any = common.make(size, architecture="fog_max", recipe="fp8_dpa")
    config.fp8.update(power_of_two=False, weight_scaling="delayed")
    config.optimizer.update(
        gradient_dtype="bfloat16",
        master_dtype="float16",
        first_moment="float16",
        second_moment="float16",
    )
    config.model.rope_scaling_factor = 8.0
    return config
