"""Read files of token ids as input of `prepare`: text that another program tokenised goes into
shards unchanged.

    for number, ids in documents("tokens.array_record", 0, count("tokens.array_record"), "", tokenizer): ...
    for number, ids in documents("tokens.parquet", 0, tables.count("tokens.parquet"), "input_ids", tokenizer): ...

A record of an ArrayRecord file is the content of a .npy file of integers, or bare little-endian
int32; a row of a table is a list of integers in the named column. It is a document, or several if
it holds end-of-document ids; one at its end is the same as none. The ids must be those of the named
tokenizer.
"""

import io
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from fp8jax.config import ConfigError
from fp8jax.data import tables
from fp8jax.data.tokenizer import Tokenizer

SUFFIXES = (".array_record", ".arrayrecord")
_NPY = b"\x93NUMPY"
_TOGETHER = 256


def count(path: str) -> int:
    """Return the number of records of a file.

    Raises:
        ConfigError: the package array_record is missing, or the file holds no records, as a damaged
            one appears to.
    """
    if not (found := _reader(path).num_records()):
        raise ConfigError(
            f"{path}: holds no records; it is empty, cut off, or not an ArrayRecord file"
        )
    return found


def documents(
    path: str, start: int, stop: int, field: str, tokenizer: Tokenizer
) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the documents of a range of records: record number, from 0, and ids [any] without the
    end-of-document id.

    Args:
        path: path of an ArrayRecord file or a table.
        start: first record, or row group of a table.
        stop: one past the last.
        field: column of ids, for a table.
        tokenizer: the tokenizer of the ids.

    Raises:
        ConfigError: a record cannot be read, is not an array of ids, or has ids that are not the
            tokenizer's.
    """
    records = (
        _records(path, start, stop)
        if path.lower().endswith(SUFFIXES)
        else _rows(path, start, stop, field)
    )
    for number, record in records:
        ids = _checked(path, number, record, tokenizer.vocab_size)
        for document in _split(ids, tokenizer.end_of_document):
            yield number, document


def _records(path: str, start: int, stop: int) -> Iterator[tuple[int, np.ndarray]]:
    reader = _reader(path)
    for first in range(start, stop, _TOGETHER):
        try:
            records = reader.read(first, min(first + _TOGETHER, stop))
        except Exception as error:  # the library raises many kinds
            raise ConfigError(
                f"{path}: cannot be read after record {first}: {str(error).splitlines()[0]}"
            ) from None
        for number, record in enumerate(records, first):
            yield number, _array(path, number, record)


def _rows(path: str, start: int, stop: int, field: str) -> Iterator[tuple[int, np.ndarray]]:
    for piece in range(start, stop):
        yield from tables.id_lists(path, piece, field)


def _array(path: str, number: int, record: bytes) -> np.ndarray:
    try:
        return _npy(record) if record.startswith(_NPY) else np.frombuffer(record, "<i4")
    except Exception:  # NumPy parses the header as Python, with any of its errors
        raise ConfigError(
            f"{path}: record {number} is neither a .npy array nor little-endian int32"
        ) from None


def _npy(record: bytes) -> np.ndarray:
    """Return the array of a .npy file; its header is checked before memory is allocated for what it
    claims.
    """
    file = io.BytesIO(record)
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, kind = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, kind = np.lib.format.read_array_header_2_0(file)
    if kind.hasobject or math.prod(shape) * kind.itemsize != len(record) - file.tell():
        raise ValueError("the header does not fit the record")
    return np.frombuffer(record, kind, offset=file.tell()).reshape(shape)


def _checked(path: str, number: int, ids: np.ndarray, vocab_size: int) -> np.ndarray:
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ConfigError(
            f"{path}: record {number} is an array of {ids.dtype} {list(ids.shape)}, not a "
            f"sequence of integers"
        )
    if ids.size and not 0 <= ids.min() <= ids.max() < vocab_size:
        raise ConfigError(
            f"{path}: record {number} has ids from {ids.min()} to {ids.max()}; those of "
            f"--tokenizer are 0 to {vocab_size - 1}"
        )
    return ids


def _split(ids: np.ndarray, end_of_document: int) -> list[np.ndarray]:
    """Split a record into its documents."""
    *ended, rest = np.split(ids, np.flatnonzero(ids == end_of_document) + 1)
    return [document[:-1] for document in ended] + ([rest] if len(rest) or not ended else [])


def _reader(path: str) -> Any:
    try:
        from array_record.python import array_record_module
    except ImportError:
        raise ConfigError(
            f"{path}: needs the package array_record; pip install -r requirements-data.txt"
        ) from None
    return array_record_module.ArrayRecordReader(path)
