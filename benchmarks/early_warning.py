"""Early warning on a catalogue of runs: train them, judge the warnings beside simple rivals, plot.

    python benchmarks/early_warning.py run                     # trains what is missing: 1 to 2 minutes a run on 2 idle cores
    python benchmarks/early_warning.py run --only=llama3_hot
    python benchmarks/early_warning.py evaluate                # table, benchmarks/results/early_warning.json
    python benchmarks/early_warning.py plot                    # docs/early_warning_*.png

Logs are kept beside the code, in benchmarks/early_warning/NAME.jsonl.xz: every logged value that the warning or the rivals
read, to four digits; a log that is there is not made again. Which runs there are and when one counts as diverged:
early_warning_runs.py; how warnings are judged: early_warning_scores.py.
"""

import argparse
import json
import lzma
import pathlib
import shutil
from typing import Any

import early_warning_plots as plots
import early_warning_scores as scores
from early_warning_runs import RESCUES, RUNS, config_of, disturbed

from fp8jax.monitor.writers import read_metrics
from fp8jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOGS = ROOT / "benchmarks" / "early_warning"
DROPPED = ("mean/", "zero/", "negative_zero/", "held_out/", "tokens_per_second", "step_seconds")


def run(names: list[str]) -> None:
    """Trains the runs whose logs are missing, in runs/early_warning/, and keeps their logs."""
    for name in names:
        log, workdir = log_of(name), ROOT / "runs" / "early_warning" / name
        if log.exists():
            continue
        shutil.rmtree(workdir, ignore_errors=True)
        chosen = (RUNS | RESCUES)[name]
        with disturbed(chosen.disturbance):
            loop.train(config_of(chosen), workdir)
        keep(workdir / "metrics.jsonl", log)


def keep(metrics: pathlib.Path, log: pathlib.Path) -> None:
    """Writes a run's log, without what nobody reads, compressed."""
    lines = [json.dumps({name: _short(value) for name, value in entry.items() if not name.startswith(DROPPED)})
             for entry in read_metrics(metrics)]
    log.parent.mkdir(exist_ok=True)
    log.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=9))


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def log_of(name: str) -> pathlib.Path:
    """Where the log of a run is kept."""
    return LOGS / f"{name}.jsonl.xz"


def read(name: str) -> list[dict[str, Any]]:
    """A kept log."""
    return [json.loads(line) for line in lzma.decompress(log_of(name).read_bytes()).splitlines()]


def main(argv: list[str] | None = None) -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run", "evaluate", "plot"))
    parser.add_argument("--only", help="names of runs, separated by commas")
    options = parser.parse_args(argv)
    if options.command == "run":
        run(options.only.split(",") if options.only else [*RUNS, *RESCUES])
        return
    logs = {name: read(name) for name in RUNS if log_of(name).exists()}
    if missing := [name for name in [*RUNS, *RESCUES] if not log_of(name).exists()]:
        print(f"without {', '.join(missing)}: run them first")
    found = scores.judge(logs)
    if options.command == "evaluate":
        path = ROOT / "benchmarks" / "results" / "early_warning.json"
        path.write_text(json.dumps(found, indent=1) + "\n")
        scores.show(found)
    else:
        plots.catalogue(logs, found, ROOT / "docs" / "early_warning_catalogue.png")
        rescued = {name: read(name) for name in ("llama3_hot", *RESCUES) if log_of(name).exists()}
        plots.rescue(rescued, ROOT / "docs" / "early_warning_rescue.png")


if __name__ == "__main__":
    main()
