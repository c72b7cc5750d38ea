"""Write a run's logs: `metrics.jsonl` and TensorBoard files for logged steps, `events.jsonl` for
incidents.

    with MetricsWriter(workdir, start_step=0) as writer:
        writer.write(10, {"loss": 2.3, "tokens": 40960})
        writer.event("early_warning", 10, tensor="qkv", layer=3)
    read_metrics(f"{workdir}/metrics.jsonl")            # logs.py: [{"step": 10, "loss": 2.3, "tokens": 40960}]

`metrics.jsonl` is the source of truth: one strict JSON object per logged step, `step` first; JSON
has no word for a non-finite number, so it is the string "nan", "inf" or "-inf". Values of layers
are one array per statistic (layered.py). The TensorBoard files hold the same values, with a name
per layer.

Storage that fails does not fail the run: lines wait in memory until they can be written
(`retrying_file.py`).

One process of a run writes, the others are `Silent`; the caller decides which, and computes all
values. Followers, such as the report and Weights & Biases, get what is written and are closed with
the writer.
"""

import functools
import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import tensorboardX
from tensorboardX import record_writer
from tensorboardX.proto.summary_pb2 import Summary

from fp8jax import files
from fp8jax.monitor import layered
from fp8jax.monitor.logs import MetricsError, cut, read_metrics
from fp8jax.monitor.retrying_file import RetryingFile

_RETRYING = "retrying"
_KEPT_SUMMARIES = 8  # sets of names: steps with statistics, without them, with an evaluation


class _RetryingFiles:
    """A factory of TensorBoard files `retrying:PATH`: a full disk would end tensorboardX's thread
    and block a step.
    """

    def open(self, path: str) -> RetryingFile:
        return RetryingFile(path.partition(":")[2], fresh=True)

    def directory_check(self, path: str) -> None:
        os.makedirs(path.partition(":")[2], exist_ok=True)


@functools.cache
def _set_up_tensorboard() -> None:
    """Have tensorboardX write through retrying files, and not warn of every NaN: a run's own log
    has them.
    """
    record_writer.register_writer_factory(_RETRYING, _RetryingFiles())
    logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)


class Follower(Protocol):
    """A receiver of every logged step."""

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Receive one step's values, Python numbers."""

    def close(self) -> None:
        """Handle the end of the run."""


class MetricsWriter:
    """A writer that appends to the logs of a run, new or continued.

    Continuing from a checkpoint repeats the steps that were logged after it. Their old lines are
    dropped first, so the log of an interrupted run equals that of an uninterrupted one. Events are
    a history: they stay.

    Args:
        workdir: directory of the run; created if missing.
        start_step: steps already taken: 0 for a new run, the checkpoint's step for a continued one.
        followers: other receivers of every logged step.

    Raises:
        MetricsError: an existing log has, among the last it keeps, an unreadable line other than
            one cut short by a crash.
    """

    def __init__(
        self, workdir: str | os.PathLike, start_step: int = 0, followers: Sequence[Follower] = ()
    ):
        _set_up_tensorboard()
        self._followers = followers
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        metrics, events = workdir / "metrics.jsonl", workdir / "events.jsonl"
        cut(metrics, start_step)
        cut(events, math.inf)
        self._metrics, self._events = RetryingFile(metrics), RetryingFile(events)
        self._summaries: dict[tuple[str, ...], Summary] = {}
        self._board: Any = tensorboardX.SummaryWriter(
            f"{_RETRYING}:{workdir / 'tensorboard'}",
            purge_step=start_step + 1,  # TensorBoard hides earlier files from here on
            filename_suffix=f".{start_step:09}",  # names hold seconds only: a quick restart would overwrite a file
            flush_secs=10,
        )

    def write(self, step: int, metrics: dict[str, float | int]) -> None:
        """Log one step; when this returns, the line is handed to the operating system.

        Args:
            step: steps taken so far.
            metrics: name → Python, NumPy or JAX scalar; may be non-finite.
        """
        values = {name: _plain(value) for name, value in metrics.items()}
        _append(self._metrics, layered.pack({"step": int(step), **values}))
        self._board.file_writer.add_summary(self._summary(values), int(step))
        for follower in self._followers:
            follower.write(int(step), values)

    def _summary(self, values: dict[str, float | int]) -> Summary:
        """Return all values as one event: thousands of calls of add_scalar take longer than a small
        model's step.

        Steps log the same names repeatedly, so the summary that holds them is kept; add_summary
        copies it.
        """
        names = tuple(values)
        if names not in self._summaries:
            if len(self._summaries) == _KEPT_SUMMARIES:
                self._summaries.clear()
            self._summaries[names] = Summary(value=[Summary.Value(tag=name) for name in names])
        summary = self._summaries[names]
        for entry, value in zip(summary.value, values.values(), strict=True):
            entry.simple_value = value
        return summary

    def event(self, kind: str, step: int, **fields: Any) -> None:
        """Log an incident: a warning, a restart, a rollback.

        Args:
            kind: what happened, in one word.
            step: steps taken so far.
            **fields: JSON values; a float may be non-finite.
        """
        values = {name: _plain(value) for name, value in fields.items()}
        _append(self._events, {"step": int(step), "kind": kind, **values})

    def waiting(self) -> str | None:
        """Return why lines wait to be written, None if none does."""
        return self._metrics.reason or self._events.reason or None

    def close(self) -> None:
        """Close the files; the writer cannot be used afterwards."""
        self._metrics.close()
        self._events.close()
        self._board.close()
        for follower in self._followers:
            follower.close()

    def __enter__(self) -> "MetricsWriter":
        """Return the writer itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the files."""
        self.close()


def _append(file: RetryingFile, record: dict[str, Any]) -> None:
    try:
        line = json.dumps(record, allow_nan=False)
    except (
        ValueError
    ):  # rare: checking each of thousands of values beforehand takes as long as writing them
        line = json.dumps(files.strict(record), allow_nan=False)
    file.write((line + "\n").encode())


def _plain(value: Any) -> Any:
    """Return the Python scalar of a NumPy or JAX scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


class Silent:
    """A stand-in for what writes or shows, in processes that do not: each of its methods does
    nothing.
    """

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def __enter__(self) -> "Silent":
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Do nothing."""


__all__ = ["MetricsError", "MetricsWriter", "Silent", "read_metrics"]
