"""Test the planner's choice: compile every option, and compare with the one that a run would choose.

    python benchmarks/fit_table.py --config=configs/fp8_base.py:390m --target=h100:1
    python benchmarks/fit_table.py --config=configs/fp8_base.py:8b --target=h100:8 --nearest=6

The script prints the peak memory of a device and the time at peak rates of each option as compiled,
and by how much the chosen one is slower than the fastest that fits; it writes
benchmarks/results/fit.json. Without --nearest all options are compiled, which takes hours at 8B;
with it, for each loss chunk and rematerialisation, only so many microbatches around those that just
fit. The exit code is 1 if the choice is more than 10% slower than the best, or does not fit.
"""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fp8jax import config as config_lib
from fp8jax.audit import targets
from fp8jax.cli.config_files import read_config
from fp8jax.training.fit import Ranking
from fp8jax.training.fit_options import gigabytes
from fp8jax.training.fit_target import TargetFit, compile_option, fit_target

RESULTS = ROOT / "benchmarks/results/fit.json"
ALLOWED = 1.1


def main() -> int:
    """Compare the choice with every option."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--target", required=True)
    parser.add_argument("--nearest", type=int, default=0)
    options = parser.parse_args()
    config = config_lib.from_dict(read_config("config", options.config))
    target = targets.resolve(options.target)
    found = fit_target(config, target, lambda line: print(line, flush=True))
    if found.limit is None or found.choice.best.seconds is None:
        print(
            f"error: --target={options.target}: its memory or rates are not known", file=sys.stderr
        )
        return 2
    rows = [
        _row(found, target, option, config) for option in _options(found, config, options.nearest)
    ]
    fitting = [
        row["seconds"] for row in rows if row["seconds"] and row["bytes"] <= found.limit.usable
    ]
    chosen = found.choice.best
    slower = chosen.seconds / min([*fitting, chosen.seconds])
    print(
        f"chosen: {chosen.option}, {chosen.seconds:.3f} s: {slower:.3f} times the best of {len(rows)}"
    )
    name = f"{options.config} on {options.target}"
    text = {"chosen": str(chosen.option), "slower_than_best": round(slower, 4), "options": rows}
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps(results | {name: text}, indent=1) + "\n")
    return 0 if found.choice.fits and slower <= ALLOWED else 1


def _options(found: TargetFit, config: config_lib.Config, nearest: int) -> list[Any]:
    """Return all options, or of each kind those whose microbatches are around the fewest that should fit."""
    if not nearest or found.limit is None:
        return found.options
    ranking = Ranking(found.plan.change(config), found.options)
    chosen = []
    for kind in dict.fromkeys((option.remat, option.loss_chunk) for option in found.options):
        same = [option for option in found.options if (option.remat, option.loss_chunk) == kind]
        same.sort(key=lambda option: abs(ranking.needs(option) - found.limit.usable))
        chosen += same[:nearest]
    return chosen


def _row(
    found: TargetFit, target: targets.Target, option: Any, config: config_lib.Config
) -> dict[str, Any]:
    compiled = compile_option(found.plan.change(option.of(config)), target)
    fits = compiled.needs <= found.limit.usable
    print(
        f"{option}: {gigabytes(compiled.needs)}, {compiled.seconds or 0:.3f} s{'' if fits else ', does not fit'}",
        flush=True,
    )
    return {"option": str(option), "bytes": compiled.needs, "seconds": compiled.seconds}


if __name__ == "__main__":
    sys.exit(main())
