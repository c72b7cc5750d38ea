"""Compute the loss of every token: from logits, or chunk by chunk of the vocabulary
(`training.loss_chunk`).

nll, lse, taps = batch_losses(model, batch, gemms, options, chunk=0)
"""

import jax
import jax.numpy as jnp

from fp8jax.models.gemms import Gemms
from fp8jax.models.taps import Taps
from fp8jax.models.transformer import ForwardOptions, Transformer
from fp8jax.parallel.sharding import constrain

Batch = dict[str, jax.Array]


@jax.custom_vjp
def token_losses(logits_btv: jax.Array, targets_bt: jax.Array) -> jax.Array:
    """Return the negative log-likelihood of each target in nats, float32 [b, t].

    Its gradient is written in one pass over the logits: derived automatically it takes three, and
    the logits of a large vocabulary are the largest arrays of a step.
    """
    return _token_losses(logits_btv, targets_bt)[0]


def _token_losses(
    logits_btv: jax.Array, targets_bt: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    chosen = jnp.take_along_axis(logits_btv, targets_bt[..., None], axis=-1)[..., 0]
    lse = jax.nn.logsumexp(logits_btv, axis=-1)
    return lse - chosen, (logits_btv, targets_bt, lse)


def _token_losses_backward(saved: tuple[jax.Array, ...], g_bt: jax.Array) -> tuple[jax.Array, None]:
    logits, targets, lse = saved
    probabilities = jnp.exp(logits - lse[..., None])
    chosen = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2) == targets[..., None]
    return jnp.where(chosen, probabilities - 1, probabilities) * g_bt[..., None], None


token_losses.defvjp(_token_losses, _token_losses_backward)


def sum_of_rows(x_bt: jax.Array) -> jax.Array:
    """Return the sum of float32 [b, t], rows added up in their order whichever devices have them.

    A reduction over devices adds in an order of its own: among processes another one than within
        one, which showed in the last
    bit of a loss.
    """
    return jnp.sum(constrain(jnp.sum(x_bt, axis=1), None))


def batch_losses(
    model: Transformer,
    batch: Batch,
    gemms: Gemms,
    options: ForwardOptions,
    *,
    chunk: int,
) -> tuple[jax.Array, jax.Array, Taps]:
    """Return negative log-likelihoods and log-partitions, float32 [b, t], and taps.

    Args:
        model: model bound to parameters.
        batch: `inputs` and `targets`, int32 [b, t], and the model's other inputs.
        gemms: from `Transformer.prepare`.
        options: static choices of the forward pass.
        chunk: rows of the vocabulary at a time; 0 takes all logits at once.
    """
    if chunk:
        return model.chunked_losses(batch, gemms, chunk, options)
    logits, taps = model(batch, gemms, options)
    with jax.named_scope("loss"):
        nll = token_losses(logits, batch["targets"])
        return nll, jax.nn.logsumexp(logits, axis=-1), taps
