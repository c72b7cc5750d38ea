"""Batches: the training order, which is a function of (seed, step), and the held-out split, in order and once.

    batches = train_batches(config)             # batches[step] is the batch of that step
    iterator = train_iterator(config, start_step=1000)
    batch = next(iterator)                      # read ahead in config.data.read_threads threads
    iterator.get_state()                        # small JSON; iterator.set_state(...) continues there
    for batch, text_bytes in held_out_batches(config, batch_size=16): ...

A split's stream of tokens (documents, each ended by the end-of-document id) is cut into windows of
T = sequence_length targets; a window's inputs are the tokens one place before its targets, and the first token of the
stream follows an end-of-document id. So every token of the stream, every document's end included, is a target in
exactly one window, and a document is always predicted from an end-of-document id onwards. Windows are shuffled anew
every epoch (Grain's index shuffle: nothing is kept in memory); batches run on across epochs. The stream itself keeps
the order of its documents, and a window that starts inside a document has no context from before it.

A batch is a dictionary of numpy arrays [batch, T]:
    inputs, targets: int32. `mask`: float32, 1 where the target counts, 0 on padding (the end of the stream).
    segment_ids, positions: int32. With `config.data.document_masks` both start anew at every document of a window;
    else segment ids are 0 and positions 0 to T - 1.

There is no mixing of sources and no worker process here.
"""

from collections.abc import Iterator

import grain
import numpy as np

from fp8jax.config import Config, ConfigError, DataConfig
from fp8jax.data import sources

Batch = dict[str, np.ndarray]


class _Windows:
    """The windows of a stream, by index: a random-access source for Grain."""

    def __init__(self, stream: sources.TokenStream, data: DataConfig):
        self.stream, self.data = stream, data

    def __len__(self) -> int:
        return -(-len(self.stream) // self.data.sequence_length)

    def __getitem__(self, index: int) -> Batch:
        """Window `index`, arrays [T]; past the end of the stream all padding."""
        length, end = self.data.sequence_length, self.stream.tokenizer.end_of_document
        before = index * length - 1  # where the first input lies in the stream
        found = self.stream.read(max(before, 0), before + 1 + length)
        tokens = np.full(length + 1, end, np.int32)
        offset = max(before, 0) - before
        tokens[offset : offset + len(found)] = found
        inputs, positions = tokens[:-1], np.arange(length, dtype=np.int32)
        real = len(self.stream) - index * length
        segment_ids = np.zeros(length, np.int32)
        if self.data.document_masks:
            segment_ids, positions = _segments(inputs, end)
        mask = (np.arange(length) < real).astype(np.float32)
        batch = {"inputs": inputs, "targets": tokens[1:], "mask": mask}
        return batch | {"segment_ids": segment_ids, "positions": positions}


def _segments(inputs: np.ndarray, end_of_document: int) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, int32 [T]: an end-of-document input opens the next document."""
    opens = inputs == end_of_document
    places = np.arange(len(inputs), dtype=np.int32)
    segment_ids = np.cumsum(opens, dtype=np.int32)
    return segment_ids - segment_ids[0], places - np.maximum.accumulate(np.where(opens, places, 0))


def train_batches(config: Config, process_index: int = 0, process_count: int = 1) -> grain.MapDataset:
    """All training batches, endless; `[step]` is the batch of a step, whatever was read before.

    Args:
        config: reads `data`, `training.batch_size` and `training.seed`.
        process_index: which slice of every batch to load.
        process_count: slices, in order of process_index, that make up the batch of training.batch_size.

    Returns:
        A dataset of batches of training.batch_size / process_count sequences.

    Raises:
        ConfigError: data that cannot be read, or a batch size that the processes do not divide.
    """
    rows = _rows(config.training.batch_size, process_index, process_count)
    windows = _Windows(sources.load(config.data, "train"), config.data)
    # Grain shuffles epoch e with seed + e: neighbouring seeds of ours must not be neighbours there.
    seed = int(np.random.SeedSequence(config.training.seed).generate_state(1)[0])
    batches = grain.MapDataset.source(windows).shuffle(seed).repeat().batch(rows)
    # Local batches follow one another in the global one, so a stride over them keeps its rows in order.
    return batches.slice(slice(process_index, None, process_count))


def train_iterator(
    config: Config, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Iterator over `train_batches` from `start_step` on, read ahead in `config.data.read_threads` threads.

    `get_state()` is a small JSON dictionary that a checkpoint can hold, though start_step says as much.
    """
    threads = config.data.read_threads
    # Two batches a thread: Grain's own default of 500 elements would be 500 batches.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(train_batches(config, process_index, process_count).to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return iterator


def held_out_batches(
    config: Config, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[tuple[Batch, int]]:
    """The held-out split in order, every token a target exactly once; all batches have the same shapes.

    Yields:
        A batch [batch_size / process_count, T], the last one padded with sequences of mask 0; and how many bytes of
        text the targets of the whole batch, over all processes, stand for. Over a whole pass, bits per byte is
        nats summed under the mask / ln 2 / bytes: an end of document costs bits but is no byte.

    Raises:
        ConfigError: as `train_batches`.
    """
    rows = _rows(batch_size, process_index, process_count)
    windows = _Windows(sources.load(config.data, "held_out"), config.data)
    return _in_order(windows, batch_size, range(process_index * rows, (process_index + 1) * rows))


def _in_order(windows: _Windows, batch_size: int, rows: range) -> Iterator[tuple[Batch, int]]:
    stream, span = windows.stream, batch_size * windows.data.sequence_length
    for first in range(0, len(windows), batch_size):
        batch = _stack([windows[first + row] for row in rows])
        targets = stream.read(first // batch_size * span, (first // batch_size + 1) * span)
        yield batch, int(stream.tokenizer.token_bytes[targets].sum())


def _stack(windows: list[Batch]) -> Batch:
    return {name: np.stack([window[name] for window in windows]) for name in windows[0]}


def _rows(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size % process_count:
        raise ConfigError(
            f"config.training.batch_size: {batch_size} sequences are not divisible by {process_count} processes"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index {process_index} is not one of {process_count} processes")
    return batch_size // process_count
