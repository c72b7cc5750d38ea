"""The defaults of every field and the sizes of the FOG paper (Table 6), for all configs; 70b has
Llama 3's shape.

A config file calls `make(size, ...)` and names only what differs. A size is the config's argument:
`fp8_base.py:390m`.
"""

from typing import Any

import ml_collections

from fp8jax import config as config_lib
from fp8jax import hardware

SIZES = {
    "tiny": dict(layers=4, width=256, ffn_width=512, heads=2, kv_heads=1),
    "390m": dict(layers=16, width=1024, ffn_width=4096, heads=8, kv_heads=4, vocab_size=131072),
    "1p5b": dict(
        layers=16,
        width=2048,
        ffn_width=8192,
        heads=16,
        kv_heads=8,
        vocab_size=131072,
        tied_embeddings=False,
    ),
    "8b": dict(
        layers=32,
        width=4096,
        ffn_width=14336,
        heads=32,
        kv_heads=8,
        vocab_size=131072,
        tied_embeddings=False,
    ),
    "70b": dict(
        layers=80,
        width=8192,
        ffn_width=28672,
        heads=64,
        kv_heads=8,
        vocab_size=131072,
        tied_embeddings=False,
    ),
}
# Sequences per step, learning rate, tokens of the run; the context is 4096. Warm-up takes 2.5B
# tokens.
_PAPER = {
    "390m": (128, 1e-3, 50e9),
    "1p5b": (256, 2.5e-4, 125e9),
    "8b": (512, 3e-4, 125e9),
    "70b": (1024, 1.5e-4, 1400e9),
}
_CONTEXT = 4096


def make(size: str | None = None, *, architecture: str, recipe: str) -> ml_collections.ConfigDict:
    """Return a run of one architecture at one size; without a size, one that suits the machine at
    hand.
    """
    size = size or hardware.default_size()[0]
    if size not in SIZES:
        raise ValueError(f"size {size!r} is not one of {', '.join(SIZES)}")
    # Any: by its own types a field of a ConfigDict may always be None.
    config: Any = config_lib.defaults()
    config.model.update(architecture=architecture, **SIZES[size])
    config.fp8.recipe = recipe
    if size == "tiny":
        # Training is chaotic, and its final noise grows with rate over batch: at 2e-3 and 8
        # sequences any change of rounding moves the final loss by 1-2%, which hides what FP8 does;
        # here by a few tenths.
        config.optimizer.update(learning_rate=1e-3, decay_fraction=0.7)
        config.training.batch_size = 16
        config.data.sequence_length = 256
        _plan(config, steps=450, warmup_steps=40)
        return config
    batch_size, rate, tokens = _PAPER[size]
    per_step = batch_size * _CONTEXT
    config.data.sequence_length = _CONTEXT
    config.optimizer.learning_rate = rate
    config.training.batch_size = batch_size
    _plan(config, steps=round(tokens / per_step), warmup_steps=round(2.5e9 / per_step))
    return config


def _plan(config: Any, *, steps: int, warmup_steps: int) -> None:
    """Set the length of the run, and the warm-up of a run of this length; a shorter one gets a
    shorter warm-up.
    """
    config.training.steps = config.preset.training.steps = steps
    config.preset.optimizer.warmup_steps = warmup_steps
