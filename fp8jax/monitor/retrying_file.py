"""A file to append to that outlasts storage that fails: what cannot be written waits in memory, in order.

    file = RetryingFile("metrics.jsonl")
    file.write(content)         # never raises for storage's sake
    file.reason                 # why some of it is not on disk yet, "" if all is; the next write tries again

Nothing is given up while the process lives, so an outage of storage costs the memory of what was written meanwhile.
"""

import os


class RetryingFile:
    """An append-only binary file.

    Args:
        path: of the file; made at the first write that succeeds.
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
        """Appends, as much as storage takes; `reason` says why not all."""
        self._pending += content
        self.flush()

    def flush(self) -> None:
        """Tries again to write what waits; goes on in the middle of a line where storage stopped there."""
        try:
            if self._file is None:
                self._file = os.open(self._path, self._flags, 0o644)
            while self._pending:
                del self._pending[: os.write(self._file, self._pending)]
            self.reason = ""
        except OSError as error:
            self.reason = f"{self._path}: {error.strerror}"

    def close(self) -> None:
        """Tries once more, and closes; what still waits is lost."""
        self.flush()
        if self._file is not None:
            os.close(self._file)
            self._file = None
