"""Write a run's tokenizer as transformers reads it: tokenizer.json, tokenizer_config.json,
generation_config.json.

    for name, content in files(tokenizer, context=4096).items():
        (directory / name).write_text(json.dumps(content))

Any tokenizer of fp8jax becomes a tokenizer.json that gives the same ids: bytes as a vocabulary
without merges, a tekken.json by the merges that its ranks imply. In training every document follows
an end-of-document token, so that token also begins a text: the tokenizer puts it there, and
`generate()` continues texts as they were trained.
"""

import base64
import json
from collections.abc import Iterable, Mapping
from typing import Any

from fp8jax.data.tokenizer import ByteTokenizer, HuggingFaceTokenizer, TekkenTokenizer, Tokenizer

END = "<|endoftext|>"


def token_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the ids for config.json and generation_config.json: the end of a document begins, ends
    and pads texts.
    """
    end = tokenizer.end_of_document
    return {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}


def files(tokenizer: Tokenizer, context: int, rows: int | None = None) -> dict[str, dict[str, Any]]:
    """Return name → JSON content of each file.

    Args:
        tokenizer: the run's tokenizer.
        context: tokens of the context that the model was trained with.
        rows: rows of the embedding; those beyond the tokenizer's ids are never generated. None
            means as many as ids.
    """
    content = _tokenizer_json(tokenizer)
    end = _text_of(content, tokenizer.end_of_document)
    content["post_processor"] = _begin_with(end, tokenizer.end_of_document)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "pad_token": end,
        "padding_side": "left",
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
    }
    generation: dict[str, Any] = {**token_ids(tokenizer), "do_sample": False}
    unused = list(range(tokenizer.vocab_size, rows or tokenizer.vocab_size))
    if unused:
        generation["suppress_tokens"] = unused
    return {
        "tokenizer.json": content,
        "tokenizer_config.json": settings,
        "generation_config.json": generation,
    }


def _tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    if isinstance(tokenizer, ByteTokenizer):
        vocab = {character: byte for byte, character in enumerate(_CHARACTERS)}
        return _byte_level(vocab, [], [(END, tokenizer.end_of_document)], pattern=None)
    if isinstance(tokenizer, TekkenTokenizer):
        return _from_tekken(json.loads(tokenizer.file.read_bytes()), tokenizer.end_of_document)
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return json.loads(tokenizer.file.read_bytes())


def _from_tekken(values: Mapping[str, Any], end_of_document: int) -> dict[str, Any]:
    config = values["config"]
    special = config["default_num_special_tokens"]
    tokens = values["vocab"][: config["default_vocab_size"] - special]
    texts = [base64.b64decode(token["token_bytes"]) for token in tokens]
    names = {0: "<unk>", 1: "<s>", end_of_document: "</s>"}
    added = [(names.get(index, f"<SPECIAL_{index}>"), index) for index in range(special)]
    vocab = {_spelled(text): special + rank for rank, text in enumerate(texts)}
    return _byte_level(vocab, _merges(texts), added, config["pattern"])


def _merges(texts: list[bytes]) -> list[list[str]]:
    """Return the merges, first to last, by which byte-pair encoding makes each text from others of
    a lower rank.
    """
    ranks = {text: rank for rank, text in enumerate(texts)}
    found = []
    for text in texts:
        splits = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        known = [pair for pair in splits if pair[0] in ranks and pair[1] in ranks]
        known.sort(key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
        found += [[_spelled(left), _spelled(right)] for left, right in known]
    return found


def _byte_level(
    vocab: dict[str, int],
    merges: list[list[str]],
    added: Iterable[tuple[str, int]],
    pattern: str | None,
) -> dict[str, Any]:
    """Return a byte-level BPE that does not merge a word that is a token as a whole, as in
    tiktoken.
    """
    added = list(added)
    # The library numbers added tokens itself unless the model knows them.
    vocab = {text: index for text, index in added} | vocab
    bytes_of_words = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    words: dict[str, Any] = bytes_of_words
    if pattern is not None:
        split = {
            "type": "Split",
            "pattern": {"Regex": pattern},
            "behavior": "Isolated",
            "invert": False,
        }
        words = {"type": "Sequence", "pretokenizers": [split, bytes_of_words]}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": True,
        "vocab": vocab,
        "merges": merges,
    }
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": text, **flags} for text, index in added],
        "normalizer": None,
        "pre_tokenizer": words,
        "post_processor": None,
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": model,
    }


def _begin_with(token: str, index: int) -> dict[str, Any]:
    """Return a post-processor that puts a token before a text."""
    begin = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [begin, first],
        "pair": [begin, first, second],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]}},
    }


def _text_of(content: Mapping[str, Any], index: int) -> str:
    return next(token["content"] for token in content["added_tokens"] if token["id"] == index)


def _characters() -> str:
    """Return the spelling of bytes 0 to 255 in byte-level vocabularies: printable ones unchanged,
    others from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return "".join(chr(byte) if byte in printable else chr(next(others)) for byte in range(256))


_CHARACTERS = _characters()


def _spelled(text: bytes) -> str:
    return "".join(_CHARACTERS[byte] for byte in text)
