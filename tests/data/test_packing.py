"""Packing: every token once, documents whole where they fit, masks where documents begin, damage named."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax import config as configs
from fp8jax.data import packing, pipeline, shards, sources, tokenizer

BYTE = tokenizer.load("byte")


def reference_best_fit(lengths, capacity):
    """One item after another, by the book: rooms of the bins at the end, sorted."""
    rooms = []
    for size in sorted(lengths, reverse=True):
        fits = [room for room in rooms if room >= size]
        if fits:
            rooms.remove(min(fits))
            rooms.append(min(fits) - size)
        else:
            rooms.append(capacity - size)
    return sorted(rooms)


@given(
    st.integers(1, 60).flatmap(
        lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=80))
    )
)
def test_best_fit_equals_one_item_at_a_time(case):
    capacity, lengths = case
    bins = packing.best_fit(np.array(lengths, np.int64), capacity)
    used = np.bincount(bins, weights=lengths).astype(int) if lengths else np.zeros(0, int)
    assert sorted((capacity - used).tolist()) == reference_best_fit(lengths, capacity)


def prepared(directory, documents, length):
    held_out = [BYTE.encode("held out")]
    shards.write_shards(
        directory,
        BYTE,
        {"train": map(BYTE.encode, documents), "held_out": held_out},
        shard_tokens=40,
    )
    return packing.write_best_fit(directory, BYTE, length)


def windows_of(directory, length, masks=True):
    data = configs.DataConfig(
        sequence_length=length, source=str(directory), packing="best_fit", document_masks=masks
    )
    stream = sources.load(data, "train")
    return packing.BestFitWindows(
        stream, data, packing.open_best_fit(directory, length, len(stream))
    )


@settings(deadline=None, max_examples=40)
@given(
    documents=st.lists(st.binary(max_size=30), min_size=1, max_size=12),
    length=st.integers(1, 24),
    together=st.integers(1, 5),
)
def test_best_fit_makes_every_token_a_target_once(tmp_path_factory, documents, length, together):
    directory = tmp_path_factory.mktemp("packed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_TOGETHER", together)
        entry = prepared(directory, documents, length)
    windows = windows_of(directory, length)
    packed = pipeline._read([(windows, index) for index in range(len(windows))], windows.data)
    real = packed["mask"] == 1
    assert entry["padding"] == pytest.approx(1 - real.mean()) and entry["windows"] == len(windows)
    rows = []
    for row in range(len(windows)):
        ids, count = packed["segment_ids"][row], int(real[row].sum())
        assert real[row][:count].all() and ids[0] == 0 and (np.diff(ids) >= 0).all()
        for segment in np.unique(ids[:count]):
            places = np.flatnonzero((ids == segment) & real[row])
            inputs, targets = packed["inputs"][row][places], packed["targets"][row][places]
            assert packed["positions"][row][places].tolist() == list(range(len(places)))
            assert inputs[1:].tolist() == targets[:-1].tolist() and 256 not in inputs[1:]
            rows.append((int(inputs[0]), *targets.tolist()))
    whole = [row for row in rows if row[0] == 256 and row[-1] == 256]
    assert sorted(bytes(row[1:-1]) for row in whole) == sorted(
        text for text in documents if len(text) + 1 <= length
    )
    assert sum(len(row) - 1 for row in rows) == sum(len(text) + 1 for text in documents)
    targets = np.sort(packed["targets"][real])
    np.testing.assert_array_equal(
        targets, np.sort([token for text in documents for token in [*text, 256]])
    )


def test_a_cut_document_goes_on_from_its_last_token(tmp_path):
    prepared(tmp_path, ["abcdefghij", "xy"], 4)
    windows = windows_of(tmp_path, 4)
    found = {
        tuple(windows[index]["inputs"].tolist()): windows[index] for index in range(len(windows))
    }
    # 11 targets: abcd efgh ij END; and xy END, which does not fit beside the 3 that are left.
    assert set(found) == {
        (256, 97, 98, 99),
        (100, 101, 102, 103),
        (104, 105, 106, 256),
        (256, 120, 121, 256),
    }
    last = found[104, 105, 106, 256]
    assert last["targets"].tolist() == [105, 106, 256, 256] and last["mask"].tolist() == [
        1,
        1,
        1,
        0,
    ]
    assert last["segment_ids"].tolist() == [0, 0, 0, 1] and last["positions"].tolist() == [
        0,
        1,
        2,
        0,
    ]
    plain = windows_of(tmp_path, 4, masks=False)[0]
    assert plain["segment_ids"].tolist() == [0] * 4 and plain["positions"].tolist() == [0, 1, 2, 3]


def test_training_order_has_every_packed_window_once_an_epoch(tmp_path):
    prepared(tmp_path, [chr(97 + n % 26) * (n % 9) for n in range(60)], 8)
    config = configs.from_dict(
        {
            "data": {"source": str(tmp_path), "packing": "best_fit", "sequence_length": 8},
            "training": {"batch_size": 1},
        }
    )
    count = len(windows_of(tmp_path, 8))
    places = [pipeline.train_places(config, step)[0] for step in range(2 * count)]
    for epoch in range(2):
        assert sorted(place.window for place in places if place.epoch == epoch) == list(
            range(count)
        )
    assert "padding" in pipeline.describe(config)[0]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (
            lambda index, path: index["best_fit"].clear(),
            "is not packed by best fit for sequences of 8; prepare it again",
        ),
        (
            lambda index, path: index["best_fit"].update({"9": index["best_fit"].pop("8")}),
            "(there is 9)",
        ),
        (lambda index, path: index.update(best_fit=[8]), "is not packed by best fit"),
        (lambda index, path: index["best_fit"].update({"8": 8}), "is not packed by best fit"),
        (lambda index, path: index["best_fit"]["8"].update(pieces=-1), "is not packed"),
        (lambda index, path: index["best_fit"]["8"].update(windows=10**12), "is not packed"),
        (lambda index, path: path.write_bytes(path.read_bytes()[:-1]), "best_fit_8.pieces: has "),
        (
            lambda index, path: path.with_suffix(".ends").write_bytes(
                bytes(path.with_suffix(".ends").stat().st_size)
            ),
            "does not end with its",
        ),
        (
            lambda index, path: path.write_bytes(b"\xff" * path.stat().st_size),
            "has pieces that do not fit",
        ),
        (
            lambda index, path: path.write_bytes(bytes(path.stat().st_size)),
            "has pieces that do not fit",
        ),
    ],
)
def test_damaged_packing_is_named(tmp_path, damage, fault):
    prepared(tmp_path, ["abcdefghij", "xy", "z"] * 3, 8)
    index = json.loads((tmp_path / "index.json").read_text())
    damage(index, tmp_path / "best_fit_8.pieces")
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError) as caught:
        windows_of(tmp_path, 8)[0]
    assert fault in str(caught.value) and str(tmp_path) in str(caught.value)


def test_best_fit_needs_prepared_shards():
    with pytest.raises(
        configs.ConfigError,
        match="config.data.packing: 'best_fit' needs directories of prepared token shards, not 'embedded'",
    ):
        pipeline.train_batches(configs.from_dict({"data": {"packing": "best_fit"}}))


def test_best_fit_of_many_documents_wastes_little(tmp_path):
    lengths = np.random.default_rng(0).lognormal(5, 1.2, 20_000).astype(np.int64) + 1
    starts = np.cumsum(lengths) - lengths
    pieces, ends = packing.pack(starts, lengths, 1024)
    assert pieces["length"].sum() == lengths.sum() and len(pieces) == ends[-1]
    assert 1 - lengths.sum() / (len(ends) * 1024) < 0.01
