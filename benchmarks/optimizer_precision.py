"""Compare optimizer states in fewer bits with float32, and the head in FP8 with BF16: same runs, several seeds, two plots.

    python benchmarks/optimizer_precision.py                         # 3 seeds of each at tiny; 12 runs, about an hour on 2 cores
    python benchmarks/optimizer_precision.py --only=states --seeds=1
    python benchmarks/optimizer_precision.py --steps=100             # cut short; its schedule is that of a run of 100 steps
    python benchmarks/optimizer_precision.py --only=head --size=390m --config.training.microbatches=8      # on a GPU
    python benchmarks/optimizer_precision.py --plot-only

A finished run is not repeated, an interrupted one is continued. Runs are written to
runs/optimizer_precision/, plots to docs/optimizer_precision.png and docs/fp8_head.png, the numbers
to benchmarks/results/optimizer_precision.json.
"""

import argparse
import json
import pathlib
import platform
import subprocess
import sys

import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common import ROOT

from fp8jax.monitor.writers import read_metrics

SMALL = [
    "--config.optimizer.gradient_dtype=bfloat16",
    "--config.optimizer.master_dtype=float16",
    "--config.optimizer.first_moment=fp8",
]
UNTIED = ["--config.model.tied_embeddings=False"]
# The first variant of each comparison is the base of the others.
COMPARISONS = {
    "states": {
        "float32": [],
        "fp8_fp16": [*SMALL, "--config.optimizer.second_moment=float16"],
        "fp8_fp8": [*SMALL, "--config.optimizer.second_moment=fp8"],
    },
    "head": {"bf16_head": UNTIED, "fp8_head": [*UNTIED, "--config.fp8.head=True"]},
}
PLOTS = {
    "states": (
        "optimizer_precision.png",
        "first and second moment, weights FP16, gradients BF16; float32: all float32",
    ),
    "head": ("fp8_head.png", "the head in BF16 and in FP8, untied"),
}
COLOURS = ("#0072b2", "#d55e00", "#009e73")
SMOOTHING = 5  # logged steps


def run(
    variant: str, flags: list[str], seed: int, arguments: argparse.Namespace, extra: list[str]
) -> list[dict]:
    """Train one run unless it is finished, and return its log."""
    workdir = ROOT / "runs" / "optimizer_precision" / f"{arguments.size}-{variant}-{seed}"
    log = workdir / "metrics.jsonl"
    if not arguments.plot_only and not (log.exists() and "held_out/loss" in read_metrics(log)[-1]):
        length = [f"--config.training.steps={arguments.steps}"] if arguments.steps else []
        command = [
            sys.executable,
            "train.py",
            f"--config=configs/fp8_base.py:{arguments.size}",
            f"--workdir={workdir}",
            *flags,
            f"--config.training.seed={seed}",
            "--config.evaluation.every=0",
            "--config.evaluation.batches=0",
            "--config.monitor.every=0",
            *length,
            *extra,
        ]
        subprocess.run(command, cwd=ROOT, check=True)
    return read_metrics(log) if log.exists() else []


def summarise(logs: dict[tuple[str, int], list[dict]]) -> dict:
    """Return final held-out losses, and their differences from the first variant's: seed by seed, and of the mean."""
    final = {
        variant: {
            seed: log[-1]["held_out/loss"]
            for (name, seed), log in logs.items()
            if name == variant and log
        }
        for variant in dict.fromkeys(name for name, _ in logs)
    }
    base, *others = final
    found = {"held_out_loss": final}
    for variant in others:
        seeds = sorted(final[base].keys() & final[variant].keys())
        differences = {
            f"seed {seed}": final[variant][seed] / final[base][seed] - 1 for seed in seeds
        }
        if seeds:
            found[f"{variant} against {base}"] = differences | {
                "mean": sum(differences.values()) / len(seeds)
            }
    return found


def plot(logs: dict[tuple[str, int], list[dict]], title: str, path: pathlib.Path) -> None:
    """Plot training loss against steps, and its difference from the first variant's of the same seed."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    variants = list(dict.fromkeys(name for name, _ in logs))
    for (variant, seed), log in logs.items():
        colour, label = COLOURS[variants.index(variant)], variant if seed == 0 else None
        steps, losses = [entry["step"] for entry in log], _smooth([entry["loss"] for entry in log])
        left.plot(steps, losses, color=colour, linewidth=1, label=label)
        if variant != variants[0] and logs[variants[0], seed]:
            base = _smooth([entry["loss"] for entry in logs[variants[0], seed]])
            right.plot(
                steps[: len(base)],
                [100 * (a / b - 1) for a, b in zip(losses, base, strict=False)],
                color=colour,
                linewidth=1,
            )
    left.set(xlabel="step", ylabel="training loss, nats a token")
    right.axhline(0, color="#999999", linewidth=0.8)
    right.set(
        xlabel="step",
        ylabel=f"difference from {variants[0]}, %",
        title=f"means of {SMOOTHING} logged steps, seed by seed",
    )
    left.legend(frameon=False)
    figure.suptitle(title)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _smooth(values: list[float]) -> list[float]:
    parts = [values[max(0, i - SMOOTHING + 1) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in parts]


def main() -> None:
    """Run what is missing, seed by seed, then write numbers and plots."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--size", default="tiny")
    parser.add_argument("--steps", type=int, help="instead of the size's own")
    parser.add_argument("--only", choices=tuple(COMPARISONS))
    parser.add_argument("--plot-only", action="store_true", help="use the runs that are there")
    arguments, extra = parser.parse_known_args()
    path = ROOT / "benchmarks" / "results" / "optimizer_precision.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    for name in [arguments.only] if arguments.only else COMPARISONS:
        logs = {
            (variant, seed): run(variant, flags, seed, arguments, extra)
            for seed in range(arguments.seeds)
            for variant, flags in COMPARISONS[name].items()
        }
        command = " ".join(["python", "benchmarks/optimizer_precision.py", *sys.argv[1:]]).replace(
            " --plot-only", ""
        )
        record[name] = {
            "command": command,
            "device": jax.devices()[0].device_kind,
            "machine": platform.machine(),
            "jax": jax.__version__,
            **summarise(logs),
        }
        plot(logs, PLOTS[name][1], ROOT / "docs" / PLOTS[name][0])
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
