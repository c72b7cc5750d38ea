"""Names of outlier statistics in logs, and their average over layers.

    flatten({"qkv": {"kurtosis": [3.1, 3.3]}})
    # {"kurtosis/qkv_avg": 3.2, "kurtosis/qkv_layer000": 3.1, "kurtosis/qkv_layer001": 3.3}

What the numbers are is said in numerics/statistics.py; activations' are taken by models/taps.py, those of casts ('qkv.x',
'qkv.w', 'qkv.g', 'attention_scores.ds', ...) come back through the GEMMs' tokens.
"""

import functools
from collections.abc import Mapping

import numpy as np


def flatten(taps: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Log entries of one step.

    Args:
        taps: tensor → statistic → value a layer; NaN where a layer does not have it.

    Returns:
        `STATISTIC/TENSOR_layerNNN` and `STATISTIC/TENSOR_avg`; amax and max_logit have a maximum, `amax/TENSOR_max`, instead
        of an average; `snr`, in decibels, in place of signal and noise, infinite for an exact cast; and, where anything is cast to
        FP8, `fp8/saturated_fraction` and `fp8/underflow_fraction`: averages over all cast operands and layers.
    """
    out: dict[str, float] = {}
    for name, stats in taps.items():
        for statistic, values in _with_snr(stats).items():
            known = values[~np.isnan(values)]
            whole, reduce = ("max", np.max) if statistic in ("amax", "max_logit") else ("avg", np.mean)
            keys = _names(statistic, name, len(values))
            if known.size:
                out[f"{statistic}/{name}_{whole}"] = float(reduce(known))
            out.update(zip(keys, values.tolist(), strict=True))
    for key, statistic in (("fp8/saturated_fraction", "overflow"), ("fp8/underflow_fraction", "underflow")):
        found = [stats[statistic] for stats in taps.values() if statistic in stats]
        if found:
            out[key] = float(np.nanmean(np.concatenate(found)))
    return out


@functools.cache
def _names(statistic: str, name: str, layers: int) -> list[str]:
    return [f"{statistic}/{name}_layer{i:03d}" for i in range(layers)]


def _with_snr(stats: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The signal-to-noise ratio of a cast, NaN where there is no signal."""
    if "noise" not in stats:
        return dict(stats)
    with np.errstate(divide="ignore", invalid="ignore"):
        snr = 10 * np.log10(stats["signal"].astype(np.float64) / stats["noise"])
    return {name: values for name, values in stats.items() if name not in ("signal", "noise")} | {"snr": snr}
