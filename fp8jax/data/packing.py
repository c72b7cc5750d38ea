"""Cut a stream of tokens into windows, one for each sequence of a batch.

    windows = ConcatWindows(stream, config.data)            # documents run on from window to window
    windows = BestFitWindows(stream, config.data, open_best_fit("tokens", 4096, len(stream)))
    rows = Rows(8, config.data); windows.fill(17, rows, 0)  # window 17 becomes the first of eight rows
    rows.batch(); len(windows), windows[17]                 # dictionaries of arrays [8, T] and [T]

A window has T = sequence_length targets; its inputs are the tokens one place before them, and a
document is always predicted from an end-of-document id onwards. With either packing, every token of
the stream, every document's end included, is a target in exactly one window.

`concat` cuts the stream every T tokens. `best_fit` keeps documents whole where they fit (Ding et
al. 2024, arXiv:2404.10830): a document is cut only every T tokens, and what is left goes, longest
first, into the fullest window that still has room. `write_best_fit` computes that once, for all
windows, so that any of them can be read alone.

A window is a dictionary of numpy arrays [T]:
    inputs, targets: int32. `mask`: float32, 1 where the target counts, 0 on padding.
    segment_ids, positions: int32. With `config.data.document_masks` both start again at every document of a window;
    otherwise segment ids are 0 and positions 0 to T - 1.
"""

import hashlib
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from fp8jax.config import ConfigError, DataConfig, DataError
from fp8jax.data import shards
from fp8jax.data.mapping import Mapped
from fp8jax.data.sources import TokenStream
from fp8jax.data.tokenizer import Tokenizer

Batch = dict[str, np.ndarray]
PIECE = np.dtype([("start", "<u8"), ("length", "<u4")])
# How many documents are packed together: memory is about 100 bytes each, and padding is the same as
# over all of them.
_TOGETHER = 1 << 21


class Rows:
    """A batch being filled: what differs between windows is put in row by row, the rest is made for
    all rows.

    Args:
        count: number of rows.
        data: the `data` section; reads `sequence_length` and `document_masks`.

    Attributes:
        inputs, targets: int32 [count, T].
        real: int64 [count]: number of targets that count, the first ones of a row.
        opens: bool [count, T]: where documents begin; used with document masks only.
    """

    def __init__(self, count: int, data: DataConfig):
        shape, self._masked = (count, data.sequence_length), data.document_masks
        self.inputs, self.targets = np.empty(shape, np.int32), np.empty(shape, np.int32)
        self.real, self.opens = np.zeros(count, np.int64), np.zeros(shape, bool)

    def pad(self, row: int, end: int) -> None:
        """Make a row all padding."""
        self.inputs[row] = self.targets[row] = end
        self.real[row], self.opens[row] = 0, False

    def batch(self) -> Batch:
        """Return the batch, arrays [count, T]."""
        places = np.arange(self.inputs.shape[1], dtype=np.int32)
        mask = (places < self.real[:, None]).astype(np.float32)
        if not self._masked:
            segment_ids, positions = (
                np.zeros_like(self.inputs),
                np.broadcast_to(places, self.inputs.shape).copy(),
            )
        else:
            segment_ids = np.cumsum(self.opens, axis=1, dtype=np.int32)
            segment_ids -= segment_ids[:, :1]
            positions = places - np.maximum.accumulate(np.where(self.opens, places, 0), axis=1)
        return {
            "inputs": self.inputs,
            "targets": self.targets,
            "mask": mask,
            "segment_ids": segment_ids,
            "positions": positions,
        }


class _Windows:
    """Windows that fill rows, and can be read one by one."""

    data: DataConfig
    fill: Callable[[int, Rows, int], None]

    def __getitem__(self, index: int) -> Batch:
        """Return window `index`, arrays [T]."""
        rows = Rows(1, self.data)
        self.fill(index, rows, 0)
        return {name: array[0] for name, array in rows.batch().items()}


class ConcatWindows(_Windows):
    """The windows of a stream that is cut every T tokens; the last one is padded."""

    def __init__(self, stream: TokenStream, data: DataConfig):
        self.stream, self.data = stream, data

    def __len__(self) -> int:
        return -(-len(self.stream) // self.data.sequence_length)

    def fill(self, index: int, rows: Rows, row: int) -> None:
        """Put window `index` into a row; past the end of the stream it is all padding.

        Raises:
            DataError: as `TokenStream.read`.
        """
        length, end = self.data.sequence_length, self.stream.tokenizer.end_of_document
        tokens = _with_predecessor(self.stream, index * length, length)
        real, inputs = max(len(tokens) - 1, 0), rows.inputs[row]
        if real < length:
            tokens = np.concatenate([tokens, np.full(length + 1 - len(tokens), end, np.int32)])
        inputs[:], rows.targets[row], rows.real[row] = tokens[:-1], tokens[1:], real
        if self.data.document_masks:
            np.equal(inputs, end, out=rows.opens[row])


class BestFit(NamedTuple):
    """The pieces of a stream that make each window.

    Attributes:
        pieces: PIECE [pieces]: where in the stream the first target of a piece is, and how many
            there are.
        ends: uint64 [windows]: the pieces of window i end before ends[i].
        path: path to name in errors.
    """

    pieces: Mapped | np.ndarray
    ends: Mapped | np.ndarray
    path: pathlib.Path


class BestFitWindows(_Windows):
    """The windows of a stream packed by best fit."""

    def __init__(self, stream: TokenStream, data: DataConfig, packed: BestFit):
        self.stream, self.data, self.packed = stream, data, packed

    def __len__(self) -> int:
        return len(self.packed.ends)

    def fill(self, index: int, rows: Rows, row: int) -> None:
        """Put window `index` into a row.

        Raises:
            DataError: the stream or a window cannot hold its pieces; the message names the file.
        """
        rows.pad(row, self.stream.tokenizer.end_of_document)
        inputs, targets, opens, filled = rows.inputs[row], rows.targets[row], rows.opens[row], 0
        for start, count in self._pieces(index):
            tokens = _with_predecessor(self.stream, start, count)
            inputs[filled : filled + count], targets[filled : filled + count] = (
                tokens[:-1],
                tokens[1:],
            )
            opens[filled] = True
            filled += count
        opens[filled : filled + 1] = True  # padding
        rows.real[row] = filled

    def _pieces(self, index: int) -> list[tuple[int, int]]:
        first, last = int(self.packed.ends[index - 1]) if index else 0, int(self.packed.ends[index])
        found = [(int(start), int(count)) for start, count in self.packed.pieces[first:last]]
        sound = all(count > 0 and start + count <= len(self.stream) for start, count in found)
        if not found or not sound or sum(count for _, count in found) > self.data.sequence_length:
            raise DataError(
                f"{self.packed.path}: window {index} (piece {first} and on) has pieces that do "
                f"not fit; prepare it again"
            )
        return found


def _with_predecessor(stream: TokenStream, start: int, count: int) -> np.ndarray:
    """Read the token before `start` and `count` tokens from there on (fewer at the stream's end),
    int32.
    """
    if start:
        return stream.read(start - 1, start + count)
    return np.concatenate(
        [np.array([stream.tokenizer.end_of_document], np.int32), stream.read(0, count)]
    )


def write_best_fit(
    directory: str | os.PathLike, tokenizer: Tokenizer, length: int
) -> dict[str, Any]:
    """Pack the training split of a directory of token shards by best fit, unless that is done
    already.

    Args:
        directory: a directory of token shards; gets two files, and an entry in its index.
        tokenizer: the tokenizer that it was prepared with.
        length: targets per window.

    Returns:
        A dictionary of `windows`, `pieces`, and `padding`, the share of targets that is padding.

    Raises:
        ConfigError: the shards cannot be read, or the length is below 1.
    """
    if length < 1:
        raise ConfigError(f"--best_fit: {length} is below 1")
    directory = pathlib.Path(directory)
    index = shards.read_index(directory, tokenizer)
    if (done := index.get("best_fit", {}).get(str(length))) is not None:
        return done
    paths, windows, pieces, tokens = _paths(directory, length), 0, 0, 0
    partials = [path.with_name(f"{path.name}.partial") for path in paths]
    digests = [hashlib.sha256(), hashlib.sha256()]
    with open(partials[0], "wb") as pieces_file, open(partials[1], "wb") as ends_file:
        for found, ends in _packed(shards.open_ends(directory, tokenizer, "train"), length):
            for file, digest, array in zip(
                (pieces_file, ends_file), digests, (found, ends + np.uint64(pieces)), strict=True
            ):
                file.write(array.tobytes())
                digest.update(array.tobytes())
            windows, pieces, tokens = (
                windows + len(ends),
                pieces + len(found),
                tokens + int(found["length"].sum()),
            )
    for partial, path in zip(partials, paths, strict=True):
        os.replace(partial, path)
    entry = {
        "windows": windows,
        "pieces": pieces,
        "padding": 1 - tokens / (windows * length),
        "pieces_sha256": digests[0].hexdigest(),
        "ends_sha256": digests[1].hexdigest(),
    }
    shards.write_index(
        directory, index | {"best_fit": index.get("best_fit", {}) | {str(length): entry}}
    )
    return entry


def _packed(
    shard_ends: Iterable[Mapped | np.ndarray], length: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield PIECE [pieces] and uint64 [windows] for one group of documents after another."""
    offset = 0
    for ends in shard_ends:
        for first in range(0, len(ends), _TOGETHER):
            stops = ends[first : first + _TOGETHER].astype(np.int64) + offset
            starts = np.concatenate(
                [[int(ends[first - 1]) + offset if first else offset], stops[:-1]]
            )
            yield pack(starts, stops - starts, length)
        offset += int(ends[-1])


def pack(starts: np.ndarray, lengths: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack documents, int64 [documents], into windows.

    Returns:
        PIECE [pieces] in the order of windows, and uint64 [windows], where each window ends among
        them.
    """
    whole = lengths // length
    document = np.repeat(np.arange(len(lengths)), whole)
    number = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
    full_starts = starts[document] + number * length
    rest = lengths % length
    rest_starts, rest = (starts + whole * length)[rest > 0], rest[rest > 0]
    windows = best_fit(rest, length)
    order = np.lexsort((rest_starts, windows))
    pieces = np.zeros(len(document) + len(rest), PIECE)
    pieces["start"] = np.concatenate([full_starts, rest_starts[order]])
    pieces["length"] = np.concatenate([np.full(len(document), length), rest[order]])
    counts = np.bincount(windows) if len(windows) else np.zeros(0, np.int64)
    return pieces, np.cumsum(np.concatenate([np.ones(len(document), np.int64), counts])).astype(
        np.uint64
    )


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assign items to bins by best-fit decreasing.

    The longest item comes first, each goes into the fullest bin with room for it, or a new one.
    Items of equal length and bins of equal room are taken together, which gives the result of one
    at a time up to the choice among bins of equal room.

    Args:
        lengths: int64 [items], each 1 to capacity.
        capacity: capacity of a bin.

    Returns:
        int64 [items], the bin of each item, numbered from 0.
    """
    bins, opened = np.zeros(len(lengths), np.int64), 0
    order = np.argsort(-lengths, kind="stable")
    rooms: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
    some = np.zeros(capacity + 1, bool)  # whether there are bins of this room
    for items in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if len(order) else []:
        size = int(lengths[items[0]])
        while len(items):
            room = size + int(np.argmax(some[size:]))
            if some[room]:
                found = np.concatenate(rooms[room])
                rooms[room], some[room] = [], False
            else:
                room = capacity
                found = np.arange(opened, opened - (-len(items) // (capacity // size)))
                opened += len(found)
            each = room // size
            used = min(len(found), -(-len(items) // each))
            taken = min(len(items), used * each)
            bins[items[:taken]] = np.repeat(found[:used], each)[:taken]
            in_last = taken - (used - 1) * each
            groups = [
                (found[: used - 1], room - each * size),
                (found[used - 1 : used], room - in_last * size),
                (found[used:], room),
            ]
            for group, left in groups:
                if len(group):
                    rooms[left].append(group)
                    some[left] = left > 0
            items = items[taken:]
    return bins


def open_best_fit(directory: str | os.PathLike, length: int, tokens: int) -> BestFit:
    """Open the best-fit packing of a directory's training split, memory-mapped.

    Args:
        directory: a directory of token shards.
        length: targets per window.
        tokens: number of tokens in the split.

    Raises:
        ConfigError: there is no packing of this length, or its files are damaged.
    """
    directory = pathlib.Path(directory)
    known = shards.read_index(directory).get("best_fit")
    known = known if isinstance(known, dict) else {}
    entry, paths = known.get(str(length)), _paths(directory, length)
    counts: list[Any] = (
        [entry.get(name) for name in ("pieces", "windows")] if isinstance(entry, dict) else []
    )
    if not counts or any(type(count) is not int or not 0 < count <= tokens for count in counts):
        have = f" (there is {', '.join(known)})" if known else ""
        raise ConfigError(
            f"config.data.packing: {directory} is not packed by best fit for sequences of "
            f"{length}{have}; "
            f"prepare it again, as before, with --best_fit {length} added"
        )
    pieces = shards.map_file(paths[0], PIECE, counts[0], "pieces")
    ends = shards.map_file(paths[1], shards.ENDS, counts[1], "windows")
    if ends[-1] != len(pieces):
        raise ConfigError(
            f"config.data.source: {paths[1]}: does not end with its {len(pieces)} pieces; "
            f"prepare it again"
        )
    return BestFit(pieces, ends, paths[0])


def _paths(directory: pathlib.Path, length: int) -> tuple[pathlib.Path, pathlib.Path]:
    return directory / f"best_fit_{length}.pieces", directory / f"best_fit_{length}.ends"
