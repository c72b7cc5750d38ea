"""Print what a program is doing before each part of its work that may take seconds.

    stage = Stages()
    with stage("compiling the training step"):
        ...
    with stage("evaluating") as note:
        note("batch 3 of 12")

prints `start    compiling the training step` at once, so that users know what they wait for, and every half minute how long it
has taken. On a terminal the line counts the seconds and ends as `start    compiling the training step: 12.3 s`. The module
imports no JAX, because loading JAX is such a part, too.
"""

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import TextIO

WORD = "start    "
QUIET = 30.0  # seconds between lines away from a terminal


class Stages:
    """Announces the parts of a start, one after another.

    Args:
        shown: False prints nothing, for all processes but the first.
        out: where to print; standard output by default.
    """

    def __init__(self, shown: bool = True, out: TextIO | None = None):
        self._shown, self._out = shown, out

    def message(self, line: str) -> None:
        """Print a line."""
        if self._shown:
            print(line, file=self._out or sys.stdout, flush=True)

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[Callable[[str], None]]:
        """Announce the part that runs inside; it may note how far it is."""
        if not self._shown:
            yield lambda text: None
            return
        line = _Line(self._out or sys.stdout, what)
        counting = threading.Thread(target=line.count, name="stage", daemon=True)
        counting.start()
        try:
            yield line.note
        finally:
            line.done.set()
            counting.join()
            line.end()


class _Line:
    """The lines of one part: on a terminal one that is rewritten, elsewhere one at the start and
    one every half minute.
    """

    def __init__(self, out: TextIO, what: str):
        self.out, self.what, self.noted, self.done = out, what, "", threading.Event()
        self.live, self.began = out.isatty(), time.monotonic()
        self._write("" if self.live else f"{WORD}{what}\n")

    def note(self, text: str) -> None:
        self.noted = f", {text}"

    def count(self) -> None:
        """Count the seconds until the part is done."""
        if self.live:
            self._rewrite(" ... 0 s")
        while not self.done.wait(1.0 if self.live else QUIET):
            seconds = f"{self.noted} ... {time.monotonic() - self.began:.0f} s"
            self._rewrite(seconds) if self.live else self._write(f"{WORD}{self.what}{seconds}\n")

    def end(self) -> None:
        if self.live:
            self._rewrite(f": {time.monotonic() - self.began:.1f} s")
            self._write("\n")

    def _rewrite(self, rest: str) -> None:
        self._write(f"\r{WORD}{self.what}{rest}\x1b[K")

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()
