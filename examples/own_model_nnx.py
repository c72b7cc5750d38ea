"""An MLP of one's own in Flax NNX, trained in FP8 with delayed scaling and again without: the losses are close.

python examples/own_model_nnx.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import fp8jax

STEPS, BATCH, WIDTH = 100, 64, 64


class MLP(nnx.Module):
    def __init__(self, recipe, rngs):
        self.up = fp8jax.nnx.Linear(WIDTH, 4 * WIDTH, recipe=recipe, role="up", rngs=rngs)
        self.down = fp8jax.nnx.Linear(4 * WIDTH, WIDTH, recipe=recipe, role="down", rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


@nnx.jit
def step(model, optimizer, x, y):
    loss, grads = fp8jax.nnx.value_and_grad(loss_fn)(model, x, y)
    optimizer.update(model, grads)
    return loss


def batch(number):
    """Return inputs and a noisy linear function of them: its noise, of variance 1, cannot be learnt."""
    x_key, noise_key = jax.random.split(jax.random.key(number))
    x = jax.random.normal(x_key, (BATCH, WIDTH))
    return x, jnp.roll(x, 1, axis=-1) + jax.random.normal(noise_key, (BATCH, WIDTH))


def train(recipe):
    """Train, and return the mean loss of the last ten steps."""
    model = MLP(recipe, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    losses = [step(model, optimizer, *batch(number)) for number in range(STEPS)]
    return float(jnp.mean(jnp.stack(losses[-10:])))


def main():
    fp8 = train(fp8jax.Recipe(scaling="delayed", history_length=64))
    plain = train(None)
    print(f"loss in FP8 {fp8:.4f}, without {plain:.4f}, ratio {fp8 / plain:.4f}")


if __name__ == "__main__":
    main()
