"""Outlier statistics of a model in BF16: no FP8 anywhere, only `tap`, `collecting` and `kurtosis`.

    python examples/outliers_only.py

A residual stream with one feature that grows is planted in the second of two blocks; the kurtosis
finds it, where the loss says nothing.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import fp8jax

WIDTH = 64


class Block(nnx.Module):
    def __init__(self, rngs):
        bf16 = {"dtype": jnp.bfloat16, "rngs": rngs}
        self.norm = nnx.RMSNorm(WIDTH, **bf16)
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, **bf16)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, **bf16)

    def __call__(self, x):
        hidden = nnx.gelu(self.up(self.norm(x)))
        out = x + self.down(hidden)
        fp8jax.tap("mlp_hidden", hidden)
        fp8jax.tap("block_out", out)
        return out


@nnx.jit
def statistics(blocks, x):
    """Return each block's statistics: name → mean, rms, kurtosis."""
    per_block = []
    for block in blocks:
        with fp8jax.collecting() as found:
            x = block(x)
        per_block.append(found)
    return per_block


def main():
    rngs = nnx.Rngs(0)
    blocks = nnx.List([Block(rngs) for _ in range(2)])
    bias = blocks[1].down.bias
    bias.set_value(bias.get_value().at[7].set(30.0))  # the outlier
    x = jax.random.normal(jax.random.key(1), (4, 32, WIDTH), jnp.bfloat16)
    for number, found in enumerate(statistics(blocks, x)):
        for name, values in found.items():
            rms, kurtosis = float(values["rms"]), float(values["kurtosis"])
            print(f"block {number}  {name:<10}  rms {rms:6.2f}  kurtosis {kurtosis:6.2f}")
    weights = blocks[0].up.kernel.get_value()
    print(f"weights, without a model: kurtosis {float(fp8jax.kurtosis(weights)):.2f}")


if __name__ == "__main__":
    main()
