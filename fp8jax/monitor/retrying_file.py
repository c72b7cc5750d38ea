"""Append to a file on storage that may fail: what cannot be written waits in memory, in order.

    file = RetryingFile("metrics.jsonl")
    file.write(content)         # does not raise when storage fails
    file.reason                 # why some of it is not on disk yet, "" if all is; the next write tries again

Content is kept while the process lives, so an outage of storage costs the memory of what was
written meanwhile.
"""

import os


class RetryingFile:
    """An append-only binary file.

    Args:
        path: path of the file, which is created by the first write that succeeds.
        fresh: start with an empty file.
    """

    def __init__(self, path: str | os.PathLike, *, fresh: bool = False):
        self._path, self._flags = (
            path,
            os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if fresh else 0),
        )
        self._file: int | None = None
        self._pending = bytearray()
        self.reason = ""

    def write(self, content: bytes) -> None:
        """Append as much as storage takes; `reason` says why not all."""
        self._pending += content
        self.flush()

    def flush(self) -> None:
        """Write what waits, continuing in the middle of a line if storage stopped there."""
        try:
            if self._file is None:
                self._file = os.open(self._path, self._flags, 0o644)
            while self._pending:
                del self._pending[: os.write(self._file, self._pending)]
            self.reason = ""
        except OSError as error:
            self.reason = f"{self._path}: {error.strerror}"

    def close(self) -> None:
        """Try once more, and close; what still waits is lost."""
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None
