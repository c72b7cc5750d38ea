"""FP8 with FP8 attention against BF16: the same runs, several seeds, one plot.

    python benchmarks/fp8_vs_bf16.py                # 3 seeds at tiny; about 35 minutes on 2 cores
    python benchmarks/fp8_vs_bf16.py --plot-only

Training at this size is chaotic: any rounding, once different, moves the loss of every later step a little. `bf16_halves`
shows by how much: it is `bf16` with each batch in two microbatches, the same mathematics in another order of sums.

Runs land in runs/fp8_vs_bf16/, the plot in docs/fp8_vs_bf16.png, the numbers in benchmarks/results/fp8_vs_bf16.json.
"""

import argparse
import json
import pathlib
import platform
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
VARIANTS = {"bf16": ["--config.fp8.recipe=bf16"], "bf16_halves": ["--config.fp8.recipe=bf16", "--config.training.microbatches=2"],
            "fp8_dpa": ["--config.fp8.recipe=fp8_dpa"]}


def run(variant: str, seed: int, extra: list[str]) -> pathlib.Path:
    """Trains one run, or continues it; returns its directory."""
    workdir = ROOT / "runs" / "fp8_vs_bf16" / f"{variant}-{seed}"
    command = [sys.executable, "train.py", "--config=configs/fp8_base.py:tiny", f"--workdir={workdir}",
               *VARIANTS[variant], f"--config.training.seed={seed}", "--config.evaluation.every=50", *extra]
    subprocess.run(command, cwd=ROOT, check=True)
    return workdir


def summarise(runs: dict[tuple[str, int], list[dict]]) -> dict:
    """Final held-out losses and their differences from BF16's: seed by seed, and of the mean over seeds."""
    final = {f"{variant}-{seed}": entries[-1] for (variant, seed), entries in runs.items()}
    seeds = sorted({seed for _, seed in runs})
    losses = {variant: [final[f"{variant}-{seed}"]["held_out/loss"] for seed in seeds] for variant in VARIANTS}
    ratio = {variant: {**{f"seed {seed}": loss / base - 1 for seed, loss, base in zip(seeds, found, losses["bf16"], strict=True)},
                       "mean": sum(found) / sum(losses["bf16"]) - 1} for variant, found in losses.items() if variant != "bf16"}
    keys = ("step", "held_out/loss", "held_out/bits_per_byte")
    return {"command": "python benchmarks/fp8_vs_bf16.py", "device": platform.processor() or platform.machine(),
            "jax": jax.__version__, "relative_difference_from_bf16": ratio,
            "final": {name: {key: entry[key] for key in keys} for name, entry in final.items()}}


def plot(runs: dict[tuple[str, int], list[dict]], path: pathlib.Path) -> None:
    """Held-out bits per byte of every run, against steps."""
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (variant, seed), entries in runs.items():
        points = [(entry["step"], entry["held_out/bits_per_byte"]) for entry in entries if "held_out/bits_per_byte" in entry]
        axes.plot(*zip(*points, strict=True), color=COLOURS[variant], marker="o", markersize=3, linewidth=1.2, alpha=0.8,
                  linestyle="--" if variant == "fp8_dpa" else "-", label=variant if seed == 0 else None)
    for order, value in ((2, 2.856), (3, 2.377)):
        axes.axhline(value, color="#999999", linewidth=0.8)
        axes.text(axes.get_xlim()[1], value, f"order-{order} byte model ", ha="right", va="bottom", fontsize=8, color="#555555")
    axes.set(xlabel="step (4,096 bytes each)", ylabel="held-out bits per byte")
    count = len({seed for _, seed in runs})
    axes.set_title(f"FOG-max tiny: FP8 with FP8 attention against BF16, {count} seed{'s' if count > 1 else ''}")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=140)


def main() -> None:
    """Runs what is missing, then writes numbers and plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--plot-only", action="store_true", help="use the runs that are there")
    arguments, extra = parser.parse_known_args()
    runs = {}
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            workdir = ROOT / "runs" / "fp8_vs_bf16" / f"{variant}-{seed}"
            if not arguments.plot_only:
                run(variant, seed, extra)
            runs[variant, seed] = read_metrics(workdir / "metrics.jsonl")
    results = ROOT / "benchmarks" / "results"
    results.mkdir(exist_ok=True)
    summary = summarise(runs)
    (results / "fp8_vs_bf16.json").write_text(json.dumps(summary, indent=2) + "\n")
    plot(runs, ROOT / "docs" / "fp8_vs_bf16.png")
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
