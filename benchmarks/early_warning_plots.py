"""Draw the plots of docs/early_warning.md."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from early_warning_runs import TWIN, twin_of
from matplotlib.lines import Line2D

from fp8jax.monitor.fp8_range import LOGITS, loads

Log = list[dict[str, Any]]
LEVELS = {"watch": ("#56b4e9", "v"), "warn": ("#e69f00", "^"), "act": ("#d55e00", "s")}
MOMENTS = {
    "departs": ("loss departs", {"color": "black", "linestyle": "--", "linewidth": 0.9}),
    "departs_calm": (
        "by the spread of calm",
        {"color": "#cc79a7", "linestyle": "-.", "linewidth": 0.9},
    ),
    "disturbed": ("disturbed from", {"color": "#999999", "linestyle": ":", "linewidth": 0.9}),
}
COLUMNS, CUT, TWINS = 4, 5.6, "#0072b2"


def catalogue(
    logs: Mapping[str, Log], found: Mapping[str, Any], split: str, path: pathlib.Path
) -> None:
    """Plot the loss of every run of a split, its warnings, and where it departs, with its BF16 twin in the same panel."""
    rows = [row for row in found["runs"] if row["split"] == split and row["kind"] != TWIN]
    high = math.ceil(len(rows) / COLUMNS)
    figure, panels = plt.subplots(
        high, COLUMNS, figsize=(13, 2.3 * high + 0.5), layout="constrained", squeeze=False
    )
    for axes in panels.flat[len(rows) :]:
        axes.set_axis_off()
    for axes, row in zip(panels.flat, rows, strict=False):
        _panel(axes, row, logs, found["alarms"][row["run"]])
    figure.legend(
        handles=_legend(rows), loc="outside upper center", ncols=7, frameon=False, fontsize=8
    )
    figure.supxlabel("step", fontsize=9)
    figure.supylabel(f"training loss, nats a byte (cut at {CUT})", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _panel(
    axes: Any, row: Mapping[str, Any], logs: Mapping[str, Log], alarms: list[dict[str, Any]]
) -> None:
    steps, loss = _curve(logs[row["run"]])
    low = float(loss.min())
    title = f"{row['run']}: {row['outcome']}"
    if twin := logs.get(twin_of(row["run"])):
        axes.plot(*_curve(twin), color=TWINS, linewidth=0.6)
        title += f" (BF16: {row['twin']})"
    axes.plot(steps, loss, color="#444444", linewidth=0.8)
    for alarm in alarms:
        colour, marker = LEVELS[alarm["level"]]
        axes.plot(
            alarm["step"], low - 0.25, marker=marker, color=colour, markersize=5, clip_on=False
        )
    for key, (_, style) in MOMENTS.items():
        if row[key]:
            axes.axvline(row[key], **style)
    axes.set_title(title, fontsize=7.5)
    axes.set(ylim=(low - 0.45, CUT + 0.1))
    axes.tick_params(labelsize=7)


def _curve(log: Log) -> tuple[list[int], np.ndarray]:
    """Return steps, and losses cut at CUT, where non-finite ones are drawn too."""
    loss = np.array([float(entry["loss"]) for entry in log])
    return [entry["step"] for entry in log], np.clip(
        np.where(np.isfinite(loss), loss, CUT), None, CUT
    )


def _legend(rows: list[Mapping[str, Any]]) -> list[Line2D]:
    """Return the legend of what the panels show, and no more."""
    out = [
        Line2D([], [], color=colour, marker=marker, linestyle="", label=level)
        for level, (colour, marker) in LEVELS.items()
    ]
    out += [
        Line2D([], [], label=label, **style)
        for key, (label, style) in MOMENTS.items()
        if any(row[key] for row in rows)
    ]
    return out + [Line2D([], [], color=TWINS, label="BF16 twin")] * any(row["twin"] for row in rows)


def rescue(logs: Mapping[str, Log], path: pathlib.Path) -> None:
    """Plot the same run left alone, in BF16, and with action=fallback: loss, and the error of attention's logits."""
    names = {
        "llama3_hot_alone": ("FP8, left alone", "#d55e00"),
        "llama3_hot_bf16": ("BF16", "#0072b2"),
        "llama3_hot_fallback": ("qkv and attention fall back at watch", "#009e73"),
        "llama3_hot_fallback_all": ("everything falls back at watch", "#cc79a7"),
        "llama3_hot_fallback_act": ("qkv and attention fall back at act", "#e69f00"),
    }
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for name, log in logs.items():
        label, colour = names[name]
        steps, loss = (
            [entry["step"] for entry in log],
            np.array([float(entry["loss"]) for entry in log]),
        )
        smooth = [float(np.median(loss[max(i - 7, 0) : i + 8])) for i in range(len(loss))]
        left.plot(steps, smooth, color=colour, label=label)
        found = {
            entry["step"]: loads(entry)
            for entry in log
            if any(key.startswith("rms/q_") for key in entry)
        }
        right.plot(
            list(found),
            [
                max(value for (tensor, _), value in row.items() if tensor == LOGITS)
                for row in found.values()
            ],
            color=colour,
        )
    left.set(xlabel="step", ylabel="training loss, nats a byte, median of 15", ylim=(2.2, 3.6))
    left.legend(frameon=False)
    right.axhline(1, color="#999999", linestyle=":")
    right.set(xlabel="step", ylabel="error of a logit, nats, worst layer", yscale="log")
    figure.savefig(path, dpi=120)
    plt.close(figure)
