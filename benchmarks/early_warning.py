"""Early warning on a catalogue of runs: train them, judge the warnings beside simple rivals, plot.

    python benchmarks/early_warning.py run                    # trains what is missing: about 1 minute a run on 2 idle cores
    python benchmarks/early_warning.py run --only=llama3_hot
    python benchmarks/early_warning.py evaluate               # table, benchmarks/results/early_warning.json
    python benchmarks/early_warning.py plot                   # docs/early_warning_*.png

Logs are kept beside the code, in benchmarks/early_warning/NAME.jsonl.xz: every logged value that the warning or the rivals
read, to four digits. Which runs there are and when one counts as diverged: benchmarks/early_warning_runs.py.
"""

import argparse
import json
import lzma
import pathlib
import shutil
from typing import Any

from early_warning_runs import RUNS, config_of, disturbed
from fp8jax.monitor.writers import read_metrics
from fp8jax.training import loop

ROOT = pathlib.Path(__file__).resolve().parent.parent
LOGS = ROOT / "benchmarks" / "early_warning"
DROPPED = ("mean/", "zero/", "negative_zero/", "held_out/", "tokens_per_second", "step_seconds")


def run(names: list[str]) -> None:
    """Trains the runs whose logs are missing, in runs/early_warning/, and keeps their logs."""
    for name in names:
        log, workdir = LOGS / f"{name}.jsonl.xz", ROOT / "runs" / "early_warning" / name
        if log.exists():
            continue
        shutil.rmtree(workdir, ignore_errors=True)
        with disturbed(RUNS[name].disturbance):
            loop.train(config_of(RUNS[name]), workdir)
        keep(workdir / "metrics.jsonl", log)


def keep(metrics: pathlib.Path, log: pathlib.Path) -> None:
    """Writes a run's log, without what nobody reads, compressed."""
    lines = [json.dumps({name: _short(value) for name, value in entry.items() if not name.startswith(DROPPED)})
             for entry in read_metrics(metrics)]
    log.parent.mkdir(exist_ok=True)
    log.write_bytes(lzma.compress(("\n".join(lines) + "\n").encode(), preset=9))


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main(argv: list[str] | None = None) -> None:
    """Runs one of the commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("run",))
    parser.add_argument("--only", help="names of runs, separated by commas")
    options = parser.parse_args(argv)
    run(options.only.split(",") if options.only else list(RUNS))


if __name__ == "__main__":
    main()
