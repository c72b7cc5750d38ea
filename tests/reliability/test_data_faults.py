"""Shards that are cut off, missing or hold ids that are none: named with path and place; fatal, or skipped and counted."""

import os

import numpy as np
import pytest

from fp8jax.config import ConfigError, DataError
from fp8jax.data import pipeline, shards, tokenizer
from fp8jax.monitor.writers import read_metrics
from fp8jax.training.checkpoint import Checkpoints
from tests.helpers.runs import micro, train

BYTE = tokenizer.load("byte")
TEXT = "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife. "


@pytest.fixture
def source(tmp_path):
    """Six training shards of 1181 tokens, in windows of 32."""
    documents = [BYTE.encode(TEXT * 10) for _ in range(6)]
    shards.write_shards(
        tmp_path / "tokens", BYTE, {"train": documents, "held_out": documents[:1]}, shard_tokens=100
    )
    return tmp_path / "tokens"


def config_of(source, policy, **training):
    data = {"source": str(source), "sequence_length": 32, "on_fault": policy}
    return micro(
        data=data,
        training={"steps": 6, "batch_size": 16, **training},
        evaluation={"every": 0, "batches": 1},
        monitor={"every": 0},
        checkpoint={"every": 2},
    )


def truncate(path):
    os.truncate(path, os.path.getsize(path) // 2)


def empty(path):
    os.truncate(path, 0)


def wrong_id(path):
    tokens = np.memmap(path, "<u2", mode="r+")
    tokens[100:200] = 9999
    tokens.flush()


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (truncate, r"train_00002\.bin: has 1181 bytes, not the 2362.*cut off at byte 1181"),
        (empty, r"train_00002\.bin: has 0 bytes"),
        (os.unlink, r"train_00002\.bin: cannot be read: No such file"),
    ],
)
def test_shards_that_are_not_whole_are_refused_at_the_start(source, damage, fault):
    damage(source / "train_00002.bin")
    with pytest.raises(ConfigError, match=fault) as caught:
        pipeline.train_batches(config_of(source, "fail"))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_wrong_id_ends_the_run_after_saving(source, tmp_path):
    wrong_id(source / "train_00002.bin")
    with pytest.raises(
        DataError,
        match=r"train_00002\.bin: token 1\d\d is 9999, outside the vocabulary of 257 \(byte \d+\)",
    ):
        train(config_of(source, "fail", steps=40), tmp_path / "run")
    (event,) = [
        event
        for event in read_metrics(tmp_path / "run" / "events.jsonl")
        if event["kind"] == "data_fault"
    ]
    assert Checkpoints(tmp_path / "run").newest() == (event["step"], {})


@pytest.mark.parametrize("damage", [truncate, empty, os.unlink, wrong_id])
def test_what_cannot_be_read_is_padding_and_nothing_else_moves(source, damage):
    """Over one epoch exactly the windows that touch the damage are padding; all others are as they were."""
    config = config_of(source, "skip")
    epoch = -(-6 * 1181 // 32 // 16)
    before = [pipeline.train_batches(config)[i] for i in range(epoch)]
    path = source / "train_00002.bin"
    damage(path)
    after = [pipeline.train_batches(config)[i] for i in range(epoch)]
    faults = [fault for batch in after for fault in batch.get("faults", [])]
    skipped = 0
    for one, two in zip(before, after, strict=True):
        gone = (two["mask"].sum(axis=1) == 0) & (one["mask"].sum(axis=1) > 0)
        skipped += gone.sum()
        for name in ("inputs", "targets", "mask", "positions", "segment_ids"):
            np.testing.assert_array_equal(one[name][~gone], two[name][~gone])
    lost = {truncate: 591 / 32, wrong_id: 100 / 32}.get(damage, 1181 / 32)
    assert lost <= skipped <= lost + 3 and skipped == len(
        faults
    )  # the edges, and one that begins after the last lost token
    assert all(str(path) in fault and "\n" not in fault for fault in faults)


@pytest.mark.slow
def test_a_run_that_skips_counts_and_resumes_the_count(source, tmp_path, capsys):
    wrong_id(source / "train_00002.bin")
    assert train(config_of(source, "skip", steps=10), tmp_path / "run") == 0
    assert train(config_of(source, "skip", steps=20), tmp_path / "run") == 0
    found = [
        event
        for event in read_metrics(tmp_path / "run" / "events.jsonl")
        if event["kind"] == "data_fault"
    ]
    assert (
        np.cumsum([event["sequences"] for event in found]).tolist()
        == [event["in_all"] for event in found]
        and len(found) > 1
    )
    assert {event["step"] > 10 for event in found} == {False, True}
    assert "of its sequences skipped" in capsys.readouterr().out


def test_held_out_text_that_cannot_be_read_counts_for_nothing(source):
    path = source / "held_out_00000.bin"
    whole = list(pipeline.held_out_batches(config_of(source, "skip"), 8))
    wrong_id(path)
    with pytest.raises(DataError, match="held_out_00000"):
        list(pipeline.held_out_batches(config_of(source, "fail"), 8))
    parts = list(pipeline.held_out_batches(config_of(source, "skip"), 8))
    lost = sum(size for _, size in whole) - sum(size for _, size in parts)
    assert 100 <= lost <= 100 + 2 * 32 and sum(
        len(batch.get("faults", [])) for batch, _ in parts
    ) in (4, 5)
