"""The metrics hook: `tap(name, x)` records statistics of a tensor where collecting is on, and costs nothing elsewhere.

    with collecting() as found:
        y = block(x)                 # calls tap("qkv", qkv) inside
    found["qkv"]["kurtosis"]         # float32 scalar

Values found inside scan, remat or vmap are tracers of that transformation: open `collecting` inside the transformed
function and *return* what was found (models/transformer.py does), never carry it out by side effect. What FP8 casts do to
the operands of GEMMs comes back through tokens instead (models/gemms.py), for gradients are seen in the backward pass only.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

from fp8jax.numerics import statistics

Taps = dict[str, dict[str, jax.Array]]
_found: contextvars.ContextVar[tuple[Taps, bool] | None] = contextvars.ContextVar("found", default=None)


@contextlib.contextmanager
def collecting(enabled: bool = True, *, pooled: bool = False) -> Iterator[Taps]:
    """Collects what is tapped inside; with enabled=False, taps do nothing.

    Args:
        enabled: static.
        pooled: kurtosis over whole sequences instead of tokens.
    """
    found: Taps = {}
    token = _found.set((found, pooled) if enabled else None)
    try:
        yield found
    finally:
        _found.reset(token)


def tap(name: str, x: jax.Array) -> None:
    """Records mean, rms and kurtosis of an activation [batch, tokens, ..., features]."""
    current = _found.get()
    if current is not None:
        found, pooled = current
        x = jax.lax.stop_gradient(x)
        found[name] = {"kurtosis": statistics.kurtosis(x, pooled=pooled), **statistics.moments(x)}
