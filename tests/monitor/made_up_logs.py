"""Logs made up for the early warning."""

import math

import numpy as np

LAYERS, EVERY, TOKENS, END = 4, 5, 1000, 400


STANDS = {"loss": lambda step: 2.0}


def log(seed=0, steps=END, layers=LAYERS, **series):
    """A calm run; `series` are functions: 'q' (rms of queries), 'snr', 'kurtosis' of step and layer, 'grad_norm' and 'loss' of the step."""
    rng = np.random.default_rng(seed)
    noise = lambda: math.exp(0.02 * rng.normal())
    out = []
    for step in range(1, steps + 1):
        norm, loss = (
            series.get(name, default)(step)
            for name, default in (("grad_norm", lambda s: 0.8), ("loss", lambda s: 4 * s**-0.15))
        )
        entry = {
            "step": step,
            "tokens": step * TOKENS,
            "loss": loss * noise(),
            "grad_norm": norm * math.exp(0.2 * rng.normal()),
        }
        for layer in range(layers) if step % EVERY == 0 else []:
            at = f"_layer{layer:03d}"
            q, snr, kurtosis = (
                series.get(name, default)(step, layer)
                for name, default in (
                    ("q", lambda s, n: 1.0),
                    ("snr", lambda s, n: 31.5),
                    ("kurtosis", lambda s, n: 3 + math.log(s)),
                )
            )
            entry |= {
                f"rms/q{at}": q * noise(),
                f"rms/k{at}": noise(),
                f"kurtosis/qkv{at}": kurtosis * noise(),
                f"rms/activation{at}": (1 + 0.1 * math.log(step)) * noise(),
                f"amax/mlp_down.w{at}": (0.1 + step / 4000) * noise(),
                f"snr/mlp_down.x{at}": snr * noise() ** 0.1,
                f"max_logit/attention_scores{at}": 4.0,
            }
            entry |= {
                f"snr/{o}{at}": 31.5
                for o in ("attention_scores.q", "attention_scores.k", "qkv.x", "qkv.w")
            }
        out.append(entry)
    return out


def growing(*layers):
    return lambda step, layer: math.exp(step / 100) if layer in layers else 1.0


def bent(at, high=1.15):
    """A loss that comes off its trend."""
    return lambda step: 4 * step**-0.15 * (high if step >= at else 1)
