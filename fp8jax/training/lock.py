"""Allow one run at a time in a directory."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
from collections.abc import Iterator
from typing import TextIO

from fp8jax.config import ConfigError


@contextlib.contextmanager
def exclusive(workdir: pathlib.Path) -> Iterator[None]:
    """Hold WORKDIR/lock, which names host and process; the system frees it when the process ends in
    any way.

    Raises:
        ConfigError: another process holds it, or the directory cannot be written.
    """
    with _opened(workdir) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            # A file system without locks cannot protect the run; it trains without one.
            if error.errno not in (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK):
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ConfigError(
                    f"{workdir}: {holder} is training here; stop it first, or choose another "
                    f"--workdir"
                ) from None
        try:
            file.truncate(0)
            file.write(
                f"process {os.getpid()} on {socket.gethostname()}, since "
                f"{time.strftime('%Y-%m-%d %H:%M:%S')}"
            )
            file.flush()
        except OSError as error:
            raise _unwritable(workdir, error) from None
        yield


def _opened(workdir: pathlib.Path) -> TextIO:
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        return (workdir / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise _unwritable(workdir, error) from None


def _unwritable(workdir: pathlib.Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{workdir}: cannot be written: {error.strerror}; fix that, or choose another --workdir"
    )
