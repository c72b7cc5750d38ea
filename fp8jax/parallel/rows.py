"""A process's share of a batch: which rows its devices need, and how they get there.

    rows = Rows((microbatches, batch, t), sharding)
    rows.numbers                 # of the whole batch's rows, those to load here; all of them where there is one process
    array = rows.put(loaded)     # [len(rows.numbers), t] to the global array [microbatches, batch, t]

Processes that share a row, because `tensor` or `sequence` spans them, both load it. Whatever the processes, the global array is the
same.
"""

import math

import jax
import numpy as np
from jax.sharding import Sharding


class Rows:
    """Rows of arrays of this shape, the last dimension of which are tokens, that lie on this process's devices."""

    def __init__(self, shape: tuple[int, ...], sharding: Sharding):
        self._shape, self._sharding = shape, sharding
        self._all = np.arange(math.prod(shape[:-1])).reshape(shape[:-1])
        needed = [
            self._all[index[:-1]].ravel()
            for index in sharding.addressable_devices_indices_map(shape).values()
            if index is not None
        ]
        self.numbers: list[int] = np.unique(np.concatenate(needed)).tolist()

    def put(self, loaded: np.ndarray) -> jax.Array:
        """The global array, from the rows loaded here."""

        def part(index: tuple[slice, ...]) -> np.ndarray:
            return loaded[np.searchsorted(self.numbers, self._all[index[:-1]]), index[-1]]

        return jax.make_array_from_callback(self._shape, self._sharding, part)
