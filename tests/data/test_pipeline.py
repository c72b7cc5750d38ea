"""Batches: every token a target once, order from (seed, step) alone, and the held-out split scored once."""

import json
import os
import subprocess
import sys
import time

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax import config as configs
from fp8jax.data import packing, pipeline, shards, sources, tokenizer

BYTE = tokenizer.load("byte")
KEYS = {"inputs", "targets", "mask", "segment_ids", "positions"}


def make_config(length=64, batch=4, seed=0, **data):
    return configs.from_dict(
        {
            "data": {"sequence_length": length, **data},
            "training": {"batch_size": batch, "seed": seed},
        }
    )


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A directory of 103 training tokens, all windows different, and 41 held-out tokens."""
    directory = tmp_path_factory.mktemp("small")
    documents = [
        np.arange(start, start + size, dtype=np.uint16)
        for start, size in [(0, 40), (40, 1), (41, 59)]
    ]
    held_out = [np.arange(100, 130, dtype=np.uint16), np.arange(130, 139, dtype=np.uint16)]
    shards.write_shards(
        directory, BYTE, {"train": documents, "held_out": held_out}, shard_tokens=41
    )
    return str(directory)


def equal(left, right):
    return left.keys() == right.keys() == KEYS and all(
        np.array_equal(left[key], right[key]) for key in KEYS
    )


def concatenate(batches):
    return {key: np.concatenate([batch[key] for batch in batches]) for key in KEYS}


@settings(deadline=None)
@given(
    documents=st.lists(st.binary(max_size=30), min_size=1, max_size=8),
    length=st.integers(1, 40),
    document_masks=st.booleans(),
)
def test_packing_makes_every_token_a_target_once(documents, length, document_masks):
    stream_tokens = [token for document in documents for token in [*document, 256]]
    stream = sources.TokenStream((np.array(stream_tokens, np.uint16),), ("",), BYTE)
    data = configs.DataConfig(sequence_length=length, document_masks=document_masks)
    windows = packing.ConcatWindows(stream, data)
    packed = pipeline._read([(windows, index) for index in range(len(windows))], windows.data)
    real = packed["mask"] == 1
    assert set(packed["mask"].flat) <= {0.0, 1.0}
    assert packed["targets"][real].tolist() == stream_tokens
    assert packed["inputs"][real].tolist() == [256, *stream_tokens[:-1]]
    assert len(windows) == int(np.ceil(len(stream_tokens) / length))
    assert all(packed[key].shape == (len(windows), length) for key in KEYS)
    assert {key: packed[key].dtype.name for key in KEYS} == dict.fromkeys(KEYS, "int32") | {
        "mask": "float32"
    }


def test_document_masks_restart_at_every_document(small):
    config = make_config(length=26, source=small, document_masks=True)
    windows = packing.ConcatWindows(sources.load(config.data, "train"), config.data)
    # The stream: 0..39 END 40 END 41..99 END. Window 1 starts inside the first document, at input 25.
    window = windows[1]
    assert window["inputs"].tolist() == [*range(25, 40), 256, 40, 256, *range(41, 49)]
    assert window["segment_ids"].tolist() == [0] * 15 + [1] * 2 + [2] * 9
    assert window["positions"].tolist() == [*range(15), 0, 1, *range(9)]
    assert windows[0]["segment_ids"].tolist() == [0] * 26 and windows[0]["positions"].tolist() == [
        *range(26)
    ]


def test_without_document_masks_a_window_is_one_segment(small):
    config = make_config(length=26, source=small)
    window = packing.ConcatWindows(sources.load(config.data, "train"), config.data)[1]
    assert window["segment_ids"].tolist() == [0] * 26 and window["positions"].tolist() == [
        *range(26)
    ]


def epochs(config, count, windows):
    """Rows of targets of the first epochs, each sorted by what they hold, and in order."""
    batches = pipeline.train_batches(config)
    steps = -(-count * windows // config.training.batch_size)
    rows = [tuple(row) for step in range(steps) for row in batches[step]["targets"].tolist()]
    return [rows[start : start + windows] for start in range(0, count * windows, windows)]


def test_every_epoch_has_every_window_once_in_another_order(small):
    config = make_config(length=8, batch=4, source=small)  # 13 windows: batches run across epochs
    stream = sources.load(config.data, "train").read(0, 1000).tolist()
    padded = stream + [256] * (13 * 8 - len(stream))
    windows = sorted(tuple(padded[start : start + 8]) for start in range(0, len(padded), 8))
    orders = epochs(config, 3, 13)
    assert all(sorted(order) == windows for order in orders)
    assert len({tuple(order) for order in orders}) == 3 and list(orders[0]) != windows


@pytest.mark.parametrize("seed", [0, 3, 2**32 - 1])
def test_order_is_that_of_grain(small, seed):
    order = pipeline._Order(make_config(length=8, seed=seed, source=small))
    length = len(order.windows[0])
    expected = (
        grain.MapDataset.range(length)
        .shuffle(int(np.random.SeedSequence(seed).generate_state(1)[0]))
        .repeat()
    )
    for sequence in [*range(2 * length), 10**9, 10**12 + 1]:
        assert order[sequence] == (0, sequence // length, int(expected[sequence]))


def test_order_depends_on_the_seed_and_seeds_share_no_epoch(small):
    first = epochs(make_config(length=8, seed=0, source=small), 3, 13)
    second = epochs(make_config(length=8, seed=1, source=small), 3, 13)
    assert first == epochs(make_config(length=8, seed=0, source=small), 3, 13)
    # Grain's shuffle takes seed + epoch: used bare, epoch 1 of seed 0 would be epoch 0 of seed 1.
    assert not {tuple(order) for order in first} & {tuple(order) for order in second}


@pytest.mark.parametrize("threads", [0, 1, 2])
def test_any_step_is_what_reading_up_to_it_gives(threads):
    config = make_config(read_threads=threads)
    iterator = pipeline.train_iterator(config)
    sequential = [next(iterator) for _ in range(12)]
    assert not equal(sequential[0], sequential[1])
    batches = pipeline.train_batches(config)
    assert all(equal(batches[step], sequential[step]) for step in (11, 3, 0))
    resumed = pipeline.train_iterator(config, start_step=7)
    assert all(equal(next(resumed), sequential[step]) for step in range(7, 12))


def test_state_is_small_json_and_continues_there():
    config = make_config(read_threads=2)
    iterator = pipeline.train_iterator(config)
    for _ in range(5):
        next(iterator)
    state = json.dumps(iterator.get_state())
    expected = [next(iterator) for _ in range(3)]
    other = pipeline.train_iterator(config)
    next(other)
    other.set_state(json.loads(state))
    assert len(state) < 100
    assert all(equal(next(other), batch) for batch in expected)


@pytest.mark.parametrize("data", [{}, {"document_masks": True, "sequence_length": 1024}])
def test_a_step_far_in_is_there_at_once(data):
    config = configs.from_dict(
        {"data": {"sequence_length": 64} | data, "training": {"batch_size": 512}}
    )
    pipeline.train_batches(config)[0]
    began = time.process_time()
    batch = next(pipeline.train_iterator(config, start_step=10**7))
    assert time.process_time() - began < 1.0
    assert equal(batch, pipeline.train_batches(config)[10**7])


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_slices_of_processes_concatenate_to_the_batch(processes):
    config = make_config(batch=8)
    whole = pipeline.train_iterator(config, start_step=5)
    share = 8 // processes
    parts = [
        pipeline.train_iterator(config, 5, range(index * share, (index + 1) * share))
        for index in range(processes)
    ]
    for _ in range(3):
        local = [next(part) for part in parts]
        assert local[0]["inputs"].shape == (8 // processes, 64)
        assert equal(concatenate(local), next(whole))


def test_held_out_is_scored_once_in_order_in_constant_shapes():
    config = make_config(length=256)
    pairs = list(pipeline.held_out_batches(config, 50))
    assert {batch[key].shape for batch, _ in pairs for key in KEYS} == {(50, 256)}
    batches = concatenate([batch for batch, _ in pairs])
    targets = batches["targets"][batches["mask"] == 1]
    text = sources.embedded_documents("held_out")[0]
    assert targets[-1] == 256 and bytes(targets[:-1].tolist()) == text
    assert sum(count for _, count in pairs) == len(text) == 466853
    assert pairs[0][1] == 50 * 256 and (pairs[-1][0]["mask"].sum(axis=1) == 0).any()


def test_held_out_slices_concatenate_and_count_the_whole_batch(small):
    config = make_config(length=4, source=small)
    whole = list(pipeline.held_out_batches(config, 4))
    parts = [list(pipeline.held_out_batches(config, 4, rows)) for rows in ([0, 1], [2, 3])]
    assert len(whole) == 3 and sum(count for _, count in whole) == 39
    for number, (batch, count) in enumerate(whole):
        assert equal(concatenate([part[number][0] for part in parts]), batch)
        assert [part[number][1] for part in parts] == [count, count]


@pytest.mark.parametrize("rows", [[], [3, 4], [-1]])
def test_rows_must_be_of_the_batch(rows):
    with pytest.raises(ValueError, match="are not rows of a batch of 4"):
        pipeline.train_batches(make_config(batch=4), rows)


def test_process_with_reading_threads_exits_cleanly_without_flags():
    program = (
        "from fp8jax import config; from fp8jax.data import pipeline\n"
        "iterator = pipeline.train_iterator(config.from_dict({'data': {'read_threads': 2}}))\n"
        "print(next(iterator)['inputs'].shape)\n"
    )
    command, environment = (
        [sys.executable, "-c", program],
        os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "(16, 256)\n", "")
