"""Generate text from a model: greedy or sampled, with a KV cache, in BF16.

    inference = Inference(load_run("runs/fp8_base-tiny")[0])
    generate(inference, ["Anne Elliot", "It was"], tokens=100)                     # greedy; a list of texts
    generate(inference, ["It was"] * 4, tokens=100, temperature=0.8, top_p=0.95)   # four different ones
    for piece in stream(inference, "It was", tokens=100): print(piece, end="", flush=True)

A prompt follows an end-of-document token, as every document did in training, and a text ends where
the model ends the document. A row's tokens depend on its prompt, the seed and its place in the
batch, never on other rows (up to rounding).

The model attends to its context, config.data.sequence_length tokens. A longer prompt is an error. A
text that outgrows it continues from its newest half context: those tokens are read again as a
prompt, and earlier ones are dropped.

Tokens come in chunks of CHUNK, one jitted loop each; shapes are powers of two, so that few programs
are compiled.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.interop.inference import Inference
from fp8jax.interop.sampling import Sampling
from fp8jax.models import kv_cache
from fp8jax.models.kv_cache import KVCache
from fp8jax.models.runner import Bound, pin_rows

CHUNK = 16
Ids = list[int]

Scalar = jax.Array | np.float32  # traced, or given from outside


def generate(
    inference: Inference,
    prompts: Sequence[str],
    *,
    tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Continue prompts, all in one batch.

    Args:
        inference: the model.
        prompts: texts; an empty string begins a new document.
        tokens: the most new tokens of each.
        temperature: see Sampling.
        top_p: see Sampling.
        seed: see Sampling.

    Returns:
        The continuation of each prompt, without the prompt.

    Raises:
        ValueError: an option out of range, or a prompt longer than the context.
    """
    rows = [document(inference, prompt) for prompt in prompts]
    *_, found = generate_ids(inference, rows, tokens, Sampling(temperature, top_p, seed))
    return [inference.tokenizer.decode(ids) for ids in found]


def stream(
    inference: Inference,
    prompt: str,
    *,
    tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Continue one prompt as `generate` does, piece by piece; a character with missing bytes waits
    for the next piece.
    """
    given, text = 0, ""
    for (ids,) in generate_ids(
        inference, [document(inference, prompt)], tokens, Sampling(temperature, top_p, seed)
    ):
        text = inference.tokenizer.decode(ids)
        # A truncated character decodes to exactly one U+FFFD, at the end.
        whole = text.removesuffix("\ufffd")
        yield whole[given:]
        given = max(given, len(whole))
    yield text[given:]


def document(inference: Inference, text: str) -> Ids:
    """Return the token ids of a document's beginning: the end of the one before, then the text."""
    return [inference.tokenizer.end_of_document, *inference.tokenizer.encode(text).tolist()]


def generate_ids(
    inference: Inference,
    prompts: Sequence[Ids],
    tokens: int,
    sampling: Sampling,
    stop: Callable[[Ids], bool] = lambda ids: False,
) -> Iterator[list[Ids]]:
    """Continue prompts of token ids.

    Args:
        inference: the model.
        prompts: token ids, none of them empty.
        tokens: the most new tokens of each.
        sampling: how tokens are chosen.
        stop: called after each chunk with a row and its new ids; True ends the row.

    Yields:
        After each chunk, all new ids of every row so far, without the end of the document.

    Raises:
        ValueError: `tokens` is below 1, or a prompt is longer than the context.
    """
    _check(inference.context, prompts, tokens)
    rows, starts = [list(prompt) for prompt in prompts], [len(prompt) for prompt in prompts]
    held = list(starts)  # how many of a row's newest tokens are in its context
    done = np.zeros(len(rows), bool)
    capacity = bucket(max(starts) + tokens, inference.context)
    state, count = None, 0
    while count < tokens and not done.all():
        steps = min(CHUNK, max(1, inference.context // 2), tokens - count)
        full = [
            not ended and length - 1 + steps > capacity
            for ended, length in zip(done, held, strict=True)
        ]
        if state is None or any(full):
            held = [
                inference.context // 2 if f else length
                for f, length in zip(full, held, strict=True)
            ]
            state = _read(
                inference, [row[-length:] for row, length in zip(rows, held, strict=True)], capacity
            )
        ended = inference.put(np.append(done, np.ones(len(state.token) - len(rows), bool)))
        state, *found = inference.call(
            _decode, state, ended, _ask(inference, sampling, count, steps)
        )
        new, taken = (inference.fetch(x) for x in found)
        for i in np.flatnonzero(~done):
            ids = new[i, : int(taken)].tolist()
            done[i] = inference.tokenizer.end_of_document in ids
            ids = ids[: ids.index(inference.tokenizer.end_of_document)] if done[i] else ids
            rows[i] += ids
            held[i] += len(ids)
            done[i] |= stop(rows[i][starts[i] :])
        count += int(taken)
        yield [row[start:] for row, start in zip(rows, starts, strict=True)]


def abstract_calls(inference: Inference) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Return what generating a text as long as the context runs, for tracing: jitted functions, and
    argument shapes.

    Returns:
        `weights`, which prepares them once; `prompt`, which reads one into a cache; `decode`, which
        adds a chunk of tokens.
    """
    batch, capacity = inference.replicas, bucket(inference.context, inference.context)
    ids, lengths = (
        jax.ShapeDtypeStruct((batch, capacity), jnp.int32),
        jax.ShapeDtypeStruct((batch,), jnp.int32),
    )
    prompt = inference.abstract_call(_reader(capacity), ids, lengths)
    state = jax.eval_shape(prompt[0], *prompt[1])
    done = jax.ShapeDtypeStruct((batch,), jnp.bool_)
    decode = inference.abstract_call(
        _decode, state, done, _ask(inference, Sampling(temperature=1.0, top_p=0.9), 0, CHUNK)
    )
    return {"weights": inference.abstract_weights(), "prompt": prompt, "decode": decode}


def bucket(length: int, most: int) -> int:
    """Return the next power of two, from CHUNK up to `most`, so that few shapes are compiled."""
    return min(most, max(CHUNK, 1 << (length - 1).bit_length()))


def next_token(
    logits_bv: jax.Array, keys_b: jax.Array, temperature: Scalar, top_p: Scalar
) -> jax.Array:
    """Choose a token per row, int32 [b].

    Args:
        logits_bv: float32; -inf where a token is not allowed.
        keys_b: a PRNG key per row; not used at temperature 0.
        temperature: float32 scalar.
        top_p: float32 scalar, above 0.
    """

    def draw(logits):
        logits = logits / temperature
        logits = jax.lax.cond(top_p < 1, lambda x: _nucleus(x, top_p), lambda x: x, logits)
        return jax.vmap(jax.random.categorical)(keys_b, logits).astype(jnp.int32)

    return jax.lax.cond(
        temperature > 0, draw, lambda x: jnp.argmax(x, axis=-1).astype(jnp.int32), logits_bv
    )


def _nucleus(logits_bv: jax.Array, top_p: Scalar) -> jax.Array:
    """Keep the logits of the smallest set of likeliest tokens with probability top_p, and of ties;
    -inf elsewhere.
    """
    descending = -jnp.sort(-logits_bv, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    count = jnp.sum(before < top_p, axis=-1, keepdims=True)
    return jnp.where(
        logits_bv >= jnp.take_along_axis(descending, count - 1, axis=-1), logits_bv, -jnp.inf
    )


class _State(NamedTuple):
    """The state between chunks: the cache, and each row's newest token, int32 [b], which is not in
    it yet.
    """

    cache: KVCache
    token: jax.Array


class _Asked(NamedTuple):
    """A chunk's request: tokens per row so far, tokens to add, how to choose them, the document's
    end, number of ids.
    """

    count: np.int32
    steps: np.int32
    temperature: np.float32
    top_p: np.float32
    seed: np.uint32
    end: np.int32
    ids: np.int32


def _ask(inference: Inference, sampling: Sampling, count: int, steps: int) -> _Asked:
    tokenizer = inference.tokenizer
    return _Asked(
        np.int32(count),
        np.int32(steps),
        np.float32(sampling.temperature),
        np.float32(sampling.top_p),
        np.uint32(sampling.seed),
        np.int32(tokenizer.end_of_document),
        np.int32(tokenizer.vocab_size),
    )


def _check(context: int, prompts: Sequence[Ids], tokens: int) -> None:
    if tokens < 1:
        raise ValueError(f"tokens: {tokens} is below 1")
    if not prompts:
        raise ValueError("prompts: none given")
    longest = max(map(len, prompts))
    if longest > context:
        raise ValueError(
            f"prompt: {longest:,} tokens, with the one that begins a document, exceed the "
            f"model's context of "
            f"{context:,}; shorten it"
        )


def _read(inference: Inference, rows: list[Ids], capacity: int) -> _State:
    """Run prompts into a fresh cache."""
    padded = -(-len(rows) // inference.replicas) * inference.replicas
    longest = max(map(len, rows))
    ids = np.zeros((padded, bucket(longest, capacity)), np.int32)
    lengths = np.ones(padded, np.int32)
    for i, row in enumerate(rows):
        ids[i, : len(row)], lengths[i] = row, len(row)
    return inference.call(_reader(capacity), inference.put(ids), inference.put(lengths))


@functools.cache
def _reader(capacity: int) -> Callable:
    def read(bound: Bound, ids_bt: jax.Array, lengths_b: jax.Array) -> _State:
        cache = kv_cache.empty(bound.model.config, ids_bt.shape[0], capacity)
        _, cache = bound.model.extend(ids_bt, cache, bound.gemms)
        # The newest token is processed again by the first decoding step, which yields its logits.
        token = jnp.take_along_axis(ids_bt, lengths_b[:, None] - 1, axis=1)[:, 0]
        return _State(kv_cache.pin(cache._replace(filled=lengths_b - 1)), pin_rows(token))

    return read


def _decode(
    bound: Bound, state: _State, done_b: jax.Array, asked: _Asked
) -> tuple[_State, jax.Array, jax.Array]:
    """Add tokens to each row; rows that are done stay as they are.

    Returns:
        The new state; int32 [b, CHUNK] tokens, the first n of them new; and n, int32, below
        asked.steps if all rows are done.
    """
    keys = jax.vmap(jax.random.fold_in, (None, 0))(
        jax.random.key(asked.seed), jnp.arange(len(done_b))
    )

    def one(carry):
        n, state, done, tokens = carry
        logits, cache = bound.model.extend(state.token[:, None], state.cache, bound.gemms)
        allowed = jnp.arange(logits.shape[-1]) < asked.ids  # the rest pads the table
        of_step = jax.vmap(jax.random.fold_in, (0, None))(keys, asked.count + n)
        token = next_token(
            jnp.where(allowed, logits[:, 0], -jnp.inf), of_step, asked.temperature, asked.top_p
        )
        token = jnp.where(done, asked.end, token)
        cache = cache._replace(filled=jnp.where(done, state.cache.filled, cache.filled))
        return (
            n + 1,
            _State(kv_cache.pin(cache), pin_rows(token)),
            done | (token == asked.end),
            tokens.at[:, n].set(token),
        )

    start = jnp.int32(0), state, done_b, jnp.zeros((len(done_b), CHUNK), jnp.int32)
    n, state, _, tokens = jax.lax.while_loop(
        lambda carry: (carry[0] < asked.steps) & ~carry[2].all(), one, start
    )
    return state, tokens, n
