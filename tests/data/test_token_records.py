"""ArrayRecord files of token ids, written by the array_record package itself, come out of prepared shards as they went in."""

import io

import numpy as np
import pytest

from fp8jax.config import ConfigError
from fp8jax.data import prepare, shards, token_records, tokenizer

array_record_module = pytest.importorskip("array_record.python.array_record_module")
BYTE = tokenizer.load("byte")
RANDOM = np.random.default_rng(0)
DOCUMENTS = [RANDOM.integers(0, 256, int(size)) for size in RANDOM.integers(0, 60, 300)]


def npy(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def write(path, records):
    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:8")
    for record in records:
        writer.write(record)
    writer.close()
    return path


def read_back(directory, split):
    arrays, _ = shards.open_shards(directory, BYTE, split)
    ends = shards.open_ends(directory, BYTE, split)
    return [
        array[start : stop - 1].tolist()
        for array, one in zip(arrays, ends, strict=True)
        for start, stop in zip([0, *one[:-1].tolist()], one[:].tolist(), strict=True)
    ]


@pytest.mark.parametrize(
    "encode",
    [
        lambda ids: ids.astype("<i4").tobytes(),
        lambda ids: np.append(ids, 256).astype("<i4").tobytes(),
        lambda ids: npy(ids.astype(np.uint16)),
        lambda ids: npy(ids.astype(">i8")),
    ],
    ids=["int32", "ended", "npy uint16", "npy big-endian"],
)
def test_read_back_equals_what_was_given(tmp_path, monkeypatch, encode):
    monkeypatch.setattr(prepare, "PART_BYTES", (20_000, 1 << 30))
    monkeypatch.setattr(token_records, "_TOGETHER", 7)
    path = write(tmp_path / "a.array_record", map(encode, DOCUMENTS))
    told = []
    found = prepare.prepare(
        [path],
        tmp_path / "out",
        validation_fraction=0.2,
        tell=lambda done, total: told.append((done, total)),
    )
    train, held_out = read_back(tmp_path / "out", "train"), read_back(tmp_path / "out", "held_out")
    assert len(found["train"]["shards"]) > 1 and 20 < len(held_out) < 120
    assert sorted(train + held_out) == sorted(document.tolist() for document in DOCUMENTS)
    assert train == [document.tolist() for document in DOCUMENTS if document.tolist() in train]
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 0
    prepare.prepare([path], tmp_path / "two", validation_fraction=0.2, workers=2)
    for file in (tmp_path / "out").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes(), file.name


def test_a_record_of_several_documents_is_split_at_their_ends(tmp_path):
    records = [[1, 2, 256, 256, 3], [256], [4, 256], [], [5]]
    path = write(tmp_path / "a.array_record", [np.array(ids, "<i4").tobytes() for ids in records])
    prepare.prepare([path], tmp_path / "out", validation_fraction=0)
    assert read_back(tmp_path / "out", "train") == [[1, 2], [], [3], [], [4], [], [5]]


@pytest.mark.parametrize(
    ("record", "fault"),
    [
        (b"abc", "record 1 is neither a .npy array nor little-endian int32"),
        (npy(np.zeros(3)), "record 1 is an array of float64 [3], not a sequence of integers"),
        (npy(np.zeros((2, 2), np.int32)), "record 1 is an array of int32 [2, 2]"),
        (npy(np.arange(9))[:-4], "record 1 is neither"),
        (
            np.array([5, 257], "<i4").tobytes(),
            "record 1 has ids from 5 to 257; those of --tokenizer are 0 to 256",
        ),
        (np.array([-1], "<i4").tobytes(), "record 1 has ids from -1 to -1"),
    ],
)
def test_bad_records_are_named(tmp_path, record, fault):
    path = write(tmp_path / "a.array_record", [np.arange(3, dtype="<i4").tobytes(), record])
    with pytest.raises(ConfigError) as caught:
        prepare.prepare([path], tmp_path / "out", validation_fraction=0)
    assert f"{path}: {fault}" in str(caught.value)


def test_what_is_no_array_record_or_has_no_text_is_refused(tmp_path):
    whole = write(tmp_path / "a.array_record", [np.arange(3, dtype="<i4").tobytes()])
    (tmp_path / "cut.array_record").write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(
        ConfigError,
        match=r"cut.array_record: holds no records; it is empty, cut off, or not an ArrayRecord file",
    ):
        prepare.prepare([tmp_path / "cut.array_record"], tmp_path / "out")
    pytest.importorskip("tokenizers")
    with pytest.raises(ConfigError, match=r"a.array_record: holds token ids, not text"):
        prepare.train_tokenizer([whole], tmp_path / "new", 300)


def test_damage_within_is_one_line(tmp_path):
    path = write(
        tmp_path / "a.array_record",
        [RANDOM.integers(0, 256, 1000, "<i4").tobytes() for _ in range(100)],
    )
    content = bytearray(path.read_bytes())
    content[40_000:40_050] = bytes(50)
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"a.array_record: (cannot be read after record \d+|holds no records)"
    ) as caught:
        prepare.prepare([path], tmp_path / "out", validation_fraction=0)
    assert "\n" not in str(caught.value)
