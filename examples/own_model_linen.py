"""The MLP of own_model_nnx.py in Flax Linen: FP8 by `dot_general_cls`, the histories in flax's TrainState.

python examples/own_model_linen.py
"""

import functools

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax.training.train_state import TrainState

import fp8jax

STEPS, BATCH, WIDTH = 100, 64, 64


class MLP(nn.Module):
    recipe: fp8jax.Recipe | None

    @nn.compact
    def __call__(self, x):
        products = functools.partial(fp8jax.linen.DotGeneral, recipe=self.recipe)
        hidden = nn.gelu(nn.Dense(4 * WIDTH, dot_general_cls=products)(x))
        return nn.Dense(WIDTH, dot_general_cls=products)(hidden)


@jax.jit
def step(state, x, y):
    def loss_fn(variables):
        return jnp.mean((state.apply_fn(variables, x) - y) ** 2)

    loss, grads = fp8jax.linen.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def batch(number):
    """Return inputs and a noisy linear function of them: its noise, of variance 1, cannot be learnt."""
    x_key, noise_key = jax.random.split(jax.random.key(number))
    x = jax.random.normal(x_key, (BATCH, WIDTH))
    return x, jnp.roll(x, 1, axis=-1) + jax.random.normal(noise_key, (BATCH, WIDTH))


def train(recipe):
    """Train, and return the mean loss of the last ten steps."""
    model = MLP(recipe)
    variables = model.init(jax.random.key(0), jnp.zeros((1, WIDTH)))
    state = TrainState.create(apply_fn=model.apply, params=variables, tx=optax.adamw(3e-3))
    losses = []
    for number in range(STEPS):
        state, loss = step(state, *batch(number))
        losses.append(loss)
    return float(jnp.mean(jnp.stack(losses[-10:])))


def main():
    fp8 = train(fp8jax.Recipe(scaling="delayed", history_length=64))
    plain = train(None)
    print(f"loss in FP8 {fp8:.4f}, without {plain:.4f}, ratio {fp8 / plain:.4f}")


if __name__ == "__main__":
    main()
