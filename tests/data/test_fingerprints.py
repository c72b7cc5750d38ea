"""Digests of data: equal for equal content wherever it lies, another for whatever a run would read otherwise."""

import pathlib
import shutil

import numpy as np
import pytest

from fp8jax.config import ConfigError, DataConfig
from fp8jax.data import fingerprints, shards, tokenizer
from tests.helpers.megatron import write as write_megatron

BYTE = tokenizer.load("byte")


def prepared(directory, train, held_out=("persuasion",)):
    texts = {"train": map(BYTE.encode, train), "held_out": map(BYTE.encode, held_out)}
    shards.write_shards(directory, BYTE, texts)
    return directory


def train_of(source, **data):
    return fingerprints.of(DataConfig(source=str(source), **data))["train"]


def test_a_directory_is_known_by_its_content(tmp_path):
    first = prepared(tmp_path / "a", ["emma", "anne"])
    shutil.copytree(first, tmp_path / "moved")
    assert fingerprints.same(train_of(first), train_of(tmp_path / "moved"))
    for other in (["anne", "emma"], ["emma", "anne", "jane"], ["emma", "anna"]):
        again = prepared(tmp_path / "-".join(other), other)
        assert not fingerprints.same(train_of(first), train_of(again))


def test_splits_and_weights_and_order_count(tmp_path):
    a, b = prepared(tmp_path / "a", ["emma"]), prepared(tmp_path / "b", ["anne"])
    one, other = (fingerprints.of(DataConfig(source=f"{a}={weight},{b}=1")) for weight in (1, 2))
    assert not fingerprints.same(one["train"], other["train"]) and not fingerprints.changed(
        one["train"], other["train"]
    )
    swapped = train_of(f"{b}=1,{a}=1")
    assert not fingerprints.same(one["train"], swapped)
    shutil.rmtree(a)
    prepared(a, ["emma"], ["sanditon"])
    now = fingerprints.of(DataConfig(source=f"{a}=1,{b}=1"))
    assert fingerprints.same(now["train"], one["train"]) and fingerprints.changed(
        now["held_out"], one["held_out"]
    ) == [str(a)]


def test_megatron_by_index_size_and_pieces(tmp_path):
    documents = [[[n % 256] * 20 + [256]] for n in range(300)]
    source = write_megatron(tmp_path / "a", documents)
    before = train_of(source, tokenizer="byte")
    assert fingerprints.same(
        before, train_of(write_megatron(tmp_path / "b", documents), tokenizer="byte")
    )
    assert not fingerprints.same(
        before, train_of(write_megatron(tmp_path / "c", documents[:-1]), tokenizer="byte")
    )
    tokens = np.memmap(f"{source}.bin", "<u2", "r+")
    tokens[:] = (tokens + 1) % 256
    tokens.flush()
    assert not fingerprints.same(before, train_of(source, tokenizer="byte"))
    pathlib.Path(f"{source}.bin").unlink()
    with pytest.raises(ConfigError, match=r"a\.bin: cannot be read"):
        train_of(source, tokenizer="byte")


@pytest.mark.parametrize("saved", [None, 7, [1, 2], [["a"]], [["a", 1.0]], {"a": 1}])
def test_a_damaged_fact_is_no_match_and_no_crash(saved):
    found = [["a", 1.0, "sha256:0"]]
    assert not fingerprints.same(found, saved) and fingerprints.changed(found, saved) == []
