"""Tokens are zeros that go into a GEMM's VJP, and their cotangents return what the GEMM measured of
its operands.

    y, pull = jax.vjp(lambda token: dot_general(x, w, dims, recipe, token=token), Token(jnp.zeros(2), AMAX))
    pull(g)[0].values                        # float32 [2]: amax of x, amax of g

A static choice, `brings`, sets what is returned, and so the shape; the first dimension is always
that of the operands, in the order of `roles.OPERANDS`:

    AMAX             [operands]                    raw amaxes
    AMAX_BY_DEVICE   [operands, *mesh sizes]       the amax on each device, without communication; their maximum is the amax
    FULL             [operands, len(REPORT)]       all of `statistics.REPORT`, in BF16 as well

Give each call its own token: cotangents of a token used twice are summed.
"""

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from fp8jax.numerics import statistics
from fp8jax.numerics.formats import Quantised
from fp8jax.numerics.gemm_sharding import amax_by_device

Brings = Literal["amax", "amax_by_device", "full"]
AMAX: Brings = "amax"
AMAX_BY_DEVICE: Brings = "amax_by_device"
FULL: Brings = "full"


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["brings"])
@dataclasses.dataclass(frozen=True)
class Token:
    """Zeros as an input; as a cotangent, the values that `brings` names."""

    values: jax.Array
    brings: Brings = AMAX

    def like(self, values: jax.Array) -> "Token":
        """Return the cotangent of this token with these values."""
        return dataclasses.replace(self, values=values)


def as_token(given: Token | jax.Array | None) -> Token | None:
    """Return a token unchanged; turn a plain array, float32 [operands], into one that returns
    amaxes.
    """
    return Token(given) if given is not None and not isinstance(given, Token) else given


def report_cast(
    token: Token | None,
    x: jax.Array,
    q: Quantised,
    amax: jax.Array | None,
    spec: PartitionSpec | None = None,
    *,
    spread: bool = False,
    counted: jax.Array | None = None,
    emulated: bool = False,
) -> jax.Array | None:
    """Return a token's cotangent for one operand; None if nothing was measured.

    Args:
        token: token of the GEMM; None if nothing is asked for.
        x: the operand.
        q: its cast.
        amax: amax of x; None if it is not taken.
        spec: how x is split.
        spread: whether its distribution belongs to FULL.
        counted: bool [b, t]: the tokens of text in statistics; None counts all.
        emulated: as for `formats.amax`.
    """
    if token is None:
        return None
    if token.brings == FULL:
        return statistics.report(x, q, spread=spread, counted=counted)
    return None if amax is None else report_amax(token, x, spec, amax, emulated=emulated)


def report_amax(
    token: Token,
    x: jax.Array,
    spec: PartitionSpec | None,
    amax: jax.Array,
    *,
    emulated: bool = False,
) -> jax.Array:
    """Return a token's cotangent for the amax of x, split by `spec`: the amax, or that of each
    device.
    """
    if token.brings == AMAX:
        return amax
    if jax.sharding.get_abstract_mesh().empty:
        return jnp.broadcast_to(amax, token.values.shape[1:])
    return amax_by_device(x, spec, token.values[0], emulated=emulated)
