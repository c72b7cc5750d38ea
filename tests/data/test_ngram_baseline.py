"""The order-k baseline against a count by hand."""

import collections
import importlib.util
import math
import pathlib

import pytest

PATH = pathlib.Path(__file__).parents[2] / "benchmarks" / "ngram_baseline.py"


@pytest.fixture(scope="module")
def baseline():
    spec = importlib.util.spec_from_file_location("ngram_baseline", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("order", range(4))
def test_bits_per_byte_equal_a_count_by_hand(baseline, order):
    train, held_out = [b"abracadabra", b"cabbala"], [b"abacus", b"drab"]
    events, contexts = collections.Counter(), collections.Counter()
    for text in (bytes(order) + text for text in train):
        for place in range(order, len(text)):
            events[text[place - order : place + 1]] += 1
            contexts[text[place - order : place]] += 1
    bits = [
        -math.log2(
            (events[text[place - order : place + 1]] + 0.01)
            / (contexts[text[place - order : place]] + 2.56)
        )
        for text in (bytes(order) + text for text in held_out)
        for place in range(order, len(text))
    ]
    assert baseline.bits_per_byte(train, held_out, order) == pytest.approx(
        sum(bits) / 10, rel=1e-12
    )


def test_embedded_corpus_at_order_two(baseline):
    documents = baseline.sources.embedded_documents
    assert baseline.bits_per_byte(documents("train"), documents("held_out"), 2) == pytest.approx(
        2.856, abs=5e-4
    )
