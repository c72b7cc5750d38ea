"""A Llama-like model in flax.nnx, written as users write theirs: nothing of fp8jax."""

import jax
import jax.numpy as jnp
from flax import nnx


class Attention(nnx.Module):
    def __init__(self, width, heads, kv_heads, rngs):
        self.heads, self.kv_heads, self.features = heads, kv_heads, width // heads
        self.wq = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.wk = nnx.Linear(width, kv_heads * self.features, use_bias=False, rngs=rngs)
        self.wv = nnx.Linear(width, kv_heads * self.features, use_bias=False, rngs=rngs)
        self.wo = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        b, t, _ = x.shape
        q = self.wq(x).reshape(b, t, self.heads, self.features)
        k = self.wk(x).reshape(b, t, self.kv_heads, self.features)
        v = self.wv(x).reshape(b, t, self.kv_heads, self.features)
        o = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        return self.wo(o.reshape(b, t, -1))


class FeedForward(nnx.Module):
    def __init__(self, width, rngs):
        self.gate = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.up = nnx.Linear(width, 2 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = Attention(width, 4, 2, rngs)
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.mlp = FeedForward(width, rngs)

    def __call__(self, x):
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Llama(nnx.Module):
    def __init__(self, *, vocab=64, width=32, layers=2, rngs):
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        self.layers = nnx.List([Block(width, rngs) for _ in range(layers)])
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.lm_head = nnx.Linear(width, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


class StackedLlama(nnx.Module):
    """The same with layers made by nnx.vmap, and run by nnx.scan with rematerialisation."""

    def __init__(self, *, vocab=64, width=32, layers=2, rngs):
        self.embed = nnx.Embed(vocab, width, rngs=rngs)
        make = nnx.vmap(lambda rngs: Block(width, rngs), in_axes=0, out_axes=0)
        self.layers = make(rngs.fork(split=layers))
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.lm_head = nnx.Linear(width, vocab, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        run = nnx.scan(
            nnx.remat(lambda x, layer: layer(x)), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return self.lm_head(self.norm(run(self.embed(tokens), self.layers)))


def next_token_loss(model, tokens):
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    picked = jnp.take_along_axis(nnx.log_softmax(logits), tokens[:, 1:, None], axis=-1)
    return -jnp.mean(picked)
