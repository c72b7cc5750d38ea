"""Arrays in files, mapped into memory while they are read: any number of them, whatever number of files a process may open.

    array = Mapped(path, np.dtype("<u2"), count)
    array[10:20], len(array)                        # numpy arrays; the file is mapped when first asked

A map keeps its file's descriptor, of which a process has a thousand by default, and it may have 65,530 maps. Here MAPS are
kept at most, those asked for last; what was taken of an array stays valid while it is used.
"""

import functools
import itertools
import os
import resource
from typing import Any

import numpy as np

from fp8jax.config import DataError

MAPS = min(1 << 14, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
_numbers = itertools.count()


class Mapped:
    """A read-only array [count] in a file of at least that size, which the caller has checked.

    Reading raises a DataError where the file has gone since, or has become too short.
    """

    def __init__(self, path: str | os.PathLike, kind: np.dtype, count: int):
        # A file that is opened again may be another one of the same name.
        self._key = next(_numbers), os.fspath(path), kind, count
        self.dtype, self.itemsize, self.shape = kind, kind.itemsize, (count,)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, where: Any) -> Any:
        """An item, or a slice as a numpy array."""
        return _mapped(*self._key)[where]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All of it, for numpy's functions."""
        return np.array(_mapped(*self._key), dtype, copy=copy)


@functools.lru_cache(maxsize=MAPS)
def _mapped(number: int, path: str, kind: np.dtype, count: int) -> np.ndarray:
    """The array, without np.memmap's bookkeeping, a third of the time of reading a short window."""
    try:
        return np.asarray(np.memmap(path, kind, mode="r", shape=(count,)))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{path}: cannot be read any more: {reason}; restore it, or set config.data.on_fault=skip") from None
