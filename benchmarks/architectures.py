"""Train every architecture of the paper at `tiny`, in BF16 and in FP8 with FP8 attention, for one table and one plot.

    python benchmarks/architectures.py                                  # 200 steps each; about 20 minutes on 2 cores
    python benchmarks/architectures.py --name=architectures_hot --config.optimizer.learning_rate=1e-2 --config.training.steps=300
    python benchmarks/architectures.py --plot-only

Runs are written to runs/NAME/, the plot to docs/NAME.png, the table to
benchmarks/results/NAME.json; docs/architectures.md discusses them. Kurtosis is that of the paper's
tensors (FOG paper, section 4), averaged over layers, in the last step that has it.
"""

import argparse
import json
import pathlib
import subprocess
import sys

import common
import jax
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from fp8jax.config import ARCHITECTURES
from fp8jax.monitor.writers import read_metrics

ROOT = common.ROOT
RECIPES = ("bf16", "fp8_dpa")
KURTOSES = ("qkv", "mlp_post_act")
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")


def run(workdir: pathlib.Path, architecture: str, recipe: str, extra: list[str]) -> list[dict]:
    """Train one run, or continue it, and return its log; a run that stops on bad numbers (exit code 3) is a result, too."""
    command = [
        sys.executable,
        "train.py",
        "--config=configs/fp8_base.py:tiny",
        f"--workdir={workdir}",
        f"--config.model.architecture={architecture}",
        f"--config.fp8.recipe={recipe}",
        "--config.training.steps=200",
        "--config.monitor.every=20",
        "--config.evaluation.every=0",
        "--config.evaluation.batches=60",
        *extra,
    ]
    if subprocess.run(command, cwd=ROOT, check=False).returncode not in (0, 3):
        sys.exit(f"{architecture} in {recipe} failed: {' '.join(command)}")
    return read_metrics(workdir / "metrics.jsonl")


def row(architecture: str, recipe: str, log: list[dict]) -> dict:
    """Return one line of the table."""
    measured = [entry for entry in log if f"kurtosis/{KURTOSES[0]}_avg" in entry]
    out = {
        "architecture": architecture,
        "recipe": recipe,
        "steps": log[-1]["step"],
        "loss": log[-1].get("held_out/loss"),
        "bad_steps": sum(entry["bad_step"] for entry in log),
        "largest_grad_norm": max(entry["grad_norm"] for entry in log[5:]),
    }
    for name in KURTOSES:
        series = [entry[f"kurtosis/{name}_avg"] for entry in measured]
        out |= {f"kurtosis_{name}": series[-1], f"largest_kurtosis_{name}": max(series)}
    return out


def plot(logs: dict[tuple[str, str], list[dict]], path: pathlib.Path) -> None:
    """Plot loss and kurtosis against steps; BF16 dotted, FP8 solid."""
    figure, panels = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    keys = {"loss": "training loss, nats a byte"} | {
        f"kurtosis/{name}_avg": f"kurtosis of {name}, mean of layers" for name in KURTOSES
    }
    for axes, (key, label) in zip(panels, keys.items(), strict=True):
        for (architecture, recipe), log in logs.items():
            points = [(entry["step"], entry[key]) for entry in log if key in entry]
            axes.plot(
                *zip(*points, strict=True),
                color=COLOURS[ARCHITECTURES.index(architecture)],
                linewidth=1.1,
                linestyle="-" if recipe == "fp8_dpa" else ":",
                label=architecture if recipe == "fp8_dpa" else None,
            )
        axes.set(xlabel="step", ylabel=label, yscale="log")
    panels[0].legend(frameon=False, fontsize=8)
    figure.suptitle("Architectures at tiny: FP8 with FP8 attention (solid) and BF16 (dotted)")
    figure.savefig(path, dpi=140)
    plt.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run what is missing, then write table and plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", default="architectures")
    parser.add_argument("--plot-only", action="store_true", help="use the runs that are there")
    arguments, extra = parser.parse_known_args(argv)
    logs = {}
    for architecture in ARCHITECTURES:
        for recipe in RECIPES:
            workdir = ROOT / "runs" / arguments.name / f"{architecture}-{recipe}"
            logs[architecture, recipe] = (
                read_metrics(workdir / "metrics.jsonl")
                if arguments.plot_only
                else run(workdir, architecture, recipe, extra)
            )
    rows = [row(architecture, recipe, log) for (architecture, recipe), log in logs.items()]
    named = [] if arguments.name == parser.get_default("name") else [f"--name={arguments.name}"]
    record = {
        "command": " ".join(["python", "benchmarks/architectures.py", *named, *extra]),
        "jax": jax.__version__,
        "rows": rows,
    }
    (ROOT / "benchmarks" / "results" / f"{arguments.name}.json").write_text(
        json.dumps(record, indent=1) + "\n"
    )
    plot(logs, ROOT / "docs" / f"{arguments.name}.png")
    for found in rows:
        print(
            "  ".join(
                f"{value:.4g}" if isinstance(value, float) else f"{value!s:<14}"
                for value in found.values()
            )
        )


if __name__ == "__main__":
    main()
