"""Text files in, a directory of token shards out, for `config.data.source`.

    prepare(["books/a.txt", "articles.jsonl"], "tokens", tokenizer="byte", held_out_fraction=0.01)

A `.txt` file is one document; a `.jsonl` file has one a line, in the field `text`. Text is UTF-8. Documents are read
one at a time, so the corpus need not fit in memory, and keep their order: training shuffles windows, not documents.
Nothing is cleaned, filtered or deduplicated.
"""

import json
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fp8jax.config import ConfigError
from fp8jax.data import shards
from fp8jax.data import tokenizer as tokenizers


def prepare(
    inputs: Sequence[str | os.PathLike],
    directory: str | os.PathLike,
    *,
    tokenizer: str = "byte",
    held_out_fraction: float = 0.01,
) -> dict[str, dict[str, Any]]:
    """Tokenises the documents of `inputs` into shards; the same inputs always give the same shards.

    Args:
        inputs: `.txt` and `.jsonl` files, in order.
        directory: where the shards go; must not hold an index.json yet.
        tokenizer: 'byte' or the path of a tokenizer.json.
        held_out_fraction: of the documents, evenly spread over them, that go to the held-out split.

    Returns:
        For either split: `documents`, `text_bytes` and `shards`.

    Raises:
        ConfigError: a file that cannot be read, an unknown kind of file, or a split left without documents.
    """
    if not 0.0 < held_out_fraction < 1.0:
        raise ConfigError(f"held_out_fraction: {held_out_fraction!r} is not between 0 and 1")
    loaded, paths = tokenizers.load(tokenizer), [pathlib.Path(path) for path in inputs]

    def encoded(held_out: bool) -> Iterator[np.ndarray]:
        for number, text in enumerate(_documents(paths)):
            if _is_held_out(number, held_out_fraction) == held_out:
                yield loaded.encode(text)

    # The text is read twice: cheap beside tokenising, and neither split has to wait in memory.
    return shards.write_shards(directory, loaded, {"train": encoded(False), "held_out": encoded(True)})


def _is_held_out(number: int, fraction: float) -> bool:
    """Whether the count of held-out documents, floor(documents * fraction), grows with this document."""
    return int((number + 1) * fraction) > int(number * fraction)


def _documents(paths: Sequence[pathlib.Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield from _read(path)
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"{path}: is not UTF-8; convert it first") from None


def _read(path: pathlib.Path) -> Iterator[str]:
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"{path}: {path.suffix!r} is not a kind of text file that is read; use .txt or .jsonl")
    if path.suffix == ".txt":
        yield path.read_bytes().decode("utf-8")
        return
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            yield _text(path, number, line)


def _text(path: pathlib.Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise ConfigError(f"{path}: line {number} is not a JSON object with a string field 'text'")
    return text
