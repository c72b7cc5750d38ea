"""Raw text: which files there are to read, how they are cut into pieces of work, and their documents, one at a time.

    paths = find(["books/", "crawl/*.jsonl.zst"])
    for piece in pieces(path, piece_bytes=1 << 24):
        for blocks in read(piece, "text", progress):        # a document: strings, one after another
            ...

`.jsonl` (and `.json`, one object a line) holds a document a line, `.parquet` one a row, `.txt` and `.md` files are a document
each. All but parquet may be compressed, `.gz` or `.zst`. Text is UTF-8. Blank lines of a `.jsonl` file are passed over. Names that
begin with 'hf:' are datasets of the Hugging Face hub (`hub`). Files that hold no text but token ids are read by `token_records`.

Files are not trusted: sizes are bounded (a line or row by MAX_DOCUMENT), and whatever cannot be read is an error of one line
with the file and the number of the line. Nothing is cleaned, filtered or deduplicated.
"""

import codecs
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import pathlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fp8jax.config import ConfigError
from fp8jax.data import hub, token_records

LINES, TEXT, PARQUET, TOKENS = (".jsonl", ".json"), (".txt", ".md"), (".parquet",), token_records.SUFFIXES
COMPRESSED = (".gz", ".zst")
MAX_DOCUMENT = 1 << 29
# Of a directory of text, what is about the text: dataset cards and what the Hugging Face libraries write beside data.
_DESCRIBING = frozenset(("readme.md", "readme.txt", "license.txt", "license.md", "dataset_info.json", "dataset_infos.json",
                         "dataset_dict.json", "state.json", "tokenizer.json", "tokenizer_config.json"))
_BLOCK = 1 << 18

Progress = Callable[[int], Any]


class Piece(NamedTuple):
    """Documents that are read in one go.

    Attributes:
        path: of the file.
        start: first byte (lines that begin from here on), row group of a parquet file, row of a dataset of the hub, or record.
        stop: the byte, row group, row or record before which to stop; -1: at the end of the file.
        size: bytes of input, for progress.
        split: of which split its documents are; '': their content decides.
    """

    path: str
    start: int
    stop: int
    size: int
    split: str = ""


def find(
    inputs: Sequence[str | os.PathLike],
    *,
    out: str | os.PathLike | None = None,
    tell: Callable[[str], None] = lambda line: None,
) -> list[str]:
    """The files that inputs name, in order and each once, whatever the spelling of its path.

    Of a directory, also through links, those that are read, sorted; without hidden files, what only describes a dataset
    (README.md, dataset_info.json), and prepared shards. A file that is named itself is always read.

    Args:
        inputs: files, directories, patterns, datasets of the hub.
        out: a directory to leave out: what is prepared must not be read.
        tell: receives a line on what was left out.

    Raises:
        ConfigError: an input that names nothing, or a file of a kind that is not read.
    """
    left_out: list[str] = []
    found: dict[str, str] = {}
    outside = os.path.realpath(out) if out is not None else None
    for name in map(os.fspath, inputs):
        seen: set[str] = set()
        files = [file for match in _matches(name) for file in _files(match, outside, left_out, seen)]
        if not files:
            raise ConfigError(f"--input={name}: no such file, directory or pattern with matches")
        for file in files:
            real = file if file.startswith(hub.PREFIX) else os.path.realpath(file)
            found.setdefault(real, file)
    for path in found.values():
        if not path.startswith(hub.PREFIX) and _kind(path) is None:
            known = ", ".join((*LINES, *TEXT, *PARQUET, *TOKENS[:1]))
            raise ConfigError(f"{path}: {pathlib.Path(path).suffix!r} is not a kind of text file that is read; use one of {known}")
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        tell(f"left out: {', '.join(left_out[:3])}{more}; name a file itself to have it read")
    return list(found.values())


def _matches(name: str) -> list[str]:
    if os.path.exists(name) or name.startswith(hub.PREFIX):
        return [name]
    return sorted(filter(os.path.exists, glob.glob(name, recursive=True)))  # links may lead nowhere, or round in circles


def _files(match: str, outside: str | None, left_out: list[str], seen: set[str]) -> list[str]:
    """The file itself, or those of a directory, less directories that were `seen`."""
    if os.path.isdir(match):
        return sorted(_in_directory(match, outside, left_out, seen))
    inside = outside is not None and os.path.realpath(match).startswith(outside + os.sep)
    return [] if inside else [match]


def _in_directory(directory: str, outside: str | None, left_out: list[str], seen: set[str]) -> list[str]:
    real = os.path.realpath(directory)
    if real in seen:  # a link back
        return []
    if real == outside or _is_prepared(directory):
        left_out.append(directory)
        return []
    seen.add(real)
    found: list[str] = []
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            left_out.append(entry.path)
        elif entry.is_dir():
            found += _in_directory(entry.path, outside, left_out, seen)
        elif entry.is_file() and _kind(entry.path):
            describes = entry.name.lower() in _DESCRIBING
            (left_out if describes else found).append(entry.path)
    return found


def _is_prepared(directory: str) -> bool:
    """Whether a directory holds token shards, finished or not."""
    if os.path.isfile(os.path.join(directory, "unfinished", "plan")):
        return True
    try:
        with open(os.path.join(directory, "index.json"), "rb") as file:
            return b'"format": "fp8jax-tokens' in file.read(200)
    except OSError:
        return False


def _kind(path: str) -> tuple[str, ...] | None:
    name = path.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    for kind in (LINES, TEXT, PARQUET, TOKENS):
        if name.endswith(kind):
            return None if kind in (PARQUET, TOKENS) and name != path.lower() else kind
    return None


def is_plain_text(path: str) -> bool:
    """Whether the file is one uncompressed document."""
    return path.lower().endswith(TEXT) and not path.startswith(hub.PREFIX)


def is_tokens(path: str) -> bool:
    """Whether the file holds token ids instead of text."""
    return _kind(path) is TOKENS and not path.startswith(hub.PREFIX)


def stat(path: str) -> tuple[int, int]:
    """Bytes of an input, and when it was last changed, in nanoseconds.

    Raises:
        ConfigError: it cannot be read.
    """
    if path.startswith(hub.PREFIX):
        return int(hub.dataset(path).data.nbytes), 0
    try:
        found = os.stat(path)
    except OSError as error:
        raise _unreadable(path, error) from None
    return found.st_size, found.st_mtime_ns


def digest(path: str) -> str:
    """Hash of an input's content; '' of a dataset of the hub, which has a version of its own.

    Raises:
        ConfigError: it cannot be read.
    """
    if path.startswith(hub.PREFIX):
        return ""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise _unreadable(path, error) from None


def pieces(path: str, piece_bytes: int) -> list[Piece]:
    """A file as pieces of about `piece_bytes`, where its format lets one start in the middle.

    Raises:
        ConfigError: the file cannot be read.
    """
    size = stat(path)[0]
    if path.startswith(hub.PREFIX):
        return _even_pieces(path, len(hub.dataset(path)), size, piece_bytes)
    if _kind(path) is PARQUET:
        file = _parquet(path)
        groups = [file.metadata.row_group(group).total_byte_size for group in range(file.metadata.num_row_groups)]
        return [Piece(path, group, group + 1, bytes_) for group, bytes_ in enumerate(groups)]
    if is_tokens(path):
        return _even_pieces(path, token_records.count(path), size, piece_bytes)
    if path.lower().endswith(LINES):
        return _even_pieces(path, size, size, piece_bytes)
    return [Piece(path, 0, -1, size)]


def _even_pieces(path: str, length: int, size: int, piece_bytes: int) -> list[Piece]:
    """Cuts 0 to `length`, which are `size` bytes."""
    count = max(1, -(-size // piece_bytes))
    edges = [length * index // count for index in range(count + 1)]
    return [Piece(path, start, stop, size * (stop - start) // max(1, length)) for start, stop in itertools.pairwise(edges)]


def cut_text(path: str, fraction: float) -> list[Piece]:
    """A text file as two documents, the second the last `fraction` of it, cut after the end of a line."""
    size = os.stat(path).st_size
    with open(path, "rb") as file:
        file.seek(int(size * (1 - fraction)))
        file.readline(1 << 20)
        cut = min(file.tell(), size)
        while cut < size:  # a very long line: not inside a character
            file.seek(cut)
            if file.read(1)[0] & 0xC0 != 0x80:
                break
            cut += 1
    if not 0 < cut < size:
        return [Piece(path, 0, -1, size)]
    return [Piece(path, 0, cut, cut, "train"), Piece(path, cut, size, size - cut, "held_out")]


def read(piece: Piece, field: str, progress: Progress) -> Iterator[Iterable[str]]:
    """The documents of a piece, each as strings to be joined; use one up before asking for the next.

    Args:
        piece: of a file.
        field: the field of an object or column of a table that holds the text.
        progress: told the bytes of input that were read since it was last told.

    Raises:
        ConfigError: a file, line or row that cannot be read as text; the message names it.
    """
    kind = _kind(piece.path)
    if is_tokens(piece.path):
        raise ConfigError(f"{piece.path}: holds token ids, not text")
    if piece.path.startswith(hub.PREFIX):
        for texts in hub.rows(piece.path, field, piece.start, piece.stop):
            yield from map(_blocks, texts)
            progress(piece.size * len(texts) // max(1, piece.stop - piece.start))
    elif kind is PARQUET:
        yield from _read_parquet(piece, field, progress)
    elif kind is LINES:
        yield from _read_lines(piece, field, progress)
    else:
        yield _read_text(piece, progress)


def _read_text(piece: Piece, progress: Progress) -> Iterator[str]:
    """The blocks of a text file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    left, offset = (piece.stop - piece.start if piece.stop >= 0 else -1), piece.start
    try:
        with _Input(piece.path, progress) as file:
            file.seek(piece.start)
            while left and (block := file.read(_BLOCK if left < 0 else min(_BLOCK, left))):
                left -= len(block) if left > 0 else 0
                yield decoder.decode(block)
                offset += len(block)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ConfigError(f"{piece.path}: is not UTF-8 near byte {offset + error.start}; convert it first") from None


def _read_lines(piece: Piece, field: str, progress: Progress) -> Iterator[Iterable[str]]:
    with _Input(piece.path, progress) as file:
        if piece.start:  # the line that began before belongs to the piece before
            file.seek(piece.start - 1)
            _skip_line(file, piece.stop)
        number = 0
        while piece.stop < 0 or file.tell() < piece.stop:
            line = file.readline(MAX_DOCUMENT + 1)
            if not line:
                return
            number += 1
            if len(line) > MAX_DOCUMENT:
                raise _line_error(piece, number, f"is longer than {MAX_DOCUMENT >> 20} MiB")
            if line.isspace():
                continue
            try:
                yield _blocks(_text(line, field))
            except ValueError as error:
                raise _line_error(piece, number, str(error)) from None


def _skip_line(file: "_Input", stop: int) -> None:
    while file.tell() < stop and (found := file.readline(_BLOCK)) and not found.endswith(b"\n"):
        pass


def _text(line: bytes, field: str) -> str:
    try:
        value = json.loads(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except (ValueError, RecursionError):
        raise ValueError("is not JSON") from None
    if not isinstance(value, dict) or not isinstance(value.get(field), str):
        raise ValueError(f"is not a JSON object with a string field {field!r}")
    return _checked(value[field])


def _checked(text: str) -> str:
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair, which is no text") from None
    return text


def _line_error(piece: Piece, number: int, fault: str) -> ConfigError:
    """Counts the lines before the piece, which nobody needed so far."""
    if piece.start:
        with open(piece.path, "rb") as file:
            left = piece.start
            while left and (block := file.read(min(left, 1 << 20))):
                number += block.count(b"\n")
                left -= len(block)
            file.seek(piece.start - 1)
            number += file.read(1) != b"\n"
    return ConfigError(f"{piece.path}: line {number} {fault}")


def _blocks(text: str) -> list[str]:
    return [text[start : start + _BLOCK] for start in range(0, max(len(text), 1), _BLOCK)]


def _read_parquet(piece: Piece, field: str, progress: Progress) -> Iterator[Iterable[str]]:
    file, row = _parquet(piece.path), 0
    column = file.schema_arrow.field(field) if field in file.schema_arrow.names else None
    if column is None or str(column.type) not in ("string", "large_string", "string_view"):
        names = ", ".join(f"{one.name} ({one.type})" for one in file.schema_arrow)
        raise ConfigError(f"{piece.path}: has no column {field!r} of text; --text_field is one of {names}")
    before = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
    rows = max(1, file.metadata.row_group(piece.start).num_rows)
    try:
        for batch in file.iter_batches(batch_size=256, row_groups=[piece.start], columns=[field], use_threads=False):
            for value in batch.column(0):
                row += 1
                if not value.is_valid:
                    raise ConfigError(f"{piece.path}: row {before + row} has no text in column {field!r}")
                try:
                    yield _blocks(value.as_py())
                except UnicodeDecodeError:
                    raise ConfigError(f"{piece.path}: row {before + row} is not UTF-8") from None
            progress(piece.size * len(batch) // rows)
    except OSError as error:  # pyarrow's errors for damaged pages are
        raise ConfigError(f"{piece.path}: cannot be read after row {before + row}: {_first_line(error)}") from None


def _parquet(path: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise _missing_package(path) from None
    try:
        return pyarrow.parquet.ParquetFile(path, memory_map=True)
    except (OSError, pyarrow.ArrowInvalid) as error:
        raise ConfigError(f"{path}: is not a parquet file: {_first_line(error)}") from None


class _Input:
    """A file, decompressed, that tells how far it was read and says where it is damaged."""

    def __init__(self, path: str, progress: Progress):
        self._path, self._progress, self._told = path, progress, 0
        try:
            self._raw = open(path, "rb", buffering=1 << 20)
        except OSError as error:
            raise _unreadable(path, error) from None
        self._file: Any = self._decompressed()

    def _decompressed(self) -> Any:
        name = self._path.lower()
        if name.endswith(".gz"):
            return io.BufferedReader(gzip.GzipFile(fileobj=self._raw), 1 << 20)
        if not name.endswith(".zst"):
            return self._raw
        try:
            import pyarrow  # unlike zstandard, it says that a stream is cut off
        except ImportError:
            raise _missing_package(self._path) from None
        return io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(self._raw, "r"), "zstd"), 1 << 20)

    def __enter__(self) -> "_Input":
        return self

    def __exit__(self, *_: Any) -> None:
        self._tell()
        self._raw.close()

    def seek(self, position: int) -> None:
        if position:
            self._file.seek(position)
            self._told = position

    def tell(self) -> int:
        return self._file.tell()

    def read(self, size: int) -> bytes:
        return self._guarded(self._file.read, size)

    def readline(self, limit: int) -> bytes:
        return self._guarded(self._file.readline, limit)

    def _guarded(self, action: Callable[[int], bytes], size: int) -> bytes:
        try:
            found = action(size)
        except (OSError, EOFError, zlib.error) as error:
            raise self._damaged(error) from None
        self._tell()
        return found

    def _tell(self) -> None:
        position = self._raw.tell()
        if position > self._told:
            self._progress(position - self._told)
            self._told = position

    def _damaged(self, error: Exception) -> ConfigError:
        return ConfigError(f"{self._path}: is damaged or cut off near byte {self._raw.tell()}: {_first_line(error)}")


def _missing_package(path: str) -> ConfigError:
    return ConfigError(f"{path}: needs the package pyarrow; pip install -r requirements-data.txt")


def _unreadable(path: str, error: OSError) -> ConfigError:
    return ConfigError(f"{path}: cannot be read: {error.strerror or _first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
