"""Read a run's `metrics.jsonl` and `events.jsonl`: whole, one line after another, or only the last
lines.

    read_metrics("DIR/metrics.jsonl")               # [{"step": 10, "loss": 2.3, "kurtosis/qkv_layer000": 3.1}, ...]
    for entry in records("DIR/metrics.jsonl"): ...  # the same in bounded memory
    for entry in tail("DIR/metrics.jsonl", entries=100, statistics=50): ...
    cut("DIR/metrics.jsonl", 1000)                  # before a run continues at step 1000

A log may have gigabytes. `tail` and `cut` read it from its end, so they take as long for a long one
as for a short one. A last line that a crash cut short is ignored.
"""

import functools
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

from fp8jax import files
from fp8jax.monitor import layered

NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
STATISTICS = b'"rms/'  # only lines with statistics have it
LINE = 1 << 26  # the most bytes of a line that are read: a thousand times those of a 70b model
_BLOCK = 1 << 20
_STEP = re.compile(rb'\{"step": (\d{1,18})[,}]')


class MetricsError(ValueError):
    """An error for a log that cannot be read; one line names path, line number and fault."""


def read_metrics(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Return the logged steps in order, with Python numbers; "nan", "inf" and "-inf" are floats
    again.

    A last line cut short by a crash, or not yet fully written, is left out. `events.jsonl` can be
    read as well.

    Raises:
        MetricsError: the file does not exist, or a line is not a JSON object with an integer
            `step`.
    """
    return list(records(path))


def records(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yield what `read_metrics` returns, one step after another: a log with statistics of many
    layers is large.
    """
    return map(_entry, lines(path))


def lines(path: str | os.PathLike, start: int = 0) -> Iterator[dict[str, Any]]:
    """Yield the object of each line as it is in the file, values of layers in arrays, from byte
    `start` on.

    Raises:
        MetricsError: as `read_metrics`.
    """
    return (record for _, record in ended_lines(path, start))


def ended_lines(
    path: str | os.PathLike,
    start: int = 0,
    damaged: Callable[[Callable[[], MetricsError]], object] | None = None,
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield what `lines` does, with the byte to continue from: the line's end, or its start if it
    has no newline.

    Args:
        path: path of the log.
        start: byte to begin at.
        damaged: receives a function that makes the error of each line that cannot be read, which is
            then skipped; None raises it. Making one reads the log up to there.
    """
    with _open(pathlib.Path(path)) as file:
        file.seek(start)
        at = start
        while line := file.readline(LINE):
            record = _parse(line)
            if record is not None:
                yield at + len(line) * line.endswith(b"\n"), record
            elif line.endswith(b"\n") or len(line) == LINE:
                error = functools.partial(_damaged, file, at, line)
                if damaged is None:
                    raise error()
                damaged(error)
                file.seek(at + len(line))
            at += len(line)


def tail(
    path: str | os.PathLike, *, entries: int, statistics: int = 0, last_step: float = math.inf
) -> Iterator[dict[str, Any]]:
    """Yield the last steps in order, as `read_metrics` returns them: at least `entries`, if the log
    has as many.

    Args:
        path: path of the log.
        entries: how many steps.
        statistics: how many of them with statistics of tensors.
        last_step: steps after this one are ignored.

    Raises:
        MetricsError: as `read_metrics`, for the lines that are read.
    """
    start, found, with_statistics = 0, 0, 0
    with _open(pathlib.Path(path)) as file:
        for at, line in _backwards(file):
            step = _step(line)
            if step is None or step > last_step:
                continue
            start, found, with_statistics = at, found + 1, with_statistics + (STATISTICS in line)
            if found >= entries and with_statistics >= statistics:
                break
        else:
            start = 0
    for record in lines(path, start):
        if record["step"] > last_step:
            return
        yield _entry(record)


def cut(path: str | os.PathLike, last_step: float) -> None:
    """Drop a last line cut short, and the lines of steps after `last_step`, if the file exists.

    Raises:
        MetricsError: a line that is dropped, or one of the last lines that stay, cannot be read.
    """
    path = pathlib.Path(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        kept, newline = _kept(file, last_step)
    if kept == path.stat().st_size and newline:
        return
    with path.open("r+b") as file:
        file.truncate(kept)
        file.seek(kept)
        file.write(b"" if newline else b"\n")
        file.flush()
        os.fsync(file.fileno())


def _kept(file: BinaryIO, last_step: float) -> tuple[int, bool]:
    """Return how many bytes of a log stay, and whether they end with a newline."""
    kept, newline = 0, True
    for at, line in _backwards(file):
        step = _step(line)
        if step is None and line.endswith(b"\n"):
            raise _damaged(file, at, line)
        if not kept and step is not None and step <= last_step:
            kept, newline = at + len(line), line.endswith(b"\n")
        if kept and at < kept - _BLOCK:
            break
    return kept, newline


def _open(path: pathlib.Path) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise MetricsError(
            f"{path}: no such file; a run writes it to its --workdir at the first logged step"
        ) from None


def _backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield (where it begins, line with its newline) of each line, the last one first."""
    at, after = (
        file.seek(0, os.SEEK_END),
        [],
    )  # `after`: the part of the line across `at` that has been read, the last block first
    while at > 0:
        size = min(_BLOCK, at)
        at -= size
        file.seek(at)
        after.append(file.read(size))
        if b"\n" not in after[-1] and at:
            if len(after) > LINE // _BLOCK:
                raise _damaged(file, at, after[-1])
            continue
        text = b"".join(reversed(after))
        after.clear()
        *whole, rest = text.split(b"\n")
        del text  # so a long log takes the memory of one block
        pieces = [line + b"\n" for line in whole] + [rest] * bool(rest)
        place = at + sum(map(len, pieces))
        for piece in reversed(pieces[1:]):
            place -= len(piece)
            yield place, piece
        after = [pieces[0]]
    if after and after[0]:
        yield 0, after[0]


def _step(line: bytes) -> int | None:
    """Return the step of a line, None if it has none; the rest of a complete line is not parsed."""
    match = _STEP.match(line)
    if match and line.endswith(b"}\n"):
        return int(match[1])
    record = _parse(line)
    return None if record is None else record["step"]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = files.parse_json(line.decode(errors="replace"))
    except ValueError:
        return None
    return record if isinstance(record, dict) and type(record.get("step")) is int else None


def _damaged(file: BinaryIO, at: int, line: bytes) -> MetricsError:
    file.seek(0)
    number = 1
    while at > 0:
        block = file.read(min(_BLOCK, at))
        number, at = number + block.count(b"\n"), at - len(block)
    excerpt = repr(line.decode(errors="replace")[:60].strip())
    return MetricsError(
        f"{file.name}, line {number}: not a JSON object with an integer 'step': {excerpt}; "
        f"remove it"
    )


def _entry(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: NON_FINITE.get(value, value) if isinstance(value, str) else value
        for name, value in layered.unpack(record).items()
    }
