"""Find the files of raw text to read, cut them into pieces of work, and read their documents one at
a time.

    paths = find(["books/", "crawl/*.jsonl.zst"])
    for piece in pieces(path, piece_bytes=1 << 24):
        for blocks in read(piece, "text", progress):        # a document: strings, one after another
            ...

`.jsonl` (`.ndjson`, and `.json`, one object a line) holds a document a line, `.parquet` and
`.arrow` one a row (`tables`), `.txt` and `.md` files are a document each. All but tables may be
compressed (`opening`). Text is UTF-8. Blank lines of a `.jsonl` file are skipped. Names that begin
with 'hf:' are datasets of the Hugging Face hub (`hub`). Files that hold no text but token ids are
read by `token_records`.

Files are not trusted: sizes are bounded (a line or row by MAX_DOCUMENT), and whatever cannot be
read is an error of one line with the file and the number of the line, or is counted and skipped
where the caller asks for it. Text is not cleaned, filtered or deduplicated.
"""

import codecs
import glob
import hashlib
import itertools
import json
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from fp8jax import files
from fp8jax.config import ConfigError
from fp8jax.data import hub, opening, tables, token_records
from fp8jax.data.opening import COMPRESSED, Input, Progress
from fp8jax.files import elsewhere

LINES, TEXT = (".jsonl", ".ndjson", ".json"), (".txt", ".md")
TABLES, TOKENS = (*tables.PARQUET, *tables.ARROW), token_records.SUFFIXES
MAX_DOCUMENT = 1 << 29
# Files in a directory of text that describe the text: dataset cards and what the Hugging Face
# libraries write beside data.
_DESCRIBING = frozenset(
    (
        "readme.md",
        "readme.txt",
        "license.txt",
        "license.md",
        "dataset_info.json",
        "dataset_infos.json",
        "dataset_dict.json",
        "state.json",
        "tokenizer.json",
        "tokenizer_config.json",
    )
)
Skip = Callable[[str], None]
_BLOCK = 1 << 18


class Piece(NamedTuple):
    """Documents that are read together.

    Attributes:
        path: path of the file.
        start: first byte (lines that begin from here on), row group of a parquet file, row of a
            dataset of the hub, or record.
        stop: the byte, row group, row or record before which to stop; -1 reads to the end of the
            file.
        size: bytes of input, for progress.
        split: the split that its documents belong to; '' if their content decides.
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
    """Return the files that inputs name, in order and each once, however its path is spelled.

    A directory stands for the text files in it, sorted, links followed; hidden files, files that
    only describe a dataset (README.md, dataset_info.json) and prepared shards are left out. A file
    that is named itself is always read.

    Args:
        inputs: files, directories, patterns, datasets of the hub.
        out: a directory to leave out, because prepared output must not be read.
        tell: receives a line on what was left out.

    Raises:
        ConfigError: an input that names nothing, or a file of a kind that is not read.
    """
    left_out: list[str] = []
    found: dict[str, str] = {}
    outside = os.path.realpath(out) if out is not None else None
    for name in (os.fspath(given) for given in inputs):
        seen: set[str] = set()
        files = [
            file for match in _matches(name) for file in _files(match, outside, left_out, seen)
        ]
        if not files:
            away = elsewhere(name)
            raise ConfigError(
                f"--input={away or f'{name}: no such file, directory or pattern with matches'}"
            )
        for file in files:
            real = file if file.startswith(hub.PREFIX) else os.path.realpath(file)
            found.setdefault(real, file)
    for path in found.values():
        if not path.startswith(hub.PREFIX) and _kind(path) is None:
            known = ", ".join((*LINES, *TEXT, *TABLES, *TOKENS[:1]))
            raise ConfigError(
                f"{path}: {pathlib.Path(path).suffix!r} is not a kind of text file that is "
                f"read; use one of {known}"
            )
    if left_out:
        more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
        tell(f"left out: {', '.join(left_out[:3])}{more}; name a file itself to have it read")
    return list(found.values())


def _matches(name: str) -> list[str]:
    if os.path.exists(name) or name.startswith(hub.PREFIX):
        return [name]
    return sorted(
        filter(os.path.exists, glob.glob(name, recursive=True))
    )  # links may lead nowhere, or round in circles


def _files(match: str, outside: str | None, left_out: list[str], seen: set[str]) -> list[str]:
    """Return the file itself, or those of a directory, without directories that were `seen`."""
    if os.path.isdir(match):
        return sorted(_in_directory(match, outside, left_out, seen))
    inside = outside is not None and os.path.realpath(match).startswith(outside + os.sep)
    return [] if inside else [match]


def _in_directory(
    directory: str, outside: str | None, left_out: list[str], seen: set[str]
) -> list[str]:
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
    """Return whether a directory holds token shards, finished or not."""
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
    for kind in (LINES, TEXT, TABLES, TOKENS):
        if name.endswith(kind):
            return None if kind in (TABLES, TOKENS) and name != path.lower() else kind
    return None


def is_plain_text(path: str) -> bool:
    """Return whether the file is one uncompressed document."""
    return path.lower().endswith(TEXT) and not path.startswith(hub.PREFIX)


def is_tokens(path: str, field: str = "") -> bool:
    """Return whether the file holds token ids instead of text; a table holds them in this column."""
    if path.startswith(hub.PREFIX):
        return False
    return _kind(path) is TOKENS or (_kind(path) is TABLES and tables.holds_ids(path, field))


def stat(path: str) -> tuple[int, int]:
    """Return the size of an input in bytes and the time of its last change in nanoseconds.

    Raises:
        ConfigError: it cannot be read.
    """
    if path.startswith(hub.PREFIX):
        return int(hub.dataset(path).data.nbytes), 0
    try:
        found = os.stat(path)
    except OSError as error:
        raise opening.unreadable(path, error) from None
    return found.st_size, found.st_mtime_ns


def digest(path: str) -> str:
    """Return the hash of an input's content; '' for a dataset of the hub, which has a version of
    its own.

    Raises:
        ConfigError: it cannot be read.
    """
    if path.startswith(hub.PREFIX):
        return ""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise opening.unreadable(path, error) from None


def pieces(path: str, piece_bytes: int) -> list[Piece]:
    """Return a file as pieces of about `piece_bytes`, or as one piece if its format must be read
    from the start.

    Raises:
        ConfigError: the file cannot be read.
    """
    size = stat(path)[0]
    if path.startswith(hub.PREFIX):
        return _even_pieces(path, len(hub.dataset(path)), size, piece_bytes)
    if _kind(path) is TABLES:
        return [
            Piece(path, group, group + 1, bytes_) for group, bytes_ in enumerate(tables.sizes(path))
        ]
    if _kind(path) is TOKENS:
        return _even_pieces(path, token_records.count(path), size, piece_bytes)
    if path.lower().endswith(LINES):
        return _even_pieces(path, size, size, piece_bytes)
    return [Piece(path, 0, -1, size)]


def _even_pieces(path: str, length: int, size: int, piece_bytes: int) -> list[Piece]:
    """Cut the range from 0 to `length`, which holds `size` bytes."""
    count = max(1, -(-size // piece_bytes))
    edges = [length * index // count for index in range(count + 1)]
    return [
        Piece(path, start, stop, size * (stop - start) // max(1, length))
        for start, stop in itertools.pairwise(edges)
    ]


def cut_text(path: str, fraction: float) -> list[Piece]:
    """Return a text file as two documents, the second the last `fraction` of it, cut after the end
    of a line.
    """
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


def read(
    piece: Piece, field: str, progress: Progress, skip: Skip | None = None
) -> Iterator[Iterable[str]]:
    """Yield the documents of a piece, each as strings to be joined; use one up before asking for
    the next.

    Args:
        piece: a piece of a file.
        field: the field of an object or column of a table that holds the text; 'a.b' is b within a.
        progress: receives the bytes of input that were read since the last call.
        skip: receives a line for each line or row that holds no text, which is then skipped; with
            None it is an error.

    Raises:
        ConfigError: a file, line or row that cannot be read as text; the message names it.
    """
    kind = _kind(piece.path)
    if piece.path.startswith(hub.PREFIX):
        for texts in hub.rows(piece.path, field, piece.start, piece.stop):
            yield from map(_blocks, texts)
            progress(piece.size * len(texts) // max(1, piece.stop - piece.start))
    elif is_tokens(piece.path, field):
        raise ConfigError(f"{piece.path}: holds token ids, not text")
    elif kind is TABLES:
        rows = max(1, tables.rows(piece.path, piece.start))
        for number, (_, text) in enumerate(tables.texts(piece.path, piece.start, field, skip)):
            yield _blocks(text)
            if number % 256 == 255:
                progress(piece.size * 256 // rows)
    elif kind is LINES:
        yield from _read_lines(piece, field, progress, skip)
    else:
        yield _read_text(piece, progress)


def _read_text(piece: Piece, progress: Progress) -> Iterator[str]:
    """Yield the blocks of a text file."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    left, offset = (piece.stop - piece.start if piece.stop >= 0 else -1), piece.start
    try:
        with Input(piece.path, progress) as file:
            file.seek(piece.start)
            while left and (block := file.read(_BLOCK if left < 0 else min(_BLOCK, left))):
                left -= len(block) if left > 0 else 0
                yield decoder.decode(block)
                offset += len(block)
            yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{piece.path}: is not UTF-8 near byte {offset + error.start}; convert it first"
        ) from None


def _read_lines(
    piece: Piece, field: str, progress: Progress, skip: Skip | None
) -> Iterator[Iterable[str]]:
    with Input(piece.path, progress) as file:
        if piece.start:  # a line that began earlier belongs to the piece before
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
                text = _text(line, field)
            except ValueError as error:
                fault = _line_error(piece, number, str(error))
                if skip is None:
                    raise fault from None
                skip(str(fault))
                continue
            yield _blocks(text)


def _skip_line(file: Input, stop: int) -> None:
    while file.tell() < stop and (found := file.readline(_BLOCK)) and not found.endswith(b"\n"):
        pass


def _text(line: bytes, field: str) -> str:
    try:
        value = _json(line.decode("utf-8").removeprefix("\ufeff"))
    except UnicodeDecodeError:
        raise ValueError("is not UTF-8") from None
    except files.TooManyValuesError:
        raise
    except ValueError:
        raise ValueError("is not JSON") from None
    found = _member(value, field)
    if isinstance(found, list) and found and all(isinstance(part, str) for part in found):
        found = "\n".join(found)
    if not isinstance(found, str):
        raise ValueError(f"is not a JSON object with a string field {field!r}")
    return _checked(found)


def _json(text: str) -> Any:
    try:
        return files.parse_json(text)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError | files.TooManyValuesError):
            raise
    return files.parse_json(
        text, parse_int=str
    )  # an integer of thousands of digits is JSON, and no field of text


def _member(value: Any, field: str) -> Any:
    """Return a field of an object; without one of the whole name, follow the dots."""
    if isinstance(value, dict) and field in value:
        return value[field]
    for name in field.split("."):
        if not isinstance(value, dict):
            return None
        value = value.get(name)
    return value


def _checked(text: str) -> str:
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair, which is no text") from None
    return text


def _line_error(piece: Piece, number: int, fault: str) -> ConfigError:
    """Return an error that names the line in the file; only now are the lines before the piece
    counted.
    """
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
