"""Find the fastest tiles of the FP8 attention kernels on the GPU at hand, for the table in numerics/attention/pallas.py.

    python benchmarks/tune_attention.py --head_dim=128 --length=4096

The script compiles every candidate, times those that the compiler accepts, kernel by kernel, and
prints the best as lines of the table. Attention is causal, with 8 KV heads of 4 query heads each.
Results go to benchmarks/results/tune_attention-HEAD_DIM-ACCUMULATION-DEVICE.json.
"""

import argparse
import concurrent.futures
import pathlib
import statistics
import time
from collections.abc import Sequence
from typing import Any

import common
import jax
import jax.numpy as jnp

from fp8jax.numerics.attention import pallas as attention_pallas
from fp8jax.numerics.attention.kernels import Tile
from fp8jax.numerics.attention.pallas import FORWARD, KEYS, QUERIES
from fp8jax.numerics.attention.rows import Call, Operands, Residuals
from fp8jax.numerics.formats import E4M3, FORMATS, Quantised
from fp8jax.numerics.recipes import FAST_ACCUMULATION, GemmRecipe

# Rows of a product are queries in two kernels and keys in the third; the tensor cores want 64 of
# them a group of four warps.
_BY_ROWS = (
    ((64, 32), 4),
    ((64, 64), 4),
    ((64, 128), 4),
    ((64, 64), 8),
    ((64, 128), 8),
    ((128, 64), 8),
    ((128, 128), 8),
)
CALLS = 5  # calls that are started together, so that the cost of starting them is hidden


def candidates(kernel: str) -> list[Tile]:
    """Return the tiles to try."""
    pairs = [
        ((columns, rows) if kernel == KEYS else (rows, columns), warps)
        for (rows, columns), warps in _BY_ROWS
    ]
    return [Tile(*pair, warps, stages) for pair, warps in pairs for stages in (2, 3, 4)]


def inputs(
    batch: int, length: int, head_dim: int, gradient_format: str
) -> tuple[Operands, Residuals]:
    """Return random operands of one attention and residuals of its forward pass, the log-sum-exp a plausible constant."""
    keys = iter(jax.random.split(jax.random.key(0), 5))

    def random(*shape: int, dtype: Any = E4M3) -> Quantised:
        return Quantised(
            jax.random.normal(next(keys), shape, jnp.float32).astype(dtype), jnp.float32(1)
        )

    few, many = (batch, length, 8, head_dim), (batch, length, 8, 4, head_dim)
    rows = jnp.full(many[:4], 8.0, jnp.float32)
    return (
        Operands(random(*many), random(*few), random(*few), None),
        Residuals(random(*many, dtype=FORMATS[gradient_format]), rows, jnp.zeros_like(rows)),
    )


def program(kernel: str, tile: Tile, call: Call, operands: Operands, residuals: Residuals) -> Any:
    """Return the compiled kernel, or the compiler's error."""
    tiles = attention_pallas.TILES | {(kernel, operands.q.data.shape[-1]): tile}

    def run(operands, residuals):
        if kernel == FORWARD:
            return attention_pallas.forward(call, operands, tiles)
        dq, dk, dv, _ = attention_pallas.backward(call, operands, residuals, jnp.float32(1), tiles)
        return dq if kernel == QUERIES else (dk, dv)  # unused results are not compiled

    try:
        return jax.jit(run).lower(operands, residuals).compile()
    except Exception as error:  # noqa: BLE001 - tiles that do not fit the device raise many kinds
        return str(error).splitlines()[0]


def seconds(executable: Any, operands: Operands, residuals: Residuals, rounds: int) -> float:
    """Return the median seconds of one call."""
    found = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        jax.block_until_ready([executable(operands, residuals) for _ in range(CALLS)])
        found.append((time.perf_counter() - start) / CALLS)
    return statistics.median(found[1:])


def tune(
    kernel: str, args: argparse.Namespace, call: Call, given: tuple[Operands, Residuals]
) -> list[dict[str, Any]]:
    """Return the rows of one kernel, fastest first."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        tiles = candidates(kernel)
        programs = list(pool.map(lambda tile: program(kernel, tile, call, *given), tiles))
    rows = []
    for tile, executable in zip(tiles, programs, strict=True):
        row = {"kernel": kernel, "head_dim": args.head_dim, "length": args.length, **tile._asdict()}
        failed = isinstance(executable, str)
        rows.append(
            row
            | (
                {"ms": None, "error": executable}
                if failed
                else {"ms": seconds(executable, *given, args.rounds) * 1e3}
            )
        )
    return sorted(rows, key=lambda row: row["ms"] or 1e9)


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Print the tables, write the results, and return their file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head_dim", type=int, default=128, choices=attention_pallas.HEAD_DIMS)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--gradient_format", default="e5m2", choices=FORMATS)
    parser.add_argument("--fast_accumulation", default="all", choices=FAST_ACCUMULATION)
    parser.add_argument("--kernels", default=f"{FORWARD},{QUERIES},{KEYS}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    recipe = GemmRecipe(
        "delayed",
        emulated=False,
        gradient_format=args.gradient_format,
        fast_accumulation=args.fast_accumulation,
    )
    call = Call(recipe, recipe, args.head_dim**-0.5, jnp.dtype(jnp.bfloat16))
    given = inputs(args.batch, args.length, args.head_dim, args.gradient_format)
    rows = [row for kernel in args.kernels.split(",") for row in tune(kernel, args, call, given)]
    for kernel in args.kernels.split(","):
        best = next(row for row in rows if row["kernel"] == kernel)
        sizes = ", ".join(str(best[field]) for field in Tile._fields)
        print(f"    ({kernel!r}, {args.head_dim}): Tile({sizes}),  # {best['ms']:.3f} ms")
    return common.save(
        f"tune_attention-{args.head_dim}-{args.fast_accumulation}", rows, args.results
    )


if __name__ == "__main__":
    main()
