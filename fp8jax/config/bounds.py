"""Check the numbers of a configuration: each against its field's bounds, and several together.

outside(200, {"at_most": 8})     # "above 8"; None for a number within its bounds
problem(config)                  # "config.fp8.static_weight_scale: 1e-09 is below 0.0003125, ..." or None
"""

import operator
from collections.abc import Mapping
from typing import Any

# Sizes from here on are mistakes, or a damaged file's, and no memory is allocated for them.
LARGE = (1 << 24) + 1
# The largest int32, and the seconds or minutes that timers can wait.
COUNT, YEARS = 2**31 - 1, 10**8
_WORDS = {
    "at_least": (operator.ge, "below"),
    "above": (operator.gt, "not above"),
    "below": (operator.lt, "not below"),
    "at_most": (operator.le, "above"),
}
_STEP = 2**31 - 1  # tokens per step, counted in int32
# How far below and above a tensor's usual size a fixed scale may be before e4m3 and e5m2 clip or
# flush to zero.
_AROUND = {"static_weight_scale": (2.0**-7, 2.0**6), "static_gradient_scale": (2.0**-14, 2.0**6)}
# The least value of a number that switches something off at 0: closer to 0 it would switch off
# training.
_OR_ZERO = {("optimizer", "clip_norm"): 1e-6, ("training", "skip_spikes"): 1.0}


def outside(value: Any, metadata: Mapping[str, Any]) -> str | None:
    """Describe how a value breaks a bound of its field; None if it does not."""
    for key, (holds, word) in _WORDS.items():
        bound = metadata[key]
        if bound is not None and not holds(value, bound):
            return f"{word} {bound}"
    return None


def problem(config: Any) -> str | None:
    """Describe field, value and bound of the first number that cannot work; None if all can."""
    for (section, name), least in _OR_ZERO.items():
        if 0 < getattr(getattr(config, section), name) < least:
            return (
                f"config.{section}.{name}: {getattr(getattr(config, section), name)} is "
                f"below {least} and not 0, which switches it off"
            )
    tokens, optimizer = config.training.batch_size * config.data.sequence_length, config.optimizer
    if tokens > _STEP:
        return (
            f"config.training.batch_size: {config.training.batch_size} sequences of "
            f"{config.data.sequence_length} are above {_STEP} tokens "
            "a step"
        )
    if optimizer.weight_decay * optimizer.learning_rate >= 1:
        return (
            f"config.optimizer.weight_decay: {optimizer.weight_decay} is not below "
            f"{1 / optimizer.learning_rate:g} at learning_rate="
            f"{optimizer.learning_rate}: "
            "a step would take more of a weight than there is"
        )
    return (
        _static_scales(config, tokens)
        if "static" in config.fp8.scaling + config.fp8.overrides
        else None
    )


def _static_scales(config: Any, tokens: int) -> str | None:
    """Describe a fixed scale that flushes its tensors to zero, or clips them; None if there is
    none.
    """
    fp8, usual = (
        config.fp8,
        {"static_weight_scale": config.model.init_std or 1.0, "static_gradient_scale": 1 / tokens},
    )
    for name, size in usual.items():
        value = getattr(fp8, name) or size
        least, most = _AROUND[name]
        low, high = size * least, size * most / 2**fp8.margin
        if not low <= value <= high:
            return (
                f"config.fp8.{name}: {value} is {'below' if value < low else 'above'} "
                f"{low if value < low else high:g}, "
                f"for tensors of size {size:g} and margin={fp8.margin}"
            )
    return None
