"""Mixtures: shares over any stretch, random access, resuming, and what the config says."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax import config as configs
from fp8jax.data import mixing, pipeline, shards, sources, tokenizer

BYTE = tokenizer.load("byte")


@settings(deadline=None, max_examples=30)
@given(
    weights=st.lists(st.floats(1e-3, 1.0), min_size=2, max_size=12), start=st.integers(0, 10**12)
)
def test_shares_are_exact_to_a_thousandth_over_any_window(weights, start):
    weights = np.array(weights) / sum(weights)
    schedule = mixing.Schedule(weights)
    found = np.array(
        [schedule.count(k, start + 10_000) - schedule.count(k, start) for k in range(len(weights))]
    )
    assert np.abs(found / 10_000 - weights).max() <= 1e-3 and found.sum() == 10_000


def test_what_rounding_leaves_goes_to_whom_it_took_most_from():
    assert mixing.Schedule((0.3000001, 0.6999999)).counts.tolist() == [30_000, 70_000]
    assert mixing.Schedule((0.2500024, 0.2500012, 0.4999964)).counts.tolist() == [
        25_000,
        25_000,
        50_000,
    ]


@given(st.integers(0, 3 * mixing.PERIOD))
def test_place_is_the_count_of_what_came_before(sequence):
    schedule = mixing.Schedule((0.6, 0.1, 0.3))
    source, number = schedule.place(sequence)
    assert (
        number == schedule.count(source, sequence)
        and schedule.count(source, sequence + 1) == number + 1
    )


def test_sliding_windows_of_a_hard_mixture():
    weights = np.array([0.5, 0.25, 0.1, 0.05, 0.05, 0.03, 0.015, 0.005])
    schedule = mixing.Schedule(weights)
    order = np.array([schedule.place(n)[0] for n in range(30_000)])
    counts = np.cumsum(order[:, None] == np.arange(8), axis=0)
    assert np.abs((counts[10_000:] - counts[:-10_000]) / 10_000 - weights).max() < 5e-4


def test_a_weight_that_never_has_its_turn_is_refused():
    with pytest.raises(ValueError, match="is below 1/100000"):
        mixing.Schedule((1 - 1e-6, 1e-6))


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    """Directories whose text is all a, all b, and c without a held-out split."""
    found = []
    for letter, size in (("a", 400), ("b", 40), ("c", 100)):
        directory = tmp_path_factory.mktemp(letter)
        documents = [np.full(size, ord(letter), np.uint16)]
        shards.write_shards(directory, BYTE, {"train": documents, "held_out": documents})
        found.append(str(directory))
    index = shards.read_index(found[2])
    index["splits"]["held_out"] = shards.summary([])
    shards.write_index(tmp_path_factory.getbasetemp() / found[2], index)
    return found


def make_config(source, batch=8, seed=0, **data):
    return configs.from_dict(
        {
            "data": {"source": source, "sequence_length": 10} | data,
            "training": {"batch_size": batch, "seed": seed},
        }
    )


def test_batches_follow_the_schedule_and_epochs(directories):
    a, b, c = directories
    config = make_config(f"{a}=7,{b}=2, {c}=1")
    batches = pipeline.train_batches(config)
    inputs = np.concatenate([batches[step]["inputs"] for step in range(50)])
    letters = np.where(inputs == 256, 0, inputs).max(axis=1)
    counts = [int((letters == ord(letter)).sum()) for letter in "abc"]
    assert counts == [280, 80, 40]
    places = [place for step in range(50) for place in pipeline.train_places(config, step)]
    seen = [place.window for place in places if place.source == b and place.epoch == 3]
    assert sorted(seen) == list(range(5))  # 41 tokens in windows of 10
    assert [("a", "b", "c")[directories.index(place.source)] for place in places[:8]] == [
        chr(letter) for letter in letters[:8]
    ]


@pytest.mark.parametrize("processes", [1, 2, 4, 8])
def test_processes_and_resuming_do_not_change_a_mixture(directories, processes):
    config = make_config(f"{directories[0]}=0.7,{directories[1]}=0.3")
    whole = pipeline.train_iterator(config, 10**7)
    count = config.training.batch_size // processes
    parts = [
        pipeline.train_iterator(config, 10**7, range(index * count, (index + 1) * count))
        for index in range(processes)
    ]
    for _ in range(3):
        expected, local = next(whole), [next(part) for part in parts]
        for key, array in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[key] for part in local]), array)


def test_sources_have_their_own_order(directories):
    config = make_config(f"{directories[0]}=0.5,embedded=0.5", batch=64)
    for name in (directories[0], "embedded"):
        windows = [
            place.window for place in pipeline.train_places(config, 0) if place.source == name
        ]
        assert len(windows) == 32 and windows != sorted(windows)


def test_held_out_splits_follow_one_another(directories):
    a, b, c = directories
    stream = sources.load(make_config(f"{c}=0.1,{a}=0.5,{b}=0.4").data, "held_out")
    assert bytes(t for t in stream.read(0, 10**6).tolist() if t != 256) == b"a" * 400 + b"b" * 40
    with pytest.raises(configs.ConfigError, match="lists no shards of split 'held_out'"):
        pipeline.train_iterator(make_config(c))


def test_repetition_is_told(directories):
    config = configs.from_dict(
        {
            "data": {"source": f"{directories[0]}=0.7,{directories[1]}=0.3", "sequence_length": 10},
            "training": {"batch_size": 10, "steps": 100},
        }
    )
    first, second = pipeline.describe(config)
    assert (
        "401 tokens, 70.0% of the sequences, 17.07 epochs" in first
        and "30.0% of the sequences, 60.00 epochs" in second
    )


@pytest.mark.parametrize(
    "source",
    [
        "a=0.5,b",
        "a=0.5,=0.5",
        "a=0.5,a=0.5",
        "a=0,b=1",
        "a=-1,b=2",
        "a=nan,b=1",
        "a=x",
        "a=0.5,",
        "a,b",
    ],
)
def test_mixtures_that_make_no_sense_are_refused(source):
    with pytest.raises(
        configs.ConfigError,
        match="config.data.source: .* is not a new source with a weight above 0",
    ):
        make_config(source)


def test_weights_are_made_to_add_up():
    assert configs.parse_sources("x=3, y/z=1") == (("x", 0.75), ("y/z", 0.25))
    assert configs.parse_sources("embedded") == (("embedded", 1.0),)


def test_all_sources_need_one_tokenizer(directories, tmp_path):
    index = shards.read_index(directories[1]) | {"tokenizer": "sha256:0"}
    shards.write_index(tmp_path, index)
    with pytest.raises(
        configs.ConfigError, match=r"tokenizer is 'sha256:0', not 'byte'; set config.data.tokenizer"
    ):
        pipeline.train_batches(make_config(f"{directories[0]}=0.5,{tmp_path}=0.5"))
