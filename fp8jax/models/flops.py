"""Count model FLOPs by closed formula: what a training step must compute, by any program.

    flops = model_flops(definition.config, vocab_size, sequences=512, sequence_length=4096)
    flops.total

A matrix product of [m, k] by [k, n] is 2 m n k FLOPs; the backward pass is twice the forward pass.
Attention is causal: a query sees the keys up to its own, half of the square. (Many reports count
the whole square, which makes MFU look higher: by 7% for the 8B model at 4096 tokens.) The embedding
lookup, norms, activations and softmax do not count.
"""

import dataclasses

from fp8jax.config import ModelConfig, head_dim
from fp8jax.models import architectures

_PASSES = 3  # the forward pass, and the gradients of both operands


@dataclasses.dataclass(frozen=True)
class ModelFlops:
    """The FLOPs of one training step over all devices: the blocks' linear layers, causal attention,
    the head.
    """

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        """Return the sum of all."""
        return self.linear + self.attention + self.head


def model_flops(
    config: ModelConfig, vocab_size: int, *, sequences: int, sequence_length: int
) -> ModelFlops:
    """Return the FLOPs of a training step.

    Args:
        config: resolved (models/architectures.py).
        vocab_size: rows of the head.
        sequences: number of sequences in the step's whole batch.
        sequence_length: tokens of each.
    """
    d, n, k, h, f = (
        config.width,
        config.heads,
        config.kv_heads,
        head_dim(config),
        architectures.ffn_hidden(config),
    )
    weights = d * (n + 2 * k) * h + n * h * d + (3 if architectures.gated(config) else 2) * d * f
    tokens = sequences * sequence_length
    pairs = sequences * sequence_length * (sequence_length + 1) // 2
    return ModelFlops(
        linear=_PASSES * 2 * config.layers * weights * tokens,
        attention=_PASSES * 4 * config.layers * pairs * n * h,
        head=_PASSES * 2 * d * vocab_size * tokens,
    )
