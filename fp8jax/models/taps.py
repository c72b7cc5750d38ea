"""Record statistics of tensors: `tap(name, x)` works while collecting is on, and has no cost
otherwise.

    with collecting() as found:
        y = block(x)                 # calls tap("qkv", qkv) inside
    found["qkv"]["kurtosis"]         # float32 scalar

Values found inside scan, remat or vmap are tracers of that transformation: open `collecting` inside
the transformed function and *return* what was found (models/transformer.py does), never carry it
out by side effect. What FP8 casts do to the operands of GEMMs comes back through tokens instead
(models/gemms.py), for gradients are seen in the backward pass only.
"""

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.numerics import statistics

Taps = dict[str, dict[str, jax.Array]]
_found: contextvars.ContextVar[tuple[Taps, bool, jax.Array | None] | None] = contextvars.ContextVar(
    "found", default=None
)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["layout"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """Taps as one array: hundreds of scalars would be carried through the scan over layers, and
    fetched, one by one.

    Attributes:
        values: float32 [..., n], a JAX or a NumPy array.
        layout: tensor, statistic, shape and dtype of each statistic, in the order of names.
    """

    values: Any
    layout: tuple[tuple[str, str, tuple[int, ...], Any], ...]

    def unpack(self) -> Taps:
        """Return the taps, with the leading dimensions that `values` has since."""
        out, end = {}, 0
        for name, statistic, shape, dtype in self.layout:
            start, end = end, end + math.prod(shape)
            part = self.values[..., start:end].reshape(*self.values.shape[:-1], *shape)
            out.setdefault(name, {})[statistic] = part.astype(dtype)
        return out


def pack(taps: Taps) -> Packed:
    """Pack all statistics into one array."""
    leaves = [
        (name, statistic, taps[name][statistic])
        for name in sorted(taps)
        for statistic in sorted(taps[name])
    ]
    values = [leaf.astype(jnp.float32).reshape(-1) for _, _, leaf in leaves]
    return Packed(
        jnp.concatenate(values or [jnp.zeros(0)]),
        tuple((name, statistic, leaf.shape, leaf.dtype) for name, statistic, leaf in leaves),
    )


@contextlib.contextmanager
def collecting(
    enabled: bool = True, *, pooled: bool = False, counted: jax.Array | None = None
) -> Iterator[Taps]:
    """Collect taps inside this context; with enabled=False, taps do nothing.

    Args:
        enabled: static.
        pooled: take the kurtosis over whole sequences instead of tokens.
        counted: bool [batch, tokens]: the tokens that count in activations of this shape; None
            counts all.
    """
    found: Taps = {}
    token = _found.set((found, pooled, counted) if enabled else None)
    try:
        yield found
    finally:
        _found.reset(token)


def tap(name: str, x: jax.Array) -> None:
    """Record mean, rms and kurtosis of an activation: in logs, `kurtosis/NAME_layer003`,
    `kurtosis/NAME_avg` and so on.

    Args:
        name: new in this block, without a slash.
        x: [batch, tokens, ..., features], floating.

    Raises:
        ValueError: the name is taken or has a slash, or the array is not such an activation.
    """
    if x.ndim < 3 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"tap({name!r}): {x.dtype}{list(x.shape)} is not a floating array [batch, tokens, "
            f"..., features]"
        )
    current = _found.get()
    counted = current and current[2]
    if counted is None or counted.shape != x.shape[:2]:
        record(name, statistics.distribution, x)
    else:
        record(name, statistics.distribution, x, counted)


def record(name: str, compute: Callable[..., dict[str, jax.Array]], *arrays: jax.Array) -> None:
    """Record compute(*arrays), statistic → scalar, while collecting is on; otherwise it is not
    computed or differentiated.

    Raises:
        ValueError: the name is taken or has a slash.
    """
    current = _found.get()
    if current is None:
        return
    found, pooled, _ = current
    if name in found or "/" in name:
        raise ValueError(
            f"tap({name!r}): "
            f"{'a name must not contain a slash' if '/' in name else 'this block has a tap of that name'}"
        )
    found[name] = statistics.choose(compute(*map(jax.lax.stop_gradient, arrays)), pooled=pooled)
