"""The loss of each token and its gradient against float64 NumPy."""

import jax
import numpy as np

from fp8jax.training.losses import token_losses


def test_losses_and_gradient_equal_the_definition():
    random = np.random.default_rng(0)
    logits, targets, g = (
        random.normal(scale=5, size=(2, 3, 17)),
        random.integers(0, 17, size=(2, 3)),
        random.normal(size=(2, 3)),
    )
    logits[0, 0, 4] = 120.0  # a probability of one, and of zero
    targets[0, :2] = 4, 16
    losses, pull = jax.vjp(token_losses, logits.astype(np.float32), targets.astype(np.int32))
    shifted = logits - logits.max(-1, keepdims=True)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    hot = np.eye(17)[targets]
    np.testing.assert_allclose(losses, -np.log((probabilities * hot).sum(-1)), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        pull(g.astype(np.float32))[0], (probabilities - hot) * g[..., None], rtol=2e-5, atol=1e-6
    )
