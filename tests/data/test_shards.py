"""Token shards: written and read back, prepared from text, and refused by name when damaged."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8jax import config as configs
from fp8jax.data import pipeline, shards, sources, tokenizer

ROOT = pathlib.Path(__file__).parents[2]
BYTE = tokenizer.load("byte")
TRAIN = ["Sir Walter Elliot,", "of Kellynch Hall,", "in Somersetshire,", "", "was a man £"]
HELD_OUT = ["who, for his own amusement,"]


def write(directory, train=TRAIN, held_out=HELD_OUT, **options):
    """A directory of byte tokens."""
    documents = {"train": map(BYTE.encode, train), "held_out": map(BYTE.encode, held_out)}
    return shards.write_shards(directory, BYTE, documents, **options)


def load(directory, split="train"):
    return sources.load(configs.DataConfig(source=str(directory)), split)


def expected(documents):
    return [token for text in documents for token in [*text.encode(), 256]]


@pytest.mark.parametrize("shard_tokens", [1, 19, 30, 1 << 28])
def test_round_trip_over_any_number_of_shards(tmp_path, shard_tokens):
    splits = write(tmp_path, shard_tokens=shard_tokens)
    assert load(tmp_path).read(0, 10**6).tolist() == expected(TRAIN)
    assert load(tmp_path, "held_out").read(0, 10**6).tolist() == expected(HELD_OUT)
    assert splits["train"]["documents"] == 5 and splits["train"]["text_bytes"] == sum(
        len(t.encode()) for t in TRAIN
    )
    assert len(splits["train"]["shards"]) == {1: 5, 19: 3, 30: 2}.get(shard_tokens, 1)
    assert splits == json.loads((tmp_path / "index.json").read_text())["splits"]


@given(st.integers(0, 90), st.integers(0, 90))
def test_reads_across_shards_equal_a_slice(start, length):
    tokens = np.array(expected(TRAIN), np.uint16)
    arrays = tuple(np.split(tokens, [19, 37, 55, 56]))
    stream = sources.TokenStream(arrays, ("",) * 5, BYTE)
    found = stream.read(start, start + length)
    assert found.dtype == np.int32 and found.tolist() == tokens[start : start + length].tolist()


def test_shards_are_mapped_not_loaded(tmp_path):
    write(tmp_path)
    array = load(tmp_path).arrays[0]
    assert isinstance(array[:].base.base, np.memmap) and not array[:].flags.writeable


@pytest.mark.parametrize(
    "gone", [pathlib.Path.unlink, lambda path: path.write_bytes(b"1")], ids=["deleted", "cut off"]
)
def test_a_shard_that_goes_before_it_is_read_is_a_fault_of_the_data(tmp_path, gone):
    write(tmp_path)
    stream = load(tmp_path)
    gone(tmp_path / "train_00000.bin")
    with pytest.raises(configs.DataError, match=r"train_00000\.bin: cannot be read any more: "):
        stream.read(0, 3)


def test_more_shards_than_files_that_may_be_open(tmp_path):
    """Read in any order, and a slice outlives its map; in another process, which may open 64 files."""
    write(tmp_path, train=[f"{number:03d}" for number in range(300)], shard_tokens=1)
    code = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from fp8jax.config import DataConfig
from fp8jax.data import packing, shards, sources, tokenizer
stream = sources.load(DataConfig(source=sys.argv[1]), "train")
assert len(stream.arrays) == 300 and len(stream) == 1200
kept = stream.arrays[0][:]
for number in (*range(299, -1, -1), *range(0, 300, 7)):
    assert stream.read(4 * number, 4 * number + 4).tolist() == [*f"{number:03d}".encode(), 256]
assert kept.tolist() == [48, 48, 48, 256] and stream.read(0, 10**6).tolist()[-4:] == [50, 57, 57, 256]
assert [ends[:].tolist() for ends in shards.open_ends(sys.argv[1], tokenizer.load("byte"), "train")] == [[4]] * 300
print(packing.write_best_fit(sys.argv[1], tokenizer.load("byte"), 8)["windows"])
"""
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert run.returncode == 0 and run.stdout == "300\n", run.stderr


def test_write_refuses_an_existing_index_and_an_empty_split(tmp_path):
    write(tmp_path / "a")
    with pytest.raises(configs.ConfigError, match="already holds index.json"):
        write(tmp_path / "a")
    with pytest.raises(configs.ConfigError, match="no documents for split 'held_out'"):
        write(tmp_path / "b", held_out=[])
    assert not (tmp_path / "b" / "index.json").exists()


@pytest.mark.parametrize("shard_tokens", [1, 30, 1 << 28])
def test_ends_are_those_of_the_documents(tmp_path, shard_tokens):
    write(tmp_path, shard_tokens=shard_tokens)
    arrays, _ = shards.open_shards(tmp_path, BYTE, "train")
    ends = shards.open_ends(tmp_path, BYTE, "train")
    texts = [
        BYTE.decode(text)
        for array, one in zip(arrays, ends, strict=True)
        for text in np.split(array, one[:-1])
    ]
    assert texts == TRAIN
    assert all(
        (np.split(array, one)[-1].size, array[one[0] - 1]) == (0, 256)
        for array, one in zip(arrays, ends, strict=True)
    )


@pytest.mark.parametrize("ends", [[19, 19], [37, 19], [19, 38], [0, 37], [19, 36]])
def test_ends_that_cannot_be_are_refused(tmp_path, ends):
    write(tmp_path, train=TRAIN[:2])
    np.array(ends, "<u8").tofile(tmp_path / "train_00000.ends")
    with pytest.raises(configs.ConfigError, match=r"train_00000\.ends: is not a rising list"):
        shards.open_ends(tmp_path, BYTE, "train")


@pytest.mark.parametrize("suffix", [".bin", ".ends"])
def test_verify_finds_one_changed_byte(tmp_path, suffix):
    write(tmp_path)
    assert shards.verify(tmp_path) is None
    path = (tmp_path / "train_00000.bin").with_suffix(suffix)
    content = bytearray(path.read_bytes())
    content[4] ^= 1
    path.write_bytes(content)
    assert f"{path}: its checksum is" in shards.verify(tmp_path)


@pytest.mark.parametrize(
    ("ids", "fault"), [([65, 257], "outside 0 to 256"), ([65, 256], "end-of-document id 256")]
)
def test_write_refuses_ids_that_no_document_has(tmp_path, ids, fault):
    with pytest.raises(ValueError, match=fault):
        shards.write_shards(tmp_path, BYTE, {"train": [np.array(ids)], "held_out": []})
    assert not (tmp_path / "index.json").exists()


def damage_file(action):
    def apply(directory):
        path = directory / "train_00001.bin"
        action(path)
        return path

    return apply


def damage_index(action):
    def apply(directory):
        path = directory / "index.json"
        index = json.loads(path.read_text())
        action(index, index["splits"]["train"]["shards"])
        path.write_text(json.dumps(index))
        return path

    return apply


def truncate_index(directory):
    path = directory / "index.json"
    path.write_text(path.read_text()[:-20])
    return path


def remove_index(directory):
    (directory / "index.json").unlink()
    return directory / "index.json"


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (damage_file(lambda p: p.write_bytes(p.read_bytes()[:-2])), "it is cut off at byte 62"),
        (damage_file(lambda p: p.write_bytes(p.read_bytes() + b"\0\1")), "bytes, not the"),
        (damage_file(lambda p: p.write_bytes(b"")), "has 0 bytes"),
        (
            damage_file(lambda p: p.write_bytes(bytes(p.stat().st_size))),
            "does not end with the end-of-document",
        ),
        (damage_file(lambda p: p.unlink()), "No such file"),
        (
            damage_index(lambda index, listed: listed[1].update(file="../train_00001.bin")),
            "not a shard's name",
        ),
        (
            damage_index(lambda index, listed: listed[1].update(file="/etc/hostname")),
            "not a shard's name",
        ),
        (
            damage_index(lambda index, listed: listed[1].update(file="held_out_00000.bin")),
            "not a shard's name",
        ),
        (damage_index(lambda index, listed: listed[1].update(file=None)), "not a shard's name"),
        (
            damage_index(lambda index, listed: listed[1].update(tokens=-1)),
            "-1 is not a number of tokens",
        ),
        (
            damage_index(lambda index, listed: listed[1].update(tokens=True)),
            "True is not a number of tokens",
        ),
        (damage_index(lambda index, listed: listed[1].pop("tokens")), "lists no shards"),
        (damage_index(lambda index, listed: listed.clear()), "lists no shards"),
        (damage_index(lambda index, listed: index["splits"].pop("train")), "lists no shards"),
        (damage_index(lambda index, listed: index.update(format="other")), "format is 'other'"),
        (
            damage_index(lambda index, listed: index.update(dtype="uint32")),
            "dtype is 'uint32', not 'uint16'",
        ),
        (
            damage_index(lambda index, listed: index.update(vocab_size=300)),
            "vocab_size is 300, not 257",
        ),
        (
            damage_index(lambda index, listed: index.update(tokenizer="sha256:0")),
            "set config.data.tokenizer",
        ),
        (truncate_index, "cannot be read"),
        (remove_index, "no such file"),
    ],
)
def test_damage_is_one_line_naming_the_file(tmp_path, damage, fault):
    write(tmp_path, shard_tokens=20)
    load(tmp_path)
    path = damage(tmp_path)
    with pytest.raises(configs.ConfigError) as caught:
        load(tmp_path)
    message = str(caught.value)
    assert (
        message.startswith(f"config.data.source: {path}")
        and fault in message
        and "\n" not in message
    )


@pytest.mark.parametrize(("threads", "bad"), [(0, 9999), (1, 9999), (0, 257)])
def test_an_id_outside_the_vocabulary_stops_the_run(tmp_path, threads, bad):
    write(tmp_path, shard_tokens=20)
    path = tmp_path / "train_00001.bin"
    tokens = np.fromfile(path, "<u2")
    tokens[3] = bad
    tokens.tofile(path)
    config = configs.from_dict(
        {"data": {"source": str(tmp_path), "read_threads": threads, "sequence_length": 8}}
    )
    iterator = pipeline.train_iterator(config)
    with pytest.raises(
        ValueError, match=rf"train_00001\.bin: token 3 is {bad}, outside the vocabulary of 257"
    ):
        for _ in range(3):
            next(iterator)


def test_shards_beyond_a_hundred_thousand_have_names(tmp_path):
    write(tmp_path, shard_tokens=30)
    index = json.loads((tmp_path / "index.json").read_text())
    for entry, number in zip(
        index["splits"]["train"]["shards"], range(99_999, 10**6, 400_000), strict=False
    ):
        for suffix in (".bin", ".ends"):
            path = tmp_path / entry["file"]
            path.with_suffix(suffix).rename(
                (tmp_path / shards.shard_name("train", number)).with_suffix(suffix)
            )
        entry["file"] = shards.shard_name("train", number)
    (tmp_path / "index.json").write_text(json.dumps(index))
    assert load(tmp_path).read(0, 10**6).tolist() == expected(TRAIN)


def test_an_index_that_names_many_input_files_is_read(tmp_path):
    """Earlier versions wrote them into the index, and refused above 64 MiB what they had written."""
    write(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["sources"] = [
        {"file": f"{'crawl/' * 700}{number:07d}", "bytes": 1, "documents": 1}
        for number in range(16_500)
    ]
    (tmp_path / "index.json").write_text(json.dumps(index, indent=1))
    assert (tmp_path / "index.json").stat().st_size > 1 << 26
    assert load(tmp_path).read(0, 10**6).tolist() == expected(TRAIN)
    assert next(shards.read_sources(tmp_path))["file"].endswith("/0000000")


def test_what_would_not_be_read_is_not_written(tmp_path, monkeypatch):
    write(tmp_path / "a")
    size = (tmp_path / "a" / "index.json").stat().st_size
    monkeypatch.setattr(shards, "INDEX_BYTES", size)
    write(tmp_path / "b")
    assert shards.read_index(tmp_path / "b")["splits"]
    monkeypatch.setattr(shards, "INDEX_BYTES", size - 1)
    with pytest.raises(
        configs.ConfigError, match=r"index\.json: would have .* several directories"
    ):
        write(tmp_path / "c")
    assert not (tmp_path / "c" / "index.json").exists()
