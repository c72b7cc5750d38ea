"""Fit order-k byte models on the embedded corpus, for the bits per byte that a trained model has to beat.

    python benchmarks/ngram_baseline.py

Counts of every byte after every k bytes of the training novels, with 0.01 added to each count,
predict the held-out novel, each of its bytes once, in seconds. Ends of documents are not scored;
evaluation's figure includes that one token, some 0.00003 bits per byte. The models have no back-off
and are not tuned.
"""

import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from fp8jax.data import sources

ALPHABET = 256
ADDED = 0.01


def contexts_and_events(documents: list[bytes], order: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for every byte its context, and context and byte together, as numbers in base 256.

    Contexts do not cross documents; zero bytes precede a document, which occur in no text.

    Args:
        documents: texts.
        order: bytes of context, 0 to 6.

    Returns:
        Two arrays, int64 [bytes].
    """
    contexts, events = [], []
    for document in documents:
        padded = np.frombuffer(bytes(order) + document, np.uint8).astype(np.int64)
        context = np.zeros(len(document), np.int64)
        for place in range(order):
            context = context * ALPHABET + padded[place : place + len(document)]
        contexts.append(context)
        events.append(context * ALPHABET + padded[order:])
    return np.concatenate(contexts), np.concatenate(events)


def count(fitted: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return how often each of `wanted` occurs in `fitted`, int64 [wanted]."""
    values, counts = np.unique(fitted, return_counts=True)
    places = np.minimum(np.searchsorted(values, wanted), len(values) - 1)
    return np.where(values[places] == wanted, counts[places], 0)


def bits_per_byte(train: list[bytes], held_out: list[bytes], order: int) -> float:
    """Return the mean of -log2 p over the held-out bytes."""
    fitted_contexts, fitted_events = contexts_and_events(train, order)
    contexts, events = contexts_and_events(held_out, order)
    seen, total = count(fitted_events, events), count(fitted_contexts, contexts)
    return float(-np.log2((seen + ADDED) / (total + ADDED * ALPHABET)).mean())


def main() -> None:
    """Print the table."""
    train, held_out = sources.embedded_documents("train"), sources.embedded_documents("held_out")
    print(f"train {sum(map(len, train)):,} bytes, held out {sum(map(len, held_out)):,} bytes")
    print("order | bits per byte")
    for order in range(4):
        print(f"{order:5} | {bits_per_byte(train, held_out, order):.3f}")


if __name__ == "__main__":
    main()
