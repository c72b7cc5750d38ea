"""Note signals that ask a run to stop, for the loop, and acknowledge them at once."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Yield a list to which signals that ask to stop are appended; the loop stops at the end of the
    step.

    They are SIGINT, SIGTERM, SIGHUP (a lost terminal) and SIGUSR1 (a scheduler's notice). A second
    SIGINT interrupts. Under nohup SIGHUP stays ignored; SIGINT, which shells ignore for background
    processes, does not. Python has handlers in the main thread alone: in another nothing is caught.
    """
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return

    def note(number: int, _frame: Any) -> None:
        if caught and number == signal.SIGINT:
            raise KeyboardInterrupt
        caught.append(number)

    numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        numbers = tuple(number for number in numbers if number != signal.SIGHUP)
    before = {number: signal.signal(number, note) for number in numbers}
    with _acknowledged(numbers):
        try:
            yield caught
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _acknowledged(numbers: Sequence[int]) -> Iterator[None]:
    """Report a signal at once, because Python's handlers wait until a compilation or a step is
    over, at times for minutes.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def say() -> None:
        while number := os.read(reader, 1):
            if number[0] in numbers:
                print(
                    f"{signal.Signals(number[0]).name}: stopping when what is under way is done "
                    f"and saved",
                    flush=True,
                )

    thread = threading.Thread(target=say, name="signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)
        thread.join()
        os.close(reader)
