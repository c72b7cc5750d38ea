"""Read tables of text or token ids: Parquet, and Arrow files and streams (as `feather` and
`datasets` write).

    for piece in range(count(path)):                   # row groups, or record batches
        for number, text in texts(path, piece, "text", skip=None): ...
        for number, ids in id_lists(path, piece, "input_ids"): ...

A text column holds strings, plain or dictionary-encoded, or lists of strings, which are joined by
line ends; 'a.b' is field b of a struct a. Values are read one at a time and dictionaries are not
expanded, because a few bytes may stand for gigabytes.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from fp8jax.config import ConfigError
from fp8jax.data.opening import first_line, missing_package

PARQUET, ARROW = (".parquet",), (".arrow", ".feather")
_ROWS = 64
Skip = Callable[[str], None]


def count(path: str) -> int:
    """Return the number of row groups or record batches, which can be read one by one.

    Raises:
        ConfigError: the file cannot be read.
    """
    return _open(path).count


def sizes(path: str) -> list[int]:
    """Return the approximate bytes of each row group or record batch.

    Raises:
        ConfigError: the file cannot be read.
    """
    return _open(path).sizes


def rows(path: str, piece: int) -> int:
    """Return the rows of one row group or record batch; 1 for a stream of Arrow batches, which has
    no counts.

    Raises:
        ConfigError: the file cannot be read.
    """
    table = _open(path)
    try:
        return table.rows(piece)
    except (OSError, MemoryError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read: {first_line(error)}") from None


def holds_ids(path: str, field: str) -> bool:
    """Return whether a column holds lists of integers."""
    return _kind_of(_leaf(path, field)) == "ids"


def texts(path: str, piece: int, field: str, skip: Skip | None = None) -> Iterator[tuple[int, str]]:
    """Yield the row number, from 1 in the file, and text of each row of a row group or record
    batch.

    Args:
        path: path of the file.
        piece: number of the row group or record batch.
        field: the column; 'a.b' is in a struct.
        skip: receives a line for each row without text, which is then skipped; with None it is an
            error.

    Raises:
        ConfigError: the column does not exist, a row has no text, or the file is damaged; the
            message names file and row.
    """
    if _kind_of(_leaf(path, field)) != "text":
        raise ConfigError(
            f"{path}: has no column {field!r} of text; --text_field is one of {_columns(path)}"
        )
    for number, value in _values(path, piece, field):
        fault = None
        text: str | None = None
        try:
            read = value.as_py()
            text = "\n".join(read) if isinstance(read, list) else read
        except UnicodeDecodeError:
            fault = f"{path}: row {number} is not UTF-8"
        except TypeError:  # the list holds a null
            text = None
        if text is None:
            fault = fault or f"{path}: row {number} has no text in column {field!r}"
            if skip is None:
                raise ConfigError(fault)
            skip(fault)
            continue
        yield number, text


def id_lists(path: str, piece: int, field: str) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the row number, from 1 in the file, and token ids, int64 [any], of each row.

    Raises:
        ConfigError: a row has no ids, or the file is damaged; the message names file and row.
    """
    for number, value in _values(path, piece, field):
        ids = value.as_py()
        if ids is None or None in ids:
            raise ConfigError(f"{path}: row {number} has no token ids in column {field!r}")
        yield number, np.asarray(ids, np.int64)


def _values(path: str, piece: int, field: str) -> Iterator[tuple[int, Any]]:
    """Yield row number and Arrow scalar of each row."""
    table = _open(path)
    number = 0
    try:
        number = table.first_row(piece)
        for array in table.arrays(piece, field):
            _check(array)
            for value in array:
                number += 1
                yield number, value
    except (
        OSError,
        MemoryError,
        ValueError,
    ) as error:  # what pyarrow raises for damaged pages
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(
            f"{path}: cannot be read after row {number}: {first_line(error)}"
        ) from None


def _check(array: Any) -> None:
    """Check an array's offsets and indices, because a damaged file could make a read follow them
    anywhere.

    Raises:
        ValueError: they point outside the array.
    """
    try:
        array.validate(full=True)
    except ValueError as error:
        if "UTF8" not in str(error):  # checked last, and reported with the row that has it
            raise


class _Parquet:
    def __init__(self, path: str):
        import pyarrow.parquet

        self._path = path
        self._file = pyarrow.parquet.ParquetFile(path, memory_map=True)
        self.schema = self._file.schema_arrow
        groups = range(self._file.metadata.num_row_groups)
        self.count = len(groups)
        self.sizes = [self._file.metadata.row_group(group).total_byte_size for group in groups]

    def rows(self, piece: int) -> int:
        return self._file.metadata.row_group(piece).num_rows

    def first_row(self, piece: int) -> int:
        return sum(self._file.metadata.row_group(group).num_rows for group in range(piece))

    def arrays(self, piece: int, field: str) -> Iterator[Any]:
        import pyarrow.parquet

        # Dictionaries are not expanded: one long text that occurs often would fill the memory.
        leaves = (self._file.schema.column(number).path for number in range(len(self._file.schema)))
        dictionaries = (
            [field] if field in leaves and _kind_of(_leaf(self._path, field)) == "text" else []
        )
        file = pyarrow.parquet.ParquetFile(
            self._path, memory_map=True, read_dictionary=dictionaries
        )
        top, *path = field.split(".")
        whole = field in self.schema.names
        for batch in file.iter_batches(
            _ROWS, row_groups=[piece], columns=[field], use_threads=False
        ):
            yield _descend(batch.column(0), [] if whole else path)


class _Arrow:
    def __init__(self, path: str):
        import pyarrow

        source = pyarrow.memory_map(path)
        try:
            self._file = pyarrow.ipc.open_file(source)
            self.count = self._file.num_record_batches
        except pyarrow.ArrowInvalid:
            source.seek(0)
            self._file = pyarrow.ipc.open_stream(source)
            self.count = 1  # a stream has no index
        self.schema = self._file.schema
        self._source = source
        self.sizes = [source.size() // max(1, self.count)] * self.count

    def rows(self, piece: int) -> int:
        return self._file.get_batch(piece).num_rows if hasattr(self._file, "get_batch") else 1

    def first_row(self, piece: int) -> int:
        return sum(self._file.get_batch(number).num_rows for number in range(piece))

    def arrays(self, piece: int, field: str) -> Iterator[Any]:
        batches = (
            [self._file.get_batch(piece)] if hasattr(self._file, "get_batch") else self._stream()
        )
        top, *path = [field] if field in self.schema.names else field.split(".")
        for batch in batches:
            yield _descend(batch.column(self.schema.names.index(top)), path)

    def _stream(self) -> Any:
        import pyarrow

        self._source.seek(0)
        return pyarrow.ipc.open_stream(self._source)


@functools.lru_cache(maxsize=4)
def _open(path: str) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise missing_package(path, "pyarrow") from None
    try:
        return _Parquet(path) if path.lower().endswith(PARQUET) else _Arrow(path)
    except (OSError, MemoryError, pyarrow.ArrowException) as error:
        kind = "a parquet" if path.lower().endswith(PARQUET) else "an Arrow"
        raise ConfigError(f"{path}: is not {kind} file: {first_line(error)}") from None


def _leaf(path: str, field: str) -> Any:
    """Return the Arrow type of a column, or of a field within one; None if it does not exist."""
    schema = _open(path).schema
    if schema.names.count(field) > 1:
        raise ConfigError(f"{path}: has {schema.names.count(field)} columns {field!r}; rename one")
    top, *inner = [field] if field in schema.names else field.split(".")
    if schema.names.count(top) != 1:
        return None
    found = schema.field(top).type
    for name in inner:
        if not str(found).startswith("struct") or found.get_field_index(name) < 0:
            return None
        found = found.field(name).type
    return found


def _kind_of(kind: Any) -> str:
    import pyarrow.types as types

    if kind is None:
        return ""
    if types.is_dictionary(kind):
        kind = kind.value_type
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        inner = kind.value_type
        return "ids" if types.is_integer(inner) else "text" if _is_string(inner) else ""
    return "text" if _is_string(kind) else ""


def _is_string(kind: Any) -> bool:
    return str(kind) in ("string", "large_string", "string_view")


def _columns(path: str) -> str:
    return ", ".join(f"{one.name} ({one.type})" for one in _open(path).schema)


def _descend(array: Any, path: list[str]) -> Any:
    """Return a field within a struct, null where the struct is."""
    import pyarrow.compute

    return pyarrow.compute.struct_field(array, path) if path else array
