"""Measure which faults the tests catch: put one fault at a time into a copy of the code and run the tests of that file.

    python tools/mutants.py                                # all faults of tools/mutants/*.toml
    python tools/mutants.py --room models --room training
    python tools/mutants.py --only decay_on_gains -v       # the end of pytest's output as well
    python tools/mutants.py --set second --jobs 2

Each file in tools/mutants/ holds the faults of one room, tests.toml says which tests a source file
has beside those that mirror its path. A fault is text to find, once in its file, and what takes its
place; white space and trailing commas do not count, so that formatting makes none stale. Your tree
is only read: faults go into copies under the system's temporary directory. Tests run with -x, each
file of tests first without any fault, because a test that fails anyway catches nothing.

Exit code 0 if every fault is caught, 1 if some survive, 2 if one is stale or its tests cannot run.
A run that takes too long counts as survived: look at it. Set JAX_COMPILATION_CACHE_DIR to keep
compiled programs.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import queue
import re
import shutil
import signal
import sys
import tempfile
import time
import tomllib

ROOT = pathlib.Path(__file__).resolve().parents[1]
DATA = ROOT / "tools" / "mutants"
COPIED = (
    "fp8jax",
    "configs",
    "tests",
    "launch",
    "benchmarks",
    "train.py",
    "eval.py",
    "pyproject.toml",
)
# These are imported once, before the processes that run tests are forked, which saves half of the
# time of a small test.
PRELOADED = [
    "pytest",
    "jax",
    "jax.numpy",
    "flax.nnx",
    "optax",
    "optax.contrib",
    "grain",
    "orbax.checkpoint.v1",
    "tensorboardX",
    "rich.live",
    "ml_collections",
]
_CONTEXT = multiprocessing.get_context("forkserver")
CAUGHT, SURVIVED, SLOW, BROKEN = "caught", "SURVIVED", "TOO LONG", "BROKEN"


class StaleError(ValueError):
    """An error for a fault whose text is not in its file, or is there more than once."""


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        name: unique name.
        file: path of the source file, from the root.
        old: text to find.
        new: what takes its place.
        fault: what goes wrong, in a few words.
        room: name of the file of faults.
        set: `first`, `second`: when it was written.
        tests: names of tests that are tried before those of the source file.
    """

    name: str
    file: str
    old: str
    new: str
    fault: str
    room: str
    set: str = "first"
    tests: tuple[str, ...] = ()

    def applied(self, root: pathlib.Path) -> str:
        """Return the file's text with the fault, for the tree at `root`.

        Raises:
            StaleError: the text is not there exactly once.
            SyntaxError: the result is not Python.
        """
        text = (root / self.file).read_text(encoding="utf-8")
        places = list(_pattern(self.old).finditer(text))
        if len(places) != 1:
            raise StaleError(
                f"{self.name}: {self.file} has this text {len(places)} times, not once: {self.old!r}"
            )
        place = places[0]
        mutated = text[: place.start()] + self.new + text[place.end() :]
        compile(mutated, self.file, "exec")
        return mutated


def _pattern(text: str) -> re.Pattern[str]:
    """Return a pattern for code that is equal but for white space and trailing commas."""
    parts = []
    for token in re.findall(r"\w+|\S", text):
        comma = r",?\s*" if token in ")]}" else ""
        parts.append(comma + re.escape(token))
    return re.compile(r"\s*".join(parts))


def load_mutants() -> list[Mutant]:
    """Return the faults of all files, in order."""
    found = []
    for path in sorted(DATA.glob("*.toml")):
        if path.name == "tests.toml":
            continue
        for entry in tomllib.loads(path.read_text(encoding="utf-8"))["mutant"]:
            tests = tuple(entry.pop("tests", ()))
            found.append(Mutant(**entry, room=path.stem, tests=tests))
    names = [mutant.name for mutant in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise StaleError(f"names that are there twice: {', '.join(twice)}")
    return found


def tests_of(file: str, extra: dict[str, list[str]]) -> list[str]:
    """Return the test files of a source file: the one that mirrors its path and those that tests.toml lists."""
    path = pathlib.PurePath(file)
    room = path.parts[1:-1] if path.parts[0] == "fp8jax" else path.parts[:-1]
    mirror = str(pathlib.PurePath("tests", *room, f"test_{path.name}"))
    listed = [mirror] if (ROOT / mirror).exists() else []
    return list(dict.fromkeys([*listed, *extra.get(file, [])]))


class Copies:
    """Copies of the tree, one per job, each used by one run at a time."""

    def __init__(self, directory: pathlib.Path, count: int):
        self._free: queue.Queue[pathlib.Path] = queue.Queue()
        for number in range(count):
            copy = directory / str(number)
            copy.mkdir()
            for name in COPIED:
                _copy(ROOT / name, copy / name)
            self._free.put(copy)

    def run(self, tests: list[str], limit: float, mutant: Mutant | None = None) -> tuple[str, str]:
        """Run tests in a copy with this fault in it.

        Returns:
            CAUGHT, SURVIVED, SLOW or BROKEN; the end of pytest's output.
        """
        copy = self._free.get()
        try:
            if mutant is None:
                return _pytest(copy, tests, limit)
            path = copy / mutant.file
            sound = path.read_text(encoding="utf-8")
            path.write_text(mutant.applied(copy), encoding="utf-8")
            try:
                return _pytest(copy, tests, limit)
            finally:
                path.write_text(sound, encoding="utf-8")
        finally:
            self._free.put(copy)


def _copy(source: pathlib.Path, target: pathlib.Path) -> None:
    if source.is_dir():
        shutil.copytree(
            source, target, ignore=shutil.ignore_patterns("__pycache__", "results", "runs")
        )
    else:
        shutil.copy2(source, target)


def _pytest(copy: pathlib.Path, tests: list[str], limit: float) -> tuple[str, str]:
    """Run pytest in a process that has the libraries, but nothing of fp8jax, imported already."""
    log = copy / "log"
    child = _CONTEXT.Process(target=_pytest_here, args=(str(copy), tests))
    child.start()
    child.join(limit)
    if child.is_alive():
        os.killpg(child.pid, signal.SIGKILL)
        child.join()
        return SLOW, f"more than {limit:.0f} s"
    end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:])
    return {0: SURVIVED, 1: CAUGHT}.get(child.exitcode, BROKEN), end


def _pytest_here(copy: str, tests: list[str]) -> None:
    """Run pytest in this process, its output to the file `log`, and exit with its code."""
    os.setsid()  # processes that tests start end with them
    log = os.open(os.path.join(copy, "log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = copy
    # A fault that is put in and taken out within a second would leave stale bytecode.
    sys.dont_write_bytecode, os.environ["PYTHONDONTWRITEBYTECODE"] = True, "1"
    sys.path[:0] = [copy]

    import pytest

    code = pytest.ExitCode.INTERNAL_ERROR
    try:
        code = pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", *tests])
    finally:  # an exception here has the exit code of a test that fails
        sys.stdout.flush()
        os._exit(int(code))


def check_sound(copies: Copies, files: list[str], limit: float) -> list[str]:
    """Return the test files that fail, or cannot run, without any fault."""
    wrong = []
    for file in files:
        outcome, end = copies.run([file], limit)
        if outcome != SURVIVED:
            wrong.append(f"{file} does not pass without a fault:\n{end}")
    return wrong


def table(results: list[tuple[Mutant, str]]) -> str:
    """Return how many faults of each room are caught."""
    lines = [f"{'room':<10} {'caught':>6} {'of':>4}"]
    rooms = dict.fromkeys(mutant.room for mutant, _ in results)
    for room in [*rooms, "all"]:
        outcomes = [outcome for mutant, outcome in results if room in ("all", mutant.room)]
        caught = outcomes.count(CAUGHT)
        lines.append(f"{room:<10} {caught:>6} {len(outcomes):>4} {caught / len(outcomes):>5.0%}")
    return "\n".join(lines)


def chosen(arguments: argparse.Namespace) -> list[Mutant]:
    """Return the faults that the command line asks for."""
    found = []
    for mutant in load_mutants():
        by_room = not arguments.room or mutant.room in arguments.room
        by_name = not arguments.only or mutant.name in arguments.only
        if by_room and by_name and arguments.set in ("all", mutant.set):
            found.append(mutant)
    return found


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--room", action="append", help="only this file of faults; may be given several times"
    )
    parser.add_argument(
        "--only", action="append", help="only this fault; may be given several times"
    )
    parser.add_argument("--set", default="all", help="only faults of this set")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds a run may take")
    parser.add_argument(
        "--trust", action="store_true", help="do not run the tests without any fault first"
    )
    parser.add_argument("--check", action="store_true", help="only look for stale faults")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="print the end of pytest's output"
    )
    return parser.parse_args()


def main() -> int:
    """Run what the command line asks for."""
    arguments = parse()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _CONTEXT.set_forkserver_preload(PRELOADED)
    extra = tomllib.loads((DATA / "tests.toml").read_text(encoding="utf-8"))["tests"]
    mutants, problems, work = chosen(arguments), [], []
    for mutant in mutants:
        tests = tests_of(mutant.file, extra)
        try:
            mutant.applied(ROOT)
        except (StaleError, SyntaxError) as error:
            problems.append(str(error))
        if not (tests or mutant.tests):
            problems.append(f"{mutant.name}: {mutant.file} has no tests; list some in tests.toml")
        work.append((mutant, tests))
    if problems or arguments.check:
        print("\n".join(problems) or f"{len(mutants)} faults, none stale")
        return 2 if problems else 0
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        copies = Copies(pathlib.Path(directory), arguments.jobs)
        files = dict.fromkeys(
            test.partition("::")[0] for mutant, tests in work for test in (*mutant.tests, *tests)
        )
        wrong = [] if arguments.trust else check_sound(copies, list(files), arguments.limit)
        if wrong:
            print("\n".join(wrong))
            return 2
        results = run_all(copies, work, arguments)
    print(table(results))
    if any(outcome == BROKEN for _, outcome in results):
        return 2
    return int(any(outcome != CAUGHT for _, outcome in results))


def run_all(
    copies: Copies, work: list[tuple[Mutant, list[str]]], arguments: argparse.Namespace
) -> list[tuple[Mutant, str]]:
    """Run the tests of every fault, and print a line per outcome as they come."""

    def one(mutant: Mutant, tests: list[str]) -> tuple[Mutant, str]:
        began = time.monotonic()
        outcome, end = (
            copies.run(list(mutant.tests), arguments.limit, mutant)
            if mutant.tests
            else (SURVIVED, "")
        )
        if outcome == SURVIVED and tests:
            outcome, end = copies.run(tests, arguments.limit, mutant)
        seconds = time.monotonic() - began
        print(
            f"{outcome:<9} {mutant.room:<9} {mutant.name:<36} {seconds:5.0f} s  {mutant.fault}",
            flush=True,
        )
        if arguments.verbose or outcome == BROKEN:
            print(end, flush=True)
        return mutant, outcome

    with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
        return list(pool.map(lambda pair: one(*pair), work))


if __name__ == "__main__":
    sys.exit(main())
