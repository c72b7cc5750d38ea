r"""Score texts and continue them up to a stop string: the three requests of lm-evaluation-harness,
without it.

    log_likelihoods(inference, [("The capital of France is", " Paris")])      # [(log probability in nats, greedy?)]
    rolling_log_likelihoods(inference, ["A whole document."])                 # [log probability in nats]
    generate_until(inference, [("Q: 1 + 1?\nA:", {"until": ["\n"], "max_gen_toks": 8})])

Requests of like length share a batch: lengths are rounded up to powers of two, so that few shapes
are compiled. A context follows an end-of-document token, as every document did in training; if it
does not fit, its oldest tokens are dropped. Texts are split into context and continuation, and long
documents into windows, as in lm-evaluation-harness, so that figures are comparable.
"""

import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track

from fp8jax.interop.generation import Ids, Sampling, bucket, document, generate_ids
from fp8jax.interop.inference import Inference
from fp8jax.models.runner import Bound

DEFAULT_TOKENS = 256  # the default of generate_until, as in the harness
LENGTHS = (
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
)  # the harness's names for it; the first one counts
_KNOWN = (
    "until",
    "do_sample",
    "temperature",
    "top_p",
    "use_cache",
    "pad_token_id",
    "length_penalty",
    "early_stopping",
)
# Other options, with the values at which they have no effect; without beams the last two of _KNOWN have none.
_NEUTRAL = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "typical_p": (1,),
    "no_repeat_ngram_size": (0,),
    "diversity_penalty": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}
# Limits of a batch, for each replica: enough to keep a device busy, and float32 logits of at most 4
# GiB.
BATCH_TOKENS, LOGITS_BYTES = 16384, 4 << 30


class Window(NamedTuple):
    """Token ids of which the last `scored` are predicted, each from all before it."""

    ids: Ids
    scored: int


def log_likelihoods(
    inference: Inference, requests: Sequence[tuple[str, str]]
) -> list[tuple[float, bool]]:
    """Return, for each (context, continuation), its log probability, and whether greedy decoding
    would write it.

    Trailing white space of a context is moved to the continuation.
    """
    return score(inference, [encode_pair(inference, *request) for request in requests])


def rolling_log_likelihoods(inference: Inference, texts: Sequence[str]) -> list[float]:
    """Return the log probability of each text, every token scored once, in windows of the model's
    context.
    """
    requests = [
        (document(inference, ""), inference.tokenizer.encode(text).tolist()) for text in texts
    ]
    return [found for found, _ in score(inference, requests)]


def encode_pair(inference: Inference, context: str, continuation: str) -> tuple[Ids, Ids]:
    """Return the token ids of a context, with the end of document before it, and of its
    continuation.

    If one token spans both, so that none is left for the continuation, the continuation is encoded
    alone: otherwise it would score 0.

    Raises:
        ValueError: the continuation has no token.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    encode = inference.tokenizer.encode
    before = document(inference, stripped)
    after = (
        encode(stripped + continuation).tolist()[len(before) - 1 :] or encode(continuation).tolist()
    )
    if not after:
        raise ValueError(
            f"the continuation of {context[-60:]!r} is empty; there is nothing to score: remove "
            f"that choice from the task"
        )
    return before, after


def windows(context: Ids, continuation: Ids, length: int) -> Iterator[Window]:
    """Cut a request into windows of at most `length` inputs that score each token of the
    continuation once.

    One window is usual. A longer continuation takes several, each but the last without context
    beyond the token before it.
    """
    whole, done = context + continuation, len(context)
    while done < len(whole):
        end = min(done + length, len(whole))
        yield Window(whole[max(0, end - length - 1) : end], end - done)
        done = end


def score(inference: Inference, requests: Sequence[tuple[Ids, Ids]]) -> list[tuple[float, bool]]:
    """Return the log probability in nats of each continuation, and whether each of its tokens is
    the likeliest.

    Args:
        inference: the model.
        requests: (context, continuation) token ids; no context is empty.
    """
    pieces = [
        (i, window)
        for i, request in enumerate(requests)
        for window in windows(*request, inference.context)
    ]
    totals, greedy = np.zeros(len(requests)), np.ones(len(requests), bool)
    for batch, length, rows in _batches(
        inference, pieces, lambda piece: len(piece[1].ids) - 1, "scoring"
    ):
        ids, mask = np.zeros((rows, length + 1), np.int32), np.zeros((rows, length), bool)
        for row, (_, window) in enumerate(batch):
            end = len(window.ids)
            ids[row, :end] = window.ids
            mask[row, end - 1 - window.scored : end - 1] = True
        arrays = (inference.put(x) for x in (ids[:, :-1], ids[:, 1:], mask))
        found = inference.call(_score, *arrays, np.int32(inference.tokenizer.vocab_size))
        for (i, _), value, likeliest in zip(batch, *map(inference.fetch, found), strict=False):
            totals[i] += value
            greedy[i] &= likeliest
    return [(float(total), bool(g)) for total, g in zip(totals, greedy, strict=True)]


def _score(
    bound: Bound, inputs_bt: jax.Array, targets_bt: jax.Array, mask_bt: jax.Array, ids: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return float32 [b] masked sums of log probabilities; bool [b], whether all tokens are the
    likeliest of `ids`.
    """
    logits, _ = bound.model({"inputs": inputs_bt}, bound.gemms)
    chosen = jnp.take_along_axis(logits, targets_bt[..., None], axis=-1)[..., 0]
    total = jnp.sum(jnp.where(mask_bt, chosen - jax.nn.logsumexp(logits, axis=-1), 0.0), axis=-1)
    largest = jnp.max(jnp.where(jnp.arange(logits.shape[-1]) < ids, logits, -jnp.inf), axis=-1)
    return total, jnp.all((chosen == largest) | ~mask_bt, axis=-1)


def generate_until(
    inference: Inference, requests: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[str]:
    """Continue each context up to its first stop string, which is left out, or the end of the
    document.

    Args:
        inference: the model.
        requests: (context, options); options are the harness's `until` (a string or several),
            `max_gen_toks` (256) or another of LENGTHS, `do_sample`, `temperature` and `top_p`. A
            context that would leave no room loses its oldest tokens, down to half the model's
            context.

    Raises:
        ValueError: an option would change the text and is not supported.
    """
    out, alike = [""] * len(requests), defaultdict(list)
    for i, (context, options) in enumerate(requests):
        alike[_Options.read(options)].append((i, document(inference, context)))
    for options, rows in alike.items():
        if not options.tokens:
            continue
        for i, text in _generate_alike(inference, options, rows):
            out[i] = text
    return out


def check_options(options: Mapping[str, Any]) -> None:
    """Check the options of a request.

    Raises:
        ValueError: as `generate_until`.
    """
    _Options.read(options)


def _generate_alike(
    inference: Inference, options: "_Options", rows: list[tuple[int, Ids]]
) -> Iterator[tuple[int, str]]:
    """Yield each row's number and its text."""
    room = max(inference.context - options.tokens, inference.context // 2)
    rows = [(i, row[-room:]) for i, row in rows]

    def stopped(ids: Ids) -> bool:
        text = inference.tokenizer.decode(ids)
        return any(stop in text for stop in options.until)

    for batch, _, count in _batches(
        inference, rows, lambda row: len(row[1]) + options.tokens, "generating"
    ):
        prompts = [row for _, row in batch] + [batch[0][1]] * (count - len(batch))
        *_, found = generate_ids(inference, prompts, options.tokens, options.sampling, stopped)
        for (i, _), ids in zip(batch, found, strict=False):
            yield i, _before(inference.tokenizer.decode(ids), options.until)


class _Options(NamedTuple):
    until: tuple[str, ...]
    tokens: int
    sampling: Sampling

    @staticmethod
    def read(options: Mapping[str, Any]) -> "_Options":
        """Return the options from the harness's dictionary.

        Raises:
            ValueError: as `generate_until`.
        """
        options = {name: value for name, value in options.items() if value is not None}
        until = options.get("until") or ()
        until = (until,) if isinstance(until, str) else tuple(until)
        temperature = float(options.get("temperature", 0.0))
        if not options.get("do_sample", temperature > 0):
            temperature = 0.0
        drawing = ("top_k", "min_p", "typical_p") if not temperature else ()
        for name, value in options.items():
            if name not in (*_KNOWN, *LENGTHS, *drawing) and value not in _NEUTRAL.get(name, ()):
                raise ValueError(
                    f"generation option {name}={value!r} is not supported; change "
                    f"generation_kwargs of the task"
                )
        length = next((name for name in LENGTHS if name in options), LENGTHS[0])
        tokens = options.get(length, DEFAULT_TOKENS)
        if type(tokens) is not int or tokens < 0:
            raise ValueError(
                f"generation option {length}={tokens!r} is not a number of tokens; change "
                f"generation_kwargs of the task"
            )
        top_p = float(options.get("top_p", 1.0)) if temperature else 1.0
        return _Options(tuple(filter(None, until)), tokens, Sampling(temperature, top_p))


def _before(text: str, stops: Iterable[str]) -> str:
    """Return the text up to the first of any stop string."""
    return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]


def _batches(
    inference: Inference, pieces: list, length: Any, what: str
) -> Iterable[tuple[list, int, int]]:
    """Return (pieces, their bucket of length, rows of the batch), the longest first, so that too
    little memory shows early.
    """
    buckets = defaultdict(list)
    for piece in sorted(pieces, key=length, reverse=True):
        buckets[bucket(length(piece), inference.context)].append(piece)
    batches, tokens = [], min(BATCH_TOKENS, LOGITS_BYTES // (4 * inference.vocab_size))
    for size, found in buckets.items():
        rows = (
            min(
                max(1, tokens // size), 1 << (-(-len(found) // inference.replicas) - 1).bit_length()
            )
            * inference.replicas
        )
        batches += [
            (found[first : first + rows], size, rows) for first in range(0, len(found), rows)
        ]
    return track(
        batches, what, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True
    )
