"""End a process that hangs, and report where: for a pod, a job that ends and restarts is better
than one that waits forever.

    with Watchdog({"start": 3600, "step": 1800, "evaluation": 1800, "save": 3600}) as watchdog:     # seconds; 0: no limit
        watchdog.begin("step", "step 17 (batch 16)")    # replaces the step before
        watchdog.begin("evaluation", "batch 3 of 12")   # with each batch again: a long evaluation that progresses may last
        watchdog.begin("save", "saving step 17")        # beside the steps, in the background
        watchdog.end("save")

On SIGUSR2 it prints the stacks of all threads, and the process continues. A crash in native code,
such as that of a mapped file which was cut off meanwhile, prints them too.
"""

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping


class Watchdog:
    """A watchdog that prints all stacks and exits with code 1 when a running part takes too long.

    Args:
        limits: kind of work → seconds; 0 for no limit. Names are those of
            `config.training.KIND_limit`.
    """

    def __init__(self, limits: Mapping[str, float]):
        self.limits, self._last = limits, "no step has begun"
        self._under_way: dict[str, tuple[str, float]] = {}
        self._done = threading.Event()

    def begin(self, kind: str, what: str) -> None:
        """Begin `what`, which replaces any other work of its kind."""
        self._under_way[kind] = what, time.monotonic()
        if kind == "step":
            self._last = f"last begun: {what}"

    def end(self, kind: str) -> None:
        """End the work of this kind."""
        self._under_way.pop(kind, None)

    def __enter__(self) -> "Watchdog":
        """Start watching."""
        faulthandler.register(signal.SIGUSR2, file=sys.__stderr__ or sys.stderr, all_threads=True)
        faulthandler.enable(file=sys.__stderr__ or sys.stderr, all_threads=True)
        if limited := [limit for limit in self.limits.values() if limit]:
            threading.Thread(
                target=self._watch, args=(min(*limited, 20.0) / 4,), name="watchdog", daemon=True
            ).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop watching."""
        self._done.set()

    def _watch(self, pause: float) -> None:
        while not self._done.wait(pause):
            for kind, (what, since) in list(self._under_way.items()):
                waited, limit = time.monotonic() - since, self.limits[kind]
                if limit and waited > limit:
                    print(
                        f"error: {what} has taken {waited:.0f} s, more than "
                        f"config.training.{kind}_limit={limit:g}; {self._last}; stacks "
                        "of all threads follow, then the process ends. Run again to continue "
                        "from the newest checkpoint.",
                        file=sys.stderr,
                        flush=True,
                    )
                    faulthandler.dump_traceback(file=sys.__stderr__ or sys.stderr, all_threads=True)
                    os._exit(1)
