"""Inspect a directory of token shards: lengths of documents, and some of them as text."""

import os
import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from fp8jax.config import ConfigError
from fp8jax.data import shards
from fp8jax.data import tokenizer as tokenizers
from fp8jax.data.mapping import Mapped


class Bin(NamedTuple):
    """The documents of `low` to `high` tokens, end of document included."""

    low: int
    high: int
    documents: int


def tokenizer_of(directory: str | os.PathLike) -> tokenizers.Tokenizer:
    """Return the tokenizer that a directory was prepared with.

    Raises:
        ConfigError: the directory does not exist, or lacks its tokenizer.json.
    """
    path = os.path.join(directory, shards.TOKENIZER)
    loaded = tokenizers.of_directory(pathlib.Path(directory))
    if (
        expected := shards.read_index(pathlib.Path(directory)).get("tokenizer")
    ) != loaded.fingerprint:
        raise ConfigError(
            f"{path}: is missing or another tokenizer's: {loaded.fingerprint}, not {expected}"
        )
    return loaded


def length_histogram(ends: Iterable[Mapped | np.ndarray]) -> list[Bin]:
    """Count documents by length, in powers of two; `ends` as `shards.open_ends` returns them."""
    counts = np.zeros(64, np.int64)
    for one in ends:
        lengths = np.diff(one[:].astype(np.int64), prepend=0)
        counts += np.bincount(
            np.frexp(lengths.astype(np.float64))[1], minlength=64
        )  # 2**(e - 1) <= length < 2**e
    used = np.flatnonzero(counts)
    return (
        [Bin(1 << (e - 1), (1 << e) - 1, int(counts[e])) for e in range(used[0], used[-1] + 1)]
        if len(used)
        else []
    )


def sample_documents(
    directory: str | os.PathLike,
    tokenizer: tokenizers.Tokenizer,
    split: str,
    count: int,
    tokens: int = 120,
) -> list[tuple[str, int, str]]:
    """Return evenly spread documents: the shard, the number of the document in it, and the text of
    its first tokens.

    Raises:
        ConfigError: as `shards.open_shards`.
    """
    (arrays, paths), ends = (
        shards.open_shards(directory, tokenizer, split),
        shards.open_ends(directory, tokenizer, split),
    )
    firsts = np.cumsum([0] + [len(one) for one in ends])
    found = []
    for index in range(min(count, int(firsts[-1]))):
        number = int(firsts[-1]) * index // min(count, int(firsts[-1]))
        shard = int(np.searchsorted(firsts, number, side="right")) - 1
        local = number - int(firsts[shard])
        start = int(ends[shard][local - 1]) if local else 0
        stop = int(ends[shard][local]) - 1
        text = tokenizer.decode(arrays[shard][start : min(stop, start + tokens)])
        found.append((paths[shard], local, text + ("…" if stop > start + tokens else "")))
    return found
