"""Kinds of files: what other programs write is read as they mean it, and what lies is refused in bounded memory."""

import bz2
import json
import lzma
import resource

import numpy as np
import pytest

from fp8jax import config as configs
from fp8jax.data import documents, inspection, prepare, shards

pa = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")
zstandard = pytest.importorskip("zstandard")

TEXTS = [f"Chapter {n}: naïve £{n} — {'Anne Elliot ' * (n % 7)}\r\n\0" for n in range(300)] + [
    "",
    " ",
    "\ufeff",
    "𝄞",
]
JSONL = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def read(path, field="text", skip=None):
    """All documents of a file."""
    found = []
    for piece in documents.pieces(str(path), 1 << 14):
        found += [
            "".join(blocks) for blocks in documents.read(piece, field, lambda more: None, skip)
        ]
    return found


def long_window(content, log=28):
    parameters = zstandard.ZstdCompressionParameters(window_log=log, enable_ldm=True)
    stream = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return stream.compress(content) + stream.flush()


COMPRESSORS = {
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.compress,
    "zst ": long_window,
    "zst  ": lambda content: long_window(content, 31),
}


@pytest.mark.parametrize("kind", COMPRESSORS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_compressed_lines(tmp_path, kind, name):
    compress = COMPRESSORS[kind]
    path = tmp_path / f"{name}.{kind.strip()}"
    half = len(JSONL) // 2
    path.write_bytes(
        compress(JSONL[:half]) + compress(JSONL[half:])
    )  # streams one after another are one
    assert read(path) == TEXTS
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(configs.ConfigError, match="is damaged or cut off near byte"):
        read(path)
    path.write_bytes(b"\0\1\2\3 not compressed at all")
    with pytest.raises(configs.ConfigError, match="is damaged or cut off near byte"):
        read(path)


def test_a_few_bytes_that_stand_for_gigabytes_stay_few(tmp_path):
    """A line of zeros without an end: refused at the longest line, not held whole."""
    path = tmp_path / "a.txt.zst"
    zeros = zstandard.ZstdCompressor(level=19).compressobj()
    block = bytes(1 << 24)
    path.write_bytes(b"".join(zeros.compress(block) for _ in range(64)) + zeros.flush())
    assert path.stat().st_size < 1 << 18
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (piece,) = documents.pieces(str(path), 1 << 30)
    for blocks in documents.read(piece, "text", lambda more: None):
        assert sum(map(len, blocks)) == 1 << 30
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KiB


def test_integers_of_thousands_of_digits_are_json(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "n": ' + "7" * 5000 + "}\n")
    assert read(path) == ["one"]


def test_text_within_objects_and_lists(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        '{"a": {"b": "inner"}}\n{"a.b": "whole name"}\n{"a": {"b": ["two", "lines"]}}\n'
    )
    assert read(path, "a.b") == ["inner", "whole name", "two\nlines"]


@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_columns_that_hold_text(tmp_path, kind):
    columns = {
        "text": pa.array(TEXTS),
        "large": pa.array(TEXTS, pa.large_string()),
        "dictionary": pa.array(TEXTS).dictionary_encode(),
        "list": pa.array([text.split(" ") for text in TEXTS]),
        "struct": pa.array([{"inner": text, "n": 1} for text in TEXTS]),
    }
    table = pa.table(columns)
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.arrow")
    if kind == "parquet":
        parquet.write_table(table, path, row_group_size=70)
    else:
        opener = pa.ipc.new_file if kind == "file" else pa.ipc.new_stream
        with opener(path, table.schema) as writer:
            for batch in table.to_batches(max_chunksize=70):
                writer.write_batch(batch)
    for name in ("text", "large", "dictionary", "struct.inner"):
        assert read(path, name) == TEXTS, name
    assert read(path, "list") == [text.replace(" ", "\n") for text in TEXTS]
    for name in ("struct", "nothing", "struct.nothing", "struct.n"):
        with pytest.raises(
            configs.ConfigError, match="has no column .* of text; --text_field is one of text "
        ):
            read(path, name)


def test_a_column_that_is_there_twice_is_refused(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(configs.ConfigError, match="has 2 columns 'text'; rename one"):
        read(tmp_path / "a.parquet")


def test_a_dictionary_is_not_expanded(tmp_path):
    """One text of 16 MiB in each of 256 rows: 4 GiB, were they all there at once."""
    once = "a" * (1 << 24)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 256, pa.int32()), pa.array([once]))
    parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 4096
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (piece,) = documents.pieces(str(tmp_path / "a.parquet"), 1 << 30)
    rows = 0
    for _ in documents.read(piece, "text", lambda more: None):
        rows += 1
        if rows == 8:
            break
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000  # KiB


def test_bad_rows_are_errors_or_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [
        '{"text": "one"}',
        "{",
        '{"text": 3}',
        '{"text": "two"}',
        '{"other": "x"}',
        '{"text": "three"}',
    ]
    path.write_text("\n".join(lines) + "\n")
    table = pa.table({"text": ["four", None, "five"]})
    parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(configs.ConfigError, match="a.jsonl: line 2 is not JSON"):
        prepare.prepare([tmp_path], tmp_path / "out", validation_fraction=0)
    said = []
    prepare.prepare(
        [tmp_path],
        tmp_path / "skipped",
        validation_fraction=0,
        skip_bad_rows=True,
        note=said.append,
    )
    index = shards.read_index(tmp_path / "skipped")
    assert index["skipped_rows"] == 4 and index["splits"]["train"]["documents"] == 5
    assert (
        "4 rows that hold no text, first " in said[-1] and "a.jsonl: line 2 is not JSON" in said[-1]
    )


@pytest.mark.parametrize("suffix", ["parquet", "arrow"])
def test_tables_of_token_ids(tmp_path, suffix):
    ids = [[65, 66], [67], [], [68, 256, 69, 256]]
    table = pa.table({"input_ids": pa.array(ids, pa.list_(pa.int32())), "n": [1, 2, 3, 4]})
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        parquet.write_table(table, path)
    else:
        pytest.importorskip("pyarrow.feather").write_feather(table, path)
    prepare.prepare([path], tmp_path / "out", text_field="input_ids", validation_fraction=0)
    loaded = inspection.tokenizer_of(tmp_path / "out")
    (array,), _ = shards.open_shards(tmp_path / "out", loaded, "train")
    assert array[:].tolist() == [65, 66, 256, 67, 256, 256, 68, 256, 69, 256]
    with pytest.raises(
        configs.ConfigError, match="row 1 has ids from 700 to 700|record 1 has ids from 700 to 700"
    ):
        parquet.write_table(pa.table({"input_ids": [[700]]}), tmp_path / "b.parquet")
        prepare.prepare(
            [tmp_path / "b.parquet"], tmp_path / "b", text_field="input_ids", validation_fraction=0
        )


def test_an_npy_record_of_impossible_size_is_refused(tmp_path):
    module = pytest.importorskip("array_record.python.array_record_module")
    header = (
        b"\x93NUMPY\x01\x00\x76\x00"
        + b"{'descr': '<i4', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(117)
        + b"\n"
    )
    writer = module.ArrayRecordWriter(str(tmp_path / "a.array_record"), "group_size:1")
    writer.write(header)
    writer.close()
    with pytest.raises(configs.ConfigError, match="record 0 is neither a .npy array"):
        prepare.prepare([tmp_path / "a.array_record"], tmp_path / "out", validation_fraction=0)


def test_a_damaged_table_is_one_line(tmp_path):
    parquet.write_table(
        pa.table({"text": TEXTS}), tmp_path / "a.parquet", use_dictionary=False, compression="none"
    )
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    for at in np.random.default_rng(0).integers(4, len(content) // 2, 200):
        content[at] ^= 0xFF
    (tmp_path / "a.parquet").write_bytes(content)
    with pytest.raises(
        configs.ConfigError, match="a.parquet: (row|cannot be read after row|is not a parquet)"
    ) as caught:
        read(tmp_path / "a.parquet")
    assert "\n" not in str(caught.value)


def test_offsets_that_lead_out_of_a_table_are_refused(tmp_path):
    """Arrow does not look at them: reading the values would follow them through memory."""
    path = tmp_path / "a.arrow"
    with pa.ipc.new_file(path, pa.schema({"text": pa.string()})) as writer:
        writer.write_table(pa.table({"text": ["Anne", "Elliot", "Kellynch"]}))
    offsets = np.array([0, 4, 10, 18], "<i4").tobytes()
    assert path.read_bytes().count(offsets) == 1
    path.write_bytes(
        path.read_bytes().replace(offsets, np.array([0, 4, 10, 1 << 30], "<i4").tobytes())
    )
    with pytest.raises(
        configs.ConfigError, match=r"a\.arrow: cannot be read after row 0: .*offset"
    ):
        read(path)
