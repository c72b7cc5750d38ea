"""Bounds of the numbers of a configuration: each by itself, as its field has them, and several together.

outside(200, {"at_most": 8})     # "above 8"; None for a number within its bounds
problem(config)                  # "config.fp8.static_weight_scale: 1e-09 is below 0.0003125, ..." or None
"""

import operator
from collections.abc import Mapping
from typing import Any

LARGE = (
    (1 << 24) + 1
)  # sizes from here on are mistakes, or a damaged file's, and no memory should be asked for them
COUNT, YEARS = (
    2**31 - 1,
    10**8,
)  # what int32 counts to; so many seconds, or minutes, which timers can wait
_WORDS = {
    "at_least": (operator.ge, "below"),
    "above": (operator.gt, "not above"),
    "below": (operator.lt, "not below"),
    "at_most": (operator.le, "above"),
}
_STEP = 2**31 - 1  # tokens a step, which int32 counts
# How far below and above a tensor's usual size a fixed scale may be, which e4m3 and e5m2 then clip or flush to zero.
_AROUND = {"static_weight_scale": (2.0**-7, 2.0**6), "static_gradient_scale": (2.0**-14, 2.0**6)}
# A number that switches something off at 0, or is at least this: closer to 0 it would switch off training.
_OR_ZERO = {("optimizer", "clip_norm"): 1e-6, ("training", "skip_spikes"): 1.0}


def outside(value: Any, metadata: Mapping[str, Any]) -> str | None:
    """How a value breaks one of the bounds of its field, if it does."""
    for key, (holds, word) in _WORDS.items():
        bound = metadata[key]
        if bound is not None and not holds(value, bound):
            return f"{word} {bound}"
    return None


def problem(config: Any) -> str | None:
    """Field, value and bound of the first that cannot work; None where all can."""
    for (section, name), least in _OR_ZERO.items():
        if 0 < getattr(getattr(config, section), name) < least:
            return f"config.{section}.{name}: {getattr(getattr(config, section), name)} is below {least} and not 0, which switches it off"
    tokens, optimizer = config.training.batch_size * config.data.sequence_length, config.optimizer
    if tokens > _STEP:
        return (
            f"config.training.batch_size: {config.training.batch_size} sequences of {config.data.sequence_length} are above {_STEP} tokens "
            "a step"
        )
    if optimizer.weight_decay * optimizer.learning_rate >= 1:
        return (
            f"config.optimizer.weight_decay: {optimizer.weight_decay} is not below {1 / optimizer.learning_rate:g} at learning_rate="
            f"{optimizer.learning_rate}: "
            "a step would take more of a weight than there is"
        )
    return (
        _static_scales(config, tokens)
        if "static" in config.fp8.scaling + config.fp8.overrides
        else None
    )


def _static_scales(config: Any, tokens: int) -> str | None:
    """Fixed scales that flush what they are for to zero, or clip it."""
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
                f"config.fp8.{name}: {value} is {'below' if value < low else 'above'} {low if value < low else high:g}, "
                f"for tensors of size {size:g} and margin={fp8.margin}"
            )
    return None
