"""Load tokens: the embedded novels, directories of prepared token shards, Megatron files, and
mixtures of them.

    stream = load(config.data, "train")         # or "held_out"; several sources one after another
    len(stream), stream.read(0, 100)            # tokens; int32 [100]
    for name, weight, stream in load_each(config.data, "train"): ...
    for name, stream in load_held_out(config.data): ...     # as config.data.held_out names them

A split is one stream of tokens in which every document ends with the tokenizer's end-of-document
id, so that id is the boundary between documents, wherever reading starts. Batches are made in
`pipeline.py`, directories of shards in `prepare.py`; no data is downloaded.
"""

import bisect
import dataclasses
import functools
import importlib.resources
import lzma
import os
from typing import NamedTuple

import numpy as np

from fp8jax import files
from fp8jax.config import ConfigError, DataConfig, DataError, parse_held_out, parse_sources
from fp8jax.data import megatron, shards
from fp8jax.data import tokenizer as tokenizers
from fp8jax.data.mapping import Mapped

NOVELS = {
    "train": (
        "emma",
        "mansfield_park",
        "northanger_abbey",
        "pride_and_prejudice",
        "sense_and_sensibility",
    ),
    "held_out": ("persuasion",),
}


@dataclasses.dataclass(frozen=True, eq=False)
class TokenStream:
    """The tokens of one split.

    Attributes:
        arrays: integers, in memory or memory-mapped; one after another they are the stream.
        names: name of each array in an error.
        tokenizer: the tokenizer whose ids these are.
    """

    arrays: tuple[np.ndarray | megatron.Ended | Mapped, ...]
    names: tuple[str, ...]
    tokenizer: tokenizers.Tokenizer

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """Return int64 [arrays + 1]: where in the stream each array starts, and the stream's
        length.
        """
        return np.cumsum([0] + [len(array) for array in self.arrays], dtype=np.int64)

    @functools.cached_property
    def _starts(self) -> list[int]:
        return self.starts.tolist()

    @functools.cached_property
    def _plain(self) -> list[np.ndarray | megatron.Ended | Mapped]:
        """Return the arrays without np.memmap's bookkeeping, a third of the time to read a short
        window.
        """
        return [
            np.asarray(array) if isinstance(array, np.ndarray) else array for array in self.arrays
        ]

    def __len__(self) -> int:
        """Return the number of tokens in the stream."""
        return int(self.starts[-1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Read tokens `start` (at least 0) to `stop - 1`, int32; fewer where the stream ends.

        Raises:
            DataError: a shard holds an id that is not in the vocabulary; the message names the file
                and the byte.
        """
        pieces, starts = [], self._starts
        stop = min(stop, starts[-1])
        while start < stop:
            which = bisect.bisect_right(starts, start) - 1
            end = min(stop, starts[which + 1])
            pieces.append(self._piece(which, start - starts[which], end - starts[which]))
            start = end
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.int32), *pieces])

    def _piece(self, which: int, first: int, last: int) -> np.ndarray:
        tokens, size = self._plain[which][first:last], self.tokenizer.vocab_size
        if tokens.max() >= size or (
            tokens.dtype.kind != "u" and tokens.min() < 0
        ):  # JAX would clamp such an id silently
            bad = int(np.argmax((tokens >= size) | (tokens < 0)))
            at = (first + bad) * self.arrays[which].itemsize
            raise DataError(
                f"{self.names[which]}: token {first + bad} is {tokens[bad]}, outside the "
                f"vocabulary of {size} (byte {at}); "
                "prepare it again, or set config.data.on_fault=skip"
            )
        return tokens.astype(np.int32)


class Source(NamedTuple):
    """One of the sources of a mixture; weights add up to 1."""

    name: str
    weight: float
    stream: TokenStream


def load(data: DataConfig, split: str) -> TokenStream:
    """Load one split of the configured sources, one after another, without those that hold nothing
    out.

    Args:
        data: the `data` section of a config.
        split: 'train' or 'held_out'.

    Raises:
        ConfigError: the directory does not exist, was prepared with another tokenizer, is damaged,
            or holds nothing out; the message names the file.
    """
    names = [name for name, _ in parse_sources(data.source)]
    if split == "held_out":
        names = [
            name for name in names if not is_directory(name) or shards.has_split(name, split)
        ] or names[:1]
    streams = [
        _load(name, tokenizers.of(data), part_of(name, data, split), data.on_fault == "skip")
        for name in names
    ]
    if len(streams) == 1:
        return streams[0]
    arrays, paths = (
        sum((getattr(one, field) for one in streams), ()) for field in ("arrays", "names")
    )
    return TokenStream(arrays, paths, streams[0].tokenizer)


def load_each(data: DataConfig, split: str) -> list[Source]:
    """Load one split of every configured source.

    Raises:
        ConfigError: as `load`.
    """
    tokenizer, tolerant = tokenizers.of(data), data.on_fault == "skip"
    named = parse_sources(data.source)
    return [
        Source(name, weight, _load(name, tokenizer, part_of(name, data, split), tolerant))
        for name, weight in named
    ]


def load_held_out(data: DataConfig) -> list[tuple[str, TokenStream]]:
    """Return name and text of each part of `config.data.held_out`; one without a name for 'auto',
    none for 'none'.

    A source that is named there gives its held-out split, or all of its text if it has none.

    Raises:
        ConfigError: as `load`; or a part without a held-out split is trained on.
    """
    if data.held_out == "auto":
        return [("", load(data, "held_out"))]
    tokenizer, tolerant = tokenizers.of(data), data.on_fault == "skip"
    try:
        return [
            (name, _load(source, tokenizer, part, tolerant))
            for name, source, part in held_out_parts(data)
        ]
    except ConfigError as error:
        raise ConfigError(
            str(error).replace("config.data.source:", "config.data.held_out:", 1)
        ) from None


def check(data: DataConfig) -> None:
    """Check that what a run reads is there, without opening it.

    Raises:
        ConfigError: a source or a held-out text is neither a directory of token shards nor a
            Megatron dataset.
    """
    trained = [name for name, _ in parse_sources(data.source)]
    held_out = [source for _, source in parse_held_out(data.held_out)]
    for field, names in (("source", trained), ("held_out", held_out)):
        for name in names:
            if is_directory(name) and not os.path.isfile(os.path.join(name, shards.INDEX)):
                raise ConfigError(f"config.data.{field}: {_not_there(name)}")


def _not_there(name: str) -> str:
    if name.startswith("hf:") and not os.path.exists(name):
        return (
            f"{name}: is a dataset of a hub; prepare it first, python -m fp8jax prepare --input "
            f"{name} --out tokens, and give the "
            "directory tokens"
        )
    path = os.path.join(name, shards.INDEX)
    return (
        files.elsewhere(name)
        or f"{path}: no such file; give 'embedded' or a directory of prepared token shards"
    )


def held_out_parts(data: DataConfig) -> list[tuple[str, str, str]]:
    """Return the parts for held-out losses: name, source, and 'held_out', 'train' or 'all' of that
    source.

    Raises:
        ConfigError: as `load_held_out`.
    """
    trained = [name for name, _ in parse_sources(data.source)]
    if data.held_out == "auto":
        return [(name, name, "held_out") for name in trained]
    found = []
    for name, source in parse_held_out(data.held_out):
        if megatron.is_dataset(source):
            part = "held_out" if source in trained else "all"
        else:
            part = (
                "held_out"
                if source == "embedded" or shards.has_split(source, "held_out")
                else "train"
            )
        if part == "train" and source in trained:
            raise ConfigError(
                f"config.data.held_out: {source} holds nothing out, and the run trains on it; "
                f"give another source, or none"
            )
        found.append((name, source, part))
    return found


def holds_out(data: DataConfig) -> bool:
    """Return True if one of the configured sources has a held-out split of its own.

    Raises:
        ConfigError: an index cannot be read.
    """
    return any(
        not is_directory(name) or shards.has_split(name, "held_out")
        for name, _ in parse_sources(data.source)
    )


def part_of(name: str, data: DataConfig, split: str) -> str:
    """Return 'all' for a Megatron dataset that is trained on and not evaluated, otherwise the
    split.
    """
    apart = data.held_out == "auto" or name in dict(parse_held_out(data.held_out)).values()
    return "all" if split == "train" and megatron.is_dataset(name) and not apart else split


def is_directory(name: str) -> bool:
    """Return whether a source is a directory of token shards."""
    return name != "embedded" and not megatron.is_dataset(name)


def _load(name: str, tokenizer: tokenizers.Tokenizer, split: str, tolerant: bool) -> TokenStream:
    if split not in (*shards.SPLITS, "all"):
        raise ValueError(f"split {split!r} is not one of {', '.join(shards.SPLITS)}")
    if name == "embedded":
        return _embedded(tokenizer, split)
    if megatron.is_dataset(name):
        array = megatron.open_stream(name, tokenizer, split)
        return TokenStream((array,), (f"{os.fspath(name)}.bin",), tokenizer)
    opened = (
        shards.open_what_is_there(name, tokenizer, split)
        if tolerant
        else shards.open_shards(name, tokenizer, split)
    )
    return TokenStream(*opened, tokenizer)


def embedded_documents(split: str) -> list[bytes]:
    """Return the embedded novels of a split, UTF-8, one document each."""
    corpus = importlib.resources.files("fp8jax.data") / "corpus"
    return [lzma.decompress((corpus / f"{novel}.txt.xz").read_bytes()) for novel in NOVELS[split]]


@functools.lru_cache(maxsize=4)
def _embedded(tokenizer: tokenizers.Tokenizer, split: str) -> TokenStream:
    tokens = np.concatenate(
        [shards.ended(tokenizer.encode(text), tokenizer) for text in embedded_documents(split)]
    )
    tokens.setflags(write=False)  # every caller shares it
    return TokenStream((tokens,), (f"embedded {split} text",), tokenizer)
