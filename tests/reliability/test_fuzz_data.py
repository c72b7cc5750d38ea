"""Files of data by anyone: read, or refused in one line, in bounded memory."""

import bz2
import contextlib
import gzip
import io
import json
import lzma
import pathlib
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8jax import config as config_lib
from fp8jax.cli import prepare
from fp8jax.config import ConfigError
from fp8jax.data import documents, megatron, pipeline, shards, token_records, tokenizer
from fp8jax.data import tables as table_reader
from tests.helpers.megatron import write as write_megatron
from tests.reliability.fuzzing import MANY, altered, damaged, one_line

pytestmark = pytest.mark.usefixtures("little_memory")


@pytest.fixture(scope="module")
def token_directory(tmp_path_factory):
    byte, directory = tokenizer.load("byte"), tmp_path_factory.mktemp("tokens")
    texts = [
        byte.encode(text)
        for text in (
            "Sir Walter Elliot,",
            "of Kellynch Hall,",
            "in Somersetshire,",
            "was a man who,",
        )
    ]
    shards.write_shards(directory, byte, {"train": texts, "held_out": texts[:1]}, shard_tokens=30)
    return directory


@pytest.mark.slow
@MANY
@given(st.data(), st.sampled_from(["fail", "skip"]))
def test_token_files(token_directory, tmp_path_factory, data, policy):
    """Index and shards, altered or damaged, then read to the end, looked at and verified."""
    directory = tmp_path_factory.getbasetemp() / "fuzz_tokens"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(token_directory, directory)
    path = directory / data.draw(
        st.sampled_from(
            ["index.json", "index.json", *(file.name for file in sorted(token_directory.iterdir()))]
        )
    )
    content = path.read_bytes()
    path.write_bytes(
        altered(data, json.loads(content))
        if path.suffix == ".json" and data.draw(st.booleans())
        else damaged(data, content)
    )
    config = config_lib.from_dict(
        {
            "data": {
                "source": str(directory),
                "sequence_length": 8,
                "read_threads": 0,
                "on_fault": policy,
            },
            "training": {"batch_size": 2},
        }
    )
    try:
        batches = pipeline.train_batches(config)
        for step in range(6):
            assert batches[step]["inputs"].max() < 257
        list(pipeline.held_out_batches(config, 2))
    except ConfigError as error:
        one_line(error)
        assert str(directory) in str(error)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        assert prepare.main(["inspect", str(directory), "--verify"]) in (0, 2)


def tables(directory):
    """Files of tables and of records, as other programs write them: name → bytes."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {
            "text": [f"Sir Walter Elliot {number} é" for number in range(50)],
            "ids": [[number, 2] for number in range(50)],
        }
    )
    parquet.write_table(table, directory / "a.parquet", row_group_size=20)
    parquet.write_table(table, directory / "b.parquet", compression="zstd", use_dictionary=["text"])
    with pa.ipc.new_file(directory / "c.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    with pa.ipc.new_stream(directory / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files of documents of every kind: name → bytes."""
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(
        json.dumps({"text": f"Kellynch Hall {number} é", "n": number}) + "\n"
        for number in range(40)
    ).encode()
    plain = {"a.jsonl": lines, "a.txt": "Sir Walter Elliot é\n".encode() * 40}
    compress = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.compress,
    }
    packed = {
        f"{name}.{suffix}": function(content)
        for name, content in plain.items()
        for suffix, function in compress.items()
    }
    return plain | packed | tables(tmp_path_factory.mktemp("tables"))


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["change", "cut out", "put in", "cut off"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def changed(content, damage):
    """As `damaged`, with all that is to be done given beforehand."""
    content = bytearray(content)
    for kind, place, more in damage:
        at = place % max(len(content), 1)
        if kind == "cut off":
            del content[at:]
        else:
            content[at : at + {"change": 1, "cut out": len(more), "put in": 0}[kind]] = (
                b"" if kind == "cut out" else more
            )
    return bytes(content)


@pytest.mark.slow
@MANY
@given(number=st.integers(0, 99), damage=DAMAGE, tolerant=st.booleans())
def test_documents(texts, tmp_path_factory, number, damage, tolerant):
    """Files of text, damaged, then cut into pieces and read to the end."""
    name = sorted(texts)[number % len(texts)]
    path = tmp_path_factory.getbasetemp() / f"fuzz_{name}"
    table_reader._open.cache_clear()  # it maps the file that is written anew
    path.unlink(missing_ok=True)
    path.write_bytes(changed(texts[name], damage))
    skipped = []
    try:
        for piece in documents.pieces(str(path), 1 << 12):
            for blocks in documents.read(
                piece, "text", lambda more: None, skipped.append if tolerant else None
            ):
                assert all(isinstance(block, str) for block in blocks)
    except ConfigError as error:
        one_line(error)
        assert str(path) in str(error)
    for line in skipped:
        one_line(line)


@pytest.mark.slow
@MANY
@given(st.data(), st.sampled_from([".idx", ".bin"]), st.sampled_from(["train", "held_out", "all"]))
def test_megatron(tmp_path_factory, data, suffix, split):
    prefix = str(tmp_path_factory.getbasetemp() / "fuzz_megatron")
    write_megatron(prefix, [[[65, 66, 256]], [[67], [68, 256]], [[69, 256]]])
    path = pathlib.Path(prefix + suffix)
    path.write_bytes(damaged(data, path.read_bytes()))
    try:
        array = megatron.open_stream(prefix, tokenizer.load("byte"), split)
        assert len(array[0 : len(array)]) == len(array) < 20
    except ConfigError as error:
        one_line(error)
        assert prefix in str(error)


@pytest.mark.slow
@MANY
@given(st.data())
def test_npy_records(data):
    """Bytes of an .npy file in memory, damaged or with another header."""
    stream = io.BytesIO()
    np.save(stream, np.arange(9, dtype=np.int32))
    content = stream.getvalue()
    if data.draw(st.booleans()):
        size = data.draw(
            st.sampled_from(["9", "1000000000000000", "-1", "9,9", "3,3", "2**70", "True", "9 "])
        )
        content = content.replace(b"(9,)", f"({size},)".encode())
    try:
        found = token_records._array(
            "records", 1, damaged(data, content) if data.draw(st.booleans()) else content
        )
        assert found.size <= len(content)
    except ConfigError as error:
        one_line(error)
