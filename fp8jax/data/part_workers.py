"""Make the parts of a preparation one after another, or in several processes."""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable
from typing import Any

from fp8jax.config import ConfigError
from fp8jax.data import documents
from fp8jax.data.prepared_part import Job, make, read_record

Tell = Callable[[int, int], Any]


def run(job: Job, parts: list, workers: int, tell: Tell) -> None:
    """Make the unfinished parts in `workers` processes; `tell` receives the bytes that are done and
    the total.
    """
    total = sum(piece.size for part in parts for piece in part)
    missing = [number for number in range(len(parts)) if read_record(job, number) is None]
    done = total - sum(piece.size for number in missing for piece in parts[number])
    tell(done, total)
    if workers == 1 or len(missing) < 2:
        for number in missing:
            progress = _Counter(lambda count, before=done: tell(before + count, total))
            make(job, number, parts[number], progress)
            done += sum(piece.size for piece in parts[number])
    elif missing:
        _run_processes(
            job, parts, missing, min(workers, len(missing)), lambda count: tell(done + count, total)
        )
    tell(total, total)


class _Counter:
    """A sum of progress within one process."""

    def __init__(self, tell: Callable[[int], Any]):
        self._tell, self._count = tell, 0

    def __call__(self, more: int) -> None:
        self._count += more
        self._tell(self._count)


def _run_processes(
    job: Job, parts: list, missing: list[int], workers: int, tell: Callable[[int], Any]
) -> None:
    context = multiprocessing.get_context(
        "spawn"
    )  # a forked copy of a process with threads may hang
    count, stop = context.Value("q", 0), context.Event()
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, _start_worker, (count, stop)
    ) as executor:
        waiting = {executor.submit(_work, job, number, parts[number]) for number in missing}
        try:
            while waiting:
                done, waiting = concurrent.futures.wait(
                    waiting, 0.5, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()
                tell(count.value)
        except concurrent.futures.process.BrokenProcessPool:
            raise ConfigError(
                "a worker was killed, perhaps for want of memory; run again with fewer --workers"
            ) from None
        finally:
            stop.set()
            executor.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(count: Any, stop: Any) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(count=count, stop=stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _work(job: Job, number: int, part: list[documents.Piece]) -> None:
    def progress(more: int) -> None:
        with _worker["count"].get_lock():
            _worker["count"].value += more
        if _worker["stop"].is_set():
            raise ConfigError("stopped")

    make(job, number, part, progress)
