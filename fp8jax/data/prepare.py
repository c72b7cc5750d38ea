"""Raw text in, a directory of token shards out, for `config.data.source`.

    prepare(["crawl/*.jsonl.zst", "books/"], "tokens", tokenizer="tokenizer.json", workers=8)

The inputs are cut into parts, a shard each, by their sizes alone; processes take parts as they become free. So the same
inputs give the same bytes whatever the number of workers. A part that is done is recorded: run again after an interruption,
only the others are made. Documents keep the order of the inputs: training shuffles windows, not documents.

A document is held out by a hash of its text (of its ids, where those are the input), so copies of it are never on both sides;
where by that nothing would be, the document of the lowest hash is. A single text file is held out from its last lines. Documents
above LONG characters are tokenised in pieces, cut before a space between two letters where there is one, so that memory is
bounded; what they decode to stays the same.
"""

import concurrent.futures
import dataclasses
import fcntl
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from fp8jax.config import ConfigError
from fp8jax.data import documents, packing, shards, token_records
from fp8jax.data import tokenizer as tokenizers

LONG = 1 << 18
BATCH = 1 << 18
_PART_BYTES = (1 << 24, 1 << 30)
_MOST_PARTS = 1 << 14  # a process may map 65,530 files, two a part
_SAMPLE = 1 << 26
_UNFINISHED = "unfinished"
_HASHES = 1 << 64

Tell = Callable[[int, int], Any]


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is the same for all parts."""

    directory: pathlib.Path
    tokenizer: str
    text_field: str
    threshold: int  # documents whose hash is below are held out
    allow_normalisation: bool = False
    skip_bad_rows: bool = False

    def load(self) -> tokenizers.Tokenizer:
        """The tokenizer, read once a process."""
        return tokenizers.load(self.tokenizer, allow_normalisation=self.allow_normalisation)


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
    tell: Tell = lambda done, total: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, dict[str, Any]]:
    """Tokenises the documents of `inputs` into shards; continues where an earlier call was interrupted.

    Args:
        inputs: files, directories and patterns, in order (see `documents`).
        directory: where the shards go; empty, or that of an earlier call with the same inputs and options.
        tokenizer: 'byte', 'tekken' or the path of a tokenizer.json, which is copied into the directory.
        text_field: the field or column with the text.
        validation_fraction: of the documents that are held out; 0: none, and the directory has no held-out split.
        best_fit: sequence lengths for which the training split is packed by best fit; also for a directory that is finished.
        workers: processes; 1 works in the present one. More need a `__main__` guard in a script.
        allow_normalisation: take a tokenizer that brings text into a Unicode form, such as NFC, first.
        skip_bad_rows: pass over lines and rows that hold no text, and count them in the index; else they are errors.
        tell: called now and then with the bytes of input that are done, and those that there are.
        note: receives lines on what was left out of the inputs, and on the tokenizer.

    Returns:
        For either split, as in the index: `documents`, `tokens`, `text_bytes` and `shards`.

    Raises:
        ConfigError: a file that cannot be read, other inputs than those of the directory, or too few documents.
    """
    if not 0.0 <= validation_fraction < 1.0:
        raise ConfigError(
            f"--validation_fraction: {validation_fraction!r} is not at least 0 and below 1"
        )
    if workers < 1:
        raise ConfigError(f"--workers: {workers} is below 1")
    directory = pathlib.Path(directory)
    job = _Job(
        directory,
        str(tokenizer),
        text_field,
        int(validation_fraction * _HASHES),
        allow_normalisation,
        skip_bad_rows,
    )
    loaded = job.load()
    for line in loaded.notes:
        note(f"tokenizer: {line}")
    parts = _parts(documents.find(inputs, out=directory, tell=note), validation_fraction)
    plan = _plan(parts, loaded, text_field, validation_fraction, skip_bad_rows)
    if (directory / shards.INDEX).exists():
        return _pack(_finished(directory, plan), directory, loaded, best_fit)
    with _begin(directory, plan, parts):
        _run(job, parts, workers, tell)
        _hold_one_out(job, parts, validation_fraction)
        index = _index(job, parts, loaded, plan, validation_fraction)
        if bad := index.get("skipped_rows"):
            note(f"skipped: {bad:,} rows that hold no text, first {index['first_skipped']}")
        _copy_tokenizer(loaded, directory)
        _write(directory, index, _sources(job, parts))
        shutil.rmtree(directory / _UNFINISHED)
    return _pack(index["splits"], directory, loaded, best_fit)


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
    """Trains a byte-level BPE on a sample of the inputs, spread over them, unless the directory already holds one.

    Returns:
        The path of the tokenizer.json, which lies in the directory.

    Raises:
        ConfigError: an input that cannot be read, or a tokenizer.json of a larger vocabulary.
    """
    path = pathlib.Path(directory) / shards.TOKENIZER
    if path.exists():
        if (found := tokenizers.load(str(path)).vocab_size) > vocab_size:
            raise ConfigError(
                f"--train_tokenizer: {vocab_size}, but {path} has {found} ids; remove it, or choose another --out"
            )
        return str(path)
    parts = _parts(documents.find(inputs, out=directory), 0.0)
    trained = tokenizers.train(_sample(parts, text_field), vocab_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(trained, encoding="utf-8")
    os.replace(partial, path)
    return str(path)


def _sample(parts: list[list[documents.Piece]], text_field: str) -> Iterator[str]:
    """The first documents of every part, _SAMPLE characters in all."""
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


def _parts(paths: list[str], fraction: float) -> list[list[documents.Piece]]:
    """The pieces of all files, neighbours together until they make a part."""
    total = sum(documents.stat(path)[0] for path in paths)
    part_bytes = max(min(max(total // 1024, _PART_BYTES[0]), _PART_BYTES[1]), total // _MOST_PARTS)
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
    """Identifies what is to be made: equal plans give equal bytes, as long as no file changes its content alone."""
    made_of = [shards.header(tokenizer), text_field, fraction, parts] + [
        "skip_bad_rows"
    ] * skip_bad_rows
    return hashlib.sha256(json.dumps(made_of).encode()).hexdigest()


def _finished(directory: pathlib.Path, plan: str) -> dict[str, Any]:
    index = shards.read_index(directory)
    if index.get("plan") != plan:
        raise ConfigError(
            f"{directory}: already holds {shards.INDEX} of other inputs or options; choose an empty directory"
        )
    for source in shards.read_sources(directory):
        _check_unchanged(directory, source)
    return index["splits"]


def _check_unchanged(directory: pathlib.Path, source: dict[str, Any]) -> None:
    """Raises ConfigError where a file's content is not what was prepared; its time of change alone does not matter."""
    path = source["file"]
    if source.get("changed") in (None, documents.stat(path)[1]):
        return
    if documents.digest(path) != source["digest"]:
        raise ConfigError(
            f"{path}: has changed since {directory} was prepared; choose an empty directory, or remove that one"
        )


def _begin(directory: pathlib.Path, plan: str, parts: list) -> Any:
    """Opens a new or interrupted preparation, locked against a second one until the returned file is closed."""
    unfinished = directory / _UNFINISHED
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
            f"{directory}: holds an unfinished preparation of other inputs or options, or of files that have changed "
            "since; remove it, or choose an empty directory"
        )
    lock.truncate(0)
    lock.write(expected)
    lock.flush()
    for left in directory.glob("*.partial"):
        left.unlink()
    return lock


def _run(job: _Job, parts: list, workers: int, tell: Tell) -> None:
    total = sum(piece.size for part in parts for piece in part)
    missing = [number for number in range(len(parts)) if _record(job, number) is None]
    done = total - sum(piece.size for number in missing for piece in parts[number])
    tell(done, total)
    if workers == 1 or len(missing) < 2:
        for number in missing:
            progress = _Counter(lambda count, before=done: tell(before + count, total))
            _make(job, number, parts[number], progress)
            done += sum(piece.size for piece in parts[number])
    elif missing:
        _run_processes(
            job, parts, missing, min(workers, len(missing)), lambda count: tell(done + count, total)
        )
    tell(total, total)


class _Counter:
    """Adds up progress within one process."""

    def __init__(self, tell: Callable[[int], Any]):
        self._tell, self._count = tell, 0

    def __call__(self, more: int) -> None:
        self._count += more
        self._tell(self._count)


class _Within:
    """Progress on a piece, which reading counts roughly: a line may end in the next piece."""

    def __init__(self, size: int, progress: documents.Progress):
        self._left, self._progress = size, progress

    def __call__(self, more: int) -> None:
        more = min(more, self._left)
        self._left -= more
        self._progress(more)

    def finish(self) -> None:
        self(self._left)


def _run_processes(
    job: _Job, parts: list, missing: list[int], workers: int, tell: Callable[[int], Any]
) -> None:
    context = multiprocessing.get_context(
        "spawn"
    )  # a forked copy of a process with threads may hang
    count, stop = context.Value("q", 0), context.Event()
    with concurrent.futures.ProcessPoolExecutor(
        workers, context, _start_worker, (count, stop)
    ) as executor:
        waiting = {executor.submit(_work, job, number, parts[number]) for number in missing}
        try:
            while waiting:
                done, waiting = concurrent.futures.wait(
                    waiting, 0.5, concurrent.futures.FIRST_COMPLETED
                )
                for future in done:
                    future.result()
                tell(count.value)
        except concurrent.futures.process.BrokenProcessPool:
            raise ConfigError(
                "a worker was killed, perhaps for want of memory; run again with fewer --workers"
            ) from None
        finally:
            stop.set()
            executor.shutdown(cancel_futures=True)


_worker: dict[str, Any] = {}


def _start_worker(count: Any, stop: Any) -> None:
    import signal

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker.update(count=count, stop=stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent:
        parent.join()
        os._exit(1)


def _work(job: _Job, number: int, part: list[documents.Piece]) -> None:
    def progress(more: int) -> None:
        with _worker["count"].get_lock():
            _worker["count"].value += more
        if _worker["stop"].is_set():
            raise ConfigError("stopped")

    _make(job, number, part, progress)


def _make(
    job: _Job, number: int, part: list[documents.Piece], progress: documents.Progress
) -> None:
    """Makes the shards of a part, and at last its record."""
    tokenizer = job.load()
    writers = {
        split: shards.ShardWriter(job.directory / shards.shard_name(split, number), tokenizer)
        for split in shards.SPLITS
    }
    lowest, counts = _HASHES, []
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
    entries = {split: writer.close() for split, writer in writers.items()}
    for split in shards.SPLITS:
        if not entries[split]["documents"]:
            for suffix in (".bin", ".ends"):
                (job.directory / shards.shard_name(split, number)).with_suffix(suffix).unlink()
            entries[split] = None
    record = job.directory / _UNFINISHED / f"{number:05d}.json"
    partial = record.with_suffix(f".{os.getpid()}")
    bad = {"skipped": skipped.count, "first_skipped": skipped.first} if skipped else {}
    partial.write_text(
        json.dumps({"shards": entries, "lowest": lowest, "documents": counts, **bad})
    )
    os.replace(partial, record)


class _Skipped:
    """Counts the rows of a part that hold no text, and keeps what was wrong with the first."""

    def __init__(self):
        self.count = 0
        self.first = ""

    def __call__(self, fault: str) -> None:
        self.count += 1
        self.first = self.first or fault


def _recorded(
    piece: documents.Piece, job: _Job, progress: documents.Progress, tokenizer: tokenizers.Tokenizer
) -> Iterator[tuple]:
    """What `_encoded` yields, of documents that are token ids already."""
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
    piece: documents.Piece, job: _Job, progress: documents.Progress, skipped: _Skipped | None
) -> Iterator[tuple[str, int, str, bool]]:
    """Split, hash of the document, text and whether the document ends with it."""
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
    """Joins the strings of a document and cuts it into pieces of at most LONG characters."""
    text = ""
    for block in blocks:
        text += block
        while len(text) > LONG:
            end = _boundary(text)
            yield text[:end], False
            text = text[end:]
    yield text, True


def _boundary(text: str) -> int:
    """Before the last space between two letters up to LONG: byte-level pre-tokenizers cut there as well."""
    end = text.rfind(" ", LONG // 2, LONG)
    while end > 0:
        if text[end - 1].isalpha() and text[end + 1].isalpha():
            return end
        end = text.rfind(" ", LONG // 2, end)
    return text.rfind("\n", LONG // 2, LONG) + 1 or LONG


def _encoded(
    piece: documents.Piece,
    job: _Job,
    progress: documents.Progress,
    tokenizer: tokenizers.Tokenizer,
    skipped: _Skipped | None,
) -> Iterator[tuple[str, int, np.ndarray, bool]]:
    """The chunks with token ids in place of text, encoded in batches of about BATCH characters."""
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


def _record(job: _Job, number: int) -> dict[str, Any] | None:
    """What is known of a part that is done and whose shards are there."""
    try:
        record = json.loads((job.directory / _UNFINISHED / f"{number:05d}.json").read_text())
        kind = tokenizers.dtype(job.load().vocab_size)
        for entry in filter(None, record["shards"].values()):
            path = job.directory / entry["file"]
            shards.map_file(path, kind, entry["tokens"], "tokens")
            shards.map_file(path.with_suffix(".ends"), shards.ENDS, entry["documents"], "documents")
    except (OSError, ValueError):  # ConfigError is one
        return None
    return record


def _records(job: _Job, parts: list) -> list[dict[str, Any]]:
    return [record for number in range(len(parts)) if (record := _record(job, number))]


def _hold_one_out(job: _Job, parts: list, fraction: float) -> None:
    """Where no document is held out though some should be, makes the part of the lowest hash again, that document held out."""
    records = _records(job, parts)
    if not fraction or any(record["shards"]["held_out"] for record in records):
        return
    if (there := sum(count for record in records for _, count in record["documents"])) < 2:
        raise ConfigError(
            "one document alone cannot be held out from itself; give more, or --validation_fraction=0"
            if there
            else "--input: holds no documents at all"
        )
    number = min(range(len(records)), key=lambda index: records[index]["lowest"])
    again = dataclasses.replace(job, threshold=records[number]["lowest"] + 1)
    _make(again, number, parts[number], lambda more: None)


def _index(
    job: _Job, parts: list, tokenizer: tokenizers.Tokenizer, plan: str, fraction: float
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
            f"{job.directory}: no documents left to train on; give more, or a lower --validation_fraction"
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
    """Write what was read, and last the index, with which a directory is finished."""
    shards.write_sources(directory, sources)
    index["source_files"] = len(sources)
    shards.write_index(directory, index)


def _sources(job: _Job, parts: list) -> list[dict[str, Any]]:
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
    """What tells later whether an input has changed."""
    size, changed = documents.stat(path)
    return {"bytes": size, "changed": changed, "digest": documents.digest(path)}


def _copy_tokenizer(tokenizer: tokenizers.Tokenizer, directory: pathlib.Path) -> None:
    if tokenizer.file is not None and not (directory / shards.TOKENIZER).exists():
        partial = directory / f"{shards.TOKENIZER}.partial"
        shutil.copyfile(tokenizer.file, partial)
        os.replace(partial, directory / shards.TOKENIZER)
