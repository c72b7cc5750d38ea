"""Settings for choosing the next token. This module imports no JAX, so that commands refuse wrong
settings early.
"""

import dataclasses
import math
from typing import NamedTuple


class Fault(NamedTuple):
    """A setting out of range."""

    name: str
    value: float
    reason: str


def fault(temperature: float, top_p: float, seed: int) -> Fault | None:
    """Return the first setting that is out of range, if any."""
    if not 0 <= temperature < math.inf:
        return Fault("temperature", temperature, "is not a number of at least 0; 0 is greedy")
    if not 0 < top_p <= 1:
        return Fault("top_p", top_p, "is not above 0 and at most 1; 1 draws from all tokens")
    if not 0 <= seed < 1 << 32:
        return Fault("seed", seed, f"is not from 0 to {(1 << 32) - 1}")
    return None


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Settings for choosing the next token.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_p: draws from the likeliest tokens that together have at least this probability.
        seed: equal seeds give equal texts.

    Raises:
        ValueError: a value is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if found := fault(self.temperature, self.top_p, self.seed):
            raise ValueError(f"{found.name}: {found.value} {found.reason}")
