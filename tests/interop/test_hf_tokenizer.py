"""Exported tokenizers give the ids of the run's own, read by the library that wrote the format."""

import base64
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax.data import sources, tokenizer
from fp8jax.interop import hf_tokenizer

hf = pytest.importorskip("tokenizers")
PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def write_tekken(path):
    """A tekken.json whose tokens beyond the bytes are the commonest words and their beginnings."""
    text = sources.embedded_documents("held_out")[0][:30_000].decode()
    words = sorted(set(f" {word}" for word in text.split()), key=lambda word: -text.count(word))[
        :60
    ]
    parts = [
        word[:length].encode() for length in range(2, 12) for word in words if len(word) >= length
    ]
    texts = [bytes([byte]) for byte in range(256)] + list(dict.fromkeys(parts))
    vocab = [
        {"rank": rank, "token_bytes": base64.b64encode(text).decode()}
        for rank, text in enumerate(texts)
    ]
    config = {
        "pattern": PATTERN,
        "default_vocab_size": len(vocab) + 10 - 3,
        "default_num_special_tokens": 10,
    }
    path.write_text(json.dumps({"config": config, "vocab": vocab}))
    return str(path)


@pytest.fixture(scope="module", params=["byte", "tekken", "trained"])
def pair(request, tmp_path_factory):
    """A tokenizer, and its export as the `tokenizers` library reads it."""
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    if request.param == "byte":
        ours = tokenizer.load("byte")
    elif request.param == "tekken":
        pytest.importorskip("tiktoken")
        ours = tokenizer.load(write_tekken(path))
    else:
        path.write_text(
            tokenizer.train([sources.embedded_documents("held_out")[0][:30_000].decode()], 400)
        )
        ours = tokenizer.load(str(path))
    content = hf_tokenizer.files(ours, 64)["tokenizer.json"]
    return ours, hf.Tokenizer.from_str(json.dumps(content))


WORDS = ["Anne", " the", "\n", " Elliot's", "  ", "12", "\u00e9", " <|endoftext|>x"]


@settings(deadline=None, max_examples=200)
@given(text=st.one_of(st.text(), st.lists(st.sampled_from(WORDS)).map("".join)))
def test_ids_are_those_of_the_run(pair, text):
    ours, exported = pair
    exported.encode_special_tokens = True
    ids = exported.encode(text).ids
    assert ids == [ours.end_of_document, *ours.encode(text).tolist()]
    assert exported.decode(ids) == text


def test_a_text_of_some_length_merges_alike(pair):
    ours, exported = pair
    text = sources.embedded_documents("held_out")[0][30_000:60_000].decode()
    assert exported.encode(text).ids[1:] == ours.encode(text).tolist()


def test_the_files_name_the_same_end(pair):
    ours, exported = pair
    files = hf_tokenizer.files(ours, 64)
    settings_, generation = files["tokenizer_config.json"], files["generation_config.json"]
    assert (
        exported.token_to_id(settings_["eos_token"])
        == generation["eos_token_id"]
        == ours.end_of_document
    )
    assert settings_["bos_token"] == settings_["eos_token"] and settings_["model_max_length"] == 64
    assert not settings_["clean_up_tokenization_spaces"] and "chat_template" not in settings_


def test_our_own_reader_takes_the_export(pair, tmp_path):
    ours, _ = pair
    (tmp_path / "tokenizer.json").write_text(
        json.dumps(hf_tokenizer.files(ours, 64)["tokenizer.json"])
    )
    again = tokenizer.load(str(tmp_path / "tokenizer.json"))
    text = "Captain Wentworth,  £20,000\r\n"
    assert (
        again.encode(text).tolist() == ours.encode(text).tolist()
        and again.end_of_document == ours.end_of_document
    )
