"""Judge the early warning on the catalogue, beside three obvious rivals.

    found = judge(logs)            # {"runs": [...], "summary": [...], "thresholds": {...}}

Rivals are thresholds: on the loss (robust standard deviations above the median of the last 64
steps), on the gradient's norm, and on the kurtosis of qkv in the worst layer. Each gets the lowest
threshold with which it raises no more false alarms on the healthy runs that the rules were made on,
all but held_out_4, than the early warning does there at `warn`. All are silent for the first SILENT
steps.

A flag is early if it comes before the step at which the loss departs; its lead is the difference.
Both are also given by the spread of calm (early_warning_runs.py), whose departures come earlier
where the loss explodes. Flags within EPISODE steps of the first are one alarm. An alarm is false in
a healthy run, and before the disturbance of a disturbed one. Runs whose loss leaves the band and
comes back are neither healthy nor diverged: they are listed, and not counted; nor are BF16 twins,
which show whether FP8 is the cause: it is if the twin has not diverged.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from early_warning_runs import RUNS, TWIN, Departure, Run, departure, twin_of

from fp8jax.config import WARNING_LEVELS
from fp8jax.monitor.early_warning import EarlyWarning

Log = list[dict[str, Any]]
SILENT, EPISODE, RECENT = 50, 50, 64
INJECTED, JUDGED = "injected drift", "held_out_4"


def warnings(log: Log) -> list[Any]:
    """Return all alarms of a run."""
    watch = EarlyWarning()
    return [alarm for entry in log for alarm in watch.observe(entry)]


def loss_scores(log: Log) -> list[tuple[int, float]]:
    """Return steps, and how far the loss lies above its recent median, in robust standard deviations."""
    losses, out = np.array([_number(entry["loss"]) for entry in log]), []
    for i in range(RECENT // 2, len(losses)):
        before = losses[max(i - RECENT, 0) : i]
        median = np.median(before)
        out.append(
            (
                log[i]["step"],
                float((losses[i] - median) / (1.4826 * np.median(np.abs(before - median)) + 1e-9)),
            )
        )
    return out


def gradient_norms(log: Log) -> list[tuple[int, float]]:
    """Return steps and gradient norms."""
    return [(entry["step"], _number(entry["grad_norm"])) for entry in log]


def kurtoses(log: Log) -> list[tuple[int, float]]:
    """Return steps, and kurtosis of qkv in the layer where it is largest."""
    found = (
        (
            entry["step"],
            [_number(v) for k, v in entry.items() if k.startswith("kurtosis/qkv_layer")],
        )
        for entry in log
    )
    return [(step, max(values)) for step, values in found if values]


def _number(value: Any) -> float:
    """Return a value, infinite if it is not finite, so that it is beyond any threshold."""
    value = float(value)
    return value if np.isfinite(value) else np.inf


RIVALS: dict[str, Callable[[Log], list[tuple[int, float]]]] = {
    "loss z-score": loss_scores,
    "gradient norm": gradient_norms,
    "kurtosis of qkv": kurtoses,
}


def episodes(steps: Sequence[int]) -> list[int]:
    """Return the first steps of the alarms that flags at these steps make; a long one counts again every EPISODE steps."""
    out: list[int] = []
    for step in steps:
        if not out or step - out[-1] > EPISODE:
            out.append(step)
    return out


def outcome(log: Log) -> tuple[str, Departure]:
    """Return 'healthy', 'diverged' or 'recovered', and when the loss departs."""
    found = departure([entry["step"] for entry in log], [float(entry["loss"]) for entry in log])
    return ("diverged" if found.step else "recovered" if found.spiked else "healthy"), found


def judge(logs: Mapping[str, Log]) -> dict[str, Any]:
    """Return every detector's flags on every run, the rivals' thresholds, and recall, false alarms and leads by split."""
    outcomes = {name: outcome(log) for name, log in logs.items()}
    alarms = {name: warnings(log) for name, log in logs.items()}
    flags = {
        f"early warning, {level}": {
            name: [
                a.step
                for a in found
                if WARNING_LEVELS.index(a.level) >= WARNING_LEVELS.index(level)
            ]
            for name, found in alarms.items()
        }
        for level in ("warn", "act")
    }
    tuned = [
        name
        for name in logs
        if RUNS[name].split != JUDGED
        and RUNS[name].kind not in (INJECTED, TWIN)
        and outcomes[name][0] == "healthy"
    ]
    allowed = sum(len(episodes(flags["early warning, warn"][name])) for name in tuned)
    thresholds = {}
    for rival, scores in RIVALS.items():
        series = {
            name: [(step, value) for step, value in scores(log) if step > SILENT]
            for name, log in logs.items()
        }
        thresholds[rival] = limit = _threshold([series[name] for name in tuned], allowed)
        flags[rival] = {
            name: [step for step, value in found if value > limit] for name, found in series.items()
        }
    rows = [
        _row(name, RUNS[name], outcomes[name], logs[name][-1]["step"], flags)
        | {
            "twin": outcomes.get(twin_of(name), (None, None))[0],
            "device": logs[name][0].get("device", "cpu"),
        }
        for name in logs
    ]
    summary = [
        _summary(rows, detector, split)
        for split in dict.fromkeys(row["split"] for row in rows)
        for detector in flags
    ]
    return {
        "runs": rows,
        "thresholds": thresholds,
        "summary": summary,
        "alarms": {name: [alarm._asdict() for alarm in found] for name, found in alarms.items()},
    }


def _threshold(healthy: list[list[tuple[int, float]]], allowed: int) -> float:
    """Return the lowest value that healthy runs exceed in no more episodes than allowed."""
    candidates = sorted({value for series in healthy for _, value in series if np.isfinite(value)})

    def alarms(limit: float) -> int:
        return sum(
            len(episodes([step for step, value in series if value > limit])) for series in healthy
        )

    # The search goes down from above, because the count need not be monotonic.
    best = candidates[-1]
    for value in reversed(candidates):
        if alarms(value) > allowed:
            break
        best = value
    return best


def _row(
    name: str,
    run: Run,
    found: tuple[str, Departure],
    steps: int,
    flags: Mapping[str, Mapping[str, list[int]]],
) -> dict[str, Any]:
    kind, departs = found
    begins = run.disturbance.first if run.disturbance else 0
    detectors = {}
    for detector, by_run in flags.items():
        false = (
            by_run[name] if kind == "healthy" else [step for step in by_run[name] if step < begins]
        )
        true = [] if kind == "healthy" else [step for step in by_run[name] if step >= begins]
        detectors[detector] = {
            "false": len(episodes(false)),
            "first": true[0] if true else None,
            "lead": departs.step - true[0] if departs.step and true else None,
            "lead_calm": departs.calm - true[0] if departs.calm and true else None,
        }
    return {
        "run": name,
        "split": run.split,
        "kind": run.kind,
        "architecture": run.architecture,
        "steps": steps,
        "outcome": kind,
        "departs": departs.step,
        "departs_calm": departs.calm,
        "disturbed": begins or None,
        "detectors": detectors,
    }


def _summary(rows: list[dict[str, Any]], detector: str, split: str) -> dict[str, Any]:
    """Return the summary of a detector on a split, without injected drifts and BF16 twins."""
    mine = [row for row in rows if row["split"] == split and row["kind"] not in (INJECTED, TWIN)]
    healthy, diverged = (
        [row for row in mine if row["outcome"] == kind] for kind in ("healthy", "diverged")
    )
    by_fp8 = [row for row in diverged if row["twin"] not in (None, "diverged")]
    early, calm, early_fp8 = (
        _early(runs, detector, lead)
        for runs, lead in ((diverged, "lead"), (diverged, "lead_calm"), (by_fp8, "lead"))
    )
    false, steps = (
        sum(row["detectors"][detector]["false"] for row in mine),
        sum(row["steps"] for row in healthy),
    )
    return {
        "split": split,
        "detector": detector,
        "diverged": len(diverged),
        "flagged_before": len(early),
        "diverged_by_fp8": len(by_fp8),
        "of_these_flagged_before": len(early_fp8),
        "flagged_at_all": sum(row["detectors"][detector]["first"] is not None for row in diverged),
        "median_lead": _median(early),
        "flagged_before_calm": len(calm),
        "median_lead_calm": _median(calm),
        "healthy_runs": len(healthy),
        "healthy_steps": steps,
        "false_alarms": false,
        "false_alarms_per_1000_steps": round(1000 * false / max(steps, 1), 2),
    }


def _early(rows: Sequence[Mapping[str, Any]], detector: str, lead: str) -> list[int]:
    """Return the leads of early flags."""
    found = (row["detectors"][detector][lead] for row in rows)
    return [value for value in found if value is not None and value > 0]


def _median(leads: Sequence[int]) -> float | None:
    return float(np.median(leads)) if leads else None


def show(found: Mapping[str, Any]) -> None:
    """Print the tables of docs/early_warning.md."""
    detectors = list(found["runs"][0]["detectors"])
    heads = ["run", "kind", "outcome", "departs", "by calm", "BF16 twin", "device", *detectors]
    print(f"| {' | '.join(heads)} |\n|" + "---|" * len(heads))
    for row in found["runs"]:
        cells = [_cell(row, row["detectors"][name]) for name in detectors]
        facts = [
            row[name] or ""
            for name in ("kind", "outcome", "departs", "departs_calm", "twin", "device")
        ]
        print(f"| {row['run']} ({row['split']}) | {' | '.join(map(str, facts + cells))} |")
    columns = list(found["summary"][0])
    print("\n| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in found["summary"]:
        print(
            "| " + " | ".join("" if value is None else str(value) for value in row.values()) + " |"
        )
    print(
        "\nthresholds: "
        + ", ".join(f"{name} {value:.3g}" for name, value in found["thresholds"].items())
    )


def _cell(row: Mapping[str, Any], cell: Mapping[str, Any]) -> str:
    if row["outcome"] == "healthy":
        return f"{cell['false']} false" if cell["false"] else "quiet"
    false = f", {cell['false']} false" if cell["false"] else ""
    if cell["first"] is None:
        return "missed" + false
    return (f"at {cell['first']}" if cell["lead"] is None else f"{cell['lead']:+d}") + false
