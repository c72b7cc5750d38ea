"""Raw text to shards: what is read back is what was given, whatever the kind of file, the workers and the interruptions."""

import gzip
import json
import pathlib
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8jax import config as configs
from fp8jax.cli import prepare as command
from fp8jax.data import (
    documents,
    hub,
    inspection,
    prepare,
    prepared_part,
    shards,
    sources,
    tokenizer,
)
from tests.data.raw_text import TEXTS, WRITERS, decoded, lines, write_parquet, write_zst


@pytest.mark.parametrize("kind", ["byte", "bpe"])
@pytest.mark.parametrize("name", WRITERS)
def test_read_back_equals_what_was_given(tmp_path, small_parts, bpe, name, kind):
    WRITERS[name](tmp_path / name)
    name_of = bpe if kind == "bpe" else "byte"
    found = prepare.prepare(
        [tmp_path / name], tmp_path / "out", tokenizer=name_of, validation_fraction=0.2
    )
    train, held_out = decoded(tmp_path / "out", "train"), decoded(tmp_path / "out", "held_out")
    assert sorted(train + held_out) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text not in held_out] and 4 < len(held_out) < 25
    assert found["train"]["text_bytes"] == sum(len(text.encode()) for text in train)
    assert shards.verify(tmp_path / "out") is None


@settings(
    deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    texts=st.lists(st.text(), min_size=1, max_size=12),
    part=st.integers(1, 300),
    kind=st.sampled_from(["byte", "bpe"]),
)
def test_any_text_survives(tmp_path_factory, bpe, texts, part, kind):
    directory = tmp_path_factory.mktemp("any")
    (directory / "a.jsonl").write_bytes(lines(texts))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "PART_BYTES", (part, 1 << 30))
        patch.setattr(prepared_part, "LONG", 5)
        prepare.prepare(
            [directory / "a.jsonl"],
            directory / "out",
            tokenizer=bpe if kind == "bpe" else "byte",
            validation_fraction=0,
        )
    assert decoded(directory / "out", "train") == texts


@settings(deadline=None, max_examples=25)
@given(
    texts=st.lists(st.text(max_size=40), max_size=12),
    part=st.integers(1, 200),
    newline=st.sampled_from(["\n", "\r\n", "\n\n"]),
)
def test_pieces_of_a_file_share_its_lines(tmp_path_factory, texts, part, newline):
    path = tmp_path_factory.mktemp("pieces") / "a.jsonl"
    path.write_bytes(lines(texts).decode().replace("\n", newline).encode())
    progress = []
    found = [piece for piece in documents.pieces(str(path), part)]
    assert [
        "".join(text) for piece in found for text in documents.read(piece, "text", progress.append)
    ] == texts
    assert sum(piece.size for piece in found) == path.stat().st_size


class FakeDataset:
    """What `prepare` uses of a datasets.Dataset."""

    def __init__(self, columns):
        self.columns, self.column_names = columns, list(columns)
        self.features = {
            name: type("Value", (), {"dtype": "string" if name == "text" else "int64"})
            for name in columns
        }
        self.data = type("Table", (), {"nbytes": 5000})

    def __len__(self):
        return len(self.columns["text"])

    def __getitem__(self, rows):
        return {name: values[rows] for name, values in self.columns.items()}

    def select_columns(self, names):
        return FakeDataset({name: self.columns[name] for name in names})


def test_datasets_of_the_hub(tmp_path, small_parts, monkeypatch):
    def load_dataset(path, config, split):
        if path != "owner/name":
            raise ConnectionError(f"Couldn't reach {path!r} on the Hub\nmore")
        return FakeDataset(
            {"text": TEXTS + [None] * (config == "holes"), "id": list(range(len(TEXTS)))}
        )

    monkeypatch.setattr(hub, "_is_reachable", lambda: True)
    monkeypatch.setitem(sys.modules, "datasets", type(sys)("datasets"))
    monkeypatch.setattr(sys.modules["datasets"], "load_dataset", load_dataset, raising=False)
    prepare.prepare(["hf:owner/name:en"], tmp_path / "out", validation_fraction=0)
    assert (
        decoded(tmp_path / "out", "train") == TEXTS
        and len(list((tmp_path / "out").glob("train_*.bin"))) == 5
    )
    for name, field, fault in [
        (
            "hf:owner/other",
            "text",
            "cannot be had: Couldn't reach 'owner/other' on the Hub; without network",
        ),
        ("hf:owner/name:de", "id", "has no column 'id' of text; --text_field is one of text, id"),
        ("hf:owner/name:holes", "text", "row 66 has no text"),
    ]:
        with pytest.raises(configs.ConfigError) as caught:
            prepare.prepare(
                [name], tmp_path / name.rpartition(":")[2], text_field=field, validation_fraction=0
            )
        assert f"{name}: {fault}" in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        configs.ConfigError, match="hf:a/b: needs the package datasets; pip install datasets"
    ):
        prepare.prepare(["hf:a/b"], tmp_path / "none")


def test_a_hub_out_of_reach_is_asked_once(monkeypatch, capfd):
    """One line at once, where the libraries would try again for half a minute, with two lines each time."""
    pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        configs.ConfigError,
        match="hf:nope/nope: cannot be had: the hub cannot be reached, and no earlier download",
    ):
        hub.dataset("hf:nope/nope")
    assert "Retrying" not in "".join(capfd.readouterr())
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_text_files_and_directories(tmp_path):
    for name, text in [
        ("b/2.txt", "two\r\n"),
        ("b/10.md", "ten"),
        ("b/c/1.txt", ""),
        ("a.txt", "ä" * 300_000),
    ]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    (tmp_path / "b" / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / "b" / "3.txt.gz").write_bytes(gzip.compress(b"three"))
    prepare.prepare(
        [tmp_path / "a.txt", tmp_path / "b", tmp_path / "b/*.txt"],
        tmp_path / "out",
        validation_fraction=0,
    )
    assert decoded(tmp_path / "out", "train") == ["ä" * 300_000, "ten", "two\r\n", "three", ""]
    with pytest.raises(configs.ConfigError, match="lists no shards of split 'held_out'"):
        shards.open_shards(tmp_path / "out", tokenizer.load("byte"), "held_out")


def test_one_text_file_is_held_out_from_its_last_lines(tmp_path):
    text = "".join(f"line {n}\n" for n in range(1000))
    (tmp_path / "a.txt").write_text(text)
    prepare.prepare([tmp_path / "a.txt"], tmp_path / "out", validation_fraction=0.1)
    (train,), (held_out,) = (
        decoded(tmp_path / "out", "train"),
        decoded(tmp_path / "out", "held_out"),
    )
    assert (
        train + held_out == text
        and train.endswith("\n")
        and 0.09 < len(held_out) / len(text) < 0.11
    )


@pytest.mark.parametrize("name", [*WRITERS, "a.txt", "long"])
def test_progress_rises_to_the_size_of_the_input(tmp_path, small_parts, name):
    path = tmp_path / (name if name != "long" else "a.jsonl")
    writer = WRITERS | {
        "a.txt": lambda path: path.write_text("some\n" * 9999),
        "long": lambda path: path.write_bytes(lines(["x" * 9999])),
    }
    writer[name](path)
    told = []
    prepare.prepare(
        [path],
        tmp_path / "out",
        validation_fraction=0,
        tell=lambda done, total: told.append((done, total)),
    )
    done = [one for one, _ in told]
    assert (
        done[0] == 0
        and done == sorted(done)
        and len({total for _, total in told}) == 1
        and told[-1][0] == told[-1][1] > 0
    )


def test_copies_of_a_document_are_on_one_side(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([f"text {n % 50}" for n in range(500)]))
    prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "out", validation_fraction=0.3)
    train, held_out = (set(decoded(tmp_path / "out", split)) for split in shards.SPLITS)
    assert train and held_out and not train & held_out


def test_few_documents_leave_one_for_the_held_out_split(tmp_path, small_parts):
    (tmp_path / "a.jsonl").write_bytes(lines(["x" * 900, "y" * 900, "z" * 900]))
    prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "out", validation_fraction=1e-6)
    assert (
        len(decoded(tmp_path / "out", "train")),
        len(decoded(tmp_path / "out", "held_out")),
    ) == (2, 1)
    assert shards.verify(tmp_path / "out") is None
    (tmp_path / "b.jsonl").write_bytes(lines(["x"]))
    with pytest.raises(configs.ConfigError, match="one document alone cannot be held out"):
        prepare.prepare([tmp_path / "b.jsonl"], tmp_path / "b")
    (tmp_path / "c.jsonl").write_bytes(b"\n\n")
    with pytest.raises(configs.ConfigError, match="holds no documents at all"):
        prepare.prepare([tmp_path / "c.jsonl"], tmp_path / "c")


def test_long_documents_are_tokenised_as_if_whole(tmp_path, bpe, monkeypatch):
    text = sources.embedded_documents("held_out")[0][:60_000].decode()
    monkeypatch.setattr(prepared_part, "LONG", 1000)
    (tmp_path / "a.jsonl").write_bytes(lines([text]))
    prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "out", tokenizer=bpe, validation_fraction=0)
    loaded = tokenizer.load(bpe)
    (array,), _ = shards.open_shards(tmp_path / "out", loaded, "train")
    np.testing.assert_array_equal(array[:-1], loaded.encode(text))


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("a.txt", None, "no such file, directory or pattern"),
        ("a.txt", b"fine\n" * 5 + b"\xff\xfe", "is not UTF-8 near byte 25"),
        (
            "a.jsonl",
            lines(["fine"] * 99) + b'{"body": "x"}\n',
            "line 100 is not a JSON object with a string field 'text'",
        ),
        (
            "a.jsonl",
            lines(["fine"] * 99) + b'{"text": 3}\n',
            "line 100 is not a JSON object with a string field",
        ),
        ("a.jsonl", b"\n\n[1]\n", "line 3 is not a JSON object"),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "cut', "line 2 is not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1 is not JSON"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1 is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1 has half of a surrogate pair"),
        ("a.jsonl.gz", gzip.compress(lines(TEXTS))[:-9], "is damaged or cut off near byte"),
        ("a.jsonl.gz", b"not gzip", "is damaged or cut off"),
        ("a.jsonl.zst", b"not zstd", "is damaged or cut off"),
        ("a.parquet", b"not parquet", "is not a parquet file"),
        ("a.parquet", b"", "is not a parquet file"),
        ("a.pdf", b"%PDF", "'.pdf' is not a kind of text file that is read; use one of .jsonl"),
    ],
)
def test_bad_input_is_one_line_that_says_where(tmp_path, small_parts, name, content, fault):
    if name.endswith(("parquet", "zst")):
        pytest.importorskip("pyarrow")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(configs.ConfigError) as caught:
        prepare.prepare([tmp_path / name], tmp_path / "out", validation_fraction=0)
    assert (
        str(tmp_path / name) in str(caught.value)
        and fault in str(caught.value)
        and "\n" not in str(caught.value)
    )
    assert not (tmp_path / "out" / "index.json").exists()


def test_bad_parquet_and_cut_zst_say_where(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    write_zst(tmp_path / "a.jsonl.zst", lines(TEXTS))
    (tmp_path / "a.jsonl.zst").write_bytes((tmp_path / "a.jsonl.zst").read_bytes()[:-5])
    write_parquet(tmp_path / "a.parquet", [*["fine"] * 20, None])
    write_parquet(tmp_path / "b.parquet", [pyarrow.scalar("x")])
    for name, field, fault in [
        ("a.jsonl.zst", "text", "is damaged or cut off"),
        ("a.parquet", "text", "row 21 has no text in column"),
        (
            "b.parquet",
            "body",
            "has no column 'body' of text; --text_field is one of text (string), number",
        ),
        ("b.parquet", "number", "has no column 'number' of text"),
    ]:
        with pytest.raises(configs.ConfigError) as caught:
            prepare.prepare(
                [tmp_path / name], tmp_path / "out", text_field=field, validation_fraction=0
            )
        assert f"{tmp_path / name}: {fault}" in str(caught.value)
        (tmp_path / "out" / "unfinished" / "plan").unlink()


def test_commands(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS, "body"))
    out = str(tmp_path / "out")
    arguments = [
        "--input",
        str(tmp_path / "*.jsonl"),
        "--out",
        out,
        "--text_field",
        "body",
        "--workers",
        "1",
    ]
    assert command.main([*arguments, "--train_tokenizer", "300"]) == 0
    assert f"--config.data.source={out}" in capsys.readouterr().out
    assert command.main(["inspect", out, "--verify"]) == 0
    shown = capsys.readouterr().out
    assert (
        "Chapter 0: naïve" in shown
        and "a.jsonl: 65 documents" in shown
        and "checksums as written" in shown
        and "\0" not in shown
    )
    assert inspection.tokenizer_of(out).vocab_size <= 300
    assert command.main([*arguments, "--tokenizer", "byte"]) == 2
    assert command.main(["inspect", str(tmp_path)]) == 2
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    for damaged in (
        index | {"splits": {"train": {}}},
        index | {"splits": []},
        index | {"best_fit": [1]},
        index | {"sources": [1]},
    ):
        (tmp_path / "out" / "index.json").write_text(json.dumps(damaged))
        assert command.main(["inspect", out]) == 2
    assert capsys.readouterr().err.count("\n") == 6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_document_of_100_megabytes(tmp_path, bpe, name):
    text = ("naïve " + sources.embedded_documents("held_out")[0].decode()) * 215
    (tmp_path / name).write_bytes(lines([text]) if name == "a.jsonl" else text.encode())
    prepare.prepare([tmp_path / name], tmp_path / "out", tokenizer=bpe, validation_fraction=0)
    assert len(text) > 100_000_000 and decoded(tmp_path / "out", "train") == [text]


def test_length_histogram_counts_powers_of_two():
    lengths = [1, 2, 3, 4, 7, 8, 1024]
    assert inspection.length_histogram(
        (np.cumsum(lengths).astype(np.uint64), np.array([1], np.uint64))
    )[:4] == [(1, 1, 2), (2, 3, 2), (4, 7, 2), (8, 15, 1)]


def test_a_file_is_read_once_whatever_its_path_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tree = tmp_path / "tree" / "inner"
    tree.mkdir(parents=True)
    (tree / "a.txt").write_text("once")
    (tmp_path / "link.txt").symlink_to(tree / "a.txt")
    (tmp_path / "linked").symlink_to(tree)
    (tree / "back").symlink_to(tmp_path / "tree")
    for inputs in (
        ["./tree/**"],
        ["tree//inner/a.txt", "tree"],
        ["tree", str(tree)],
        ["link.txt", "tree"],
        ["linked", "tree"],
        ["."],
    ):
        assert len(documents.find(inputs)) == 1, inputs


def test_what_is_no_text_of_a_directory_is_left_out_and_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    others = (
        "README.md",
        "dataset_info.json",
        ".ipynb_checkpoints/a.txt",
        ".cache/b.jsonl",
        "._x.jsonl",
        "LICENSE.txt",
    )
    for name in ("a.txt", "b.txt", *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text of some length\n" * 40)
    said = []
    assert documents.find(["."], tell=said.append) == ["./a.txt", "./b.txt"]
    assert len(said) == 1 and "left out: " in said[0] and " more" in said[0]
    assert documents.find(["README.md"]) == ["README.md"]
    (tmp_path / "b.txt").write_text("text of another kind\n" * 40)
    first = prepare.prepare(["."], "tokens", validation_fraction=0.01)
    assert sum(found["documents"] for found in first.values()) == 2
    assert (
        prepare.prepare(["."], "tokens", validation_fraction=0.01) == first
    )  # its own output is no input
    assert (
        prepare.prepare(["."], "again", validation_fraction=0.01) == first
    )  # nor is that of another


def test_a_normalising_tokenizer_is_remembered_with_its_shards(tmp_path, bpe):
    content = json.loads(pathlib.Path(bpe).read_text()) | {"normalizer": {"type": "NFC"}}
    (tmp_path / "nfc.json").write_text(json.dumps(content))
    (tmp_path / "a.jsonl").write_bytes(lines(["e\u0301 one", "two", "three"]))
    options = {"tokenizer": str(tmp_path / "nfc.json"), "validation_fraction": 0.4}
    with pytest.raises(configs.ConfigError, match="--allow_normalisation"):
        prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "out", **options)
    said = []
    prepare.prepare(
        [tmp_path / "a.jsonl"],
        tmp_path / "out",
        **options,
        allow_normalisation=True,
        note=said.append,
    )
    assert said == ["tokenizer: its text is brought into NFC first"]
    assert tokenizer.of(configs.DataConfig(source=str(tmp_path / "out"))).notes
    assert sorted(decoded(tmp_path / "out", "train") + decoded(tmp_path / "out", "held_out")) == [
        "three",
        "two",
        "\u00e9 one",
    ]
