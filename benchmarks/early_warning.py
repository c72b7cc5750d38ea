"""Test the early warning on a catalogue of runs: train them, judge the warnings beside simple rivals, plot.

    python benchmarks/early_warning.py run                     # trains what is missing: 1 to 2 minutes a run on 2 idle cores
    python benchmarks/early_warning.py run --only=llama3_hot,held_out_2     # runs, or all of a split
    python benchmarks/early_warning.py run --only=held_out_3 --parallel=12 --seconds=220    # at once, on one GPU
    python benchmarks/early_warning.py evaluate                # table, benchmarks/results/early_warning.json
    python benchmarks/early_warning.py plot                    # docs/early_warning_*.png, one a split, and the rescue

Logs are kept beside the code, in benchmarks/early_warning/NAME.jsonl.xz: every logged value that
the warning or the rivals read, to four digits, and in its first entry the device; an existing log
is not made again. With `--parallel` each run is a process of its own, its output goes to
runs/early_warning/NAME.txt, and the log of one that fails or is cut off is kept if it has half of
the steps. early_warning_runs.py defines the runs and when one counts as diverged;
early_warning_scores.py judges warnings.
"""

import argparse
import concurrent.futures
import difflib
import json
import lzma
import pathlib
import shutil
import subprocess
import sys
import time
from typing import Any

import common
import early_warning_plots as plots
import early_warning_scores as scores
from early_warning_runs import RESCUES, RUNS, config_of, disturbed

from fp8jax.monitor.writers import read_metrics
from fp8jax.training import loop

ROOT = common.ROOT
LOGS, WORKDIRS = ROOT / "benchmarks" / "early_warning", ROOT / "runs" / "early_warning"
ALL = RUNS | RESCUES
DROPPED = ("mean/", "zero/", "negative_zero/", "held_out/", "tokens_per_second", "step_seconds")


def run(names: list[str]) -> None:
    """Train the runs whose logs are missing, in runs/early_warning/, and keep their logs."""
    for name in names:
        log, workdir = log_of(name), WORKDIRS / name
        if log.exists():
            continue
        shutil.rmtree(workdir, ignore_errors=True)
        chosen = ALL[name]
        with disturbed(chosen.disturbance):
            loop.train(config_of(chosen), workdir)
        keep(workdir, log)


def run_apart(names: list[str], parallel: int, seconds: float) -> None:
    """Run each in its own process, `parallel` at once, in this order; runs that are unfinished when time is up are cut off."""
    WORKDIRS.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + seconds
    with concurrent.futures.ThreadPoolExecutor(parallel) as pool:
        runs = [
            pool.submit(_run_apart, name, deadline) for name in names if not log_of(name).exists()
        ]
    for done in runs:  # only now, so that a fault of one does not end the others
        done.result()


def _run_apart(name: str, deadline: float) -> None:
    """Train one run in a process of its own, and return a line on the outcome."""
    log, workdir, start = log_of(name), WORKDIRS / name, time.monotonic()
    shutil.rmtree(workdir, ignore_errors=True)
    ended = "cut off"
    if start < deadline:
        with (WORKDIRS / f"{name}.txt").open("w") as out:
            try:
                done = subprocess.run(
                    [sys.executable, __file__, "run", f"--only={name}"],
                    stdin=subprocess.DEVNULL,
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=deadline - start,
                    check=False,
                )
                ended = f"exit code {done.returncode}"
            except subprocess.TimeoutExpired:
                pass
    metrics, wanted = workdir / "metrics.jsonl", config_of(ALL[name]).training.steps
    steps = len(read_metrics(metrics)) if metrics.exists() else 0
    if not log.exists() and steps >= wanted / 2:
        keep(workdir, log)
    print(
        f"{name}: {ended} after {time.monotonic() - start:.0f} s, {steps} of {wanted} steps, "
        f"{'kept' if log.exists() else 'not kept'}",
        flush=True,
    )


def keep(workdir: pathlib.Path, log: pathlib.Path) -> None:
    """Write a run's log, compressed, with its device and without values that are never read."""
    entries = [
        {name: _short(value) for name, value in entry.items() if not name.startswith(DROPPED)}
        for entry in read_metrics(workdir / "metrics.jsonl")
    ]
    facts = json.loads((workdir / "run.json").read_text())
    entries[0] |= {name: facts[name] for name in ("device", "gemms", "versions")}
    log.parent.mkdir(exist_ok=True)
    log.write_bytes(
        lzma.compress("".join(json.dumps(entry) + "\n" for entry in entries).encode(), preset=9)
    )


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def log_of(name: str) -> pathlib.Path:
    """Return the path of a run's kept log."""
    return LOGS / f"{name}.jsonl.xz"


def read(name: str) -> list[dict[str, Any]]:
    """Read a kept log."""
    return [json.loads(line) for line in lzma.decompress(log_of(name).read_bytes()).splitlines()]


def _chosen(text: str) -> list[str]:
    """Return names of runs, from names of runs and of splits."""
    splits = {
        run.split: [name for name in ALL if ALL[name].split == run.split] for run in ALL.values()
    }
    out: dict[str, None] = {}
    for part in text.split(","):
        if part not in ALL and part not in splits:
            near = difflib.get_close_matches(part, [*ALL, *splits], 1)
            raise argparse.ArgumentTypeError(
                f"{part!r} is no run and no split" + (f"; did you mean {near[0]}?" if near else "")
            )
        out |= dict.fromkeys([part] if part in ALL else splits[part])
    return list(out)


def main(argv: list[str] | None = None) -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("run", "evaluate", "plot"))
    parser.add_argument(
        "--only",
        type=_chosen,
        default=list(ALL),
        help="names of runs or of splits, separated by commas",
    )
    parser.add_argument(
        "--parallel",
        type=int,
        default=0,
        help="runs at once, each in a process of its own; 0: one by one, in this one",
    )
    parser.add_argument(
        "--seconds",
        type=float,
        default=3600.0,
        help="with --parallel: seconds after which unfinished runs are cut off",
    )
    options = parser.parse_args(argv)
    if options.command == "run" and options.parallel:
        run_apart(options.only, options.parallel, options.seconds)
        return
    if options.command == "run":
        run(options.only)
        return
    logs = {name: read(name) for name in RUNS if log_of(name).exists()}
    if missing := [name for name in ALL if not log_of(name).exists()]:
        print(f"without {', '.join(missing)}: run them first")
    found = scores.judge(logs)
    if options.command == "evaluate":
        path = ROOT / "benchmarks" / "results" / "early_warning.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        scores.show(found)
    else:
        for split in dict.fromkeys(row["split"] for row in found["runs"]):
            plots.catalogue(logs, found, split, ROOT / "docs" / f"early_warning_{split}.png")
        rescued = {name: read(name) for name in RESCUES if log_of(name).exists()}
        plots.rescue(rescued, ROOT / "docs" / "early_warning_rescue.png")


if __name__ == "__main__":
    main()
