"""Megatron datasets against a writer that knows nothing of the reader."""

import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax import config as configs
from fp8jax.data import megatron, pipeline, sources, tokenizer
from tests.helpers.megatron import write

BYTE = tokenizer.load("byte")


def load(prefix, split="train"):
    return sources.load(configs.DataConfig(source=prefix, tokenizer="byte"), split)


@settings(deadline=None, max_examples=30)
@given(
    documents=st.lists(
        st.lists(st.binary(max_size=9), min_size=1, max_size=3), min_size=2, max_size=10
    ),
    letter=st.sampled_from(["h", "i", "q", "H"]),
)
def test_reads_what_was_written(tmp_path_factory, documents, letter):
    written = [[*map(list, document[:-1]), [*document[-1], 256]] for document in documents]
    prefix = write(tmp_path_factory.mktemp("megatron") / "corpus", written, letter)
    tokens = [[token for sequence in document for token in sequence] for document in written]
    assert load(prefix).read(0, 10**6).tolist() == sum(tokens[:-1], [])
    assert load(prefix, "held_out").read(0, 10**6).tolist() == tokens[-1]


def test_trains_from_the_files_as_they_lie(tmp_path):
    prefix = write(tmp_path / "corpus", [[[n % 256] * 20 + [256]] for n in range(300)])
    config = configs.from_dict(
        {"data": {"source": prefix, "tokenizer": "byte", "sequence_length": 16}}
    )
    assert isinstance(load(prefix).arrays[0], np.memmap) and len(load(prefix, "held_out")) == 3 * 21
    assert next(pipeline.train_iterator(config))["inputs"].shape == (16, 16)
    with pytest.raises(configs.ConfigError, match="for Megatron files set config.data.tokenizer"):
        pipeline.train_iterator(configs.from_dict({"data": {"source": prefix}}))


def cut(suffix, count):
    def damage(prefix):
        path = f"{prefix}.{suffix}"
        with open(path, "rb") as file:
            content = file.read()
        with open(path, "wb") as file:
            file.write(content[:-count])

    return damage


def overwrite(at, content):
    def damage(prefix):
        with open(f"{prefix}.idx", "r+b") as file:
            file.seek(at)
            file.write(content)

    return damage


@pytest.mark.parametrize(
    ("damage", "file", "fault"),
    [
        (cut("bin", 3), "bin", "bytes, not the 84 that its index tells; it is cut off at byte 81"),
        (cut("idx", 1), "idx", "it is cut off at byte"),
        (cut("idx", 140), "idx", "is not the index of a Megatron dataset"),
        (overwrite(0, b"X"), "idx", "is not the index of a Megatron dataset"),
        (overwrite(9, b"\2"), "idx", "is of version 2"),
        (overwrite(17, b"\6"), "idx", "dtype code 6"),
        (overwrite(18, b"\xff" * 8), "idx", "it is cut off at byte"),
        (overwrite(34, struct.pack("<i", -5)), "idx", "do not follow one another"),
        (overwrite(74, struct.pack("<q", 99)), "idx", "do not follow one another"),
        (overwrite(138, struct.pack("<q", 9)), "idx", "documents do not rise"),
    ],
)
def test_damage_is_one_line_naming_the_file(tmp_path, damage, file, fault):
    prefix = write(tmp_path / "corpus", [[[65] * 10, [256]]] * 2 + [[[66] * 9, [256]]] * 2)
    damage(prefix)
    with pytest.raises(configs.ConfigError) as caught:
        load(prefix)
    assert f"{prefix}.{file}: " in str(caught.value) and fault in str(caught.value)


def test_documents_of_which_some_end_and_ids_out_of_range_are_refused(tmp_path):
    with pytest.raises(
        configs.ConfigError,
        match="document 1 does not end with the end-of-document id 256, others do",
    ):
        load(write(tmp_path / "endless", [[[65, 256]], [[65]], [[65, 256]]]))
    with pytest.raises(
        ValueError, match=r"corpus\.bin: token 1 is -7, outside the vocabulary of 257"
    ):
        load(write(tmp_path / "corpus", [[[65, -7, 256]], [[65, 256]]], "i")).read(0, 3)
    assert not megatron.is_dataset(tmp_path)


@settings(deadline=None, max_examples=60)
@given(documents=st.lists(st.binary(max_size=6), min_size=2, max_size=120), data=st.data())
def test_documents_without_an_end_get_one(tmp_path_factory, documents, data):
    """The boundaries are in the index; empty documents, first and last ones too, are none."""
    prefix = write(
        tmp_path_factory.mktemp("megatron") / "corpus", [[list(document)] for document in documents]
    )
    there = [document for document in documents if document]
    if len(there) < 2:
        with pytest.raises(configs.ConfigError, match="nothing to hold out"):
            load(prefix)
        return
    held_out = max(1, len(there) // 100)
    for split, part in (("train", there[:-held_out]), ("held_out", there[-held_out:])):
        expected = [token for document in part for token in (*document, 256)]
        stream = load(prefix, split)
        assert len(stream) == len(expected) and stream.read(0, 10**6).tolist() == expected
        start = data.draw(st.integers(0, len(expected)))
        stop = data.draw(st.integers(start, len(expected)))
        assert stream.read(start, stop).tolist() == expected[start:stop]


def test_an_empty_last_document_is_not_what_is_held_out(tmp_path):
    prefix = write(tmp_path / "corpus", [[list(b"one"), [256]], [list(b"two"), [256]], [[]]])
    config = configs.from_dict(
        {"data": {"source": prefix, "tokenizer": "byte", "sequence_length": 4}}
    )
    batches = list(pipeline.held_out_batches(config, batch_size=2))
    assert sum(text_bytes for _, text_bytes in batches) == 3
    assert load(prefix, "held_out").read(0, 9).tolist() == [*b"two", 256]


@pytest.mark.parametrize("end", [[], [256]], ids=["without ends", "with ends"])
@pytest.mark.parametrize(
    "texts", [[b"one", b"two", b""], [b"", b"one", b"two"], [b"", b"one", b"", b"two", b"", b""]]
)
def test_empty_documents_are_none(tmp_path, texts, end):
    """First, last and between: what is held out is the last one with text, and has bytes to divide by."""
    prefix = write(tmp_path / "corpus", [[[*text, *end] if text else []] for text in texts])
    assert load(prefix).read(0, 9).tolist() == [*b"one", 256] and load(prefix, "held_out").read(
        0, 9
    ).tolist() == [*b"two", 256]
    config = configs.from_dict(
        {"data": {"source": prefix, "tokenizer": "byte", "sequence_length": 4}}
    )
    assert sum(text_bytes for _, text_bytes in pipeline.held_out_batches(config, batch_size=2)) == 3
