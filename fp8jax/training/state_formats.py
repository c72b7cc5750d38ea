"""Convert parameters and moments to their storage formats between steps, and on restore from other
formats.

    params, opt_state = pack(config.optimizer, params, moments, step)     # float32 → formats of the config
    params, moments = unpack(params, opt_state)                           # float32 again

Only matrices are packed, which have nearly all bytes; gains and scalars stay float32. Computation
is in float32 (optimizer.py); formats, blocks and rounding are those of numerics/low_bit_state.py.
With all dtypes float32, packing changes nothing.

The random bits of rounding depend on the step and the parameter's place, so a resumed run repeats
them.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from fp8jax.config import OptimizerConfig
from fp8jax.numerics import low_bit_state
from fp8jax.training.optimizer import MATRIX

# Fields of optax's states that hold averages of gradients (m1: AdEMAMix's fast one; its slow one
# takes in 1e-4 of a gradient a step, less than the noise of 8 bits, and stays float32), and of
# squares.
_FIRST, _SECOND = ("mu", "m1"), ("nu",)


class OptState(NamedTuple):
    """The optimizer's state.

    Attributes:
        moments: optax's state, arrays of matrices in their storage formats.
        scales: like `moments`, None for arrays without.
        remainder: like the parameters, int8 of matrices whose rounding is compensated, otherwise
            None.
    """

    moments: Any
    scales: Any
    remainder: Any


def pack(
    config: OptimizerConfig, params: Any, moments: Any, step: jax.Array
) -> tuple[Any, OptState]:
    """Convert float32 parameters and moments to the formats of a config; `step` seeds the rounding."""
    kept = _map(lambda path, x, bits: _pack_moment(config, path, x, bits), moments, step, 0)
    masters = _map(lambda path, x, bits: _pack_master(config, path, x, bits), params, step, 1 << 16)
    (moments, scales), (params, remainder) = _unzip(moments, kept), _unzip(params, masters)
    return params, OptState(moments, scales, remainder)


def unpack(params: Any, opt_state: OptState) -> tuple[Any, Any]:
    """Return float32 parameters and moments."""

    def master(x: jax.Array, low: jax.Array | None) -> jax.Array:
        return x.astype(jnp.float32) if low is None else low_bit_state.join(x, low)

    def moment(path: Any, x: jax.Array, scale: jax.Array | None) -> jax.Array:
        return low_bit_state.decode(x, scale, root=_moment(path) in _SECOND) if _moment(path) else x

    moments = jax.tree_util.tree_map_with_path(moment, opt_state.moments, opt_state.scales)
    return jax.tree.map(master, params, opt_state.remainder), moments


def saved_as(config: OptimizerConfig, dtypes: dict[str, str]) -> OptimizerConfig:
    """Return the config with the optimizer and the formats with which a checkpoint was saved.

    Args:
        config: a run's section.
        dtypes: dtypes of the checkpoint's arrays, by name: 'params/embedding/w'.
    """
    names = {str(dtype): name for name, dtype in low_bit_state.FORMATS.items()}
    found: dict[str, str] = {}
    for path, dtype in dtypes.items():
        parts = path.split("/")
        if parts[0] == "opt_state":
            marks = {"m1": "ademamix", "inner_states": "muon"}
            found["name"] = next(
                (marks[part] for part in parts if part in marks), found.get("name", "adamw")
            )
        if parts[-1] != MATRIX or dtype not in names:
            continue
        if parts[0] == "params":
            found["master_dtype"] = names[dtype]
        elif parts[:2] == ["opt_state", "moments"] and (
            kind := next((p for p in parts if p in _FIRST + _SECOND), None)
        ):
            found["first_moment" if kind in _FIRST else "second_moment"] = names[dtype]
    compensated = any(path.startswith("opt_state/remainder/") for path in dtypes)
    if found.get("master_dtype", "float32") != "float32":
        found["master_rounding"] = "compensated" if compensated else "stochastic"
    return dataclasses.replace(config, **found)


def describe(config: OptimizerConfig) -> str:
    """Describe the formats, as 'weights float16 (stochastic), moments fp8 and float16'."""
    rounding = "" if config.master_dtype == "float32" else f" ({config.master_rounding})"
    return (
        f"weights {config.master_dtype}{rounding}, moments {config.first_moment} and "
        f"{config.second_moment}"
    )


def _pack_moment(
    config: OptimizerConfig, path: Any, x: jax.Array, bits: Any
) -> tuple[jax.Array, jax.Array | None]:
    kind = _moment(path)
    name = (
        "float32"
        if kind is None
        else config.second_moment
        if kind in _SECOND
        else config.first_moment
    )
    return (
        (x, None)
        if name == "float32"
        else low_bit_state.encode(x, name, bits(x), root=kind in _SECOND)
    )


def _pack_master(
    config: OptimizerConfig, path: Any, x: jax.Array, bits: Any
) -> tuple[jax.Array, jax.Array | None]:
    if config.master_dtype == "float32" or path[-1].key != MATRIX:
        return x, None
    if config.master_rounding == "compensated":
        return low_bit_state.split(x, low_bit_state.FORMATS[config.master_dtype])
    return low_bit_state.round_stochastic(
        x, low_bit_state.FORMATS[config.master_dtype], bits(x)
    ), None


def _moment(path: Any) -> str | None:
    """Return the kind of average that an array of optax's state is, if it is a matrix's; otherwise
    None.
    """
    if getattr(path[-1], "key", None) != MATRIX:
        return None
    return next((key.name for key in path if getattr(key, "name", None) in _FIRST + _SECOND), None)


def _map(function: Any, tree: Any, step: jax.Array, first: int) -> list[Any]:
    """Return function(path, leaf, its source of random bits) for every leaf; `first` distinguishes
    trees.
    """
    out = []
    for number, (path, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(tree), first):
        out.append(
            function(
                path,
                leaf,
                lambda x, number=number: low_bit_state.random_bits(
                    x.shape, low_bit_state.seed_of(step, number)
                ),
            )
        )
    return out


def _unzip(like: Any, pairs: list[Any]) -> tuple[Any, Any]:
    structure = jax.tree.structure(like)
    first, second = zip(*pairs, strict=True)
    return structure.unflatten(first), structure.unflatten(second)
