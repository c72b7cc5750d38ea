"""The embedded corpus: the very texts its README names, and the script that made them."""

import hashlib
import importlib.resources
import importlib.util
import lzma
import struct
import zlib

import numpy as np
import pytest

from fp8jax import config as configs
from fp8jax.data import sources

CORPUS = importlib.resources.files("fp8jax.data") / "corpus"
TEXTS = {
    "emma": (883027, "dd08b340a56ad4a0a00718d5682528a5a5886ae0aef91c9e0fa528074fa64b75"),
    "mansfield_park": (883279, "e0e9ef3863ea77f51f6070062ee0dd50ad9b933223880617629e4e4963ea40ff"),
    "northanger_abbey": (
        433410,
        "8618a5acf5be50cc6e9b7680c7469fb6012649ab08c709dfc63c6367989fd31d",
    ),
    "pride_and_prejudice": (
        684767,
        "2e44edaa4946d64ad541c68e0224f5d672f43bf3ce2a8a0b0637ad5e02fc6eb3",
    ),
    "sense_and_sensibility": (
        673687,
        "0996d90842bbe8093f3b8142c1e77d1b20cff52d1d0615f3ed67733653e74e26",
    ),
    "persuasion": (466853, "726513a6c18bb678427bcbcf7c72d0d20816a67c25b0471b26ddcabf3ebac140"),
}


@pytest.mark.parametrize(
    ("split", "novels"), [("train", list(TEXTS)[:5]), ("held_out", ["persuasion"])]
)
def test_texts_are_the_ones_that_the_readme_names(split, novels):
    readme = (CORPUS / "README.md").read_text()
    documents = sources.embedded_documents(split)
    assert [(len(text), hashlib.sha256(text).hexdigest()) for text in documents] == [
        TEXTS[novel] for novel in novels
    ]
    for novel in novels:
        size, digest = TEXTS[novel]
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| `{novel}.txt.xz` |")]
        assert f"{size:,}" in row and digest in row


@pytest.mark.parametrize(("split", "documents"), [("train", 5), ("held_out", 1)])
def test_stream_is_the_texts_each_with_its_end(split, documents):
    stream = sources.load(configs.DataConfig(), split)
    tokens = stream.read(0, len(stream))
    assert (tokens == 256).sum() == documents and tokens[-1] == 256
    parts = np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]
    assert [bytes(part[:-1].tolist()) for part in parts] == sources.embedded_documents(split)


def test_embedded_stream_is_read_once_and_cannot_be_written():
    stream = sources.load(configs.DataConfig(), "held_out")
    assert sources.load(configs.DataConfig(sequence_length=64), "held_out") is stream
    with pytest.raises(ValueError, match="read-only"):
        stream.arrays[0][0] = 1


def test_unknown_split_is_an_error():
    with pytest.raises(ValueError, match="'test' is not one of train, held_out"):
        sources.load(configs.DataConfig(), "test")


def test_make_corpus_reads_the_r_format(tmp_path, monkeypatch):
    def entry(lines):
        header = (
            b"X\n\0\0\0\3\0\4\2\1\0\3\5\0\0\0\0\5UTF-8"
            + b"\0\0\0\x10"
            + struct.pack(">I", len(lines))
        )
        raw = header + b"".join(struct.pack(">II", 0x40009, len(line)) + line for line in lines)
        return struct.pack(">I", len(raw)) + zlib.compress(raw)

    (tmp_path / "Rdata.rdb").write_bytes(
        entry([b"LADY SUSAN", b"", b"A novel"]) + entry([b"Sanditon", b"\xc2\xa31"])
    )
    script = tmp_path / "make_corpus.py"
    script.write_text((CORPUS / "make_corpus.py").read_text())
    spec = importlib.util.spec_from_file_location("make_corpus", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr("sys.argv", ["make_corpus.py", str(tmp_path / "Rdata.rdb")])
    module.main()
    assert (
        lzma.decompress((tmp_path / "lady_susan.txt.xz").read_bytes()) == b"LADY SUSAN\n\nA novel"
    )
    assert lzma.decompress((tmp_path / "sanditon.txt.xz").read_bytes()) == b"Sanditon\n\xc2\xa31"
