"""Compute logits, loss and gradients of a model in float32, to check a conversion against another
implementation.

    found = compute(model, vocab_size, params, tokens_bt, gradients=True)
    found["logits"], found["loss"], found["gradients"]

No tensor is quantised and activations are float32, for any config of the run.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.config import Config, Fp8Config, ModelConfig
from fp8jax.models import gemms
from fp8jax.models.definition import Params
from fp8jax.plan import make_plan


def compute(
    model: ModelConfig,
    vocab_size: int,
    params: Params,
    tokens_bt: np.ndarray,
    *,
    gradients: bool = False,
) -> dict[str, Any]:
    """Compute one forward pass and, if asked for, one backward pass.

    Args:
        model: model config.
        vocab_size: rows of the embedding.
        params: float32 parameters.
        tokens_bt: ids, [batch, length], within the vocabulary.
        gradients: whether to return the loss's gradients, too.

    Returns:
        `logits` float32 [b, t, v]; `loss`, float32, the mean of -log p(token i + 1 | tokens to i)
        over each row's first t - 1 positions; with `gradients`, those, like the parameters.

    Raises:
        ValueError: ids are not integers [batch, length], shorter than 2, or outside the vocabulary.
    """
    if (
        tokens_bt.ndim != 2
        or tokens_bt.shape[1] < 2
        or not np.issubdtype(tokens_bt.dtype, np.integer)
        or not tokens_bt.size
    ):
        raise ValueError(
            f"tokens: {tokens_bt.dtype} {list(tokens_bt.shape)} are not integers [batch, "
            f"length], at least 2 long"
        )
    if tokens_bt.min() < 0 or tokens_bt.max() >= vocab_size:
        raise ValueError(
            f"tokens: ids from {tokens_bt.min()} to {tokens_bt.max()}; the model's are 0 to "
            f"{vocab_size - 1}"
        )
    config = Config(
        model=dataclasses.replace(model, dtype="float32"),
        fp8=Fp8Config(recipe="bf16", backend="emulated"),
    )
    plan = make_plan(config, jax.devices()[:1], vocab_size=vocab_size)
    definition, recipes = plan.definition, plan.recipes
    tokens = jnp.asarray(tokens_bt, jnp.int32)

    def loss_of(params: Params) -> tuple[jax.Array, jax.Array]:
        bound = definition.bind(params)
        logits, _ = bound(
            {"inputs": tokens}, bound.prepare(recipes, {}, gemms.zero_tokens(recipes))
        )
        chosen = jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits[:, :-1], axis=-1) - chosen), logits

    if not gradients:
        loss, logits = jax.jit(loss_of)(params)
        return {"logits": np.asarray(logits), "loss": np.asarray(loss)}
    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_of, has_aux=True))(params)
    return {"logits": np.asarray(logits), "loss": np.asarray(loss), "gradients": grads}
