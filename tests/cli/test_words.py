"""Numbers and names as they are mistyped."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax.cli import words


@pytest.mark.parametrize(
    ("kind", "text", "said"),
    [
        (int, "7", ""),
        (float, "1e-3", ""),
        (float, "nan", ""),
        (int, "10k", "'10k' is not a whole number; write 10000"),
        (int, "1.5M", "'1.5M' is not a whole number; write 1500000"),
        (int, "1,000", "'1,000' is not a whole number; write 1000"),
        (int, "1e3", "'1e3' is not a whole number; write 1000"),
        (int, "2B", "'2B' is not a whole number; write 2000000000"),
        (int, "1.5", "'1.5' is not a whole number"),
        (int, "1,00", "'1,00' is not a whole number"),
        (int, "k", "'k' is not a whole number"),
        (int, "", "'' is not a whole number"),
        (int, "inf", "'inf' is not a whole number"),
        (int, "1e999", "'1e999' is not a whole number"),
        (float, "0,1", "'0,1' is not a number"),
        (float, "1,234.5", "'1,234.5' is not a number; write 1234.5"),
    ],
)
def test_numbers(kind, text, said):
    assert words.wrong_number(kind, text) == said


@settings(max_examples=50)
@given(text=st.text(max_size=12), kind=st.sampled_from([int, float]))
def test_any_text_is_a_number_or_answered_in_words(text, kind):
    try:
        kind(text)
        assert words.wrong_number(kind, text) == ""
    except ValueError:
        assert words.wrong_number(kind, text).startswith(f"{text!r} is not a ")


@given(count=st.integers(1, 10**15), unit=st.sampled_from("kKmM"))
def test_what_is_advised_is_taken(count, unit):
    advised = words.wrong_number(int, f"{count}{unit}").rpartition(" write ")[2]
    meant = count * {"k": 10**3, "m": 10**6}[unit.lower()]
    assert int(advised) == meant if meant < 10**18 else "is not a whole number" in advised


@given(word=st.text(max_size=30))
def test_any_word_is_answered(word):
    for fields in (False, True):
        assert words.unknown_flag(word, ["tokens", "top_p"], fields=fields).startswith(
            "unknown flag --"
        )
