"""Estimate what a step sends and its least time on 8 to 4096 H100s: the figures of docs/scaling.md.

    python benchmarks/scaling.py                 # all, some minutes on 2 cores; needs requirements-audit.txt, no GPU
    python benchmarks/scaling.py --only=8b/512   # cases whose name contains this; the others are kept

Each step is compiled whole, all layers and the whole batch, for a mesh that fits (or, to show that
it does not, for one that does not), and read by the audit. Bytes are those of the compiled program;
seconds are a roofline at peak rates: 450 GB/s between the GPUs of a node, 50 GB/s per GPU between
nodes. Nothing is measured. The script writes results/scaling.json and prints the table of
docs/scaling.md.
"""

import argparse
import json
import pathlib
import sys
from typing import Any, NamedTuple

import jax

jax.config.update("jax_platforms", "cpu")

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from configs import common
from fp8jax import config as config_lib
from fp8jax.audit import targets
from fp8jax.cli.audit_step import audit

RESULTS = ROOT / "benchmarks/results/scaling.json"


class Case(NamedTuple):
    """A size on a number of nodes of 8 GPUs; sizes of data, fsdp, tensor, sequence; microbatches of the size's own batch."""

    size: str
    nodes: int
    mesh: tuple[int, int, int, int]
    microbatches: int

    @property
    def name(self) -> str:
        """Return the name, such as '8b/512 data 64 x fsdp 8'."""
        axes = [
            f"{axis} {size}"
            for axis, size in zip(config_lib.MESH_AXES, self.mesh, strict=True)
            if size > 1
        ]
        return f"{self.size}/{self.nodes * 8} {' x '.join(axes)}"


CASES = [
    Case("8b", 1, (1, 8, 1, 1), 64),
    Case("8b", 8, (8, 8, 1, 1), 8),
    Case("8b", 8, (1, 64, 1, 1), 8),
    Case("8b", 64, (64, 8, 1, 1), 1),
    Case("8b", 64, (8, 8, 8, 1), 8),
    Case("8b", 512, (64, 8, 8, 1), 1),
    Case("8b", 512, (64, 8, 1, 8), 1),
    Case("70b", 1, (1, 8, 1, 1), 128),
    Case("70b", 8, (1, 64, 1, 1), 16),
    Case("70b", 8, (1, 8, 8, 1), 128),
    Case("70b", 64, (8, 64, 1, 1), 2),
    Case("70b", 64, (8, 8, 8, 1), 16),
    Case("70b", 512, (64, 8, 8, 1), 2),
    Case("70b", 512, (16, 32, 8, 1), 2),
]


def measure(case: Case) -> dict[str, Any]:
    """Return the audit's findings on one case, in short."""
    config = common.make(case.size, architecture="fog_max", recipe="fp8_dpa")
    config.mesh.update(dict(zip(config_lib.MESH_AXES, case.mesh, strict=True)))
    config.training.update(microbatches=case.microbatches, remat="save_fp8", loss_chunk=0)
    found = audit(config_lib.from_dict(config), targets.resolve(f"h100:{case.nodes}x8"))
    sent: dict[str, int] = {}
    for row in found["collectives"]:
        key = f"{' x '.join(row['axes'])}: {row['kind']} {row['dtype']}"
        sent[key] = sent.get(key, 0) + row["sent"]
    estimate = found["estimate"]
    keys = (
        "gemm_seconds",
        "memory_seconds",
        "collective_seconds",
        "step_seconds",
        "step_seconds_no_overlap",
        "mfu_bf16",
        "tokens_per_second_per_device",
    )
    return {
        "size": case.size,
        "devices": case.nodes * 8,
        "mesh": list(case.mesh),
        "microbatches": case.microbatches,
        "sent": dict(sorted(sent.items(), key=lambda item: -item[1])),
        "peak_bytes": found["memory"]["peak_bytes_per_device"],
        "fits": found["memory"]["fits"],
        "fp8_share": found["fp8_share"],
        **{key: estimate[key] for key in keys},
    }


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Return the table as lines of Markdown."""
    lines = [
        "| run | sent a GPU and step, GB, by mesh axes | memory, GB | GEMMs, s | rest, s | network, s | step, s | MFU | tokens/s a GPU |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name in (case.name for case in CASES if case.name in results):
        row = results[name]
        by_axes: dict[str, float] = {}
        for key, size in row["sent"].items():
            axes = key.partition(":")[0]
            by_axes[axes] = by_axes.get(axes, 0) + size / 1e9
        sent = ", ".join(f"{axes} {size:,.1f}" for axes, size in by_axes.items() if size >= 0.05)
        fits = "" if row["fits"] else " (too much)"
        lines.append(
            f"| {name} | {sent} | {row['peak_bytes'] / 1e9:,.0f}{fits} | {row['gemm_seconds']:.2f} | {row['memory_seconds']:.2f} | "
            f"{row['collective_seconds']:.2f} | {row['step_seconds']:.2f} to {row['step_seconds_no_overlap']:.2f} | "
            f"{row['mfu_bf16']:.0%} | {row['tokens_per_second_per_device']:,.0f} |"
        )
    return lines


def main() -> None:
    """Compile, write and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="part of the names of the cases to compile")
    only = parser.parse_args().only
    for case in CASES:
        if only in case.name:
            print(f"compiling {case.name} ...", file=sys.stderr, flush=True)
            found = measure(case)
            results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
            RESULTS.write_text(json.dumps(results | {case.name: found}, indent=1) + "\n")
    print("\n".join(table(json.loads(RESULTS.read_text()))))


if __name__ == "__main__":
    main()
