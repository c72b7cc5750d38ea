"""Identify a run's data by content, not by path: a digest of each source, kept with every
checkpoint.

    found = of(config.data)                 # {"train": [["web", 0.7, "sha256:..."], ...], "held_out": [...]}
    same(found["train"], saved["train"])    # True if a run would continue with the data that it began with

The digest of a prepared directory is that of the checksums in its index, so it takes no time. For a
Megatron dataset the whole index is read, and of the tokens only the size and evenly spaced pieces:
a change of single tokens may go unnoticed.
"""

import functools
import hashlib
import importlib.resources
import json
import os
import pathlib
from typing import Any

import numpy as np

from fp8jax.config import ConfigError, DataConfig, parse_sources
from fp8jax.data import megatron, shards, sources

# How many pieces of a Megatron dataset's tokens are read, and the bytes of one.
_PIECES, _PIECE = 256, 1 << 12
_READ = 1 << 22


def of(data: DataConfig) -> dict[str, list[list[Any]]]:
    """Return a dictionary from split to the name, weight and digest of each source, as in JSON.

    Raises:
        ConfigError: a source that cannot be read; the message names the file.
    """
    train = parse_sources(data.source)
    held_out = sources.held_out_parts(data)
    return {
        "train": [
            [name, weight, _digest(name, data, sources.part_of(name, data, "train"))]
            for name, weight in train
        ],
        "held_out": [[name, 1.0, _digest(source, data, part)] for name, source, part in held_out],
    }


def same(found: list[list[Any]], saved: Any) -> bool:
    """Return True if the sources' weights and contents, in order, equal the saved ones; names may
    differ.
    """
    try:
        return [(weight, digest) for _, weight, digest in found] == [
            (weight, digest) for _, weight, digest in saved
        ]
    except (TypeError, ValueError):  # the manifest is damaged
        return False


def changed(found: list[list[Any]], saved: Any) -> list[str]:
    """Return the names of the sources whose content differs from that saved under the same name."""
    try:
        before = {name: digest for name, _, digest in saved}
    except (TypeError, ValueError):
        return []
    return [name for name, _, digest in found if before.get(name, digest) != digest]


def _digest(name: str, data: DataConfig, part: str) -> str:
    if name == "embedded":
        return _of_corpus(part)
    if megatron.is_dataset(name):
        return _of_megatron(pathlib.Path(f"{name}.idx"), pathlib.Path(f"{name}.bin"), part)
    return _of_directory(pathlib.Path(name), data, part)


def _of_directory(directory: pathlib.Path, data: DataConfig, part: str) -> str:
    index = shards.read_index(directory)
    splits = index.get("splits")
    found = splits.get(part) if isinstance(splits, dict) else None
    listed = found.get("shards") if isinstance(found, dict) else None
    content = [index.get("dtype"), listed]
    if part == "train" and data.packing == "best_fit":
        packed = index.get("best_fit")
        content.append(packed.get(str(data.sequence_length)) if isinstance(packed, dict) else None)
    return f"sha256:{hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}"


def _of_megatron(index: pathlib.Path, tokens: pathlib.Path, part: str) -> str:
    digest = hashlib.sha256(part.encode())
    try:
        with index.open("rb") as file:
            for piece in iter(functools.partial(file.read, _READ), b""):
                digest.update(piece)
        with tokens.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(str(size).encode())
            for start in np.linspace(0, max(size - _PIECE, 0), _PIECES, dtype=np.int64).tolist():
                file.seek(start)
                digest.update(file.read(_PIECE))
    except OSError as error:
        raise ConfigError(
            f"config.data.source: {error.filename or tokens}: cannot be read: {error.strerror}"
        ) from None
    return f"sha256:{digest.hexdigest()}"


@functools.lru_cache(maxsize=2)
def _of_corpus(split: str) -> str:
    corpus = importlib.resources.files("fp8jax.data") / "corpus"
    digest = hashlib.sha256()
    for novel in sources.NOVELS[split]:
        digest.update((corpus / f"{novel}.txt.xz").read_bytes())
    return f"sha256:{digest.hexdigest()}"
