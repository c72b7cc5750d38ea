"""Make batches: training batches as a function of (seed, step), and held-out text, in order and
once.

    batches = train_batches(config)             # batches[step] is the batch of that step
    iterator = train_iterator(config, start_step=1000)
    batch = next(iterator)                      # read ahead in config.data.read_threads threads
    iterator.get_state()                        # small JSON; iterator.set_state(...) continues there
    train_places(config, step)                  # where each sequence of that batch comes from
    for name, stream in held_out_streams(config).items():
        held_out_sequences(config, stream)      # how many sequences it has
        for batch, text_bytes in held_out_batches(config, batch_size=16, stream=stream): ...

A sequence is a window of a source (`packing`), and sources take turns by their weights (`mixing`).
The windows of a source are shuffled anew every epoch (Grain's index shuffle keeps no list in
memory); batches run on across epochs. A batch does not depend on what was read before, so any step
can be read directly, and processes that share a batch do not communicate.

A batch is a dictionary of numpy arrays [batch, T], as described in `packing`. With
`config.data.on_fault=skip` a sequence that cannot be read is padding, and the batch has `faults`, a
list with a line for each. No worker processes are started.
"""

import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from fp8jax.config import Config, ConfigError, DataConfig, DataError
from fp8jax.data import mixing, packing, sources
from fp8jax.data.packing import Batch

_ENDLESS = sys.maxsize


class Place(NamedTuple):
    """The origin of a sequence: name of the source, which pass over it (from 0), and which window
    of it.
    """

    source: str
    epoch: int
    window: int


class _Order:
    """The places of all sequences of a run, by sequence number."""

    def __init__(self, config: Config):
        self.found = sources.load_each(config.data, "train")
        self.windows = [_windows(config, source) for source in self.found]
        try:
            self.schedule = (
                mixing.Schedule([source.weight for source in self.found])
                if len(self.found) > 1
                else None
            )
        except ValueError as error:
            raise ConfigError(
                f"config.data.source: {error}; leave that source out, or raise its weight"
            ) from None
        # Epoch e is shuffled with seed + e, so neighbouring seeds of runs must not be neighbours
        # here.
        self._seeds = (
            np.random.SeedSequence(config.training.seed).generate_state(len(self.found)).tolist()
        )
        self._lengths = [len(windows) for windows in self.windows]

    def __getitem__(self, sequence: int) -> tuple[int, int, int]:
        """Return source, epoch and window of a sequence."""
        source, number = self.schedule.place(sequence) if self.schedule else (0, sequence)
        epoch, window = divmod(number, self._lengths[source])
        # The order of grain.MapDataset.range(length).shuffle(seed), without the cost of a dataset.
        seed = (self._seeds[source] + epoch) % 2**32
        return (
            source,
            epoch,
            grain.experimental.index_shuffle(
                window, max_index=self._lengths[source] - 1, seed=seed, rounds=4
            ),
        )


class _Batches:
    """One process's slice of every batch, by step, as a random-access source for Grain."""

    def __init__(self, order: _Order, config: Config, rows: Sequence[int]):
        self._order, self._data, self._batch_size, self._rows = (
            order,
            config.data,
            config.training.batch_size,
            rows,
        )

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: int) -> dict[str, Any]:
        places = [self._order[index * self._batch_size + row] for row in self._rows]
        return _read(
            [(self._order.windows[source], window) for source, _, window in places], self._data
        )


def train_batches(config: Config, rows: Sequence[int] | None = None) -> grain.MapDataset:
    """Return all training batches, endless; `[step]` is the batch of a step, whatever was read
    before.

    Args:
        config: reads `data`, `training.batch_size` and `training.seed`.
        rows: which sequences of every batch to load, in this order, a process's share; None loads
            all.

    Returns:
        A dataset of batches of len(rows) sequences.

    Raises:
        ConfigError: the data cannot be read.
        ValueError: the batch does not have these rows.
    """
    rows = _rows(config.training.batch_size, rows)
    return grain.MapDataset.source(_Batches(_Order(config), config, rows))


def train_iterator(
    config: Config, start_step: int = 0, rows: Sequence[int] | None = None
) -> grain.DatasetIterator:
    """Iterate over `train_batches` from `start_step` on, read ahead in `config.data.read_threads`
    threads.

    `get_state()` is a small JSON dictionary that a checkpoint can hold, though start_step is
    enough.

    Raises:
        ConfigError: as `train_batches`; also if there is no text to evaluate on, which would show
            much later.
    """
    held_out_streams(config)
    threads = config.data.read_threads
    # Two batches per thread: Grain's default of 500 elements would be 500 batches.
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    iterator = iter(train_batches(config, rows).to_iter_dataset(options))
    iterator.set_state({"next_index": start_step})
    return iterator


def train_places(config: Config, step: int) -> list[Place]:
    """Return where the sequences of a step's batch come from, in the order of its rows."""
    order, first = _Order(config), step * config.training.batch_size
    found = [order[sequence] for sequence in range(first, first + config.training.batch_size)]
    return [Place(order.found[source].name, epoch, window) for source, epoch, window in found]


def describe(config: Config) -> list[str]:
    """Return lines for the start of a run: every source, its share, and how often the run goes over
    it.

    Raises:
        ConfigError: as `train_batches`.
    """
    order, total = _Order(config), config.training.steps * config.training.batch_size
    lines = []
    for number, (source, windows) in enumerate(zip(order.found, order.windows, strict=True)):
        drawn = order.schedule.count(number, total) if order.schedule else total
        share = f", {source.weight:.1%} of the sequences" if order.schedule else ""
        padding = 1 - len(source.stream) / (len(windows) * config.data.sequence_length)
        packed = f", {padding:.2%} padding" if config.data.packing != "concat" else ""
        name = (
            "the embedded corpus, five novels by Jane Austen"
            if source.name == "embedded"
            else source.name
        )
        lines.append(
            f"{name}: {len(source.stream):,} tokens{share}{packed}, {drawn / len(windows):.2f} epochs"
        )
    return lines


def held_out_streams(config: Config) -> dict[str, sources.TokenStream]:
    """Return the streams for held-out losses, by name; '' is the name of what the sources
    themselves hold out.

    The dictionary is empty with `data.held_out=none`, and if the sources hold nothing out and no
    evaluation is asked for.

    Raises:
        ConfigError: the text cannot be read, or there is none though evaluations are asked for.
    """
    if (
        config.data.held_out == "auto"
        and not config.evaluation.every
        and not sources.holds_out(config.data)
    ):
        return {}
    return dict(sources.load_held_out(config.data))


def held_out_sequences(config: Config, stream: sources.TokenStream | None = None) -> int:
    """Return the number of sequences of a whole held-out text; with None, of what the sources hold
    out.

    Raises:
        ConfigError: as `train_batches`.
    """
    stream = stream or sources.load(config.data, "held_out")
    return len(packing.ConcatWindows(stream, config.data))


def held_out_batches(
    config: Config,
    batch_size: int,
    rows: Sequence[int] | None = None,
    *,
    sequences: int = 0,
    stream: sources.TokenStream | None = None,
) -> Iterator[tuple[Batch, int]]:
    """Yield a held-out text in order, no token a target more than once; all batches have the same
    shapes.

    Documents continue from window to window with any config.data.packing. The splits of several
    sources follow one another.

    Args:
        config: reads `data`.
        batch_size: sequences of a batch, over all processes.
        rows: which of every batch to load; None loads all.
        sequences: how many to read, spread evenly over the text; 0, or more than there are, reads
            every one.
        stream: one of `held_out_streams`; None reads what the sources hold out.

    Yields:
        A batch [len(rows), T], the last one padded with sequences of mask 0; and how many bytes of
        text the targets of the whole batch, over all processes, stand for. Over a whole pass, bits
        per byte is nats summed under the mask / ln 2 / bytes: an end of document costs bits but is
        no byte.

    Raises:
        ConfigError: as `train_batches`.
    """
    rows = _rows(batch_size, rows)
    windows = packing.ConcatWindows(stream or sources.load(config.data, "held_out"), config.data)
    count = min(sequences or len(windows), len(windows))
    return _in_order(windows, count, batch_size, rows)


def _in_order(
    windows: packing.ConcatWindows, count: int, batch_size: int, rows: Sequence[int]
) -> Iterator[tuple[Batch, int]]:
    """Yield batches of `count` evenly spaced windows; a window beyond the last one is padding."""
    token_bytes, total = windows.stream.tokenizer.token_bytes, len(windows)
    for first in range(0, count, batch_size):
        numbers = range(first, first + batch_size)
        whole = _read([(windows, number * total // count) for number in numbers], windows.data)
        batch = {
            name: values if name == "faults" else values[list(rows)]
            for name, values in whole.items()
        }
        yield batch, int((token_bytes[whole["targets"]] * (whole["mask"] > 0)).sum())


def _windows(
    config: Config, source: sources.Source
) -> packing.ConcatWindows | packing.BestFitWindows:
    data = config.data
    if data.packing == "concat":
        return packing.ConcatWindows(source.stream, data)
    if not sources.is_directory(source.name):
        raise ConfigError(
            f"config.data.packing: {data.packing!r} needs directories of prepared token shards, "
            f"not {source.name!r}"
        )
    packed = packing.open_best_fit(source.name, data.sequence_length, len(source.stream))
    return packing.BestFitWindows(source.stream, data, packed)


def _read(windows: list[tuple[Any, int]], data: DataConfig) -> dict[str, Any]:
    """Read a batch of windows, each given by its source's windows and its number there."""
    rows, faults = packing.Rows(len(windows), data), []
    for row, (source, number) in enumerate(windows):
        try:
            source.fill(number, rows, row)
        except DataError as fault:
            if data.on_fault == "fail":
                raise
            rows.pad(row, source.stream.tokenizer.end_of_document)
            faults.append(str(fault))
    return rows.batch() | ({"faults": faults} if faults else {})


def _rows(batch_size: int, rows: Sequence[int] | None) -> Sequence[int]:
    """Return the rows of a batch to load, by default all of them."""
    rows = range(batch_size) if rows is None else rows
    if len(rows) == 0 or not 0 <= min(rows) <= max(rows) < batch_size:
        raise ValueError(f"rows {list(rows)[:8]} are not rows of a batch of {batch_size}")
    return rows
