"""Time causal FP8 attention, forward and with its backward pass, against BF16 (cuDNN's flash attention on a GPU).

    python benchmarks/attention.py --size=8b --lengths=4096,8192
    python benchmarks/attention.py --size=tiny --rounds=2

Heads are the size's. Every backend takes turns with BF16, so that `speed`, relative to BF16 in the
same run, holds. FLOPs are those of causal attention, 2 GEMMs forward and 5 backward over half the
square. A backend that fails is a row with its error.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp

from configs import common as configs
from fp8jax.numerics.attention.definition import BACKENDS, SCORES, VALUES, attention
from fp8jax.numerics.compiling import compiler_options
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe

PASSES = {"forward": 2, "forward+backward": 7}


def bf16(q, k, v, scale: float):
    """Compute BF16 attention by jax.nn, q [b, t, k, g, h]."""
    b, t, kv, groups, h = q.shape
    kind = "cudnn" if common.on_gpu() else None
    o = jax.nn.dot_product_attention(
        q.reshape(b, t, kv * groups, h), k, v, scale=scale, is_causal=True, implementation=kind
    )
    return o.reshape(q.shape)


def fp8(q, k, v, scale: float, backend: str, scaling: str, fast: str = "fprop"):
    """Compute FP8 attention; its scales, under delayed scaling, are constants."""
    recipes = {
        role: GemmRecipe(scaling, emulated=not common.on_gpu(), fast_accumulation=fast)
        for role in (SCORES, VALUES)
    }
    scales = {role: jnp.full(len(OPERANDS[role]), 1 / 64, jnp.float32) for role in recipes}
    return attention(q, k, v, recipes, softmax_scale=scale, scales=scales, backend=backend)


def jitted(forward: Callable[..., jax.Array], passes: str) -> Callable[..., Any]:
    """Return a jitted function of (q, k, v, do) that returns the output, or output and gradients."""

    def run(q, k, v, do):
        if passes == "forward":
            return forward(q, k, v)
        o, pull = jax.vjp(forward, q, k, v)
        return o, pull(do)

    return jax.jit(run, compiler_options=compiler_options(jax.default_backend()))


def candidates(head: int, scalings: Sequence[str]) -> dict[str, Callable[..., jax.Array]]:
    """Return name → attention of q, k, v; with FP8 units, `emulated` is left out, as it is a definition."""
    backends = [backend for backend in BACKENDS if backend != "emulated" or not common.on_gpu()]
    found = {"bf16": functools.partial(bf16, scale=head**-0.5)}
    for scaling in scalings:
        found |= {
            f"{backend}, {scaling}": functools.partial(
                fp8, scale=head**-0.5, backend=backend, scaling=scaling
            )
            for backend in backends
        }
    return found | {
        "pallas, delayed, fast": functools.partial(
            fp8, scale=head**-0.5, backend="pallas", scaling="delayed", fast="all"
        )
    }


def measure(length: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the rows of one length."""
    s = configs.SIZES[args.size]
    kv, head = s["kv_heads"], s["width"] // s["heads"]
    many, few = (args.batch, length, kv, s["heads"] // kv, head), (args.batch, length, kv, head)
    arrays = [
        jax.random.normal(jax.random.key(i), shape, jnp.bfloat16)
        for i, shape in enumerate((many, few, few, many))
    ]
    rows = []
    for passes, gemms in PASSES.items():
        forwards = candidates(head, args.scalings.split(","))
        calls = {
            name: functools.partial(jitted(forward, passes), *arrays)
            for name, forward in forwards.items()
        }
        found, failed = common.surviving(calls, args.rounds)
        flops = gemms * args.batch * s["heads"] * length**2 * head
        rows += [
            {
                "attention": name,
                "length": length,
                "passes": passes,
                "ms": seconds * 1e3,
                "tflops_per_second": flops / seconds / 1e12,
                "speed": found["bf16"] / seconds if "bf16" in found else None,
            }
            for name, seconds in found.items()
        ]
        rows += [
            {"attention": name, "length": length, "passes": passes, "error": error}
            for name, error in failed.items()
        ]
    return rows


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Print the table, write the results, and return their file."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/attention.py --size=tiny",
    )
    parser.add_argument(
        "--size", default="8b" if common.on_gpu() else "tiny", choices=configs.SIZES
    )
    parser.add_argument("--lengths", default="4096,2048,8192,16384" if common.on_gpu() else "256")
    parser.add_argument("--scalings", default="delayed,current")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for length in map(int, args.lengths.split(",")):
        rows += measure(length, args)
        path = common.save(
            f"attention-{args.size}", rows, args.results, show=False, batch=args.batch
        )
    common.print_table(rows)
    return path


if __name__ == "__main__":
    main()
