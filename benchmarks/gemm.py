"""Time one FP8 linear layer, forward and backward, against the same in BF16, at the shapes of a size's block.

    python benchmarks/gemm.py --size=8b --tokens=4096

A layer's three GEMMs with their casts are timed together, and fprop alone.
"""

import argparse
import functools
import pathlib
from collections.abc import Sequence

import common
import jax
import jax.numpy as jnp

from configs import common as configs
from fp8jax.numerics.compiling import compiler_options
from fp8jax.numerics.gemm import dot_general
from fp8jax.numerics.recipes import GemmRecipe

SCALINGS = ("bf16", "delayed", "current", "static")


def shapes(size: str) -> dict[str, tuple[int, int]]:
    """Return role → (inputs, outputs) of a size's block, with an FFN of two layers as in FOG."""
    s = configs.SIZES[size]
    head = s["width"] // s["heads"]
    hidden = s["ffn_width"] * 3 // 2
    return {
        "qkv": (s["width"], (s["heads"] + 2 * s["kv_heads"]) * head),
        "attention_out": (s["width"], s["width"]),
        "mlp_up": (s["width"], hidden),
        "mlp_down": (hidden, s["width"]),
    }


def linear(recipe: GemmRecipe, backward: bool):
    """Return a jitted function of (x, w, dy, scales, token) that returns the output, or its gradients."""

    def forward(x, w, scales, token):
        return dot_general(x, w, (((1,), (0,)), ((), ())), recipe, scales=scales, token=token)

    def both(x, w, dy, scales, token):
        if not backward:
            return forward(x, w, scales, token)
        y, pull = jax.vjp(lambda x, w, token: forward(x, w, scales, token), x, w, token)
        return y, pull(dy)

    return jax.jit(both, compiler_options=compiler_options(jax.default_backend()))


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Print the table, write the results, and return their file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", default="8b" if common.on_gpu() else "tiny", choices=configs.SIZES
    )
    parser.add_argument("--tokens", type=int, default=8192 if common.on_gpu() else 256)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    rows = []
    for role, (inputs, outputs) in shapes(args.size).items():
        x, w, dy = (
            jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
            for i, shape in enumerate(
                ((args.tokens, inputs), (inputs, outputs), (args.tokens, outputs))
            )
        )
        scales, token = jnp.full(2, 1 / 64, jnp.float32), jnp.zeros(2, jnp.float32)
        for backward in (False, True):
            calls = {
                scaling: functools.partial(
                    linear(GemmRecipe(scaling, emulated=not common.on_gpu()), backward),
                    x,
                    w,
                    dy,
                    scales,
                    token,
                )
                for scaling in SCALINGS
            }
            flops = 2 * args.tokens * inputs * outputs * (3 if backward else 1)
            found, failed = common.surviving(calls, args.rounds)
            passes = "fprop+dgrad+wgrad" if backward else "fprop"
            rows += [
                {"role": role, "passes": passes, "scaling": name, "error": error}
                for name, error in failed.items()
            ]
            rows += [
                {
                    "role": role,
                    "passes": passes,
                    "scaling": scaling,
                    "ms": seconds * 1e3,
                    "tflops_per_second": flops / seconds / 1e12,
                    "speed": found["bf16"] / seconds if "bf16" in found else None,
                }
                for scaling, seconds in found.items()
            ]
        path = common.save(f"gemm-{args.size}", rows, args.results, show=False, tokens=args.tokens)
    common.print_table(rows)
    return path


if __name__ == "__main__":
    main()
