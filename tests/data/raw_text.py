"""Text in files of every kind, and what shards of it hold."""

import gzip
import hashlib
import json
import pathlib

import numpy as np
import pytest

from fp8jax.data import inspection, shards

TEXTS = [f"Chapter {n}: naïve £{n} — {'Anne Elliot ' * (n % 7)}\r\n\0" for n in range(60)] + [
    "",
    " ",
    "\n",
    "\ufeff",
    "𝄞",
]


def lines(texts, field="text"):
    return "".join(
        json.dumps({field: text}, ensure_ascii=number % 2 == 0) + "\n"
        for number, text in enumerate(texts)
    ).encode()


def decoded(directory, split):
    """The documents of a split, in order."""
    loaded = inspection.tokenizer_of(directory)
    arrays, _ = shards.open_shards(directory, loaded, split)
    ends = shards.open_ends(directory, loaded, split)
    return [
        loaded.decode(ids[:-1])
        for array, one in zip(arrays, ends, strict=True)
        for ids in np.split(array, one[:-1])
    ]


def files(directory):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in pathlib.Path(directory).iterdir()
    }


def write_parquet(path, texts):
    table = pytest.importorskip("pyarrow").table({"text": texts, "number": list(range(len(texts)))})
    pytest.importorskip("pyarrow.parquet").write_table(table, path, row_group_size=7)


def write_zst(path, content):
    """Two frames, one after the other."""
    pyarrow = pytest.importorskip("pyarrow")
    half = len(content) // 2
    path.write_bytes(
        b"".join(
            pyarrow.compress(part, "zstd", asbytes=True)
            for part in (content[:half], content[half:])
        )
    )


WRITERS = {
    "a.jsonl": lambda path: path.write_bytes(lines(TEXTS)),
    "a.json.gz": lambda path: path.write_bytes(
        gzip.compress(lines(TEXTS[:30])) + gzip.compress(lines(TEXTS[30:]))
    ),
    "a.jsonl.zst": lambda path: write_zst(path, lines(TEXTS)),
    "a.parquet": lambda path: write_parquet(path, TEXTS),
}
