"""Run several processes as one: start-up, who writes, what all must agree on, and the end of all
when one is lost.

    with start(launch, start_timeout=300, heartbeat_timeout=100):       # before anything that starts JAX; launchers.find() gives `launch`
        if is_first(): ...                                              # only process 0 writes logs
        step = from_first(step)                                         # process 0's value, on every process
        reason = from_any(reason)                                       # the text of the first process that has one
        agreement = Agreement(2)
        stop, save = agreement((stop, save))                            # true everywhere once it is true anywhere

Each process keeps a connection to process 0, at the port after the coordinator's. When a process is
killed or its machine fails, the connection ends, process 0 informs the others, and all end with a
message that names it; a launcher then restarts the job. JAX's own heartbeats end the run later, or
at once if process 0 is gone, with less information. If JAX finds the coordinator itself (TPU pods),
only the heartbeats are used.
"""

import contextlib
import ctypes
import functools
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fp8jax.config import ConfigError
from fp8jax.parallel.launchers import Launch

_TEXT = 500
_PATIENCE = 5.0  # seconds for an orderly ending process to inform the others


@contextlib.contextmanager
def start(launch: Launch | None, *, start_timeout: int, heartbeat_timeout: int) -> Iterator[None]:
    """Join the other processes; a process alone continues at once.

    Args:
        launch: this process's launch.
        start_timeout: seconds to wait for all processes.
        heartbeat_timeout: seconds after which JAX gives up a silent process.

    Raises:
        ConfigError: other processes did not connect in time; the message names them.
    """
    if launch is None:
        yield
        return
    if launch.address is None:
        jax.distributed.initialize(
            cluster_detection_method=launch.method,
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
        yield
        return
    with _Peers(launch, start_timeout):
        _delay_abort()
        jax.distributed.initialize(
            launch.address,
            launch.count,
            launch.process,
            launch.devices,
            cluster_detection_method="deactivate",
            initialization_timeout=start_timeout,
            heartbeat_timeout_seconds=heartbeat_timeout,
        )
        yield


def is_first() -> bool:
    """Return whether this process writes what is written once."""
    return jax.process_index() == 0


def from_first(value: int) -> int:
    """Return the number that process 0 has; every process must call this."""
    return (
        value
        if jax.process_count() == 1
        else int(multihost_utils.broadcast_one_to_all(np.int32(value)))
    )


def from_any(text: str | None) -> str | None:
    """Return the text of the first process that has one, cut to 500 bytes, or None; every process
    must call this.
    """
    if jax.process_count() == 1:
        return text
    mine = np.zeros(_TEXT, np.uint8)
    encoded = np.frombuffer((text or "").encode()[:_TEXT], np.uint8)
    mine[: len(encoded)] = encoded
    texts = (
        bytes(row).rstrip(b"\0").decode(errors="replace")
        for row in multihost_utils.process_allgather(mine)
    )
    return next((text for text in texts if text), None)


def least(value: int) -> int:
    """Return the smallest of all processes' numbers, each within an int32; every process must call
    this.
    """
    return (
        value
        if jax.process_count() == 1
        else int(multihost_utils.process_allgather(np.int32(value)).min())
    )


class Agreement:
    """Flags that are set on all processes, at the same call, soon after they are set on one.

    The answer is that of the call before last, so that no device waits for it; in a process alone
    it is immediate.

    Args:
        flags: number of flags.
    """

    def __init__(self, flags: int):
        self._flags, self._asked = flags, []
        mesh = Mesh(np.asarray(jax.devices()), ("all",))
        self._sharding = NamedSharding(mesh, PartitionSpec("all"))
        self._any = jax.jit(
            functools.partial(jnp.max, axis=0), out_shardings=NamedSharding(mesh, PartitionSpec())
        )

    def __call__(self, flags: tuple[bool, ...]) -> tuple[bool, ...]:
        """Return the flags of all processes, each combined by `or`."""
        if jax.process_count() == 1:
            return flags
        mine = np.asarray([flags], np.int32)
        self._asked.append(
            self._any(
                jax.make_array_from_callback(
                    (jax.device_count(), self._flags), self._sharding, lambda _: mine
                )
            )
        )
        if len(self._asked) < 3:
            return (False,) * self._flags
        return tuple(bool(flag) for flag in np.asarray(self._asked.pop(0)))

    def forget(self) -> None:
        """Drop the pending answers, because the action is done."""
        self._asked.clear()


class _Peers:
    """The connections between process 0 and the others, as a context that informs the others how it
    ended.
    """

    def __init__(self, launch: Launch, timeout: float):
        self._launch, self._deadline, self._timeout = launch, time.monotonic() + timeout, timeout
        host, _, port = (launch.address or "").rpartition(":")
        self._host, self._port = host.strip("[]"), int(port) + 1
        self._sockets: dict[int, socket.socket] = {}
        self._names: dict[int, str] = {}
        self._ended = False

    def __enter__(self) -> None:
        self._gather() if self._launch.process == 0 else self._join()
        for number, connection in self._sockets.items():
            connection.settimeout(None)
            _keep_alive(connection)
            threading.Thread(
                target=self._listen,
                args=(number, connection),
                name=f"process {number}",
                daemon=True,
            ).start()

    def __exit__(self, kind: type | None, error: BaseException | None, _: Any) -> None:
        # An error here may be an effect of losing another process; the thread that listens to that
        # one reports it.
        if error is not None and not isinstance(error, (SystemExit, ConfigError)):
            time.sleep(_PATIENCE)
        self._ended = True
        for connection in self._sockets.values():
            _send(
                connection,
                {
                    "left": f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
                    if error is not None
                    else ""
                },
            )

    def _gather(self) -> None:
        try:
            server = socket.create_server(("", self._port))
        except OSError as error:
            raise ConfigError(
                f"--coordinator_address={self._launch.address}: port {self._port}, the one "
                f"after it, cannot be used: "
                f"{error.strerror}"
            ) from None
        with server:
            while len(self._sockets) < self._launch.count - 1:
                server.settimeout(max(self._deadline - time.monotonic(), 0.01))
                try:
                    connection, _ = server.accept()
                    connection.settimeout(5.0)
                    hello = _receive(connection)
                except TimeoutError:
                    self._complain_of_missing()
                    continue
                if hello and isinstance(hello.get("process"), int):
                    self._sockets[hello["process"]], self._names[hello["process"]] = (
                        connection,
                        str(hello.get("name")),
                    )
        for connection in self._sockets.values():
            _send(connection, {"name": _own_name()})

    def _complain_of_missing(self) -> None:
        if time.monotonic() < self._deadline:
            return
        missing = [number for number in range(1, self._launch.count) if number not in self._sockets]
        told = ", ".join(map(str, missing[:8])) + (
            f" and {len(missing) - 8} more" if len(missing) > 8 else ""
        )
        raise ConfigError(
            f"{len(missing)} of {self._launch.count} processes have not come within "
            f"{self._timeout:.0f} s: {told}; look at their "
            f"logs, and check that they reach {self._launch.address} and the port after it"
        )

    def _join(self) -> None:
        where = f"process 0 at {self._host}, port {self._port} (the one after the coordinator's)"
        while True:
            try:
                connection = socket.create_connection((self._host, self._port), timeout=5.0)
                break
            except OSError as error:
                if time.monotonic() > self._deadline:
                    raise ConfigError(
                        f"process {self._launch.process} has not reached {where} within "
                        f"{self._timeout:.0f} s: {error}; is "
                        "process 0 running, and may the two connect?"
                    ) from None
                time.sleep(0.2)
        _send(connection, {"process": self._launch.process, "name": _own_name()})
        connection.settimeout(max(self._deadline - time.monotonic(), 1.0))
        with contextlib.suppress(TimeoutError):
            if welcome := _receive(connection):
                self._sockets[0], self._names[0] = connection, str(welcome.get("name"))
                return
        raise ConfigError(
            f"process {self._launch.process} was let go by {where} after {self._timeout:.0f} s: "
            f"not all of the "
            f"{self._launch.count} processes came; its log names the missing ones"
        )

    def _listen(self, number: int, connection: socket.socket) -> None:
        """End this process when the one at the other end is gone, or reports that another is."""
        while message := _receive(connection):
            if "lost" in message:
                self._end(message["lost"])
            elif message.get("left"):
                time.sleep(_PATIENCE)
                self._end(
                    f"process {number} ({self._names[number]}) has ended with {message['left']}"
                )
            elif "left" in message:
                return
        self._end(
            f"process {number} ({self._names[number]}) is lost: killed, or its machine or "
            f"network failed"
        )

    def _end(self, reason: str) -> None:
        if self._ended:
            return
        self._ended = True
        if self._launch.process == 0:
            for connection in self._sockets.values():
                _send(connection, {"lost": reason})
        print(
            f"error: {reason}; the other processes end. Start all again to continue from the "
            f"newest checkpoint.",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)


def _delay_abort() -> None:
    """Give `_listen` time to report which process is lost before JAX aborts this one.

    A thread of JAX calls abort() as soon as it misses process 0, mostly before Python runs. The C
    library's own `sleep` becomes the handler of SIGABRT and takes the signal's number, 6, for
    seconds; then the process ends as it would without it.
    """
    library = ctypes.CDLL(None)
    library.signal.argtypes, library.signal.restype = (
        [ctypes.c_int, ctypes.c_void_p],
        ctypes.c_void_p,
    )
    library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))


def _own_name() -> str:
    return f"pid {os.getpid()} on {socket.gethostname()}"


def _keep_alive(connection: socket.socket) -> None:
    """Make the connection detect within a minute that a machine has stopped answering."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 15), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 3)):
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any] | None:
    """Return the next message; None when the connection has ended."""
    line = b""
    while not line.endswith(b"\n"):
        try:
            byte = connection.recv(1)
        except TimeoutError:
            raise
        except OSError:
            return None
        if not byte:
            return None
        line += byte
    try:
        message = json.loads(line)
    except ValueError:
        return None
    return message if isinstance(message, dict) else None
