"""What a run leaves to read: `metrics.jsonl` and TensorBoard files for logged steps, `events.jsonl` for incidents.

    with MetricsWriter(workdir, start_step=0) as writer:
        writer.write(10, {"loss": 2.3, "tokens": 40960})
        writer.event("early_warning", 10, tensor="qkv", layer=3)
    read_metrics(f"{workdir}/metrics.jsonl")            # [{"step": 10, "loss": 2.3, "tokens": 40960}]

`metrics.jsonl` is the source of truth: one strict JSON object a logged step, `step` first; JSON has no word for a
non-finite number, so it is the string "nan", "inf" or "-inf". The TensorBoard files say the same.

Storage that fails does not fail the run: lines wait in memory until they can be written (`patient_file.py`).

One process of a run writes, the others are `Silent`; nothing here decides which. Nothing is averaged or computed here. Followers,
such as the report and Weights & Biases, get what is written and are closed with the writer.
"""

import json
import logging
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import tensorboardX
from tensorboardX import record_writer
from tensorboardX.proto.summary_pb2 import Summary

from fp8jax.monitor.patient_file import PatientFile

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

# tensorboardX prints a warning for every NaN. A diverging run has many, and its own log already says so.
logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)
_PATIENT = "patient"
_KEPT_SUMMARIES = 8  # sets of names: steps with statistics, without, with an evaluation


class _PatientFiles:
    """Opens TensorBoard files called `patient:PATH`: a full disk would end tensorboardX's thread, and the next step wait for it for ever."""

    def open(self, path: str) -> PatientFile:
        return PatientFile(path.partition(":")[2], fresh=True)

    def directory_check(self, path: str) -> None:
        os.makedirs(path.partition(":")[2], exist_ok=True)


record_writer.register_writer_factory(_PATIENT, _PatientFiles())


class MetricsError(ValueError):
    """A log that cannot be read. The message is one line: path, line number, what is wrong."""


class Follower(Protocol):
    """Who wants every logged step."""

    def write(self, step: int, values: dict[str, float | int]) -> None:
        """Takes one step's values, Python numbers."""

    def close(self) -> None:
        """The run ends."""


class MetricsWriter:
    """Appends to the logs of a run, new or continued.

    Continuing from a checkpoint repeats the steps that were logged after it. Their old lines are dropped first, so the
    log of an interrupted run equals that of an uninterrupted one. Events are a history: they stay.

    Args:
        workdir: directory of the run; made if missing.
        start_step: steps already taken: 0 for a new run, the checkpoint's step for a continued one.
        followers: others who want every logged step.

    Raises:
        MetricsError: an existing log has an unreadable line other than a last one cut short by a crash.
    """

    def __init__(self, workdir: str | os.PathLike, start_step: int = 0, followers: Sequence[Follower] = ()):
        self._followers = followers
        workdir = pathlib.Path(workdir)
        workdir.mkdir(parents=True, exist_ok=True)
        metrics, events = workdir / "metrics.jsonl", workdir / "events.jsonl"
        _rewrite(metrics, [line for line, record in _lines(metrics) if record["step"] <= start_step])
        _rewrite(events, [line for line, _ in _lines(events)])
        self._metrics, self._events = PatientFile(metrics), PatientFile(events)
        self._summaries: dict[tuple[str, ...], Summary] = {}
        self._board = tensorboardX.SummaryWriter(
            f"{_PATIENT}:{workdir / 'tensorboard'}",
            purge_step=start_step + 1,  # TensorBoard hides what earlier files hold from here on
            filename_suffix=f".{start_step:09}",  # names hold seconds only: a quick restart would overwrite a file
            flush_secs=10,
        )

    def write(self, step: int, metrics: dict[str, float | int]) -> None:
        """Log one step; the line is on disk, as far as this process decides, when this returns.

        Args:
            step: steps taken so far.
            metrics: name → Python, NumPy or JAX scalar; may be non-finite.
        """
        values = {name: _plain(value) for name, value in metrics.items()}
        _append(self._metrics, {"step": int(step), **values})
        self._board.file_writer.add_summary(self._summary(values), int(step))
        for follower in self._followers:
            follower.write(int(step), values)

    def _summary(self, values: dict[str, float | int]) -> Summary:
        """All values as one event: a call of add_scalar a value takes longer than a small model's step where there are thousands.

        Steps log the same names again and again, so what they are put into is kept; add_summary copies it.
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
        """Why lines wait to be written, None where none does."""
        return self._metrics.reason or self._events.reason or None

    def close(self) -> None:
        """Close the files; the writer is of no use afterwards."""
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


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the logged steps in order, with Python numbers; "nan", "inf" and "-inf" are floats again.

    A last line cut short by a crash, or not yet fully written, is left out. Reads `events.jsonl` as well.

    Raises:
        MetricsError: no such file, or a line that is not a JSON object with an integer `step`.
    """
    return list(records(path))


def records(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """As `read_metrics`, one step after another: a log with statistics of many layers is large."""
    path = pathlib.Path(path)
    if not path.exists():
        raise MetricsError(f"{path}: no such file; a run writes it to its --workdir at the first logged step")
    for _, record in _lines(path):
        yield {name: _number(value) for name, value in record.items()}


def _append(file: PatientFile, record: dict[str, Any]) -> None:
    try:
        line = json.dumps(record, allow_nan=False)
    except ValueError:  # seldom: looking at each of thousands of values beforehand takes as long as writing them
        line = json.dumps({k: str(v) if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}, allow_nan=False)
    file.write((line + "\n").encode())


def _plain(value: Any) -> Any:
    """Return the Python scalar of a NumPy or JAX scalar; anything else as it is."""
    return value.item() if hasattr(value, "item") else value


def _number(value: Any) -> Any:
    return NON_FINITE.get(value, value) if isinstance(value, str) else value


def _lines(path: pathlib.Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (line with its newline, its object) of each line; nothing if there is no file."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict) and type(record.get("step")) is int:
                yield line.rstrip("\n") + "\n", record
            elif line.endswith("\n"):
                excerpt = repr(line[:60].strip())
                raise MetricsError(f"{path}, line {number}: not a JSON object with an integer 'step': {excerpt}; remove it")


def _rewrite(path: pathlib.Path, lines: list[str]) -> None:
    """Make these lines the file's content, all or nothing; an equal file stays untouched."""
    content = "".join(lines).encode()
    if not path.exists() or path.read_bytes() == content:
        return
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


class Silent:
    """Takes the place of whatever writes or shows something, in processes that do not: any method of it does nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None

    def __enter__(self) -> "Silent":
        """Return itself."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Nothing."""
