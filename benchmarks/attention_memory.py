"""Print memory and GEMMs of FP8 attention, forward and backward, from compiled programs, without running them.

    python benchmarks/attention_memory.py                                   # for the device at hand
    python benchmarks/attention_memory.py --target=h100.txtpb               # for one H100 that is not there
    python benchmarks/attention_memory.py --lengths=4096,32768 --scaling=current

A target is XLA's text of a GPU's properties; compiling for it takes jax's CUDA plugin, and
JAX_SKIP_CUDA_CONSTRAINTS_CHECK=1 in the environment of a machine without a GPU. One sequence, 8 KV
heads with 4 query heads each, heads of 128 (8b's). The table has MiB of temporaries, ratio to the
row before, FP8 and other GEMMs in the program. `emulated`, which keeps all scores, stands beside
`composed`. attention.py measures speed, on a device.
"""

import argparse
import pathlib
import re

import common  # noqa: F401  puts fp8jax on the path
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fp8jax.numerics.attention.definition import BACKENDS, SCORES, VALUES, attention
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe

HEADS, GROUPS, WIDTH = 8, 4, 128
OPTIONS = {"xla_gpu_autotune_level": "0", "xla_gpu_enable_triton_gemm": False}


def target_device(path: str | None) -> jax.Device:
    """Return the first local device, or the one that the text at `path` describes."""
    if path is None:
        return jax.devices()[0]
    text = pathlib.Path(path).read_text()
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="h100", topology="1x1x1", target_config=text
    )
    return topology.devices[0]


def compiled(device: jax.Device, backend: str, scaling: str, length: int) -> jax.stages.Compiled:
    """Compile forward and backward pass of one attention for a device, with FP8 GEMMs unless it is a CPU."""
    sharding = NamedSharding(Mesh(np.array([device]), ("data",)), PartitionSpec())
    recipes = {
        role: GemmRecipe(scaling, emulated=device.platform == "cpu") for role in (SCORES, VALUES)
    }

    def both(q, k, v, do, scales, tokens):
        def forward(q, k, v, tokens):
            return attention(
                q,
                k,
                v,
                recipes,
                softmax_scale=WIDTH**-0.5,
                scales=scales,
                tokens=tokens,
                backend=backend,
            )

        o, backward = jax.vjp(forward, q, k, v, tokens)
        return o, *backward(do)

    def array(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    q, k = array(1, length, HEADS, GROUPS, WIDTH), array(1, length, HEADS, WIDTH)
    scales = {role: array(len(OPERANDS[role]), dtype=jnp.float32) for role in recipes}
    lowered = (
        jax.jit(both)
        .trace(q, k, k, q, scales, scales)
        .lower(lowering_platforms=(_platform(device),))
    )
    return lowered.compile(compiler_options=OPTIONS if _platform(device) == "cuda" else None)


def _platform(device: jax.Device) -> str:
    return "cuda" if device.platform in ("gpu", "cuda") else device.platform


def gemm_counts(text: str) -> tuple[int, int]:
    """Count FP8 GEMMs and others in a compiled program; a loop's body counts once."""
    targets = re.findall(r'custom_call_target="(__cublas[^"]*|__onednn[^"]*)"|= \S+ (dot)\(', text)
    names = [a or b for a, b in targets]
    fp8 = sum(name.endswith("$f8") for name in names)
    return fp8, len(names) - fp8


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/attention_memory.py --lengths=1024,4096",
    )
    parser.add_argument("--target", help="text of a GPU's properties; default: the device at hand")
    parser.add_argument("--lengths", default="1024,4096,16384")
    parser.add_argument("--scaling", default="delayed", choices=("delayed", "current"))
    args = parser.parse_args()
    device = target_device(args.target)
    print(f"{device.device_kind}, jax {jax.__version__}, scaling {args.scaling}\n")
    print(
        "| backend | tokens | temporaries, MiB | ratio | FP8 GEMMs | others |\n|---|---:|---:|---:|---:|---:|"
    )
    for backend in reversed(BACKENDS):
        before = None
        for length in map(int, args.lengths.split(",")):
            program = compiled(device, backend, args.scaling, length)
            size = program.memory_analysis().temp_size_in_bytes / 2**20
            fp8, others = gemm_counts(program.as_text())
            ratio = f"{size / before:.2f}" if before else ""
            print(f"| {backend} | {length} | {size:.0f} | {ratio} | {fp8} | {others} |", flush=True)
            before = size


if __name__ == "__main__":
    main()
