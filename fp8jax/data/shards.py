"""Write directories of token shards, and open them without trusting them.

    write_shards("tokens", tokenizer, {"train": documents, "held_out": documents})
    arrays, paths = open_shards("tokens", tokenizer, "train")

The directory holds `index.json` and the files that it lists: shards `train_00000.bin`,
`held_out_00000.bin` and so on, bare little-endian uint16 token ids (uint32 for vocabularies above
65536), documents one after another, each ended by the end-of-document id, none split between
shards; beside each, `train_00000.ends`: little-endian uint64, where in the shard every document
ends. `fp8jax.data.prepare` makes such a directory from text, with a copy of the tokenizer's file.

Opening checks the index, the tokenizer and every file's size, and maps the files into memory, so a
large directory opens at once; the ids themselves are checked where they are read
(`sources.TokenStream`), checksums by `python -m fp8jax prepare inspect DIR --verify`. Nothing is
unpickled, and no file outside the directory is named.
"""

import hashlib
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fp8jax import files
from fp8jax.config import ConfigError, read_json
from fp8jax.data.mapping import Mapped
from fp8jax.data.tokenizer import Tokenizer, dtype

SPLITS = ("train", "held_out")
FORMAT = "fp8jax-tokens-2"
INDEX, SOURCES = "index.json", "sources.jsonl"
# The largest index that is read, and so written: a million shards, or the two million input files
# that indexes of earlier versions named.
INDEX_BYTES = 1 << 28
TOKENIZER = "tokenizer.json"
ENDS = np.dtype("<u8")


class ShardWriter:
    """A writer of one shard, under a temporary name until `close`; documents may come in pieces.

    Args:
        path: path of the `.bin` file; the `.ends` file lies beside it.
        tokenizer: the tokenizer whose ids are written.
    """

    def __init__(self, path: pathlib.Path, tokenizer: Tokenizer):
        self.path, self.tokenizer = path, tokenizer
        self.tokens = self.documents = self.text_bytes = 0
        self._end = np.array([tokenizer.end_of_document], dtype(tokenizer.vocab_size)).tobytes()
        self._files = [_HashedFile(path), _HashedFile(path.with_suffix(".ends"))]

    def write(self, ids: np.ndarray) -> None:
        """Write token ids [any] that continue the present document, without the end-of-document id.

        Raises:
            ValueError: ids that are not the tokenizer's, or an end-of-document id.
        """
        _check_document(ids, self.tokenizer)
        self._files[0].write(ids.astype(dtype(self.tokenizer.vocab_size)).tobytes())
        self.tokens += len(ids)
        self.text_bytes += int(self.tokenizer.token_bytes[ids].sum())

    def end_document(self) -> None:
        """End the present document."""
        self._files[0].write(self._end)
        self.tokens += 1
        self.documents += 1
        self._files[1].write(np.array([self.tokens], ENDS).tobytes())

    def close(self) -> dict[str, Any]:
        """Give the files their names, and return the shard's entry for the index."""
        digests = [file.close() for file in self._files]
        return {
            "file": self.path.name,
            "tokens": self.tokens,
            "documents": self.documents,
            "text_bytes": self.text_bytes,
            "sha256": digests[0],
            "ends_sha256": digests[1],
        }


class _HashedFile:
    """A file under a temporary name, with the hash of what was written."""

    def __init__(self, path: pathlib.Path):
        self._path, self._partial = path, path.with_name(f"{path.name}.{os.getpid()}.partial")
        self._file, self._digest = open(self._partial, "wb", buffering=1 << 20), hashlib.sha256()

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)

    def close(self) -> str:
        self._file.close()
        os.replace(self._partial, self._path)
        return self._digest.hexdigest()


def write_shards(
    directory: str | os.PathLike,
    tokenizer: Tokenizer,
    documents: Mapping[str, Iterable[np.ndarray]],
    *,
    shard_tokens: int = 1 << 28,
) -> dict[str, dict[str, Any]]:
    """Write a directory of token shards; `index.json` comes last, so an interrupted directory is
    never read.

    Args:
        directory: created if missing; must not hold an index.json yet.
        tokenizer: the tokenizer of the documents' ids.
        documents: for 'train' and 'held_out', the token ids of one document each, without the
            end-of-document id.
        shard_tokens: a shard ends with the document with which it reaches this many tokens.

    Returns:
        For each split, as in the index: `documents`, `tokens`, `text_bytes` and `shards`.

    Raises:
        ConfigError: the directory already holds an index.json, or a split has no documents.
        ValueError: ids that are not the tokenizer's, or an end-of-document id inside a document.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / INDEX).exists():
        raise ConfigError(f"{directory}: already holds {INDEX}; choose an empty directory")
    splits = {
        name: summary(_write_split(directory, name, tokenizer, documents[name], shard_tokens))
        for name in SPLITS
    }
    for name in SPLITS:
        if not splits[name]["documents"]:
            raise ConfigError(
                f"{directory}: no documents for split {name!r}; give more documents or another fraction"
            )
    write_index(directory, header(tokenizer) | {"splits": splits})
    return splits


def _write_split(
    directory: pathlib.Path, split: str, tokenizer: Tokenizer, documents, shard_tokens: int
) -> list[dict]:
    entries, writer = [], None
    for document in documents:
        writer = writer or ShardWriter(directory / shard_name(split, len(entries)), tokenizer)
        writer.write(document)
        writer.end_document()
        if writer.tokens >= shard_tokens:
            entries.append(writer.close())
            writer = None
    return [*entries, writer.close()] if writer else entries


def summary(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the index entry of a split made of these shards."""
    totals = {
        name: sum(entry[name] for entry in entries)
        for name in ("documents", "tokens", "text_bytes")
    }
    return totals | {"shards": entries}


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}_{number:05d}.bin"


def header(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the part of the index that must match before any shard is read."""
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype(tokenizer.vocab_size).name,
    }


def write_index(directory: pathlib.Path, index: dict[str, Any]) -> None:
    """Write index.json atomically.

    Raises:
        ConfigError: it would be larger than `read_index` accepts.
    """
    content = (json.dumps(index, indent=1) + "\n").encode()
    if len(content) > INDEX_BYTES:
        raise ConfigError(
            f"{directory / INDEX}: would have {len(content):,} bytes, more than the "
            f"{INDEX_BYTES:,} that are read; "
            "prepare the input in several directories, and mix them: "
            "config.data.source='dirA=0.5,dirB=0.5'"
        )
    partial = directory / f"{INDEX}.partial"
    partial.write_bytes(content)
    os.replace(partial, directory / INDEX)


def write_sources(directory: pathlib.Path, sources: Iterable[dict[str, Any]]) -> None:
    """Write sources.jsonl atomically: a line per input file, which readers of tokens do not need."""
    partial = directory / f"{SOURCES}.partial"
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(source) + "\n" for source in sources)
    os.replace(partial, directory / SOURCES)


def read_sources(directory: pathlib.Path) -> Iterator[dict[str, Any]]:
    """Yield the input files that a directory was prepared from: `file`, `bytes`, `documents` and
    more.

    Raises:
        ConfigError: the list is damaged.
    """
    index, path = read_index(directory), directory / SOURCES
    if "sources" in index or not path.exists():  # prepared by an earlier version, or by hand
        yield from index.get("sources", ())
        return
    try:
        with path.open("rb") as file:
            while line := file.readline(files.JSON_BYTES):
                yield files.parse_json(line)
    except (OSError, ValueError) as error:
        raise _error(path, f"cannot be read: {str(error)[:100]}") from None


def ended(document: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """Return the document's ids and the end-of-document id, uint16 or uint32 [tokens + 1]."""
    return np.append(document, tokenizer.end_of_document).astype(dtype(tokenizer.vocab_size))


def _check_document(document: np.ndarray, tokenizer: Tokenizer) -> None:
    if len(document) and not 0 <= document.min() <= document.max() < tokenizer.vocab_size:
        raise ValueError(f"a document has token ids outside 0 to {tokenizer.vocab_size - 1}")
    if (document == tokenizer.end_of_document).any():
        raise ValueError(f"a document holds the end-of-document id {tokenizer.end_of_document}")


def open_shards(
    directory: str | os.PathLike, tokenizer: Tokenizer, split: str
) -> tuple[tuple[Mapped, ...], tuple[str, ...]]:
    """Return the memory-mapped shards of a split, in order, and their paths.

    Args:
        directory: made by `write_shards` or `prepare`.
        tokenizer: the tokenizer that it was prepared with.
        split: 'train' or 'held_out'.

    Raises:
        ConfigError: a file is missing or damaged, the tokenizer is another, or the split is
            missing; the message names the file.
    """
    directory = pathlib.Path(directory)
    listed = _listed(directory, read_index(directory, tokenizer), split)
    arrays = tuple(_open_shard(directory, split, shard, tokenizer) for shard in listed)
    return arrays, tuple(str(directory / shard["file"]) for shard in listed)


def open_what_is_there(
    directory: str | os.PathLike, tokenizer: Tokenizer, split: str
) -> tuple[tuple[Mapped | np.ndarray, ...], tuple[str, ...]]:
    """Open shards as `open_shards` does, with missing tokens as arrays of -1, which readers refuse.

    Raises:
        ConfigError: the index cannot be used; the message names it.
    """
    directory, kind = pathlib.Path(directory), dtype(tokenizer.vocab_size)
    arrays, names = [], []
    for shard in _listed(directory, read_index(directory, tokenizer), split):
        path = directory / shard["file"]
        size = path.stat().st_size if path.is_file() else 0
        there = min(size // kind.itemsize, shard["tokens"])
        if there:
            arrays.append(Mapped(path, kind, there))
            names.append(str(path))
        if there < shard["tokens"]:
            arrays.append(
                np.broadcast_to(np.int32(-1), (shard["tokens"] - there,))
            )  # takes no memory
            names.append(
                f"{path}, cut off at byte {size}" if path.is_file() else f"{path}, which is missing"
            )
    return tuple(arrays), tuple(names)


def open_ends(directory: str | os.PathLike, tokenizer: Tokenizer, split: str) -> tuple[Mapped, ...]:
    """Return where each document ends in every shard of a split, memory-mapped uint64 [documents].

    Raises:
        ConfigError: as `open_shards`; the values themselves are checked too.
    """
    directory = pathlib.Path(directory)
    arrays, _ = open_shards(directory, tokenizer, split)
    listed = _listed(directory, read_index(directory, tokenizer), split)
    return tuple(
        _open_ends(directory, split, shard, len(array))
        for shard, array in zip(listed, arrays, strict=True)
    )


def has_split(directory: str | os.PathLike, split: str) -> bool:
    """Return whether a directory lists shards of a split.

    Raises:
        ConfigError: the index cannot be read.
    """
    splits = read_index(pathlib.Path(directory)).get("splits")
    found = splits.get(split) if isinstance(splits, dict) else None
    return isinstance(found, dict) and bool(found.get("shards"))


def read_index(directory: pathlib.Path, tokenizer: Tokenizer | None = None) -> dict[str, Any]:
    """Read the index, and check that its shards are of the tokenizer, if one is given.

    Raises:
        ConfigError: the index is missing or cannot be read, or the shards are of another tokenizer.
    """
    path = pathlib.Path(directory) / INDEX
    try:
        index = read_json(path, INDEX_BYTES)
    except FileNotFoundError:
        raise _error(
            path, "no such file; source is 'embedded' or a directory of prepared token shards"
        ) from None
    except ConfigError as error:
        raise ConfigError(f"config.data.source: {error}") from None
    if not isinstance(index, dict):
        raise _error(path, "is not an index of token shards")
    expected = header(tokenizer) if tokenizer else {"format": FORMAT}
    for key, value in expected.items():
        if index.get(key) != value:
            fix = (
                "set config.data.tokenizer to the one used then"
                if key == "tokenizer"
                else "prepare it again"
            )
            raise _error(path, f"{key} is {index.get(key)!r}, not {value!r}; {fix}")
    return index


def _listed(directory: pathlib.Path, index: dict[str, Any], split: str) -> list[dict[str, Any]]:
    """Return the shards of a split, after checking that each has a safe name and a valid number of
    tokens.
    """
    try:
        listed = [
            {"file": shard["file"], "tokens": shard["tokens"]} | shard
            for shard in index["splits"][split]["shards"]
        ]
    except (KeyError, TypeError):
        listed = []
    if not listed:
        fix = (
            "set config.data.held_out to other text, or to none"
            if split == "held_out"
            else "prepare it again"
        )
        raise _error(directory / INDEX, f"lists no shards of split {split!r}; {fix}")
    for shard in listed:
        file, tokens = shard["file"], shard["tokens"]
        if not isinstance(file, str) or not re.fullmatch(rf"{split}_[0-9]{{5,9}}\.bin", file):
            raise _error(
                directory / INDEX, f"{file!r} is not a shard's name, such as {shard_name(split, 0)}"
            )
        if type(tokens) is not int or tokens < 1:
            raise _error(directory / INDEX, f"{file}: {tokens!r} is not a number of tokens")
    return listed


def _open_shard(
    directory: pathlib.Path, split: str, shard: dict[str, Any], tokenizer: Tokenizer
) -> Mapped:
    path, kind = directory / shard["file"], dtype(tokenizer.vocab_size)
    array = map_file(path, kind, shard["tokens"], "tokens")
    with open(
        path, "rb", buffering=0
    ) as file:  # a map takes ten times as long, and there may be 100,000 shards
        file.seek(-kind.itemsize, os.SEEK_END)
        last = np.frombuffer(file.read(kind.itemsize), kind)
    if last.tolist() != [tokenizer.end_of_document]:
        fault = f"does not end with the end-of-document id {tokenizer.end_of_document}; prepare it again"
        raise _error(directory / shard["file"], fault)
    return array


def _open_ends(directory: pathlib.Path, split: str, shard: dict[str, Any], tokens: int) -> Mapped:
    documents, path = shard.get("documents"), (directory / shard["file"]).with_suffix(".ends")
    if type(documents) is not int or documents < 1:
        raise _error(
            directory / INDEX, f"{shard['file']}: {documents!r} is not a number of documents"
        )
    ends = map_file(path, ENDS, documents, "documents")
    if ends[-1] != tokens or (np.diff(ends[:].astype(np.int64), prepend=0) < 1).any():
        raise _error(
            path, f"is not a rising list of document ends up to {tokens}; prepare it again"
        )
    return ends


def map_file(path: pathlib.Path, kind: np.dtype, count: int, what: str) -> Mapped:
    """Return a file of `count` values (at least 1), mapped into memory when it is read.

    Raises:
        ConfigError: the file is missing or of another size; the message names it and where it ends.
    """
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from None
    if size != (expected := count * kind.itemsize):
        where = f"; it is cut off at byte {size}" if size < expected else ""
        raise _error(
            path,
            f"has {size} bytes, not the {expected} of its {count} {what}{where}; prepare it again",
        )
    return Mapped(path, kind, count)


def verify(directory: str | os.PathLike) -> str | None:
    """Read every shard and compare it with its checksum; return the first fault, None if there is
    none.

    Raises:
        ConfigError: the index cannot be read.
    """
    directory = pathlib.Path(directory)
    index = read_index(directory)
    for split in SPLITS:
        if not index["splits"][split]["shards"]:
            continue
        for shard in _listed(directory, index, split):
            path = directory / shard["file"]
            for file, expected in (
                (path, shard["sha256"]),
                (path.with_suffix(".ends"), shard["ends_sha256"]),
            ):
                try:
                    with open(file, "rb") as content:
                        found = hashlib.file_digest(content, "sha256").hexdigest()
                except OSError as error:
                    return f"{file}: cannot be read: {error.strerror}"
                if found != expected:
                    return (
                        f"{file}: its checksum is {found[:12]}…, not {expected[:12]}…; "
                        f"prepare it again"
                    )
    return None


def _error(path: pathlib.Path, fault: str) -> ConfigError:
    return ConfigError(f"config.data.source: {path}: {fault}")
