"""Prepare a directory of token shards from raw text, for `config.data.source`.

    prepare(["crawl/*.jsonl.zst", "books/"], "tokens", tokenizer="tokenizer.json", workers=8)

The inputs are cut into parts, a shard each, by their sizes alone; processes take parts as they
become free. So the same inputs give the same bytes with any number of workers. A finished part is
recorded, so that a call after an interruption makes only the others. Documents keep the order of
the inputs: training shuffles windows, not documents.

A document is held out by a hash of its text (of its ids, if those are the input), so copies of it
are never on both sides; if that would hold no document out, the one of the lowest hash is. Of a
single text file the last lines are held out. Documents above `prepared_part.LONG` characters are
tokenised in pieces, cut before a space between two letters if there is one, so that memory is
bounded; they decode to the same text.
"""

import concurrent.futures
import dataclasses
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fp8jax.config import ConfigError
from fp8jax.data import documents, packing, part_workers, shards
from fp8jax.data import tokenizer as tokenizers
from fp8jax.data.prepared_part import HASHES, UNFINISHED, Job, make, read_record

PART_BYTES = (1 << 24, 1 << 30)
_MOST_PARTS = 1 << 14  # a process may map 65,530 files, two per part
_SAMPLE = 1 << 26


def prepare(
    inputs: Sequence[str | os.PathLike],
    directory: str | os.PathLike,
    *,
    tokenizer: str = "byte",
    text_field: str = "text",
    validation_fraction: float = 0.01,
    best_fit: Sequence[int] = (),
    workers: int = 1,
    allow_normalisation: bool = False,
    skip_bad_rows: bool = False,
    tell: part_workers.Tell = lambda done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Tokenise the documents of `inputs` into shards, continuing where an earlier call was
    interrupted.

    Args:
        inputs: files, directories and patterns, in order (see `documents`).
        directory: directory for the shards; empty, or that of an earlier call with the same inputs
            and options.
        tokenizer: 'byte', 'tekken' or the path of a tokenizer.json, which is copied into the
            directory.
        text_field: the field or column with the text.
        validation_fraction: part of the documents that is held out; with 0 the directory has no
            held-out split.
        best_fit: sequence lengths for which the training split is packed by best fit; also for a
            finished directory.
        workers: number of processes; 1 works in the present one. More need a `__main__` guard in a
            script.
        allow_normalisation: accept a tokenizer that first brings text into a Unicode form, such as
            NFC.
        skip_bad_rows: skip lines and rows that hold no text, and count them in the index; otherwise
            they are errors.
        tell: called from time to time with the bytes of input that are done, and the total.
        note: receives lines on what was left out of the inputs, and on the tokenizer.

    Returns:
        For each split, as in the index: `documents`, `tokens`, `text_bytes` and `shards`.

    Raises:
        ConfigError: a file cannot be read, the directory is of other inputs, or there are too few
            documents.
    """
    _check_numbers(validation_fraction, workers)
    directory = pathlib.Path(directory)
    held_out = int(validation_fraction * HASHES)
    job = Job(directory, str(tokenizer), text_field, held_out, allow_normalisation, skip_bad_rows)
    loaded = job.load()
    for line in loaded.notes:
        note(f"tokenizer: {line}")
    parts = cut_into_parts(documents.find(inputs, out=directory, tell=note), validation_fraction)
    plan = _plan(parts, loaded, text_field, validation_fraction, skip_bad_rows)
    if (directory / shards.INDEX).exists():
        return _pack(_finished(directory, plan), directory, loaded, best_fit)
    with _begin(directory, plan, parts):
        part_workers.run(job, parts, workers, tell)
        _hold_one_out(job, parts, validation_fraction)
        index = _index(job, parts, loaded, plan, validation_fraction)
        if bad := index.get("skipped_rows"):
            note(f"skipped: {bad:,} rows that hold no text, first {index['first_skipped']}")
        _copy_tokenizer(loaded, directory)
        _write(directory, index, _sources(job, parts))
        shutil.rmtree(directory / UNFINISHED)
    return _pack(index["splits"], directory, loaded, best_fit)


def _check_numbers(validation_fraction: float, workers: int) -> None:
    if not 0.0 <= validation_fraction < 1.0:
        raise ConfigError(
            f"--validation_fraction: {validation_fraction!r} is not at least 0 and below 1"
        )
    if workers < 1:
        raise ConfigError(f"--workers: {workers} is below 1")


def _pack(
    splits: dict, directory: pathlib.Path, tokenizer: tokenizers.Tokenizer, lengths: Sequence[int]
) -> dict[str, Any]:
    for length in lengths:
        packing.write_best_fit(directory, tokenizer, length)
    return splits


def train_tokenizer(
    inputs: Sequence[str | os.PathLike],
    directory: str | os.PathLike,
    vocab_size: int,
    text_field: str = "text",
) -> str:
    """Train a byte-level BPE on a sample of the inputs, spread over them, unless the directory
    already holds one.

    Returns:
        The path of the tokenizer.json, which lies in the directory.

    Raises:
        ConfigError: an input cannot be read, or the tokenizer.json has a larger vocabulary.
    """
    path = pathlib.Path(directory) / shards.TOKENIZER
    if path.exists():
        if (found := tokenizers.load(str(path)).vocab_size) > vocab_size:
            raise ConfigError(
                f"--train_tokenizer: {vocab_size}, but {path} has {found} ids; remove it, or "
                f"choose another --out"
            )
        return str(path)
    parts = cut_into_parts(documents.find(inputs, out=directory), 0.0)
    trained = tokenizers.train(_sample(parts, text_field), vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(trained, encoding="utf-8")
    os.replace(partial, path)
    return str(path)


def _sample(parts: list[list[documents.Piece]], text_field: str) -> Iterator[str]:
    """Yield the first documents of every part, _SAMPLE characters in all."""
    for part in parts:
        left = _SAMPLE // len(parts)
        for blocks in (
            blocks
            for piece in part
            for blocks in documents.read(piece, text_field, lambda more: None)
        ):
            for block in blocks:
                yield block
                left -= len(block)
            if left <= 0:
                break


def cut_into_parts(paths: list[str], fraction: float) -> list[list[documents.Piece]]:
    """Return parts of the pieces of all files: neighbours are joined until they make a part."""
    total = sum(documents.stat(path)[0] for path in paths)
    part_bytes = max(min(max(total // 1024, PART_BYTES[0]), PART_BYTES[1]), total // _MOST_PARTS)
    if len(paths) == 1 and fraction and documents.is_plain_text(paths[0]):
        return [documents.cut_text(paths[0], fraction)]
    parts, size = [[]], 0
    for path in paths:
        for piece in documents.pieces(path, part_bytes):
            if parts[-1] and size + piece.size > part_bytes:
                parts, size = [*parts, []], 0
            parts[-1].append(piece)
            size += piece.size
    return [part for part in parts if part]


def _plan(
    parts: list,
    tokenizer: tokenizers.Tokenizer,
    text_field: str,
    fraction: float,
    skip_bad_rows: bool,
) -> str:
    """Return a digest of the task: equal plans give equal bytes, unless only the content of a file
    changes.
    """
    made_of = [shards.header(tokenizer), text_field, fraction, parts] + [
        "skip_bad_rows"
    ] * skip_bad_rows
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _finished(directory: pathlib.Path, plan: str) -> dict[str, Any]:
    index = shards.read_index(directory)
    if index.get("plan") != plan:
        raise ConfigError(
            f"{directory}: already holds {shards.INDEX} of other inputs or options; choose an "
            f"empty directory"
        )
    for source in shards.read_sources(directory):
        _check_unchanged(directory, source)
    return index["splits"]


def _check_unchanged(directory: pathlib.Path, source: dict[str, Any]) -> None:
    """Raise ConfigError if a file's content is not what was prepared; its time of change alone does
    not matter.
    """
    path = source["file"]
    if source.get("changed") in (None, documents.stat(path)[1]):
        return
    if documents.digest(path) != source["digest"]:
        raise ConfigError(
            f"{path}: has changed since {directory} was prepared; choose an empty directory, or "
            f"remove that one"
        )


def _begin(directory: pathlib.Path, plan: str, parts: list) -> Any:
    """Open a new or interrupted preparation, locked against a second one until the returned file is
    closed.
    """
    unfinished = directory / UNFINISHED
    unfinished.mkdir(parents=True, exist_ok=True)
    lock = open(unfinished / "plan", "a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise ConfigError(f"{directory}: another process is preparing it") from None
    changed = {piece.path: documents.stat(piece.path) for part in parts for piece in part}
    expected = plan + " " + hashlib.sha256(json.dumps(changed).encode()).hexdigest()
    lock.seek(0)
    found = lock.read()
    if found and found != expected:
        raise ConfigError(
            f"{directory}: holds an unfinished preparation of other inputs or options, or of "
            f"files that have changed "
            "since; remove it, or choose an empty directory"
        )
    lock.truncate(0)
    lock.write(expected)
    lock.flush()
    for left in directory.glob("*.partial"):
        left.unlink()
    return lock


def _records(job: Job, parts: list) -> list[dict[str, Any]]:
    return [record for number in range(len(parts)) if (record := read_record(job, number))]


def _hold_one_out(job: Job, parts: list, fraction: float) -> None:
    """Hold out the document of the lowest hash, by making its part again, if none is held out
    though some should be.
    """
    records = _records(job, parts)
    if not fraction or any(record["shards"]["held_out"] for record in records):
        return
    if (there := sum(count for record in records for _, count in record["documents"])) < 2:
        raise ConfigError(
            "one document alone cannot be held out from itself; give more, or "
            "--validation_fraction=0"
            if there
            else "--input: holds no documents at all"
        )
    number = min(range(len(records)), key=lambda index: records[index]["lowest"])
    again = dataclasses.replace(job, threshold=records[number]["lowest"] + 1)
    make(again, number, parts[number], lambda more: None)


def _index(
    job: Job, parts: list, tokenizer: tokenizers.Tokenizer, plan: str, fraction: float
) -> dict[str, Any]:
    records = _records(job, parts)
    splits = {
        split: shards.summary(
            [record["shards"][split] for record in records if record["shards"][split]]
        )
        for split in shards.SPLITS
    }
    if not splits["train"]["documents"]:
        raise ConfigError(
            f"{job.directory}: no documents left to train on; give more, or a lower "
            f"--validation_fraction"
        )
    more: dict[str, Any] = {"normalised": True} if job.allow_normalisation else {}
    if bad := sum(record.get("skipped", 0) for record in records):
        first = next(record["first_skipped"] for record in records if record.get("skipped"))
        more |= {"skipped_rows": bad, "first_skipped": first}
    return (
        shards.header(tokenizer)
        | more
        | {
            "plan": plan,
            "text_field": job.text_field,
            "validation_fraction": fraction,
            "splits": splits,
        }
    )


def _write(directory: pathlib.Path, index: dict[str, Any], sources: list[dict[str, Any]]) -> None:
    """Write the sources, and last the index, which finishes a directory."""
    shards.write_sources(directory, sources)
    index["source_files"] = len(sources)
    shards.write_index(directory, index)


def _sources(job: Job, parts: list) -> list[dict[str, Any]]:
    """Return the input files, with their documents."""
    sources: dict[str, dict[str, Any]] = {}
    for path, count in (pair for record in _records(job, parts) for pair in record["documents"]):
        source = sources.setdefault(path, {"file": path, "documents": 0})
        source["documents"] += count
    with concurrent.futures.ThreadPoolExecutor(4) as executor:  # hashing leaves Python's lock
        for source, state in zip(sources.values(), executor.map(_state_of, sources), strict=True):
            source |= state
    return list(sources.values())


def _state_of(path: str) -> dict[str, Any]:
    """Return what shows later whether an input has changed."""
    size, changed = documents.stat(path)
    return {"bytes": size, "changed": changed, "digest": documents.digest(path)}


def _copy_tokenizer(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path) -> None:
    if tokenizer.file is not None and not (directory / shards.TOKENIZER).exists():
        partial = directory / f"{shards.TOKENIZER}.partial"
        shutil.copyfile(tokenizer.file, partial)
        os.replace(partial, directory / shards.TOKENIZER)
