"""Check once, when a tokenizer's file is read, that decoding returns the text that was encoded.

    check(encode, decode, token_bytes, added=("<tool>",), forms=())      # raises ValueError, one line

Bits per byte divides by the bytes of the text that the tokens stand for. A tokenizer that loses
text (an alphabet without some bytes, lowercase, white space stripped, a prefix space) silently
makes that number wrong, so a probe text is sent through it: every byte that UTF-8 has, white space
at both ends, capitals, accents in both spellings, and each added token between spaces. Unicode
normalisation (NFC and its like) changes text in a defined way: if the user has asked for it, the
normalised text must come back.
"""

import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

FORMS = ("NFC", "NFD", "NFKC", "NFKD")


def probes(added: Iterable[str] = ()) -> tuple[str, ...]:
    """Return a text of all bytes of UTF-8 and what tokenizers tend to change, and one that begins
    with a letter.
    """
    ascii_and_two_bytes = "".join(map(chr, range(0x800)))
    # One character for each first byte of three and four bytes.
    longer = "".join(
        map(chr, [0x800, *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x40000)])
    )
    words = "  Anne ELLIOT's  naïve e\u0301lan\u00a0\r\n\t\n\n 1234567 ... \u212b \ufb01 "
    tokens = "".join(f" {token}  {token}" for token in added)
    return f"{words}{ascii_and_two_bytes}{longer}{tokens} {words}", "Anne Elliot"


def forms_of(normaliser: Any) -> tuple[str, ...]:
    """Return the Unicode forms among the normalisers of a tokenizer.json, in their order."""
    return tuple(kind for kind in _kinds(normaliser) if kind in FORMS)


def normalised(text: str, forms: Sequence[Any]) -> str:
    """Return the text after applying these forms, one after another."""
    for form in forms:
        text = unicodedata.normalize(form, text)
    return text


def check(
    encode: Callable[[str], np.ndarray],
    decode: Callable[[np.ndarray], str],
    token_bytes: np.ndarray,
    *,
    added: Iterable[str] = (),
    forms: Sequence[str] = (),
) -> None:
    """Send the probes through a tokenizer.

    Args:
        encode: turns text into token ids.
        decode: turns token ids into text.
        token_bytes: int [vocab_size], bytes of text that each id stands for.
        added: tokens beside the model's own that text may spell.
        forms: Unicode forms that the text may come back in.

    Raises:
        ValueError: the text that comes back, or the bytes that its ids stand for, differ from the
            probe's.
    """
    for text in probes(added):
        ids = np.asarray(encode(text))
        expected, found = normalised(text, forms), decode(ids)
        if found != expected:
            raise ValueError(f"loses text: {_difference(expected, found)}")
        counted, there = int(token_bytes[ids].sum()), len(expected.encode("utf-8"))
        if counted != there:
            raise ValueError(f"counts {counted} bytes for a text of {there}")


def cause(spec: Mapping[str, Any]) -> str:
    """Return what in a tokenizer.json may change text, for an error; '' if no known cause is there."""
    parts = [
        f"{name} {'+'.join(kinds)}"
        for name in ("normalizer", "pre_tokenizer")
        if (kinds := _kinds(spec.get(name)))
    ]
    return f" ({', '.join(parts)})" if parts else ""


def _kinds(component: Any) -> list[str]:
    """Return the types of a component of a tokenizer.json; a sequence gives those of its members."""
    if not isinstance(component, Mapping):
        return []
    for inner in ("normalizers", "pretokenizers"):
        if isinstance(component.get(inner), list):
            return [kind for part in component[inner] for kind in _kinds(part)]
    return [str(component.get("type", "?"))]


def _difference(expected: str, found: str) -> str:
    """Describe where two texts first differ."""
    pairs = zip(expected, found, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(found)))
    return f"{expected[at : at + 8]!r} comes back as {found[at : at + 8]!r}"
