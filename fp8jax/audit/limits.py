"""Find how much memory a run may use: on a device at hand, on this machine, on a device that is
only compiled for.

    limit = limits.of_target(target)        # for the audit
    limit = limits.of_devices(devices)      # devices at hand; None if unknown
    limit.usable                            # bytes that a program may need on one device

A GPU or TPU reports what its allocator may take (`memory_stats()`). On a CPU the limit is what is
free on the machine, in the cgroups that this process is in, and in its own address space
(`ulimit -v`), shared by its devices. No memory is allocated.
"""

import dataclasses
import os
import pathlib
import resource
from collections.abc import Iterable, Mapping, MutableMapping, Sequence

import jax

from fp8jax.audit.roofline import DEVICES
from fp8jax.audit.targets import Target

# The part of a GPU's memory that JAX's allocator takes. JAX's own default, 3/4, leaves 20 GB of an
# H100 unused; the rest here is for the CUDA context, NCCL's buffers and libraries.
MEMORY_FRACTION = 0.92
# The part of the allocator's memory that a program may be planned to need: the rest is lost between
# arrays.
_PLANNED = {"gpu": 0.96, "tpu": 0.96, "cpu": 0.9}
# Bytes of address space that a run takes besides its arrays: stacks and heaps of threads that begin
# later (measured: 1.2 GB).
_THREADS = 5 << 28
_FRACTIONS = ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION")


@dataclasses.dataclass(frozen=True)
class Limit:
    """The memory of one device.

    Attributes:
        bytes: memory for arrays.
        usable: bytes that a program may be planned to need.
        source: where the number comes from, readable.
    """

    bytes: int
    usable: int
    source: str


def set_memory_fraction(environment: MutableMapping[str, str] = os.environ) -> None:
    """Let JAX's allocator take MEMORY_FRACTION of a GPU, unless the user sets it; call this before
    JAX starts.
    """
    if not any(environment.get(name) for name in _FRACTIONS):
        environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(MEMORY_FRACTION)


def of_target(target: Target) -> Limit | None:
    """Return the memory of a target's device; None if unknown."""
    if target.kind not in DEVICES:
        return of_devices(target.devices)
    device = DEVICES[target.kind]
    part = MEMORY_FRACTION if target.platform == "gpu" else 1.0
    return _limit(
        device.capacity * part,
        target.platform,
        f"{part:.0%} of {device.name}'s {device.capacity / 1e9:.0f} GB",
    )


def of_devices(devices: Sequence[jax.Device]) -> Limit | None:
    """Return the least free memory of this process's devices; None if unknown."""
    mine = [device for device in devices if device.process_index == jax.process_index()]
    if not mine:
        return None
    platform = mine[0].platform
    if platform == "cpu":
        free, source = free_memory()
        return _limit(
            free / len(mine),
            platform,
            source if len(mine) == 1 else f"{source}, over {len(mine)} devices",
        )
    stats = [device.memory_stats() or {} for device in mine]
    if any("bytes_limit" not in found for found in stats):
        return None
    free = min(found["bytes_limit"] - found.get("bytes_in_use", 0) for found in stats)
    return _limit(free, platform, f"what JAX may take of {mine[0].device_kind}")


def _limit(size: float, platform: str, source: str) -> Limit:
    return Limit(int(size), int(size * _PLANNED.get(platform, 0.9)), source)


def free_memory(root: pathlib.Path = pathlib.Path("/")) -> tuple[int, str]:
    """Return the bytes of host memory that this process can still take, and what sets that bound.

    Args:
        root: directory of proc/ and sys/.
    """
    bounds = [*_of_machine(root), *_of_cgroups(root), *_of_process(root)]
    return min(bounds, default=(1 << 62, "no bound known"))


def _of_machine(root: pathlib.Path) -> Iterable[tuple[int, str]]:
    fields = _fields(root / "proc/meminfo")
    if "MemAvailable" in fields:
        yield fields["MemAvailable"] * 1024, "free on this machine"


def _of_cgroups(root: pathlib.Path) -> Iterable[tuple[int, str]]:
    """Yield the bounds of every cgroup from this process's own up to the root, in a container the
    container's.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers == "":
            base, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        below = pathlib.PurePosixPath(path.lstrip("/"))
        for part in (below, *below.parents):
            yield from _of_cgroup(base / part, *names)


def _of_cgroup(
    directory: pathlib.Path, most: str, now: str, cached: str
) -> Iterable[tuple[int, str]]:
    limit, used = _number(directory / most), _number(directory / now)
    if (
        limit is None or used is None or limit > 1 << 60
    ):  # "max", or cgroup v1's number for no limit
        return
    reclaimable = _fields(directory / "memory.stat").get(cached, 0)
    yield max(limit - used + min(reclaimable, used), 0), "free in this process's cgroup"


def _of_process(root: pathlib.Path) -> Iterable[tuple[int, str]]:
    fields = _fields(root / "proc/self/status")
    address_space = resource.RLIMIT_AS, "VmSize", "ulimit -v"
    data = resource.RLIMIT_DATA, "VmData", "ulimit -d"
    for kind, used, name in (address_space, data):
        most, _ = resource.getrlimit(kind)
        if most != resource.RLIM_INFINITY:
            yield max(most - fields.get(used, 0) * 1024 - _THREADS, 0), f"left of {name}"


def _fields(path: pathlib.Path) -> Mapping[str, int]:
    """Return names and numbers of lines such as `MemAvailable:   1234 kB`."""
    words = [line.replace(":", " ").split() for line in _lines(path)]
    return {found[0]: int(found[1]) for found in words if len(found) > 1 and found[1].isdigit()}


def _number(path: pathlib.Path) -> int | None:
    text = "".join(_lines(path)).strip()
    return int(text) if text.isdigit() else None


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
