"""Log-likelihoods against a plain forward computation, one request at a time."""

import numpy as np
import pytest

from fp8jax.interop import scoring
from fp8jax.interop.generation import Sampling, generate, generate_ids
from fp8jax.interop.inference import Inference
from fp8jax.interop.scoring import (
    Window,
    _Options,
    encode_pair,
    generate_until,
    log_likelihoods,
    rolling_log_likelihoods,
    score,
    windows,
)

from .micro_model import load, uncached

END = 256
REQUESTS = [
    ("It is a truth universally", " acknowledged"),
    ("", "Anne"),
    ("a" * 40 + " ", "b"),
    ("Anne  ", "Elliot"),
]


@pytest.fixture(scope="module")
def by_hand(model):
    """(ids, how many of the last are scored) → (log probability, greedy?) by one forward pass."""
    forward = uncached(model)

    def by_hand(ids, scored):
        if not scored:
            return 0.0, True
        logits, targets = forward(ids[:-1])[-scored:].astype(np.float64), np.array(ids[-scored:])
        chosen = logits[np.arange(scored), targets]
        return np.sum(chosen - np.log(np.sum(np.exp(logits), axis=-1))), bool(
            (logits[:, :257].argmax(-1) == targets).all()
        )

    return by_hand


def test_log_likelihoods_equal_a_plain_forward_pass(by_hand, inference):
    found = log_likelihoods(inference, REQUESTS)
    for (context, continuation), (total, greedy) in zip(REQUESTS, found, strict=True):
        ids = [END, *(context + continuation).encode()]
        scored = len(ids) - 1 - len(context.rstrip().encode())
        wanted, is_greedy = by_hand(ids, scored)
        assert total == pytest.approx(wanted, abs=1e-4) and greedy == is_greedy


class Merging:
    """A tokenizer of bytes in which ' which' is one id, as BPEs have it."""

    vocab_size, end_of_document = 257, 256

    def encode(self, text):
        return np.frombuffer(text.encode().replace(b" which", b"\x07"), np.uint8).astype(np.uint16)


def test_a_continuation_that_the_join_swallows_is_scored_alone(inference, by_hand, monkeypatch):
    monkeypatch.setattr(inference, "tokenizer", Merging())
    assert encode_pair(inference, " whi", "ch") == ([END, *b" whi"], [*b"ch"])
    assert encode_pair(inference, "a ", "which") == ([END, *b"a"], [7])
    ((total, _),) = log_likelihoods(inference, [(" whi", "ch")])
    assert total == pytest.approx(by_hand([END, *b" which"], 2)[0], abs=1e-4) and total < -0.1
    with pytest.raises(ValueError, match="continuation of 'a' is empty"):
        encode_pair(inference, "a", "")


def test_greedy_continuations_are_called_greedy(inference):
    prompt = [END, *b"Anne"]
    *_, (ids,) = generate_ids(inference, [prompt], 6, Sampling())
    right, wrong = score(inference, [(prompt, ids), (prompt, [*ids[:-1], ids[-1] ^ 1])])
    assert right[1] and not wrong[1] and right[0] > wrong[0]


def test_eight_devices_agree_with_one(inference):
    sharded = Inference(load(mesh={"data": 2, "fsdp": 2, "tensor": 2}))
    for one, eight in zip(
        log_likelihoods(inference, REQUESTS), log_likelihoods(sharded, REQUESTS), strict=True
    ):
        assert one[0] == pytest.approx(eight[0], abs=1e-4) and one[1] == eight[1]


def test_requests_of_many_lengths_come_back_in_order(by_hand, inference):
    random = np.random.default_rng(0)
    requests = [("a" * int(n), "bc") for n in random.integers(1, 80, 40)]
    found = log_likelihoods(inference, requests)
    for (context, _), (total, _) in list(zip(requests, found, strict=True))[::7]:
        ids = [END, *context.encode(), *b"bc"][-65:]  # the context is cut to what fits
        assert total == pytest.approx(by_hand(ids, 2)[0], abs=1e-4)


@pytest.mark.parametrize("count", [1, 63, 64, 65, 150])
def test_windows_score_every_token_once(count):
    context, tokens = [END], list(range(count))
    found = list(windows(context, tokens, 64))
    assert [token for window in found for token in window.ids[-window.scored :]] == tokens
    assert all(len(window.ids) <= 65 and window.scored < len(window.ids) for window in found)
    assert list(windows([1, 2, 3], [4], 2)) == [Window([2, 3, 4], 1)] and not list(
        windows([1], [], 8)
    )


def test_rolling_log_likelihood_of_a_long_text(by_hand, inference):
    text = "The Elliots lived in Kellynch Hall. " * 4
    ids = list(text.encode())
    first, second = by_hand([END, *ids[:64]], 64)[0], by_hand(ids[63:128], 64)[0]
    rest = by_hand(ids[-65:], len(ids) - 128)[0]
    short, long = rolling_log_likelihoods(inference, ["Anne", text])
    assert long == pytest.approx(first + second + rest, abs=1e-3)
    assert short == pytest.approx(by_hand([END, *b"Anne"], 4)[0], abs=1e-4)


def test_generate_until_stops_before_the_stop_string(inference):
    contexts = ["Anne", "Elliot", "It is"]
    whole = generate_until(inference, [(context, {"max_gen_toks": 20}) for context in contexts])
    assert whole == generate(inference, contexts, tokens=20)
    stop = whole[0][5:7]
    found = generate_until(
        inference,
        [
            (
                context,
                {"until": [stop, ""], "max_gen_toks": 20, "do_sample": False, "temperature": 1.0},
            )
            for context in contexts
        ],
    )
    assert found == [text[: text.index(stop)] if stop in text else text for text in whole]
    assert len(found[0]) < 20


def test_the_first_of_several_stop_strings_ends_a_text(inference, monkeypatch):
    """Wherever it stands in the list; and no more is generated than the chunk in which it comes."""
    (whole,) = generate_until(inference, [("Anne", {"max_gen_toks": 48})])
    first, *_, last = (
        at
        for at in range(1, 12)
        if "\ufffd" not in whole[at : at + 2] and whole.index(whole[at : at + 2]) == at
    )
    early, late = whole[first : first + 2], whole[last : last + 2]
    chunks, original = [], scoring.generate_ids
    monkeypatch.setattr(
        scoring,
        "generate_ids",
        lambda *args: (chunks.append(found) or found for found in original(*args)),
    )
    for until in ([early, late], [late, early], [late, "never there", early]):
        chunks.clear()
        assert generate_until(inference, [("Anne", {"until": until, "max_gen_toks": 48})]) == [
            whole[:first]
        ]
        assert len(chunks) == 1


def test_a_text_is_greedy_if_every_window_is(inference, model):
    """Of two windows the first is not, the second, a single token, is."""
    forward, tokens = uncached(model), np.random.default_rng(0).integers(97, 123, 64).tolist()
    likeliest = int(forward(tokens)[-1, :257].argmax())
    found = score(
        inference, [([END], [*tokens, likeliest]), (tokens[:1], [*tokens[1:], likeliest])]
    )
    assert [greedy for _, greedy in found] == [False, False]
    assert score(inference, [(tokens, [likeliest])])[0][1]


def test_generate_until_cuts_long_contexts_and_samples_where_asked(inference):
    context, options = "It is a truth universally acknowledged. " * 4, {"max_gen_toks": 8}
    (found,) = generate_until(inference, [(context, options)])
    *_, (ids,) = generate_ids(inference, [list(context.encode())[-56:]], 8, Sampling())
    assert found == inference.tokenizer.decode(ids)
    first, second = generate_until(inference, [(context, options | {"temperature": 1.0})] * 2)
    assert first != second


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 5, "temperature": 1.0}, "top_k=5 is not supported"),
        ({"num_beams": 4}, "num_beams=4 is not supported"),
        ({"repetition_penalty": 1.2}, "repetition_penalty=1.2 is not supported"),
        ({"mirostat": 2}, "mirostat=2 is not supported"),
        ({"max_gen_toks": -1}, "max_gen_toks=-1 is not a number of tokens"),
        ({"max_tokens": "8"}, "max_tokens='8' is not a number of tokens"),
    ],
)
def test_options_that_would_change_the_text_are_named(inference, options, words):
    with pytest.raises(
        ValueError, match=f"generation option {words}; change generation_kwargs of the task"
    ):
        generate_until(inference, [("Anne", options)])


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 1, "top_k": 50, "early_stopping": True, "length_penalty": 1.0},
        {"top_k": 0, "repetition_penalty": 1.0, "min_p": None},
        {"do_sample": False, "temperature": 0.7, "top_p": 0.9, "typical_p": 0.5},
        {"use_cache": True, "num_return_sequences": 1},
    ],
)
def test_options_that_change_nothing_are_taken(options):
    assert _Options.read(options) == _Options.read({})


def test_every_name_of_a_length_is_that_of_the_harness():
    """As lm_eval.models.utils.normalize_gen_kwargs: the first of these names that is there counts."""
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    for first in range(4):
        options = {name: 10 + number for number, name in list(enumerate(names))[first:][::-1]}
        assert _Options.read(options).tokens == 10 + first
    assert (
        _Options.read({"max_gen_toks": None, "max_tokens": 3}).tokens == 3
        and _Options.read({}).tokens == 256
    )


def test_no_tokens_are_no_text(inference):
    assert generate_until(
        inference, [("Anne", {"max_gen_toks": 0}), ("Sir Walter", {"max_new_tokens": 0})]
    ) == ["", ""]


def test_logits_of_a_batch_fit_the_budget_of_the_table(monkeypatch):
    """The table of a byte tokenizer's model may have 131,072 rows, and so have its logits."""
    inference = Inference(load(vocab_size=4096))
    assert inference.vocab_size == 4096
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * 4096 * 256)
    pieces = [(number, [0] * 64) for number in range(50)]
    found = list(scoring._batches(inference, pieces, lambda piece: len(piece[1]), "scoring"))
    assert {(size, rows) for _, size, rows in found} == {(64, 4)} and sum(
        len(batch) for batch, _, _ in found
    ) == 50
