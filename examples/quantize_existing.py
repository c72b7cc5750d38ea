"""A Llama written in plain flax.nnx, turned into FP8 from outside, trained a little, and turned back.

python examples/quantize_existing.py
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import fp8jax

VOCAB, WIDTH, LAYERS, HEADS, KV_HEADS = 64, 64, 2, 4, 2


def rotate(x_btnh):
    """Apply RoPE."""
    half = x_btnh.shape[-1] // 2
    angles = jnp.arange(x_btnh.shape[1])[:, None] * 1e4 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angles)[:, None, :], jnp.sin(angles)[:, None, :]
    left, right = jnp.split(x_btnh, 2, axis=-1)
    return jnp.concatenate([left * cos - right * sin, left * sin + right * cos], axis=-1)


class Attention(nnx.Module):
    def __init__(self, rngs):
        head = WIDTH // HEADS
        self.query = nnx.LinearGeneral(WIDTH, (HEADS, head), use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(WIDTH, (KV_HEADS, head), use_bias=False, rngs=rngs)
        self.value = nnx.LinearGeneral(WIDTH, (KV_HEADS, head), use_bias=False, rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, head), WIDTH, axis=(-2, -1), use_bias=False, rngs=rngs)

    def __call__(self, x):
        q, k, v = rotate(self.query(x)), rotate(self.key(x)), self.value(x)
        return self.out(jax.nn.dot_product_attention(q, k, v, is_causal=True))


class FeedForward(nnx.Module):
    def __init__(self, rngs):
        self.gate = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(WIDTH, 2 * WIDTH, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, rngs):
        self.attention_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.attention = Attention(rngs)
        self.mlp_norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.mlp = FeedForward(rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
        self.layers = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)
        self.lm_head = nnx.Linear(WIDTH, VOCAB, use_bias=False, rngs=rngs)

    def __call__(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


def loss_fn(model, ids):
    logits = model(ids[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


@nnx.jit
def step(model, optimizer, ids):
    loss, grads = fp8jax.nnx.value_and_grad(loss_fn)(model, ids)
    optimizer.update(model, grads)
    return loss


def train(model, ids, steps=30):
    optimizer = nnx.Optimizer(model, optax.adamw(3e-3), wrt=nnx.Param)
    losses = [step(model, optimizer, ids) for _ in range(steps)]
    return float(losses[-1])


def main():
    ids = (jnp.arange(33)[None] * jnp.arange(1, 9)[:, None]) % VOCAB  # rows that count
    recipe = fp8jax.Recipe(scaling="delayed", history_length=16)
    rules = [("lm_head", None), ("*.attention.*", recipe), ("*.mlp.*", recipe)]
    model = fp8jax.nnx.quantize(Llama(nnx.Rngs(0)), rules)
    print(f"loss in FP8 {train(model, ids):.4f}, without {train(Llama(nnx.Rngs(0)), ids):.4f}")

    plain = fp8jax.nnx.dequantize(model)
    shared = model.layers[0].mlp.up.kernel is plain.layers[0].mlp.up.kernel
    print(f"turned back: {type(plain.layers[0].mlp.up).__module__}, the same parameters: {shared}")


if __name__ == "__main__":
    main()
