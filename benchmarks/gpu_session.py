"""Run all GPU checks and benchmarks in one command, within ten minutes on one H100, the most important first.

    python benchmarks/gpu_session.py                              # results in benchmarks/results
    python benchmarks/gpu_session.py --results=/tmp/out --only=checks,step
    python benchmarks/gpu_session.py --size=tiny --quick          # a rehearsal, on a CPU too

`checks` compares native kernels with `emulated` and with float64 mathematics; its figures are in
gpu_checks.json.

Each part is a process of its own with a limit of its own, so that a failure does not end the
others; parts write results as they go, so that a part that runs out of time leaves what it had. A
session writes one log (gpu_session.log) and a summary (gpu_session.json). The exit code is 1 if a
part failed.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

import common

MAIN = "llama3:bf16,fog_flash:fp8_dpa,fog_flash:fp8_dpa:fast"
OTHERS = "llama3:bf16,fog_flash:fp8,fog_flash:fp8_dpa:composed,fog_flash:bf16,llama3:fp8,fog_max:fp8_dpa,op:fp8_dpa,olmo2:bf16"


@dataclasses.dataclass(frozen=True)
class Part:
    """One process: its arguments to Python, its limit in seconds."""

    name: str
    arguments: tuple[str, ...]
    limit: int


class Measure(NamedTuple):
    """How much is measured."""

    rounds: str
    step: tuple[str, ...]
    depths: str
    lengths: str
    tokens: tuple[str, ...]
    batch: tuple[str, ...]


_WHOLE = Measure(
    rounds="--rounds=10",
    step=("--batch=4", "--rounds=2", "--steps=5"),
    depths="6,2",
    lengths="4096,8192,2048,16384",
    tokens=(),
    batch=(),
)
_QUICK = Measure(
    rounds="--rounds=1",
    step=("--batch=1", "--rounds=1", "--steps=1"),
    depths="2,1",
    lengths="256",
    tokens=("--tokens=256",),
    batch=("--batch=1",),
)
_CHECKS = "-m pytest tests/gpu -m gpu -s -W default -p no:cacheprovider"


def parts(args: argparse.Namespace) -> list[Part]:
    """Return the parts to run, in order."""
    size, where = f"--size={args.size}", f"--results={args.results}"
    measure = _QUICK if args.quick else _WHOLE
    figures = f"--figures={args.results / 'gpu_checks.json'}"
    first_depth = measure.depths.split(",")[0]
    step = ("benchmarks/train_step.py", size, where)
    main = f"--models={MAIN}", f"--layers={measure.depths}", "--profile"
    others = f"--models={OTHERS}", f"--layers={first_depth}", "--name=train_step_others"
    lengths = f"--lengths={measure.lengths}", "--batch=2", "--scalings=delayed"
    attention = ("benchmarks/attention.py", size, where, *lengths, measure.rounds)
    gemm = ("benchmarks/gemm.py", size, where, measure.rounds, *measure.tokens)
    peers = ("benchmarks/peers.py", size, where, measure.rounds, *measure.batch)
    return [
        Part("step", (*step, *main, *measure.step), 170),
        Part("checks", (*_CHECKS.split(), figures), 150),
        Part("attention", attention, 100),
        Part("gemm", gemm, 60),
        Part("peers", peers, 200),
        Part("others", (*step, *others, *measure.step), 120),
        Part("tune", ("benchmarks/tune_attention.py", where), 150),
    ]


def run(part: Part, limit: float, log: pathlib.Path) -> dict:
    """Run one part to its end or its limit, and return its outcome."""
    path = os.pathsep.join(filter(None, (str(common.ROOT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {
        "PYTHONPATH": path,
        "PYTHONUNBUFFERED": "1",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
    }
    if part.name in ("checks", "peers"):  # the latter shares the GPU with PyTorch
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    if part.name == "checks":
        environment["JAX_PLATFORMS"] = "cuda" if pathlib.Path("/dev/nvidiactl").exists() else "cpu"
    start = time.perf_counter()
    with log.open("a") as out:
        out.write(f"\n=== {part.name}: python {' '.join(part.arguments)}\n")
        out.flush()
        process = subprocess.Popen(
            [sys.executable, *part.arguments],
            cwd=common.ROOT,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            code = None
    outcome = {
        "part": part.name,
        "seconds": round(time.perf_counter() - start, 1),
        "limit": round(limit),
        "outcome": {0: "passed", None: "ran out of time"}.get(code, f"failed with {code}"),
    }
    print(
        f"{outcome['part']:<10} {outcome['outcome']:<16} {outcome['seconds']:6.1f} s of {outcome['limit']}",
        flush=True,
    )
    return outcome


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts while time is left, and return the exit code."""
    args = _arguments(argv)
    args.results = args.results.resolve()
    args.results.mkdir(parents=True, exist_ok=True)
    log = args.results / "gpu_session.log"
    log.write_text("")
    start, outcomes = time.perf_counter(), []
    known = {part.name: part for part in parts(args)}
    for name in args.only.split(",") if args.only else [name for name in known if name != "tune"]:
        part, left = known[name], args.budget - (time.perf_counter() - start)
        outcomes.append(
            run(part, min(part.limit, left), log)
            if left > 15
            else {"part": part.name, "outcome": "no time left"}
        )
        record = {
            "command": " ".join(["python", *sys.argv]),
            "versions": common.versions(),
            "parts": outcomes,
        }
        (args.results / "gpu_session.json").write_text(json.dumps(record, indent=1) + "\n")
    print(f"{time.perf_counter() - start:.0f} s; results and gpu_session.log in {args.results}")
    return int(any(outcome["outcome"] != "passed" for outcome in outcomes))


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/gpu_session.py --only=step,checks",
    )
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    parser.add_argument("--size", default="8b")
    parser.add_argument(
        "--budget", type=float, default=590.0, help="seconds for all parts together"
    )
    parser.add_argument(
        "--only",
        help="parts to run, in this order, separated by commas; tune runs only when asked for",
    )
    parser.add_argument(
        "--quick", action="store_true", help="small shapes, one round: does everything run?"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
