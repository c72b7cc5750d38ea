"""Draw the plots that docs/benchmarks.md shows, from the JSON files that the benchmarks wrote.

    python benchmarks/report.py                          # every result in benchmarks/results
    python benchmarks/report.py --results=/tmp/out --out=/tmp/plots

Each file gives one plot with its name: speed of the training step and where its milliseconds go
(train_step), of attention by length, of linear layers by role (gemm), of the block against peers.
The script draws what was measured and computes nothing.
"""

import argparse
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).resolve().parent.parent
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#999999")
SHOWN_CLASSES = 9
Record = dict[str, Any]


def step(record: Record) -> plt.Figure:
    """Draw speed against the first model, at measured and extrapolated depth, and milliseconds by class of kernel."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(13, 4.6), layout="constrained")
    rows = _measured(record)
    depths = dict.fromkeys((row["layers"], row["depth"]) for row in rows)
    models = list(dict.fromkeys(row["model"] for row in rows))
    speeds = {(row["model"], row["layers"]): row.get("speed") for row in rows}
    series = {
        f"{layers} layers{', extrapolated' if depth != 'measured' else ''}": [
            speeds.get((model, layers)) for model in models
        ]
        for layers, depth in depths
    }
    _bars(left, models, series, f"tokens/s relative to {models[0]}")
    _stacked(right, record.get("profiles", {}))
    return figure


def attention(record: Record) -> plt.Figure:
    """Draw speed against BF16 by length, forward and with the backward pass."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained", sharey=True)
    for axes, passes in zip(panels, ("forward", "forward+backward"), strict=True):
        rows = [row for row in _measured(record) if row["passes"] == passes]
        for i, name in enumerate(dict.fromkeys(row["attention"] for row in rows)):
            points = sorted(
                (row["length"], row["speed"])
                for row in rows
                if row["attention"] == name and row.get("speed")
            )
            axes.plot(
                *zip(*points, strict=True), marker="o", color=COLOURS[i % len(COLOURS)], label=name
            )
        axes.set(title=passes, xlabel="tokens a sequence", ylabel="speed, BF16 = 1", xscale="log")
        axes.set_xticks(
            lengths := sorted({row["length"] for row in rows}),
            [str(n) for n in lengths],
            minor=False,
        )
        axes.minorticks_off()
    panels[0].legend(frameon=False, fontsize=8)
    return figure


def gemm(record: Record) -> plt.Figure:
    """Draw the speed of a linear layer against BF16, by role and scaling."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    rows = [row for row in _measured(record) if row["passes"] == "fprop+dgrad+wgrad"]
    roles, scalings = (list(dict.fromkeys(row[key] for row in rows)) for key in ("role", "scaling"))
    speeds = {(row["role"], row["scaling"]): row["speed"] for row in rows}
    _bars(
        axes,
        roles,
        {scaling: [speeds.get((role, scaling)) for role in roles] for scaling in scalings},
        "speed, BF16 = 1",
    )
    return figure


def peers(record: Record) -> plt.Figure:
    """Draw the speed of one block against BF16."""
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    rows = _measured(record)
    _bars(
        axes,
        [row["peer"] for row in rows],
        {record["scope"]: [row["speed"] for row in rows]},
        "speed, BF16 = 1",
    )
    return figure


# Start of a results file's name → function that draws it.
PLOTS: dict[str, Callable[[Record], plt.Figure]] = {
    "train_step_others-": step,
    "train_step-": step,
    "attention-": attention,
    "gemm-": gemm,
    "peers-": peers,
}


def _measured(record: Record) -> list[dict[str, Any]]:
    """Return the rows of candidates that ran."""
    return [row for row in record["rows"] if "error" not in row]


def _bars(
    axes: plt.Axes, groups: Sequence[str], series: dict[str, list[float | None]], label: str
) -> None:
    width = 0.8 / max(len(series), 1)
    for i, (name, values) in enumerate(series.items()):
        places = [group + (i + 0.5) * width - 0.4 for group in range(len(groups))]
        drawn = axes.bar(
            places,
            [value or 0.0 for value in values],
            width,
            color=COLOURS[i % len(COLOURS)],
            label=name,
        )
        axes.bar_label(drawn, [f"{value:.2f}" if value else "" for value in values], fontsize=7)
    axes.axhline(1.0, color="black", linewidth=0.6, linestyle=":")
    axes.set_xticks(range(len(groups)), groups, rotation=20, ha="right", fontsize=8)
    axes.set_ylabel(label)
    axes.set_ylim(top=1.2 * axes.get_ylim()[1])  # room for the legend
    axes.legend(frameon=False, fontsize=8, ncols=len(series), loc="upper center")


def _stacked(axes: plt.Axes, profiles: dict[str, Record]) -> None:
    """Draw a bar per profile, cut by class: the largest classes, the rest together."""
    totals: dict[str, float] = {}
    for found in profiles.values():
        for kind, ms in found["classes"].items():
            totals[kind] = totals.get(kind, 0.0) + ms
    shown = sorted(totals, key=lambda kind: -totals[kind])[:SHOWN_CLASSES]
    bottoms = [0.0] * len(profiles)
    for i, kind in enumerate([*shown, "the rest"]):
        heights = [
            found["classes"].get(kind, 0.0)
            if kind in shown
            else sum(ms for name, ms in found["classes"].items() if name not in shown)
            for found in profiles.values()
        ]
        axes.bar(
            list(profiles), heights, 0.6, bottom=bottoms, label=kind, color=plt.get_cmap("tab10")(i)
        )
        bottoms = [a + b for a, b in zip(bottoms, heights, strict=True)]
    axes.set_ylabel("ms a step")
    axes.tick_params(axis="x", labelsize=8)
    if profiles:
        axes.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))


def main(argv: Sequence[str] | None = None) -> None:
    """Draw every known result."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/report.py --results=/tmp/out",
    )
    parser.add_argument("--results", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "docs")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for path in sorted(args.results.glob("*.json")):
        draw = next((plot for start, plot in PLOTS.items() if path.name.startswith(start)), None)
        record = json.loads(path.read_text()) if draw else {}
        if draw is None or not _measured(record):
            continue
        figure = draw(record)
        figure.suptitle(path.stem, fontsize=10)
        target = args.out / f"{path.stem}.png"
        figure.savefig(target, dpi=130)
        plt.close(figure)
        print(target)


if __name__ == "__main__":
    main()
