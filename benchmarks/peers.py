"""Times the FFN's linear layers, forward and backward, in fp8jax, flax's fp8_ops, qwix and BF16, in turns: same shapes, same stack.

    python benchmarks/peers.py --size=tiny

Two layers, up and down with GELU between, without attention. A peer that is not installed, or fails, is a row that says so.
"""

import argparse
import functools
import pathlib
from collections.abc import Sequence

import common
import flax.linen as nn
import jax
import jax.numpy as jnp

from configs import common as configs
from fp8jax.numerics.dot_general import dot_general
from fp8jax.numerics.recipes import GemmRecipe


class Ffn(nn.Module):
    """Flax's own layers, with a peer's dot_general."""

    hidden: int
    dot: type | None = None

    @nn.compact
    def __call__(self, x):
        """[tokens, width] to the same."""
        dense = functools.partial(nn.Dense, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=self.dot)
        return dense(x.shape[-1])(nn.gelu(dense(self.hidden)(x)))


def step(model: nn.Module, x: jax.Array):
    """Jitted forward and backward pass of a flax model; a call runs it."""
    variables = model.init(jax.random.key(0), x)
    run = jax.jit(jax.value_and_grad(lambda v, x: jnp.sum(model.apply(v, x).astype(jnp.float32) ** 2), (0, 1), allow_int=True))
    return functools.partial(run, variables, x)


def ours(hidden: int, x: jax.Array):
    """The same in fp8jax, with delayed scaling."""
    recipe, dims = GemmRecipe("delayed", emulated=not common.on_gpu()), (((1,), (0,)), ((), ()))
    up = jax.random.normal(jax.random.key(0), (x.shape[1], hidden)) * 0.02
    scales, tokens = jnp.full((2, 2), 1 / 64, jnp.float32), jnp.zeros((2, 2), jnp.float32)

    def loss(weights, tokens, x):
        h = nn.gelu(dot_general(x, weights[0], dims, recipe, scales=scales[0], token=tokens[0]))
        y = dot_general(h, weights[1], dims, recipe, scales=scales[1], token=tokens[1])
        return jnp.sum(y.astype(jnp.float32) ** 2)

    return functools.partial(jax.jit(jax.value_and_grad(loss, (0, 1, 2))), (up, up.T), tokens, x)


def with_qwix(hidden: int, x: jax.Array):
    """Flax's layers, quantised by qwix: e4m3 forward, e5m2 gradients."""
    import qwix  # noqa: PLC0415

    rule = qwix.QtRule(weight_qtype=jnp.float8_e4m3fn, act_qtype=jnp.float8_e4m3fn, bwd_qtype=jnp.float8_e5m2)
    return step(qwix.quantize_model(Ffn(hidden), qwix.QtProvider([rule])), x)


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Prints the table and writes the results; returns their file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="8b" if common.on_gpu() else "tiny", choices=configs.SIZES)
    parser.add_argument("--tokens", type=int, default=8192 if common.on_gpu() else 2048)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    s = configs.SIZES[args.size]
    hidden = s["ffn_width"] * 3 // 2
    x = jax.random.normal(jax.random.key(1), (args.tokens, s["width"]), jnp.bfloat16)
    kinds = {"bf16": lambda: step(Ffn(hidden), x), "fp8jax": lambda: ours(hidden, x),
             "flax fp8_ops": lambda: step(Ffn(hidden, nn.Fp8DirectDotGeneralOp), x), "qwix": lambda: with_qwix(hidden, x)}
    calls, failed = {}, []
    for name, make in kinds.items():
        try:
            calls[name] = make()
            jax.block_until_ready(calls[name]())
        except Exception as error:  # noqa: BLE001  a peer's failure is a result
            calls.pop(name, None)
            failed.append({"peer": name, "error": f"{type(error).__name__}: {error}".splitlines()[0][:160]})
    found = common.interleaved(calls, args.rounds)
    first = next(iter(found.values()))
    rows = [{"peer": name, "ms": seconds * 1e3, "speed": first / seconds} for name, seconds in found.items()]
    return common.save(f"peers-{args.size}", rows + failed, args.results, tokens=args.tokens, scope="FFN forward+backward")


if __name__ == "__main__":
    main()
