"""Measure how much of FP8's range each tensor of a logged step uses: its load, where 1 is the edge
of the range.

    loads(entry)      # {("mlp_down.x", 3): 0.27, ("attention_logits", 0): 0.61, ...} by tensor and layer

A tensor leaves FP8's range in two ways, and each has a unit of its own:

- **Its cast loses a bit.** In range, the error of a cast is the rounding of its mantissa, for every
  tensor: about 31.5 dB below the signal for e4m3, 25.5 dB for e5m2. Clipping and flushing to zero
  add to it. At 6 dB less, the format has lost one bit of its mantissa to the range.
- **Attention's logits lose their meaning.** A softmax takes differences of logits, so their
  absolute error counts, in nats: at 1, a weight is off by a factor of e. Errors of rounding are
  relative, so this one grows with queries times keys, however well each of the two is held. Queries
  and keys are rounded twice: as products of a rounded input and a rounded weight, and when they are
  cast themselves. With all four errors independent of the directions of q and k, a logit's has the
  standard deviation rms(q) rms(k) softmax_scale sqrt(head_dim)
  sqrt(1/snr_q + 1/snr_k + 2/snr_x + 2/snr_w); the two factors in the middle are not logged, and
  their product is 1 unless the config sets it otherwise.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

LOGITS = "attention_logits"
# Signal-to-noise ratio of rounding a Gaussian tensor, in decibels; the output gradients' names end
# in these operands.
ROUNDING = {"e4m3": 31.5, "e5m2": 25.5, "bf16": 55.6}
GRADIENTS = (".g", ".ds", ".do")
BIT = 20 * math.log10(2)
_SNR = re.compile(r"snr/(.+)_layer(\d+)")
_RMS = re.compile(r"rms/q_layer(\d+)")

Place = tuple[str, int]


def loads(entry: Mapping[str, Any], gradient_format: str = "e5m2") -> dict[Place, float]:
    """Return loads by tensor and layer, without tensors that are not in FP8 or not in the log.

    Args:
        entry: a line of metrics.jsonl, as `read_metrics` returns it.
        gradient_format: format of output gradients, "e4m3" or "e5m2"; everything else is in e4m3.
    """
    out: dict[Place, float] = {}
    for name, value in entry.items():
        if (found := _SNR.fullmatch(name)) and not math.isnan(value):
            tensor, layer = found[1], int(found[2])
            rounding = ROUNDING[gradient_format if tensor.endswith(GRADIENTS) else "e4m3"]
            out[tensor, layer] = _ratio(rounding - BIT - value)
        elif found := _RMS.fullmatch(name):
            layer = int(found[1])
            error = _logit_error(entry, found[1])
            if not math.isnan(error):
                out[LOGITS, layer] = error
    return out


def _logit_error(entry: Mapping[str, Any], layer: str) -> float:
    """Return the standard deviation of a logit's error in nats; what is not in FP8 rounds to BF16."""
    noise = 0.0
    for operand, times in (
        ("attention_scores.q", 1),
        ("attention_scores.k", 1),
        ("qkv.x", 2),
        ("qkv.w", 2),
    ):
        snr = entry.get(f"snr/{operand}_layer{layer}", math.nan)
        noise += times * _ratio(-(ROUNDING["bf16"] if math.isnan(snr) else snr))
    size = entry[f"rms/q_layer{layer}"] * entry.get(f"rms/k_layer{layer}", math.nan)
    return size * math.sqrt(noise)


def _ratio(decibels: float) -> float:
    """Return the ratio of powers for a level in dB."""
    return 10 ** (min(decibels, 3000.0) / 10)
