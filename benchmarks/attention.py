"""Times causal FP8 attention, forward and backward, against BF16 (cuDNN's flash attention on a GPU).

    python benchmarks/attention.py --size=8b --length=4096

`speed` is relative to BF16 in the same run.
"""

import argparse
import functools
import pathlib
from collections.abc import Sequence

import common
import jax
import jax.numpy as jnp

from configs import common as configs
from fp8jax.numerics.attention import SCORES, VALUES, attention
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe


def bf16(q, k, v, scale: float):
    """BF16 attention by jax.nn, q [b, t, k, g, h]."""
    b, t, kv, groups, h = q.shape
    kind = "cudnn" if common.on_gpu() else None
    o = jax.nn.dot_product_attention(q.reshape(b, t, kv * groups, h), k, v, scale=scale, is_causal=True, implementation=kind)
    return o.reshape(q.shape)


def fp8(q, k, v, scale: float, backend: str, scaling: str):
    """FP8 attention; its scales, under delayed scaling, are constants."""
    recipes = {role: GemmRecipe(scaling, emulated=not common.on_gpu()) for role in (SCORES, VALUES)}
    scales = {role: jnp.full(len(OPERANDS[role]), 1 / 64, jnp.float32) for role in recipes}
    return attention(q, k, v, recipes, softmax_scale=scale, scales=scales, backend=backend)


def both(forward):
    """Jitted forward and backward pass."""
    def run(q, k, v, do):
        o, pull = jax.vjp(forward, q, k, v)
        return o, pull(do)

    return jax.jit(run, compiler_options={"xla_gpu_enable_triton_gemm": False} if common.on_gpu() else None)


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Prints the table and writes the results; returns their file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", default="8b" if common.on_gpu() else "tiny", choices=configs.SIZES)
    parser.add_argument("--length", type=int, default=4096 if common.on_gpu() else 256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    s = configs.SIZES[args.size]
    kv, head = s["kv_heads"], s["width"] // s["heads"]
    many, few = (args.batch, args.length, kv, s["heads"] // kv, head), (args.batch, args.length, kv, head)
    arrays = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i, shape in enumerate((many, few, few, many))]
    kinds = {"bf16": functools.partial(bf16, scale=head**-0.5)}
    kinds |= {f"{backend}, {scaling}": functools.partial(fp8, scale=head**-0.5, backend=backend, scaling=scaling)
              for backend, scaling in (("composed", "delayed"), ("composed", "current"), ("emulated", "delayed"))}
    found = common.interleaved({name: functools.partial(both(forward), *arrays) for name, forward in kinds.items()}, args.rounds)
    rows = [{"attention": name, "length": args.length, "ms": seconds * 1e3, "speed": found["bf16"] / seconds}
            for name, seconds in found.items()]
    return common.save(f"attention-{args.size}", rows, args.results)


if __name__ == "__main__":
    main()
