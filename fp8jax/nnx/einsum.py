"""An einsum of two operands as one dot_general, inputs first, and a transpose."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import opt_einsum


def einsum(
    equation: str, x: jax.Array, w: jax.Array, product: Callable[..., jax.Array]
) -> jax.Array:
    """Return `jnp.einsum(equation, x, w)`, with `product(x, w, dimension_numbers)` in place of
    dot_general.

    Args:
        equation: with `->`, such as `...d,dhk->...hk`.
        x: left operand.
        w: right operand.
        product: computes dot_general.

    Raises:
        ValueError: an operand repeats a letter, or has one that neither the other nor the result
            has.
    """
    names, out, _ = opt_einsum.parser.parse_einsum_input((equation, x, w))
    of_x, of_w = names.split(",")
    _check(equation, of_x, of_w, out)
    shared = [name for name in of_x if name in of_w]
    batch = [name for name in shared if name in out]
    contract = [name for name in shared if name not in out]
    dims: Any = tuple(
        (tuple(map(of_x.index, letters)), tuple(map(of_w.index, letters)))
        for letters in (contract, batch)
    )
    found = batch + [name for name in of_x + of_w if name not in shared]
    return jnp.transpose(product(x, w, dims), [found.index(name) for name in out])


def _check(equation: str, of_x: str, of_w: str, out: str) -> None:
    for letters, others in ((of_x, of_w), (of_w, of_x)):
        for name in letters:
            if letters.count(name) > 1 or name not in others + out:
                raise ValueError(
                    f"einsum {equation!r}: {name!r} is repeated or summed in one operand alone, "
                    f"which is no single GEMM"
                )
