"""Find a process's share of a batch: which rows its devices need, and put them there.

    rows = Rows((microbatches, batch, t), sharding)
    rows.numbers                 # numbers of the rows of the whole batch to load here; all of them in a single process
    array = rows.put(loaded)     # from [len(rows.numbers), t] to the global array [microbatches, batch, t]

Processes that share a row, because `tensor` or `sequence` spans them, both load it. The global
array is the same for any number of processes.
"""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding


class Rows:
    """The rows of arrays of this shape, whose last dimension is tokens, that lie on this process's
    devices.
    """

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
        """Return the global array, from the rows loaded here."""

        def part(index: Any) -> np.ndarray:
            return loaded[np.searchsorted(self.numbers, self._all[index[:-1]]), index[-1]]

        return jax.make_array_from_callback(self._shape, self._sharding, part)
