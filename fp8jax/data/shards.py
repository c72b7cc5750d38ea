"""The directory of token shards: how it is written, and how it is opened without trusting it.

    write_shards("tokens", tokenizer, {"train": documents, "held_out": documents})
    arrays, paths = open_shards("tokens", tokenizer, "train")

The directory holds `index.json` and the files that it lists, `train_00000.bin`, `held_out_00000.bin` and so on: bare
little-endian uint16 token ids (uint32 for vocabularies above 65536), documents one after another, each ended by the
end-of-document id, none split between files. `fp8jax.data.prepare` makes such a directory from text.

Opening checks the index, the tokenizer and every file's size, and maps the files into memory, so a large directory
opens at once; the ids themselves are checked where they are read (`sources.TokenStream`). Nothing is unpickled, and no
file outside the directory is named. Other formats are not read here.
"""

import itertools
import json
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from fp8jax.config import ConfigError
from fp8jax.data.tokenizer import Tokenizer, dtype

SPLITS = ("train", "held_out")
FORMAT = "fp8jax-tokens-1"


def write_shards(
    directory: str | os.PathLike,
    tokenizer: Tokenizer,
    documents: Mapping[str, Iterable[np.ndarray]],
    *,
    shard_tokens: int = 1 << 28,
) -> dict[str, dict[str, Any]]:
    """Writes a directory of token shards; `index.json` comes last, so an interrupted directory is never read.

    Args:
        directory: created if missing; must not hold an index.json yet.
        tokenizer: whose ids the documents are.
        documents: for 'train' and 'held_out', the token ids of one document each, without the end-of-document id.
        shard_tokens: a shard ends with the document with which it reaches this many tokens.

    Returns:
        For either split: `documents`, `text_bytes` and `shards` (`file`, `tokens`), as in the index.

    Raises:
        ConfigError: the directory already holds an index.json, or a split has no documents.
        ValueError: ids that are not the tokenizer's, or an end-of-document id inside a document.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if (directory / "index.json").exists():
        raise ConfigError(f"{directory}: already holds index.json; choose an empty directory")
    splits = {split: _write_split(directory, split, tokenizer, documents[split], shard_tokens) for split in SPLITS}
    partial = directory / "index.json.partial"
    partial.write_text(json.dumps(_header(tokenizer) | {"splits": splits}, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, directory / "index.json")
    return splits


def _header(tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "dtype": dtype(tokenizer.vocab_size).name,
    }


def _write_split(directory: pathlib.Path, split: str, tokenizer: Tokenizer, documents, shard_tokens: int) -> dict:
    entry = {"documents": 0, "text_bytes": 0, "shards": []}
    documents = iter(documents)
    for first in documents:
        path = directory / f"{split}_{len(entry['shards']):05d}.bin"
        counts = _write_shard(path, tokenizer, itertools.chain([first], documents), shard_tokens)
        entry["shards"].append({"file": path.name, "tokens": counts[0]})
        entry["documents"] += counts[1]
        entry["text_bytes"] += counts[2]
    if not entry["shards"]:
        raise ConfigError(f"{directory}: no documents for split {split!r}; give more documents or another fraction")
    return entry


def _write_shard(path: pathlib.Path, tokenizer: Tokenizer, documents: Iterator, shard_tokens: int) -> tuple:
    """Takes documents until the shard is full: (tokens, documents, bytes of text)."""
    tokens, count, text_bytes = 0, 0, 0
    with open(path, "wb") as file:
        for document in documents:
            _check_document(document, tokenizer)
            file.write(ended(document, tokenizer).tobytes())
            tokens += len(document) + 1
            count += 1
            text_bytes += int(tokenizer.token_bytes[document].sum())
            if tokens >= shard_tokens:
                break
    return tokens, count, text_bytes


def ended(document: np.ndarray, tokenizer: Tokenizer) -> np.ndarray:
    """The document's ids and the end-of-document id, uint16 or uint32 [tokens + 1]."""
    return np.append(document, tokenizer.end_of_document).astype(dtype(tokenizer.vocab_size))


def _check_document(document: np.ndarray, tokenizer: Tokenizer) -> None:
    if len(document) and not 0 <= document.min() <= document.max() < tokenizer.vocab_size:
        raise ValueError(f"a document has token ids outside 0 to {tokenizer.vocab_size - 1}")
    if (document == tokenizer.end_of_document).any():
        raise ValueError(f"a document holds the end-of-document id {tokenizer.end_of_document}")


def open_shards(
    directory: str | os.PathLike, tokenizer: Tokenizer, split: str
) -> tuple[tuple[np.ndarray, ...], tuple[str, ...]]:
    """The memory-mapped shards of a split, in order, and their paths.

    Args:
        directory: made by `write_shards`.
        tokenizer: the one it was prepared with.
        split: 'train' or 'held_out'.

    Raises:
        ConfigError: a missing or damaged file, or another tokenizer; the message names the file.
    """
    directory = pathlib.Path(directory)
    index = _read_index(directory / "index.json", tokenizer)
    try:
        listed = [(shard["file"], shard["tokens"]) for shard in index["splits"][split]["shards"]]
    except (KeyError, TypeError):
        listed = []
    if not listed:
        raise _error(directory / "index.json", f"lists no shards of split {split!r}; prepare it again")
    arrays = tuple(_open_shard(directory, split, file, tokens, tokenizer) for file, tokens in listed)
    return arrays, tuple(str(directory / file) for file, _ in listed)


def _read_index(path: pathlib.Path, tokenizer: Tokenizer) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _error(path, "no such file; source is 'embedded' or a directory of prepared token shards") from None
    except (OSError, ValueError) as error:
        raise _error(path, f"cannot be read: {error}") from None
    if not isinstance(index, dict):
        raise _error(path, "is not an index of token shards")
    for key, value in _header(tokenizer).items():
        if index.get(key) != value:
            fix = "set config.data.tokenizer to the one used then" if key == "tokenizer" else "prepare it again"
            raise _error(path, f"{key} is {index.get(key)!r}, not {value!r}; {fix}")
    return index


def _open_shard(directory: pathlib.Path, split: str, file: Any, tokens: Any, tokenizer: Tokenizer) -> np.ndarray:
    if not isinstance(file, str) or not re.fullmatch(rf"{split}_[0-9]{{5}}\.bin", file):
        raise _error(directory / "index.json", f"{file!r} is not a shard's name, such as {split}_00000.bin")
    if type(tokens) is not int or tokens < 1:
        raise _error(directory / "index.json", f"{file}: {tokens!r} is not a number of tokens")
    path, kind = directory / file, dtype(tokenizer.vocab_size)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}") from None
    if size != (expected := tokens * kind.itemsize):
        raise _error(path, f"has {size} bytes, not the {expected} of its {tokens} tokens; prepare it again")
    shard = np.memmap(path, kind, mode="r")
    if shard[-1] != tokenizer.end_of_document:
        raise _error(path, f"does not end with the end-of-document id {tokenizer.end_of_document}; prepare it again")
    return shard


def _error(path: pathlib.Path, fault: str) -> ConfigError:
    return ConfigError(f"config.data.source: {path}: {fault}")
