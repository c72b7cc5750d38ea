"""Name outlier statistics for logs, and average them over layers.

    flatten({"qkv": {"kurtosis": [3.1, 3.3]}})
    # {"kurtosis/qkv_avg": 3.2, "kurtosis/qkv_layer000": 3.1, "kurtosis/qkv_layer001": 3.3}

numerics/statistics.py defines the numbers; models/taps.py takes those of activations, those of
casts ('qkv.x', 'qkv.w', 'qkv.g', 'attention_scores.ds', ...) come back through the GEMMs' tokens.
"""

import functools
from collections.abc import Mapping

import numpy as np

from fp8jax.numerics.statistics import HEALTH, WEIGHTS

_OF_CASTS = frozenset(HEALTH) - {"amax"}


def flatten(taps: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Return the log entries of one step; a value that is unknown, because nothing entered or was
    cast, has none.

    Args:
        taps: tensor → statistic → value per layer, and the number of `tokens` and `rows` in it
            (statistics.WEIGHTS).

    Returns:
        `STATISTIC/TENSOR_layerNNN` and `STATISTIC/TENSOR_avg`; amax and max_logit have a maximum,
        `amax/TENSOR_max`, instead of an average; `snr`, in decibels, in place of signal and noise,
        infinite for an exact cast; and, where anything is cast to FP8, `fp8/saturated_fraction` and
        `fp8/underflow_fraction`: averages over all cast operands and layers.
    """
    out: dict[str, float] = {}
    of_casts: dict[str, list[np.ndarray]] = {"overflow": [], "underflow": []}
    for name, stats in taps.items():
        for statistic, values in _with_snr(stats).items():
            known = _known(stats, statistic, values)
            whole, reduce = (
                ("max", np.max) if statistic in ("amax", "max_logit") else ("avg", np.mean)
            )
            if known.any():
                out[f"{statistic}/{name}_{whole}"] = float(reduce(values[known]))
            keys = _names(statistic, name, len(values))
            out.update((keys[layer], float(values[layer])) for layer in np.flatnonzero(known))
            of_casts.get(statistic, []).append(values[known])
    for key, statistic in (
        ("fp8/saturated_fraction", "overflow"),
        ("fp8/underflow_fraction", "underflow"),
    ):
        found = np.concatenate([np.zeros(0), *of_casts[statistic]])
        if found.size:
            out[key] = float(np.mean(found))
    return out


def _known(stats: Mapping[str, np.ndarray], statistic: str, values: np.ndarray) -> np.ndarray:
    """Return the layers in which a statistic is known: values entered it, were cast for those of
    casts, and are not all 0.
    """
    known = np.ones(len(values), bool)
    if statistic == "snr":
        known &= stats["signal"] != 0
    if statistic in _OF_CASTS or statistic == "snr":
        known &= stats.get("scale", known) != 0
    weight = "rows" if statistic == "kurtosis" else "tokens"
    return known & (stats[weight] > 0) if weight in stats and statistic != "amax" else known


@functools.cache
def _names(statistic: str, name: str, layers: int) -> list[str]:
    return [f"{statistic}/{name}_layer{i:03d}" for i in range(layers)]


def _with_snr(stats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the statistics to log: without weights, with the signal-to-noise ratio of a cast."""
    logged = {
        name: values for name, values in stats.items() if name not in ("signal", "noise", *WEIGHTS)
    }
    if "noise" not in stats:
        return logged
    with np.errstate(divide="ignore", invalid="ignore"):
        return logged | {"snr": 10 * np.log10(stats["signal"].astype(np.float64) / stats["noise"])}
