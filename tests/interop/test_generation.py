"""Generated text against the plain forward pass, and what sampling draws against the distribution asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.interop import generation
from fp8jax.interop.generation import Sampling, document, generate, generate_ids, next_token, stream
from fp8jax.interop.inference import Inference

from .micro_model import load, uncached

PROMPTS = ["Anne Elliot", "", "It is a truth universally acknowl"]
GREEDY = Sampling()


def greedy_by_hand(model, ids, tokens):
    logits, out = uncached(model), []
    for _ in range(tokens):
        out.append(int(np.argmax(logits(ids + out)[-1, :257])))
    return out


def last(iterator):
    *_, found = iterator
    return found


def test_greedy_is_the_argmax_of_the_uncached_forward_pass(model, inference):
    rows = [document(inference, prompt) for prompt in PROMPTS]
    found = last(generate_ids(inference, rows, 24, GREEDY))
    for row, ids in zip(rows, found, strict=True):
        assert ids == greedy_by_hand(model, row, 24)
        assert len(set(ids)) > 5


def test_a_text_that_outgrows_the_context_goes_on_from_its_newest_half():
    model = load(context=16)
    inference, logits = Inference(model), uncached(model)
    row = document(inference, "Anne")
    (found,) = last(generate_ids(inference, [row], 40, GREEDY))
    ids, held, wanted = list(row), len(row), []
    for count in range(40):
        steps = min(8, 40 - count)  # half the context is the longest chunk here
        if count % 8 == 0 and held - 1 + steps > 16:
            held = 8
        wanted.append(int(np.argmax(logits(ids[-held:])[-1, :257])))
        ids, held = [*ids, wanted[-1]], held + 1
    assert found == wanted


def test_rows_do_not_depend_on_each_other(inference):
    options = {"tokens": 30, "temperature": 1.0, "top_p": 0.9, "seed": 3}
    together = generate(inference, PROMPTS, **options)
    assert generate(inference, PROMPTS, **options) == together
    assert generate(inference, PROMPTS[:1], **options)[0] == together[0]
    assert generate(inference, PROMPTS, **options | {"seed": 4}) != together
    again = generate(inference, ["Anne"] * 3, **options)
    assert len(set(again)) == 3


def test_text_ends_with_the_document_and_has_no_ids_beyond_the_tokenizer():
    inference = Inference(load(init_std=0.0))  # all tokens alike
    end, tokens = inference.tokenizer.end_of_document, 60
    found = last(generate_ids(inference, [[end]] * 32, tokens, Sampling(temperature=1.0)))
    assert all(0 <= token < end for ids in found for token in ids)
    assert all(
        ids[:16] != ids[16:32] for ids in found if len(ids) >= 32
    )  # every chunk has random numbers of its own
    ended = [len(ids) for ids in found if len(ids) < tokens]
    # A row goes on with probability (256/257)^60 = 0.79: 6.7 of 32 should end, with standard deviation 2.3.
    assert 1 <= len(ended) <= 16 and len(set(ended)) > 1
    assert all(len(ids) == tokens for ids in found if len(ids) not in ended)


def test_stop_ends_a_row_after_its_chunk(inference):
    rows = [document(inference, prompt) for prompt in PROMPTS]
    whole = last(generate_ids(inference, rows, 48, GREEDY))
    found = last(
        generate_ids(inference, rows, 48, GREEDY, stop=lambda ids: ids[:3] == whole[0][:3])
    )
    assert found[0] == whole[0][:16] and found[1:] == whole[1:]


def test_eight_devices_agree_with_one_and_compile_one_decoding_loop(inference):
    sharded = Inference(load(mesh={"data": 2, "fsdp": 2, "tensor": 2}))
    assert generate(sharded, PROMPTS, tokens=40) == generate(inference, PROMPTS, tokens=40)
    assert sharded._compiled[generation._decode]._cache_size() == 1


PROBABILITIES = np.array([0.05, 0.4, 0.0, 0.3, 0.2, 0.05])


@pytest.mark.parametrize(
    ("temperature", "top_p", "wanted"),
    [
        (1.0, 1.0, PROBABILITIES),
        (0.5, 1.0, PROBABILITIES**2 / np.sum(PROBABILITIES**2)),
        (1.0, 0.69, [0, 4 / 7, 0, 3 / 7, 0, 0]),
        (1.0, 0.71, [0, 4 / 9, 0, 3 / 9, 2 / 9, 0]),
        (1.0, 0.91, PROBABILITIES),  # one of two equals is needed: both stay
        (1.0, 1e-6, [0, 1, 0, 0, 0, 0]),
        (0.0, 1.0, [0, 1, 0, 0, 0, 0]),
    ],
)
def test_what_is_drawn(temperature, top_p, wanted):
    draws = 20000
    with np.errstate(divide="ignore"):
        logits = jnp.asarray(np.broadcast_to(np.log(PROBABILITIES) + 3, (draws, 6)), jnp.float32)
    keys = jax.random.split(jax.random.key(0), draws)
    counts = np.bincount(
        jax.jit(next_token)(logits, keys, jnp.float32(temperature), jnp.float32(top_p)), minlength=6
    )
    wanted = np.asarray(wanted)
    assert counts[wanted == 0].sum() == 0
    expected = draws * wanted[wanted > 0]
    chi2 = np.sum((counts[wanted > 0] - expected) ** 2 / expected)
    assert chi2 < 25, counts  # at most 4 degrees of freedom: exceeded once in 20,000


def test_pieces_of_a_stream_never_split_a_character(inference, monkeypatch):
    text = "naïve — 😀 \U0001f469‍🚀 end"
    ids = list(text.encode()) + [0xFF, 0x41, 0xF0, 0x9F]
    monkeypatch.setattr(
        generation, "generate_ids", lambda *_: ([ids[: n + 1]] for n in range(len(ids)))
    )
    pieces = list(stream(inference, "x", tokens=1))
    assert "".join(pieces) == text + "\ufffdA\ufffd"
    assert all("\ufffd" not in piece for piece in pieces[: len(text.encode())])


def test_a_stream_is_the_generated_text(inference):
    assert (
        "".join(stream(inference, "Anne", tokens=50)) == generate(inference, ["Anne"], tokens=50)[0]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": 0}, ["tokens", "0"]),
        ({"temperature": -1.0}, ["temperature", "-1.0"]),
        ({"temperature": float("nan")}, ["temperature", "nan"]),
        ({"top_p": 0.0}, ["top_p", "0.0"]),
        ({"top_p": 1.5}, ["top_p", "1.5"]),
        ({"prompts": ["x" * 64]}, ["prompt", "65", "64"]),
        ({"prompts": []}, ["prompts"]),
    ],
)
def test_mistakes(inference, arguments, words):
    with pytest.raises(ValueError) as error:
        generate(inference, **{"prompts": ["x"], "tokens": 4} | arguments)
    assert all(word in str(error.value) for word in words)
