"""Tokenizers: round trips, byte counts, and what is refused."""

import base64
import importlib.util
import json
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax import config as configs
from fp8jax.data import sources, tokenizer


def train_bpe(path, special=("<|endoftext|>",), **changes):
    """A byte-level BPE of 400 ids in a tokenizer.json; `changes` replace top-level entries of the file."""
    hf = pytest.importorskip("tokenizers")
    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = hf.decoders.ByteLevel()
    alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
    trainer = hf.trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([sources.embedded_documents("held_out")[0][:50_000].decode()], trainer)
    path.write_text(json.dumps(json.loads(bpe.to_str()) | changes))
    return str(path)


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    return tokenizer.load(train_bpe(tmp_path_factory.mktemp("bpe") / "tokenizer.json"))


@given(st.text())
def test_byte_round_trip(text):
    byte = tokenizer.load("byte")
    ids = byte.encode(text)
    assert ids.tolist() == list(text.encode("utf-8"))
    assert byte.decode(ids) == text
    assert byte.token_bytes[ids].sum() == len(text.encode("utf-8"))


@given(st.binary())
def test_any_bytes_encode_as_themselves(raw):
    ids = tokenizer.load("byte").encode(raw)
    assert ids.dtype == np.uint16 and bytes(ids.tolist()) == raw


def test_end_of_document_decodes_to_nothing_and_stands_for_no_bytes():
    byte = tokenizer.load("byte")
    assert byte.decode([72, 256, 105]) == "Hi"
    assert byte.token_bytes[256] == 0 and byte.token_bytes.shape == (byte.vocab_size,)


@pytest.mark.parametrize("ids", [[400], [-1], [65, 4000]])
def test_decoding_ids_outside_the_vocabulary_is_an_error(ids, bpe):
    with pytest.raises(ValueError, match="the tokenizer's are 0 to 256"):
        tokenizer.load("byte").decode(ids)
    with pytest.raises(ValueError, match="the tokenizer's are 0 to 399"):
        bpe.decode(ids)


@settings(deadline=None)
@given(text=st.text())
def test_bpe_round_trip_and_byte_count(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.token_bytes[ids].sum() == len(text.encode("utf-8"))


def test_bpe_shortens_english_and_takes_utf8_bytes(bpe):
    text = "The Elliots of Kellynch, £20,000, naïveté."
    ids = bpe.encode(text)
    assert len(ids) < len(text) and ids.dtype == np.uint16
    assert ids.tolist() == bpe.encode(text.encode()).tolist()


def test_text_that_spells_the_end_of_document_is_ordinary_text(bpe):
    ids = bpe.encode("a<|endoftext|>b")
    assert bpe.end_of_document not in ids
    assert bpe.decode(ids) == "a<|endoftext|>b"
    assert bpe.token_bytes[bpe.end_of_document] == 0


def test_truncation_in_the_file_does_not_cut_documents(tmp_path):
    cut = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    loaded = tokenizer.load(train_bpe(tmp_path / "tokenizer.json", truncation=cut))
    assert loaded.decode(loaded.encode("Captain Wentworth must be out of sight")).endswith("sight")


def test_fingerprint_tells_tokenizers_apart(bpe, tmp_path):
    other = tokenizer.load(
        train_bpe(tmp_path / "tokenizer.json", special=("<|endoftext|>", "<pad>"))
    )
    assert len({bpe.fingerprint, other.fingerprint, tokenizer.load("byte").fingerprint}) == 3


@pytest.fixture(scope="module")
def tekken(tmp_path_factory):
    """A tekken.json of 10 special tokens, all bytes, and a few merges, the last of which is beyond the vocabulary's size."""
    pytest.importorskip("tiktoken")
    texts = [bytes([byte]) for byte in range(256)] + [b"an", b"er", b"ann", b" w", b"beyond"]
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(text).decode(), "token_str": None}
        for rank, text in enumerate(texts)
    ]
    config = {
        "pattern": r" ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+",
        "num_vocab_tokens": len(vocab),
        "default_vocab_size": 270,
        "default_num_special_tokens": 10,
        "version": "v3",
    }
    path = tmp_path_factory.mktemp("tekken") / "tekken.json"
    path.write_text(json.dumps({"config": config, "vocab": vocab}))
    return tokenizer.load(str(path))


@settings(deadline=None)
@given(text=st.text())
def test_tekken_round_trip_and_byte_count(tekken, text):
    ids = tekken.encode(text)
    assert tekken.decode(ids) == text and ids.dtype == np.uint16
    assert tekken.token_bytes[ids].sum() == len(text.encode("utf-8"))
    assert [part.tolist() for part in tekken.encode_batch([text, ""])] == [ids.tolist(), []]


def test_tekken_ids_follow_its_special_tokens(tekken):
    assert tekken.encode("anner w</s>").tolist() == [
        10 + 258,
        10 + 257,
        10 + 259,
        *(10 + byte for byte in b"</s>"),
    ]
    assert (
        tekken.vocab_size == 270
        and tekken.end_of_document == 2
        and tekken.decode([2, 10 + 65, 1]) == "A"
    )
    assert tekken.encode("x").dtype == np.uint16 and tekken.token_bytes[:10].sum() == 0


def test_tekken_by_name_is_that_of_mistral_common():
    pytest.importorskip("tiktoken")
    if importlib.util.find_spec("mistral_common") is None:
        with pytest.raises(configs.ConfigError, match="pip install --no-deps mistral-common"):
            tokenizer.load("tekken")
        return
    loaded = tokenizer.load("tekken")
    text = sources.embedded_documents("held_out")[0][:20_000].decode()
    assert (
        loaded.vocab_size == 131_072
        and loaded.decode(loaded.encode(text)) == text
        and loaded.encode(text).dtype == np.uint32
    )


@pytest.mark.parametrize("vocab_size", [257, 300])
def test_trained_tokenizer_is_a_usable_file(tmp_path, vocab_size):
    pytest.importorskip("tokenizers")
    texts = [sources.embedded_documents("held_out")[0][:20_000].decode()]
    content = tokenizer.train(texts, vocab_size)
    (tmp_path / "tokenizer.json").write_text(content)
    loaded = tokenizer.load(str(tmp_path / "tokenizer.json"))
    assert (
        loaded.vocab_size == vocab_size
        and loaded.decode(loaded.encode("\0 naïve 𝄞\r\n")) == "\0 naïve 𝄞\r\n"
    )
    assert tokenizer.train(texts, vocab_size) == content
    with pytest.raises(configs.ConfigError, match="--train_tokenizer: 256 is below 257"):
        tokenizer.train(texts, 256)


def test_auto_is_the_tokenizer_of_the_first_source(tmp_path, bpe):
    (tmp_path / "tokenizer.json").write_bytes(bpe.file.read_bytes())
    assert tokenizer.of(configs.DataConfig()).fingerprint == "byte"
    assert (
        tokenizer.of(configs.DataConfig(source=f"{tmp_path}=1,embedded=1")).fingerprint
        == bpe.fingerprint
    )
    assert tokenizer.of(configs.DataConfig(source=f"embedded=1,{tmp_path}=1")).fingerprint == "byte"
    assert (
        tokenizer.of(configs.DataConfig(source=str(tmp_path), tokenizer="byte")).fingerprint
        == "byte"
    )
    with pytest.raises(configs.ConfigError, match="index.json: no such file"):
        tokenizer.of(configs.DataConfig(source=str(tmp_path / "gone")))


def test_unusable_files_are_refused_in_one_line(tmp_path):
    def message(path):
        with pytest.raises(configs.ConfigError) as caught:
            tokenizer.load(str(path))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
        return str(caught.value)

    (tmp_path / "torn.json").write_text('{"version": "1.0", "model": {')
    assert "no such file" in message(tmp_path / "missing.json")
    assert "is not a tokenizer.json" in message(tmp_path / "torn.json")
    assert "end-of-document" in message(train_bpe(tmp_path / "endless.json", special=("<pad>",)))
    decoder = {"type": "WordPiece", "prefix": "##", "cleanup": True}
    assert "not byte-level" in message(train_bpe(tmp_path / "wordpiece.json", decoder=decoder))


def _lossy(change):
    """What a change of one part of a byte-level tokenizer.json makes of it."""
    prefix = {
        "type": "ByteLevel",
        "add_prefix_space": True,
        "trim_offsets": True,
        "use_regex": True,
    }
    splits = {
        "type": "Sequence",
        "pretokenizers": [{"type": "Whitespace"}, prefix | {"add_prefix_space": False}],
    }
    return {
        "prefix space": {"pre_tokenizer": prefix},
        "whitespace": {"pre_tokenizer": splits},
        "lowercase": {"normalizer": {"type": "Lowercase"}},
        "accents": {
            "normalizer": {
                "type": "Sequence",
                "normalizers": [{"type": "NFD"}, {"type": "StripAccents"}],
            }
        },
        "strip": {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        "added": {
            "added_tokens": [
                _added(400, "<tool>", lstrip=True),
                _added(0, "<|endoftext|>", special=True),
            ]
        },
    }[change]


def _added(index, content, **flags):
    defaults = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": False,
    }
    return {"id": index, "content": content} | defaults | flags


@pytest.mark.parametrize(
    "change", ["prefix space", "whitespace", "lowercase", "accents", "strip", "added"]
)
def test_tokenizers_that_lose_text_are_refused(tmp_path, change):
    path = train_bpe(tmp_path / "tokenizer.json", **_lossy(change))
    with pytest.raises(
        configs.ConfigError, match="loses text: .*comes back as.*bits per byte would be wrong"
    ) as caught:
        tokenizer.load(path, allow_normalisation=True)
    assert "\n" not in str(caught.value)


def test_an_alphabet_that_lacks_bytes_is_refused(tmp_path):
    hf = pytest.importorskip("tokenizers")
    bpe = hf.Tokenizer(hf.models.BPE())
    bpe.pre_tokenizer, bpe.decoder = (
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
        hf.decoders.ByteLevel(),
    )
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False
    )
    bpe.train_from_iterator(["plain ASCII text and no more"], trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert bpe.encode("é").ids == []  # so that its two bytes would not be counted
    with pytest.raises(configs.ConfigError, match="loses text"):
        tokenizer.load(str(tmp_path / "tokenizer.json"))


def test_an_id_for_what_is_unknown_is_refused(tmp_path):
    hf = pytest.importorskip("tokenizers")
    bpe = hf.Tokenizer(hf.models.BPE(unk_token="<unk>"))
    bpe.pre_tokenizer, bpe.decoder = (
        hf.pre_tokenizers.ByteLevel(add_prefix_space=False),
        hf.decoders.ByteLevel(),
    )
    trainer = hf.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", "<|endoftext|>"], show_progress=False
    )
    bpe.train_from_iterator(["plain ASCII text and no more"], trainer)
    bpe.save(str(tmp_path / "tokenizer.json"))
    assert bpe.encode("é").tokens == ["<unk>", "<unk>"]  # ten bytes would be counted, of two
    with pytest.raises(configs.ConfigError, match="loses text: .*bits per byte would be wrong"):
        tokenizer.load(str(tmp_path / "tokenizer.json"))


def test_normalisation_is_named_and_asked_for(tmp_path):
    path = train_bpe(tmp_path / "tokenizer.json", normalizer={"type": "NFC"})
    with pytest.raises(configs.ConfigError, match="brings text into NFC.*--allow_normalisation"):
        tokenizer.load(path)
    loaded = tokenizer.load(path, allow_normalisation=True)
    assert loaded.notes == ("its text is brought into NFC first",)
    ids = loaded.encode("e\u0301")
    assert loaded.decode(ids) == "\u00e9" and loaded.token_bytes[ids].sum() == 2
    data = configs.DataConfig(tokenizer=path, allow_normalisation=True)
    assert tokenizer.of(data).fingerprint == loaded.fingerprint


def test_dropout_is_switched_off_and_said(tmp_path):
    content = json.loads(open(train_bpe(tmp_path / "plain.json")).read())
    content["model"]["dropout"] = 0.5
    (tmp_path / "dropout.json").write_text(json.dumps(content))
    loaded, plain = (
        tokenizer.load(str(tmp_path / "dropout.json")),
        tokenizer.load(str(tmp_path / "plain.json")),
    )
    text = "Captain Wentworth must be out of sight " * 20
    assert loaded.encode(text).tolist() == plain.encode(text).tolist()
    assert "dropout of 0.5 is switched off" in loaded.notes[0] and not plain.notes


def test_missing_package_is_said_in_one_line(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(configs.ConfigError, match="pip install tokenizers"):
        tokenizer.load(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("size", "expected"), [(257, "<u2"), (65536, "<u2"), (65537, "<u4"), (131072, "<u4")]
)
def test_dtype_holds_every_id(size, expected):
    assert tokenizer.dtype(size) == np.dtype(expected) and np.iinfo(expected).max >= size - 1


def test_vocab_size_is_rounded_up_or_checked():
    def resolved(value):
        return tokenizer.vocab_size(configs.from_dict({"model": {"vocab_size": value}}))

    assert resolved(None) == 384 and resolved(257) == 257 and resolved(1000) == 1000
    with pytest.raises(
        configs.ConfigError, match="config.model.vocab_size: 256 is below the 257 ids"
    ):
        resolved(256)
