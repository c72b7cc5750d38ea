"""safetensors files: what is written is the format's own, and what lies about itself is refused."""

import json
import math
import pathlib
import struct
import time

import ml_dtypes
import numpy as np
import pytest

from fp8jax.interop.hf_safetensors import (
    INDEX,
    SINGLE,
    HuggingFaceError,
    TensorFiles,
    read_json,
    write_files,
)

A = np.arange(6, dtype=np.float32).reshape(2, 3)


def file(path, header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)


def entry(start=0, stop=24, shape=(2, 3), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, stop]}


def test_a_written_file_read_by_hand(tmp_path):
    tensors = {"a": ((2, 3), lambda: A), "b": ((), lambda: np.float32(7).reshape(()))}
    write_files(tmp_path, tensors, np.dtype(np.float32), 10**6)
    raw = (tmp_path / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0 and header.pop("__metadata__") == {"format": "pt"}
    assert header == {"a": entry(), "b": entry(24, 28, ())}
    assert raw[8 + length :] == A.tobytes() + struct.pack("<f", 7)


@pytest.mark.parametrize(
    "dtype", [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
)
def test_round_trip_in_shards_no_larger_than_asked(tmp_path, dtype):
    rng = np.random.default_rng(0)
    arrays = {f"t{i}": rng.normal(size=(i + 1, 5)).astype(dtype) for i in range(8)} | {
        "empty": np.zeros((0, 4), dtype)
    }
    limit = 40 * dtype.itemsize
    write_files(tmp_path, {n: (a.shape, lambda a=a: a) for n, a in arrays.items()}, dtype, limit)
    files = TensorFiles(tmp_path)
    assert {n: files.read(n).tobytes() for n in arrays} == {
        n: a.tobytes() for n, a in arrays.items()
    }
    assert all(
        files.read(n).shape == a.shape and files.read(n).dtype == dtype for n, a in arrays.items()
    )
    index = json.loads((tmp_path / INDEX).read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 2 and shards == {p.name for p in tmp_path.glob("*.safetensors")}
    for shard in shards:
        held = [arrays[n].nbytes for n, where in index["weight_map"].items() if where == shard]
        assert sum(held) <= limit or len(held) == 1
    assert index["metadata"]["total_size"] == sum(a.nbytes for a in arrays.values())


@pytest.mark.parametrize(
    ("header", "data", "length", "words"),
    [
        ({"a": entry()}, A.tobytes(), 10**12, "header has 1000000000000 bytes"),
        ({"a": entry()}, A.tobytes()[:-1], None, "truncated"),
        ({"a": entry()}, A.tobytes() + b"x", None, "25 bytes of data"),
        ({"a": entry(stop=20)}, A.tobytes(), None, "gives a shape"),
        ({"a": entry(shape=(2, -3))}, A.tobytes(), None, "gives a shape"),
        ({"a": entry(4, 28)}, A.tobytes(), None, "a starts at byte 4"),
        ({"a": entry(-8, 16)}, A.tobytes(), None, "gives a shape"),
        ({"a": entry(), "b": entry()}, A.tobytes(), None, "b starts at byte 0"),
        ({"a": entry(dtype="F3")}, A.tobytes(), None, "entry of a"),
        ({"a": {"dtype": "F32"}}, A.tobytes(), None, "entry of a"),
        ({"a": 3}, A.tobytes(), None, "entry of a"),
        (b'{"a":1,"a":2}', b"", None, "a stands twice"),
        (b"[" * 10**5, b"", None, "is not JSON"),
        (b"\xff\xfe", b"", None, "is not JSON"),
        (b"[]", b"", None, "not a JSON object"),
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, header, data, length, words):
    file(tmp_path / SINGLE, header, data, length)
    with pytest.raises(HuggingFaceError, match=words) as caught:
        TensorFiles(tmp_path)
    assert "\n" not in str(caught.value)


def test_sizes_that_overflow_are_refused(tmp_path):
    shape = (2**40, 2**40)
    file(tmp_path / SINGLE, {"a": entry(0, 4 * math.prod(shape), shape)}, A.tobytes())
    with pytest.raises(HuggingFaceError, match="truncated"):
        TensorFiles(tmp_path)


def test_other_dtypes_are_known_but_not_read(tmp_path):
    file(tmp_path / SINGLE, {"a": entry(0, 6, dtype="I8")}, bytes(6))
    with pytest.raises(HuggingFaceError, match="a has dtype I8"):
        TensorFiles(tmp_path).read("a")


@pytest.mark.parametrize(
    "name",
    [
        "../stolen.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..\\m.safetensors",
        "model.bin",
        "",
    ],
)
def test_an_index_names_only_safetensors_files_beside_it(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    file(tmp_path.parent / "stolen.safetensors", {"a": entry()}, A.tobytes())
    with pytest.raises(HuggingFaceError, match="not the name of a .safetensors file"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ({"a": "x.safetensors", "b": "x.safetensors"}, "lacks b"),
        ({"a": "missing.safetensors"}, "missing.safetensors: cannot be read"),
        ({"a": "x.safetensors", "c": "y.safetensors"}, "holds a, which .* places in x.safetensors"),
        ({"c": "y.safetensors"}, "holds a, which .* places in no file"),
        ({}, "weight_map"),
        ([1], "weight_map"),
        ({"a": 1}, "weight_map"),
    ],
)
def test_an_index_and_its_files_must_agree(tmp_path, weight_map, words):
    file(tmp_path / "x.safetensors", {"a": entry()}, A.tobytes())
    file(
        tmp_path / "y.safetensors", {"a": entry(), "c": entry(24, 28, (1,))}, A.tobytes() + bytes(4)
    )
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(HuggingFaceError, match=words):
        TensorFiles(tmp_path)


def test_pickled_weights_are_not_looked_at(tmp_path):
    pathlib.Path(tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(HuggingFaceError, match="no pickle"):
        TensorFiles(tmp_path)


def test_a_name_twice_is_refused_at_once(tmp_path):
    entries = ",".join(f'"t{i % 32_000}":0' for i in range(64_000))
    file(tmp_path / SINGLE, f"{{{entries}}}".encode())
    begin = time.monotonic()
    with pytest.raises(HuggingFaceError, match="t0 stands twice"):
        TensorFiles(tmp_path)
    assert time.monotonic() - begin < 5  # 22 s where each name was looked for among all before it


def test_a_sparse_config_of_gigabytes_is_not_read(tmp_path):
    with (tmp_path / "config.json").open("wb") as sparse:
        sparse.truncate(3 << 30)
    with pytest.raises(HuggingFaceError, match="has more than 67108864 bytes"):
        read_json(tmp_path / "config.json")
