"""Compare FP8 with FP8 attention and BF16: the same runs, several seeds, one plot.

    python benchmarks/fp8_vs_bf16.py                    # 5 seeds at tiny; about an hour on 2 cores
    python benchmarks/fp8_vs_bf16.py --setting=calm     # a lower rate and a larger batch: less chaos, the same question
    python benchmarks/fp8_vs_bf16.py --plot-only

Training at this size is chaotic: any rounding, once different, moves the loss of every later step a
little. `bf16_halves` shows by how much: it is `bf16` with each batch in two microbatches, the same
mathematics in another order of sums. The gap of a seed is the loss in FP8 over the mean of its two
BF16 runs; the mean gap comes with its standard error over seeds.

Runs are written to runs/SETTING/, the plot to docs/SETTING.png, the numbers to
benchmarks/results/SETTING.json, where SETTING is fp8_vs_bf16, or fp8_vs_bf16_NAME for another
setting.
"""

import argparse
import json
import math
import pathlib
import platform
import statistics
import subprocess
import sys

import common
import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fp8jax.monitor.writers import read_metrics

ROOT = common.ROOT
COLOURS = {"bf16": "#0072b2", "bf16_halves": "#56b4e9", "fp8_dpa": "#d55e00"}
VARIANTS = {
    "bf16": ["--config.fp8.recipe=bf16"],
    "bf16_halves": ["--config.fp8.recipe=bf16", "--config.training.microbatches=2"],
    "fp8_dpa": ["--config.fp8.recipe=fp8_dpa"],
}


SETTINGS = {
    "usual": [],
    "calm": ["--config.optimizer.learning_rate=3e-4", "--config.training.batch_size=32"],
}


def name_of(setting: str) -> str:
    """Return the name of a setting's directory, plot and results."""
    return "fp8_vs_bf16" if setting == "usual" else f"fp8_vs_bf16_{setting}"


def run(workdir: pathlib.Path, variant: str, seed: int, extra: list[str]) -> None:
    """Train one run, or continue it."""
    fixed = [
        f"--config.training.seed={seed}",
        "--config.evaluation.every=90",
        "--config.evaluation.batches=0",
    ]
    fixed += ["--config.monitor.every=0", "--config.log.report_minutes=0"]
    command = [
        sys.executable,
        "train.py",
        "--config=configs/fp8_base.py:tiny",
        f"--workdir={workdir}",
    ]
    subprocess.run([*command, *fixed, *VARIANTS[variant], *extra], cwd=ROOT, check=True)


def gap(losses: list[float], bases: list[float]) -> dict[str, float]:
    """Return relative differences seed by seed, their mean and its standard error."""
    gaps = [loss / base - 1 for loss, base in zip(losses, bases, strict=True)]
    found = {f"seed {seed}": value for seed, value in enumerate(gaps)}
    error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.nan
    return {**found, "mean": statistics.fmean(gaps), "standard_error": error}


def summarise(runs: dict[tuple[str, int], list[dict]], command: str) -> dict:
    """Return final held-out losses, and the gaps of FP8 and of the second summation order."""
    final = {f"{variant}-{seed}": entries[-1] for (variant, seed), entries in runs.items()}
    seeds = sorted({seed for _, seed in runs})
    losses = {
        variant: [final[f"{variant}-{seed}"]["held_out/loss"] for seed in seeds]
        for variant in VARIANTS
    }
    both = [
        statistics.fmean(pair) for pair in zip(losses["bf16"], losses["bf16_halves"], strict=True)
    ]
    gaps = {
        "fp8_dpa over the mean of both BF16 orders": gap(losses["fp8_dpa"], both),
        "bf16_halves over bf16": gap(losses["bf16_halves"], losses["bf16"]),
    }
    keys = ("step", "held_out/loss", "held_out/bits_per_byte")
    return {
        "command": command,
        "device": platform.processor() or platform.machine(),
        "jax": jax.__version__,
        "gaps": gaps,
        "final": {name: {key: entry[key] for key in keys} for name, entry in final.items()},
    }


def plot(runs: dict[tuple[str, int], list[dict]], path: pathlib.Path) -> None:
    """Plot held-out bits per byte of every run against steps."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (variant, seed), entries in runs.items():
        points = [
            (entry["step"], entry["held_out/bits_per_byte"])
            for entry in entries
            if "held_out/bits_per_byte" in entry
        ]
        axes.plot(
            *zip(*points, strict=True),
            color=COLOURS[variant],
            marker="o",
            markersize=3,
            linewidth=1.2,
            alpha=0.8,
            linestyle="--" if variant == "fp8_dpa" else "-",
            label=variant if seed == 0 else None,
        )
    for order, value in ((2, 2.856), (3, 2.377)):
        axes.axhline(value, color="#999999", linewidth=0.8)
        axes.text(
            axes.get_xlim()[1],
            value,
            f"order-{order} byte model ",
            ha="right",
            va="bottom",
            fontsize=8,
            color="#555555",
        )
    axes.set_ylabel("held-out bits per byte")
    count = len({seed for _, seed in runs})
    tokens = next(iter(runs.values()))[-1]["tokens"] // next(iter(runs.values()))[-1]["step"]
    axes.set_xlabel(f"step ({tokens:,} bytes each)")
    axes.set_title(
        f"FOG-max tiny: FP8 with FP8 attention against BF16, {count} seed{'s' if count > 1 else ''}"
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)


def main() -> None:
    """Run what is missing, then write numbers and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--setting", choices=tuple(SETTINGS), default="usual")
    parser.add_argument("--plot-only", action="store_true", help="use the runs that are there")
    arguments, extra = parser.parse_known_args()
    name = name_of(arguments.setting)
    runs = {}
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            workdir = ROOT / "runs" / name / f"{variant}-{seed}"
            if not arguments.plot_only:
                run(workdir, variant, seed, [*SETTINGS[arguments.setting], *extra])
            runs[variant, seed] = read_metrics(workdir / "metrics.jsonl")
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    chosen = [] if arguments.setting == "usual" else [f"--setting={arguments.setting}"]
    summary = summarise(runs, " ".join(["python benchmarks/fp8_vs_bf16.py", *chosen, *extra]))
    (results / f"{name}.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(runs, ROOT / "docs" / f"{name}.png")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
