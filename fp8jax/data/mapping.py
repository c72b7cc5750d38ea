"""Map arrays in files into memory while they are read: any number of them, however few files a
process may open.

    array = Mapped(path, np.dtype("<u2"), count)
    array[10:20], len(array)                        # numpy arrays; the file is mapped when first asked

A map keeps a file descriptor open, of which a process has a thousand by default, and a process may
have 65,530 maps. At most MAPS are kept here, those mapped last; a slice that was taken stays valid
while it is used.
"""

import collections
import os
import resource
import threading
import weakref
from typing import Any

import numpy as np

from fp8jax.config import DataError

MAPS = min(1 << 14, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)


class Mapped:
    """A read-only array [count] in a file of at least that size, which the caller has checked.

    Reading raises a DataError if the file is gone by then, or has become too short.
    """

    def __init__(self, path: str | os.PathLike, kind: np.dtype, count: int):
        self._path = os.fspath(path)
        self.dtype, self.itemsize, self.shape = kind, kind.itemsize, (count,)
        self._array: np.ndarray | None = None  # set while the file is mapped

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: Any) -> Any:
        """Return an item, or a slice as a numpy array."""
        array = self._array
        return (_map(self) if array is None else array)[where]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Return the whole array, for numpy's functions."""
        return np.array(self[:], dtype, copy=copy)

    def _opened(self) -> np.ndarray:
        """Return the array without np.memmap's bookkeeping, a third of the time to read a short
        window.
        """
        try:
            return np.asarray(np.memmap(self._path, self.dtype, mode="r", shape=self.shape))
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise DataError(
                f"{self._path}: cannot be read any more: {reason}; restore it, or set "
                f"config.data.on_fault=skip"
            ) from None


_lock = threading.Lock()
_mapped: collections.deque[weakref.ref[Mapped]] = collections.deque()


def _map(mapped: Mapped) -> np.ndarray:
    """Map a file; above MAPS, release the one that was mapped first."""
    with _lock:
        if mapped._array is not None:  # another thread mapped it meanwhile
            return mapped._array
        array = mapped._array = mapped._opened()
        _mapped.append(weakref.ref(mapped))
        if len(_mapped) > MAPS and (first := _mapped.popleft()()) is not None:
            first._array = None
        return array
