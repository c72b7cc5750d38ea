"""Ends a process that hangs, and tells where: for a pod, a job that ends and restarts beats one that waits for ever.

    with Watchdog(limit=1800) as watchdog:
        watchdog.expect("step 17")      # from here until the next call may take `limit` seconds

On SIGUSR2 it prints the stacks of all threads, and the process goes on.
"""

import faulthandler
import os
import signal
import sys
import threading
import time


class Watchdog:
    """Prints all stacks and exits with code 1 when what is expected takes too long.

    Args:
        limit: seconds; 0: never.
    """

    def __init__(self, limit: float):
        self.limit, self._what, self._since = limit, "start-up", time.monotonic()
        self._done = threading.Event()

    def expect(self, what: str) -> None:
        """What is under way now; starts its time."""
        self._what, self._since = what, time.monotonic()

    def __enter__(self) -> "Watchdog":
        """Starts watching."""
        faulthandler.register(signal.SIGUSR2, file=sys.__stderr__, all_threads=True)
        self.expect("start-up")
        if self.limit:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Stops watching."""
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(min(self.limit / 4, 5.0)):
            waited = time.monotonic() - self._since
            if waited > self.limit:
                print(f"error: {self._what} has taken {waited:.0f} s, more than config.training.hang_limit={self.limit:g}; "
                      "stacks of all threads follow, then the process ends. Run again to continue from the newest checkpoint.",
                      file=sys.stderr, flush=True)
                faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)
                os._exit(1)
