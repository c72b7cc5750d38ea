"""Plots of docs/early_warning.md."""

import math
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from early_warning_runs import TWIN, twin_of

from fp8jax.monitor.loads import LOGITS, loads

Log = list[dict[str, Any]]
LEVELS = {"watch": ("#56b4e9", "v"), "warn": ("#e69f00", "^"), "act": ("#d55e00", "s")}
COLUMNS = 4


def catalogue(logs: Mapping[str, Log], found: Mapping[str, Any], path: pathlib.Path) -> None:
    """The loss of every run, its warnings, and where it departs; that of its BF16 twin in the same panel."""
    rows = [row for row in found["runs"] if row["kind"] != TWIN]
    figure, panels = plt.subplots(math.ceil(len(rows) / COLUMNS), COLUMNS, figsize=(13, 2.1 * math.ceil(len(rows) / COLUMNS)),
                                  layout="constrained", squeeze=False)
    for axes in panels.flat[len(rows):]:
        axes.set_axis_off()
    for axes, row in zip(panels.flat, rows, strict=False):
        log = logs[row["run"]]
        steps, loss = [entry["step"] for entry in log], np.array([float(entry["loss"]) for entry in log])
        low = float(np.nanmin(loss))
        if twin := logs.get(twin_of(row["run"])):
            axes.plot([entry["step"] for entry in twin], np.clip([float(entry["loss"]) for entry in twin], low, 5.6), color="#0072b2",
                      linewidth=0.6)
        axes.plot(steps, np.clip(loss, None, 5.6), color="#444444", linewidth=0.8)
        for alarm in found["alarms"][row["run"]]:
            colour, marker = LEVELS[alarm["level"]]
            axes.plot(alarm["step"], low - 0.25, marker=marker, color=colour, markersize=5, clip_on=False)
        if row["departs"]:
            axes.axvline(row["departs"], color="black", linestyle="--", linewidth=0.9)
        if row["disturbed"]:
            axes.axvline(row["disturbed"], color="#999999", linestyle=":", linewidth=0.9)
        axes.set_title(f"{row['run']}: {row['outcome']}", fontsize=8)
        axes.set(ylim=(low - 0.45, 5.7))
        axes.tick_params(labelsize=7)
    for level, (colour, marker) in LEVELS.items():
        panels.flat[0].plot([], [], color=colour, marker=marker, linestyle="", label=level)
    panels.flat[0].plot([], [], color="black", linestyle="--", label="loss departs")
    panels.flat[0].plot([], [], color="#999999", linestyle=":", label="disturbed")
    if any(row["kind"] == TWIN for row in found["runs"]):
        panels.flat[0].plot([], [], color="#0072b2", label="BF16 twin")
    panels.flat[0].legend(frameon=False, fontsize=6)
    figure.supxlabel("step")
    figure.supylabel("training loss, nats a byte (cut at 5.6)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rescue(logs: Mapping[str, Log], path: pathlib.Path) -> None:
    """The same run left alone, in BF16, and with action=fallback: loss, and the error of attention's logits."""
    names = {"llama3_hot": ("FP8, left alone", "#d55e00"), "llama3_hot_bf16": ("BF16", "#0072b2"),
             "llama3_hot_fallback": ("qkv and attention fall back", "#009e73"),
             "llama3_hot_fallback_all": ("everything falls back", "#cc79a7")}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
    for name, log in logs.items():
        label, colour = names[name]
        steps, loss = [entry["step"] for entry in log], np.array([float(entry["loss"]) for entry in log])
        smooth = [float(np.median(loss[max(i - 7, 0):i + 8])) for i in range(len(loss))]
        left.plot(steps, smooth, color=colour, label=label)
        found = {entry["step"]: loads(entry) for entry in log if any(key.startswith("rms/q_") for key in entry)}
        right.plot(list(found), [max(value for (tensor, _), value in row.items() if tensor == LOGITS) for row in found.values()], color=colour)
    left.set(xlabel="step", ylabel="training loss, nats a byte, median of 15", ylim=(2.2, 3.6))
    left.legend(frameon=False)
    right.axhline(1, color="#999999", linestyle=":")
    right.set(xlabel="step", ylabel="error of a logit, nats, worst layer", yscale="log")
    figure.savefig(path, dpi=120)
    plt.close(figure)
