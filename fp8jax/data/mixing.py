"""Choose the source of the n-th sequence of a run by weights, exactly and by random access.

    schedule = Schedule((0.7, 0.3))
    schedule.place(10**9)       # (1, 300_000_000): the source, and how many sequences of it came before
    schedule.count(1, 1000)     # 300 of the first 1000 sequences

Sequences all have as many tokens, so shares of sequences are shares of tokens. The schedule repeats
every PERIOD sequences, within which the j-th of a source's m sequences aims at (j + 1/2) / m of the
period: shares hold over any stretch of it.
"""

from collections.abc import Sequence

import numpy as np

PERIOD = 100_000


class Schedule:
    """The order of sources.

    Args:
        weights: positive, adding up to 1.

    Raises:
        ValueError: a weight below 1 / PERIOD, which would never have its turn.
    """

    def __init__(self, weights: Sequence[float]):
        exact = np.array(weights, np.float64) * PERIOD
        self.counts = np.floor(exact).astype(np.int64)
        # The remainder of rounding down goes to the sources that lost most by it.
        self.counts[
            np.argsort(self.counts - exact, kind="stable")[: PERIOD - self.counts.sum()]
        ] += 1
        if (self.counts == 0).any():
            raise ValueError(f"weight {min(weights)} is below 1/{PERIOD}")
        aims = np.concatenate([(np.arange(count) + 0.5) / count for count in self.counts])
        order = np.argsort(aims, kind="stable")
        self._sources = np.repeat(np.arange(len(weights)), self.counts)[order]
        self._ranks = np.concatenate([np.arange(count) for count in self.counts])[order]

    def place(self, sequence: int) -> tuple[int, int]:
        """Return the source of a sequence, and its number among the sequences of that source."""
        period, offset = divmod(sequence, PERIOD)
        source = int(self._sources[offset])
        return source, period * int(self.counts[source]) + int(self._ranks[offset])

    def count(self, source: int, sequences: int) -> int:
        """Return how many of the first `sequences` come from a source."""
        periods, offset = divmod(sequences, PERIOD)
        return periods * int(self.counts[source]) + int(
            np.count_nonzero(self._sources[:offset] == source)
        )
