"""Open files of text as bytes, decompressing `.gz`, `.bz2`, `.xz` and `.zst`.

    with Input("crawl.jsonl.zst", progress) as file:
        line = file.readline(1 << 20)

A file is not trusted: what is decompressed at a time is bounded, and damage or a missing end is a
ConfigError that names the file and the byte. Concatenated streams are read as one. `zstd --long` is
read with any window, which is held in memory.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any

from fp8jax.config import ConfigError

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
Progress = Callable[[int], Any]

_OUTPUT = 1 << 20
_XZ_MEMORY = 1 << 29
# zstd packs up to 128 KiB into 4 bytes, and its Python package has no limit on output: so little
# goes in at a time.
_ZSTD_INPUT = 1 << 12
_ZSTD_WINDOW = 1 << 31  # the format's largest


class Input:
    """A file, decompressed, that reports how far it was read and names the place where it is
    damaged.
    """

    def __init__(self, path: str, progress: Progress):
        self._path = path
        self._progress = progress
        self._reported = 0
        try:
            self._raw = open(path, "rb", buffering=1 << 20)
        except OSError as error:
            raise unreadable(path, error) from None
        self._file: Any = self._decompressed()

    def _decompressed(self) -> Any:
        name = self._path.lower()
        if name.endswith(".gz"):
            return io.BufferedReader(gzip.GzipFile(fileobj=self._raw), 1 << 20)
        if name.endswith(".bz2"):
            return io.BufferedReader(_Stream(self._raw, bz2.BZ2Decompressor), 1 << 20)
        if name.endswith(".xz"):
            stream = _Stream(self._raw, lambda: lzma.LZMADecompressor(memlimit=_XZ_MEMORY))
            return io.BufferedReader(stream, 1 << 20)
        if name.endswith(".zst"):
            return io.BufferedReader(_Stream(self._raw, _zstd(self._path)), 1 << 20)
        return self._raw

    def __enter__(self) -> "Input":
        return self

    def __exit__(self, *_: Any) -> None:
        self._report()
        self._raw.close()

    def seek(self, position: int) -> None:
        """Go to a byte of a file that is not compressed."""
        if position:
            self._file.seek(position)
            self._reported = position

    def tell(self) -> int:
        """Return the position in the decompressed bytes that is read next."""
        return self._file.tell()

    def read(self, size: int) -> bytes:
        """Read at most `size` bytes; b'' at the end."""
        return self._guarded(self._file.read, size)

    def readline(self, limit: int) -> bytes:
        """Read a line with its end, or its first `limit` bytes."""
        return self._guarded(self._file.readline, limit)

    def _guarded(self, action: Callable[[int], bytes], size: int) -> bytes:
        try:
            found = action(size)
        except (OSError, EOFError, ValueError, MemoryError, zlib.error, lzma.LZMAError) as error:
            raise self._damaged(error) from None
        self._report()
        return found

    def _report(self) -> None:
        position = self._raw.tell()
        if position > self._reported:
            self._progress(position - self._reported)
            self._reported = position

    def _damaged(self, error: Exception) -> ConfigError:
        return ConfigError(
            f"{self._path}: is damaged or cut off near byte {self._raw.tell()}: {first_line(error)}"
        )


class _Zstd:
    """A decompressor of one zstd frame, with the interface of bz2's and lzma's decompressors."""

    def __init__(self, decoder: Any, error: type[Exception]):
        self._decoder = decoder
        self._error = error
        self.needs_input = True

    def decompress(self, data: bytes, max_length: int) -> bytes:
        try:
            return self._decoder.decompress(data)
        except self._error as error:
            raise ValueError(first_line(error)) from None

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data


def _zstd(path: str) -> Callable[[], _Zstd]:
    try:
        import zstandard
    except ImportError:
        raise missing_package(path, "zstandard") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    return lambda: _Zstd(decompressor.decompressobj(), zstandard.ZstdError)


class _Stream(io.RawIOBase):
    """The output of a decompressor of `raw`, stream after stream."""

    def __init__(self, raw: Any, make: Callable[[], Any]):
        self._raw = raw
        self._make = make
        self._decoder: Any = None
        self._left = memoryview(b"")
        self._input = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            if not self._advance():
                return 0
        count = min(len(buffer), len(self._left))
        buffer[:count] = self._left[:count]
        self._left = self._left[count:]
        return count

    def _advance(self) -> bool:
        """Decompress some more; return False at the end of the last stream."""
        if self._decoder is not None and self._decoder.eof:
            self._input = self._decoder.unused_data
            self._decoder = None
        if not self._input and (self._decoder is None or self._decoder.needs_input):
            self._input = self._raw.read(_ZSTD_INPUT)
            if not self._input:
                if self._decoder is None:
                    return False
                raise EOFError("the compressed stream has no end")
        if self._decoder is None:
            self._decoder = self._make()
        given, self._input = self._input[:_ZSTD_INPUT], self._input[_ZSTD_INPUT:]
        self._left = memoryview(self._decoder.decompress(given, max_length=_OUTPUT))
        if self._decoder.eof:
            self._input = self._decoder.unused_data + self._input
            self._decoder = None
        return True


def missing_package(path: str, package: str) -> ConfigError:
    """Return the error for a package of requirements-data.txt that is not installed."""
    return ConfigError(f"{path}: needs the package {package}; pip install -r requirements-data.txt")


def unreadable(path: str, error: OSError) -> ConfigError:
    """Return the error for a file that cannot be opened."""
    return ConfigError(f"{path}: cannot be read: {error.strerror or first_line(error)}")


def first_line(error: BaseException) -> str:
    """Return an error's message as one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]
