"""Pack the values of layers as in a line of `metrics.jsonl`: an array per statistic, not a name per
layer.

    pack({"loss": 2.3, "kurtosis/qkv_layer000": 3.1, "kurtosis/qkv_layer001": 3.3})
    # {"loss": 2.3, "kurtosis/qkv_layers": [3.1, 3.3]}
    unpack({"kurtosis/qkv_layers": [3.1, 3.3]})     # the other way

A layer without a value is None. A line of a 390m model has 22 kB instead of 127, one of a 70b model
106 kB instead of 669. In Python, values have names: only files hold arrays.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

SUFFIX = "_layers"
DIGITS = 6
LAYERS = 10_000  # the most layers of a model: a name with a higher layer number is an ordinary name
_LAYER = re.compile(r"(.+)_layer(\d{3,5})")
_EXACT = "scale/"  # these are powers of two


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return statistics rounded to the digits that are logged, so that a log holds what the run
    itself saw.
    """
    return {
        name: value if name.startswith(_EXACT) else float(f"{value:.{DIGITS}g}")
        for name, value in values.items()
    }


def pack(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same values, with those of layers in one list per statistic, in the place of its
    first.
    """
    places, lengths = _places(tuple(values))
    out: dict[str, Any] = {}
    for (key, layer), value in zip(places, values.values(), strict=True):
        if layer is None:
            out[key] = value
            continue
        if key not in out:
            out[key] = [None] * lengths[key]
        out[key][layer] = value
    return out


def unpack(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a line, old or new, each under its own name."""
    out: dict[str, Any] = {}
    for key, value in record.items():
        if isinstance(value, list) and key.endswith(SUFFIX) and len(value) <= LAYERS:
            names = layer_names(key.removesuffix(SUFFIX), len(value))
            out.update(
                (name, item) for name, item in zip(names, value, strict=True) if item is not None
            )
        else:
            out[key] = value
    return out


@functools.lru_cache(maxsize=4096)
def layer_names(statistic: str, layers: int) -> list[str]:
    """Return `STATISTIC_layerNNN` for each of `layers` layers."""
    return [f"{statistic}_layer{layer:03d}" for layer in range(layers)]


@functools.lru_cache(maxsize=16)
def _places(names: tuple[str, ...]) -> tuple[list[tuple[str, int | None]], dict[str, int]]:
    """Return the place of each name (its list and layer, or the name itself) and the lists'
    lengths.
    """
    matches = [
        match if (match := _LAYER.fullmatch(name)) and int(match[2]) < LAYERS else None
        for name in names
    ]
    lengths: dict[str, int] = {}
    for match in matches:
        if match:
            key = match[1] + SUFFIX
            lengths[key] = max(lengths.get(key, 0), int(match[2]) + 1)
    places: list[tuple[str, int | None]] = []
    for name, match in zip(names, matches, strict=True):
        if match is None:
            places.append((name, None))
            continue
        key, layer = match[1] + SUFFIX, int(match[2])
        own = key in names or name != layer_names(match[1], layer + 1)[-1]
        places.append((name, None) if own else (key, layer))
    return places, lengths
