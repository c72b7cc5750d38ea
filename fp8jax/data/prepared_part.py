"""Make one part of a preparation: its documents, tokenised, in a shard of each split, and the
record that it is done.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from fp8jax.data import documents, shards, token_records
from fp8jax.data import tokenizer as tokenizers

LONG = 1 << 18
BATCH = 1 << 18
UNFINISHED = "unfinished"
HASHES = 1 << 64


@dataclasses.dataclass(frozen=True)
class Job:
    """The settings that all parts of a preparation share."""

    directory: pathlib.Path
    tokenizer: str
    text_field: str
    threshold: int  # documents whose hash is below it are held out
    allow_normalisation: bool = False
    skip_bad_rows: bool = False

    def load(self) -> tokenizers.Tokenizer:
        """Return the tokenizer, which is read once per process."""
        return tokenizers.load(self.tokenizer, allow_normalisation=self.allow_normalisation)


class _Within:
    """The progress on a piece, an approximation because a line may end in the next piece."""

    def __init__(self, size: int, progress: documents.Progress):
        self._left, self._progress = size, progress

    def __call__(self, more: int) -> None:
        more = min(more, self._left)
        self._left -= more
        self._progress(more)

    def finish(self) -> None:
        self(self._left)


def make(job: Job, number: int, part: list[documents.Piece], progress: documents.Progress) -> None:
    """Make the shards of a part, and last its record."""
    tokenizer = job.load()
    writers = {
        split: shards.ShardWriter(job.directory / shards.shard_name(split, number), tokenizer)
        for split in shards.SPLITS
    }
    lowest, counts = HASHES, []
    skipped = _Skipped() if job.skip_bad_rows else None
    for piece in part:
        before = sum(writer.documents for writer in writers.values())
        within = _Within(piece.size, progress)
        if documents.is_tokens(piece.path, job.text_field):
            found = _recorded(piece, job, within, tokenizer)
        else:
            found = _encoded(piece, job, within, tokenizer, skipped)
        for split, low, ids, last in found:
            lowest = min(lowest, low)
            writers[split].write(ids)
            if last:
                writers[split].end_document()
        within.finish()
        counts.append((piece.path, sum(writer.documents for writer in writers.values()) - before))
    entries: dict[str, dict[str, Any] | None] = {}
    for split in shards.SPLITS:
        entry = writers[split].close()
        entries[split] = entry
        if not entry["documents"]:
            for suffix in (".bin", ".ends"):
                (job.directory / shards.shard_name(split, number)).with_suffix(suffix).unlink()
            entries[split] = None
    record = job.directory / UNFINISHED / f"{number:05d}.json"
    partial = record.with_suffix(f".{os.getpid()}")
    bad = {"skipped": skipped.count, "first_skipped": skipped.first} if skipped else {}
    partial.write_text(
        json.dumps({"shards": entries, "lowest": lowest, "documents": counts, **bad})
    )
    os.replace(partial, record)


class _Skipped:
    """A counter of the rows of a part that hold no text, with the fault of the first."""

    def __init__(self):
        self.count = 0
        self.first = ""

    def __call__(self, fault: str) -> None:
        self.count += 1
        self.first = self.first or fault


def _recorded(
    piece: documents.Piece, job: Job, progress: documents.Progress, tokenizer: tokenizers.Tokenizer
) -> Iterator[tuple]:
    """Yield what `_encoded` does, for documents that are token ids already."""
    told = piece.start
    for record, ids in token_records.documents(
        piece.path, piece.start, piece.stop, job.text_field, tokenizer
    ):
        digest = _hash(ids.astype("<i8").tobytes())
        yield shards.SPLITS[digest < job.threshold], digest, ids, True
        if piece.path.lower().endswith(
            documents.TOKENS
        ):  # a table's rows are not counted in a piece's
            progress(piece.size * (record - told) // (piece.stop - piece.start))
            told = record


def _chunks(
    piece: documents.Piece, job: Job, progress: documents.Progress, skipped: _Skipped | None
) -> Iterator[tuple[str, int, str, bool]]:
    """Yield split, hash of the document, text, and whether the document ends with it."""
    for blocks in documents.read(piece, job.text_field, progress, skipped):
        split = None
        for text, last in _cut(blocks):
            if split is None:
                digest = _hash(text.encode("utf-8"))
                split = piece.split or shards.SPLITS[digest < job.threshold]
            yield split, digest, text, last


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _cut(blocks: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Join the strings of a document and cut it into pieces of at most LONG characters."""
    text = ""
    for block in blocks:
        text += block
        while len(text) > LONG:
            end = _boundary(text)
            yield text[:end], False
            text = text[end:]
    yield text, True


def _boundary(text: str) -> int:
    """Return the place before the last space between two letters up to LONG; byte-level
    pre-tokenizers cut there as well.
    """
    end = text.rfind(" ", LONG // 2, LONG)
    while end > 0:
        if text[end - 1].isalpha() and text[end + 1].isalpha():
            return end
        end = text.rfind(" ", LONG // 2, end)
    return text.rfind("\n", LONG // 2, LONG) + 1 or LONG


def _encoded(
    piece: documents.Piece,
    job: Job,
    progress: documents.Progress,
    tokenizer: tokenizers.Tokenizer,
    skipped: _Skipped | None,
) -> Iterator[tuple[str, int, np.ndarray, bool]]:
    """Yield the chunks with token ids in place of text, encoded in batches of about BATCH
    characters.
    """
    batch, size = [], 0
    for chunk in _chunks(piece, job, progress, skipped):
        batch.append(chunk)
        size += len(chunk[2]) + 64
        if size >= BATCH:
            yield from _encoded_batch(batch, tokenizer)
            batch, size = [], 0
    yield from _encoded_batch(batch, tokenizer)


def _encoded_batch(
    batch: list[tuple], tokenizer: tokenizers.Tokenizer
) -> Iterator[tuple[str, int, np.ndarray, bool]]:
    found = tokenizer.encode_batch([text for _, _, text, _ in batch])
    for (split, digest, _, last), ids in zip(batch, found, strict=True):
        yield split, digest, ids, last


def read_record(job: Job, number: int) -> dict[str, Any] | None:
    """Return the record of a finished part whose shards are there, otherwise None."""
    try:
        record = json.loads((job.directory / UNFINISHED / f"{number:05d}.json").read_text())
        kind = tokenizers.dtype(job.load().vocab_size)
        for entry in filter(None, record["shards"].values()):
            path = job.directory / entry["file"]
            shards.map_file(path, kind, entry["tokens"], "tokens")
            shards.map_file(path.with_suffix(".ends"), shards.ENDS, entry["documents"], "documents")
    except (OSError, ValueError):  # ConfigError is a ValueError
        return None
    return record
