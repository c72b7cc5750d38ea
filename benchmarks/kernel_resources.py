"""List registers, spills and shared memory of the FP8 attention kernels, from the compiler, without a GPU.

    python benchmarks/kernel_resources.py                 # all kernels and head dims, 4096 tokens, for an H100

The script compiles forward and backward attention for an H100 that need not be there
(requirements-audit.txt), and asks `ptxas`, of NVIDIA's CUDA toolkit, what each kernel takes.
`wgmma` counts tensor-core instructions on FP8 operands in a kernel's text.
"""

import argparse
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
import common
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from fp8jax.audit import targets
from fp8jax.numerics.attention.definition import SCORES, VALUES, attention
from fp8jax.numerics.attention.pallas import FORWARD, HEAD_DIMS, KEYS, QUERIES, TILES
from fp8jax.numerics.recipes import FAST_ACCUMULATION, OPERANDS, GemmRecipe


def compile_into(folder: pathlib.Path, head_dim: int, length: int, recipe: GemmRecipe) -> None:
    """Compile one attention, forward and backward, with the compiler's dump in a folder."""
    recipes = {SCORES: recipe, VALUES: recipe}
    mesh = Mesh(np.array(targets.resolve("h100:1").devices), ("data",), axis_types=(AxisType.Auto,))

    def array(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    def both(q, k, v, do, scales):
        o, pull = jax.vjp(
            lambda q, k, v: attention(
                q, k, v, recipes, softmax_scale=0.1, scales=scales, backend="pallas"
            ),
            q,
            k,
            v,
        )
        return o, pull(do)

    q, k = array(1, length, 8, 4, head_dim), array(1, length, 8, head_dim)
    scales = {role: array(len(OPERANDS[role]), dtype=jnp.float32) for role in recipes}
    lowered = jax.jit(both).trace(q, k, k, q, scales).lower(lowering_platforms=("cuda",))
    lowered.compile(compiler_options={"xla_gpu_autotune_level": "0", "xla_dump_to": str(folder)})


def resources(folder: pathlib.Path, kernel: str) -> dict[str, int]:
    """Return registers and spilled bytes per thread, shared memory of a program, FP8 tensor-core instructions in the text."""
    name = f"fp8_attention_{kernel}"
    source = next(path for path in folder.glob("*.ptx") if f".entry {name}(" in path.read_text())
    launches = next(folder.glob("*thunk_sequence.txt")).read_text()
    command = ["ptxas", "-v", "-arch=sm_90a", str(source), "-o", str(folder / "kernel.cubin")]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    numbers = {
        "registers": (r"Used (\d+) registers", told),
        "spilled_bytes": (r"(\d+) bytes spill stores", told),
        "shared_memory_bytes": (rf"{name} .*shared_memory: (\d+) bytes", launches),
    }
    found = {key: int(re.search(pattern, text)[1]) for key, (pattern, text) in numbers.items()}
    return found | {
        "wgmma": len(re.findall(r"wgmma\.mma_async\S*\.e[45]m[23]\.e[45]m[23]", source.read_text()))
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="example: python benchmarks/kernel_resources.py"
    )
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    if not shutil.which("ptxas"):
        sys.exit("ptxas is not on the PATH: install NVIDIA's CUDA toolkit")
    rows = []
    for head_dim in HEAD_DIMS:
        for fast in FAST_ACCUMULATION:
            with tempfile.TemporaryDirectory() as name:
                folder = pathlib.Path(name)
                compile_into(
                    folder,
                    head_dim,
                    args.length,
                    GemmRecipe("delayed", emulated=False, fast_accumulation=fast),
                )
                rows += [
                    {
                        "kernel": kernel,
                        "head_dim": head_dim,
                        "fast_accumulation": fast,
                        **TILES[kernel, head_dim]._asdict(),
                        **resources(folder, kernel),
                    }
                    for kernel in (FORWARD, QUERIES, KEYS)
                ]
    common.save("kernel_resources-h100", rows, args.results)


if __name__ == "__main__":
    main()
