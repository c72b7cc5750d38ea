"""Read datasets of Megatron-LM, `PREFIX.bin` and `PREFIX.idx`, as a source:
`config.data.source=PREFIX`.

The index holds the magic bytes, uint64 version 1, uint8 code of the dtype, uint64 sequences, uint64
entries of the document index, then int32 lengths and int64 byte offsets of the sequences, and int64
[documents + 1], where documents begin, in sequences. All values are little-endian. The tokens are
mapped into memory, not copied.

Documents must lie in the file in order and without gaps, as Megatron writes them. Where they do not
end with the tokenizer's end-of-document id (written without Megatron's --append-eod), it is put
after each as they are read; empty documents are skipped. The last hundredth of the documents, at
least one, is the held-out split.
"""

import os
import pathlib
from typing import NamedTuple

import numpy as np

from fp8jax.config import ConfigError
from fp8jax.data.tokenizer import Tokenizer

MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_HEADER = len(MAGIC) + 8 + 1 + 8 + 8
_HELD_OUT = 100
_LOOKED_AT = 1000


class Index(NamedTuple):
    """Arrays of an .idx file, memory-mapped: int32 [sequences], int64 [sequences], int64 [documents
    + 1].
    """

    kind: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray


def is_dataset(prefix: str | os.PathLike) -> bool:
    """Return whether there is an .idx file of this prefix, and no directory of this name."""
    return not os.path.isdir(prefix) and os.path.isfile(f"{os.fspath(prefix)}.idx")


class Ended:
    """Documents that lie in an array one after another, with an end-of-document id after each, as
    if it stood there.

    Slices are int64 arrays; besides them the class has only the length and item size of an array.
    """

    def __init__(self, tokens: np.ndarray, stops: np.ndarray, end_of_document: int):
        self._tokens, self._end = tokens, end_of_document
        self._ends = stops + np.arange(
            1, len(stops) + 1
        )  # length of each document in the stream, its id included
        self.itemsize = tokens.itemsize

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, where: slice) -> np.ndarray:
        first, last, _ = where.indices(len(self))
        before, through = np.searchsorted(self._ends, (first, last), side="right")
        tokens = np.asarray(self._tokens[first - before : last - through], np.int64)
        places = self._ends[before:through] - 1 - first
        return np.insert(tokens, places - np.arange(len(places)), self._end)


def open_stream(prefix: str | os.PathLike, tokenizer: Tokenizer, split: str) -> np.ndarray | Ended:
    """Open the tokens of a split, [tokens] in the file's dtype; as `Ended` if documents lack their
    end id.

    Args:
        prefix: prefix of the dataset's files.
        tokenizer: the tokenizer that it was written with.
        split: 'train', 'held_out' or 'all' for both.

    Raises:
        ConfigError: the files are damaged, do not belong together, or only some of their documents
            end.
    """
    prefix = os.fspath(prefix)
    index, path = read_index(prefix), pathlib.Path(f"{prefix}.bin")
    # In order and without gaps, so that the file is one stream.
    ends = np.cumsum(index.lengths, dtype=np.int64)
    if (index.lengths < 0).any() or (
        index.offsets != (ends - index.lengths) * index.kind.itemsize
    ).any():
        raise _error(
            f"{prefix}.idx",
            "sequences do not follow one another without gaps; merge or write the dataset again",
        )
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from None
    if size != (expected := int(ends[-1]) * index.kind.itemsize):
        cut = f"; it is cut off at byte {size}" if size < expected else ""
        raise _error(path, f"has {size} bytes, not the {expected} that its index tells{cut}")
    stops = np.append(0, ends)[index.documents]
    stops = stops[1:][np.diff(stops) > 0]
    documents = len(stops)
    first_held_out = documents - max(1, documents // _HELD_OUT)
    if first_held_out < (split != "all"):
        raise _error(
            f"{prefix}.idx",
            f"holds {documents} document{'' if documents == 1 else 's'} with tokens; there is "
            f"nothing to hold "
            "out: set config.data.held_out to other text, or to none",
        )
    tokens = np.memmap(path, index.kind, mode="r")
    ended = _ends_itself(path, tokens, stops, tokenizer)
    of_split = stops
    if split != "all":
        cut = stops[first_held_out - 1]
        tokens = tokens[:cut] if split == "train" else tokens[cut:]
        of_split = stops[:first_held_out] if split == "train" else stops[first_held_out:] - cut
    if ended:
        return tokens
    return Ended(tokens, of_split, tokenizer.end_of_document)


def _ends_itself(
    path: pathlib.Path, tokens: np.ndarray, stops: np.ndarray, tokenizer: Tokenizer
) -> bool:
    """Return whether documents end with the end-of-document id, judged by the last token of some,
    evenly spread.

    Raises:
        ConfigError: some do and some do not.
    """
    some = np.unique(np.linspace(0, len(stops) - 1, min(_LOOKED_AT, len(stops)), dtype=np.int64))
    ended = tokens[stops[some] - 1] == tokenizer.end_of_document
    if ended.any() and not ended.all():
        bad = int(some[np.argmin(ended)])
        raise _error(
            path,
            f"document {bad} does not end with the end-of-document id "
            f"{tokenizer.end_of_document}, others do; write it again, "
            "and set config.data.tokenizer to its tokenizer",
        )
    return bool(ended.all())


def read_index(prefix: str | os.PathLike) -> Index:
    """Map PREFIX.idx into memory.

    Raises:
        ConfigError: the file is missing, another version, damaged or cut off; the message names it.
    """
    path = pathlib.Path(f"{os.fspath(prefix)}.idx")
    try:
        with open(path, "rb") as file:
            head = file.read(_HEADER)
        size = path.stat().st_size
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from None
    if len(head) < _HEADER or not head.startswith(MAGIC):
        raise _error(path, "is not the index of a Megatron dataset")
    version, sequences, documents = (
        int.from_bytes(head[at : at + 8], "little") for at in (9, 18, 26)
    )
    if version != 1 or head[17] not in _DTYPES:
        raise _error(
            path,
            f"is of version {version} and dtype code {head[17]}; known are version 1 and codes "
            f"{list(_DTYPES)}",
        )
    expected = _HEADER + 12 * sequences + 8 * documents
    if size < expected or not sequences or documents < 2:
        raise _error(
            path,
            f"has {size} bytes, not the {expected} of {sequences} sequences and {documents} "
            f"document entries; it is cut "
            f"off at byte {size}",
        )
    raw = np.memmap(path, np.uint8, mode="r")
    lengths, offsets, starts = np.split(raw[_HEADER:expected], [4 * sequences, 12 * sequences])
    index = Index(
        np.dtype(_DTYPES[head[17]]), lengths.view("<i4"), offsets.view("<i8"), starts.view("<i8")
    )
    if (
        index.documents[0] != 0
        or index.documents[-1] != sequences
        or (np.diff(index.documents) < 0).any()
    ):
        raise _error(
            path, f"documents do not rise from sequence 0 to {sequences}; write the dataset again"
        )
    return index


def _error(path: str | os.PathLike, fault: str) -> ConfigError:
    return ConfigError(f"config.data.source: {path}: {fault}")
