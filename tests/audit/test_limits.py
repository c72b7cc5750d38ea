"""How much memory there is: of a machine, a cgroup, a process, as files and limits say."""

import resource

import jax
import pytest

from fp8jax.audit import limits

GIB = 1 << 30


@pytest.fixture
def root(tmp_path):
    """A machine with 8 GiB free."""
    for path in ("proc/self", "sys/fs/cgroup/user/run", "sys/fs/cgroup/memory/job"):
        (tmp_path / path).mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:   {8 * GIB >> 10} kB\n")
    (tmp_path / "proc/self/status").write_text(f"Name:\tpython\nVmSize:\t {GIB >> 10} kB\n")
    return tmp_path


def test_a_machine(root):
    assert limits.free_memory(root) == (8 * GIB, "free on this machine")


def test_a_cgroup_of_version_2_and_those_above_it(root):
    (root / "proc/self/cgroup").write_text("0::/user/run\n")
    group = root / "sys/fs/cgroup/user/run"
    (group / "memory.max").write_text("max\n")
    (group / "memory.current").write_text(f"{GIB}\n")
    assert limits.free_memory(root)[0] == 8 * GIB
    (group.parent / "memory.max").write_text(f"{4 * GIB}\n")
    (group.parent / "memory.current").write_text(f"{2 * GIB}\n")
    (group.parent / "memory.stat").write_text(f"anon 5\ninactive_file {GIB}\n")
    assert limits.free_memory(root) == (3 * GIB, "free in this process's cgroup")


def test_a_cgroup_of_version_1(root):
    (root / "proc/self/cgroup").write_text("5:cpu:/\n4:memory:/job\n")
    group = root / "sys/fs/cgroup/memory/job"
    (group / "memory.limit_in_bytes").write_text(f"{4 * GIB}\n")
    (group / "memory.usage_in_bytes").write_text(f"{GIB}\n")
    assert limits.free_memory(root)[0] == 3 * GIB
    (group / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert limits.free_memory(root)[0] == 8 * GIB


def test_the_address_space_of_the_process(root, monkeypatch):
    bounds = {resource.RLIMIT_AS: 4 * GIB}
    monkeypatch.setattr(
        resource, "getrlimit", lambda kind: (bounds.get(kind, resource.RLIM_INFINITY),) * 2
    )
    left = 3 * GIB - limits._THREADS  # threads begin later
    assert limits.free_memory(root) == (left, "left of ulimit -v")


def test_devices_of_one_process_share_the_machine():
    one, all_ = limits.of_devices(jax.devices()[:1]), limits.of_devices(jax.devices())
    assert all_.bytes == pytest.approx(one.bytes / len(jax.devices()), rel=0.2)
    assert one.usable < one.bytes


def test_what_an_allocator_may_take_less_what_is_taken(monkeypatch):
    class Device:
        platform, device_kind, process_index = "gpu", "NVIDIA H100", 0

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    devices = [Device({"bytes_limit": 100}), Device({"bytes_limit": 100, "bytes_in_use": 30})]
    assert limits.of_devices(devices).bytes == 70
    assert limits.of_devices([Device(None)]) is None


def test_the_users_own_memory_fraction_stays():
    environment = {}
    limits.set_memory_fraction(environment)
    assert environment == {"XLA_PYTHON_CLIENT_MEM_FRACTION": str(limits.MEMORY_FRACTION)}
    for name in ("XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_CLIENT_MEM_FRACTION"):
        environment = {name: ".5"}
        limits.set_memory_fraction(environment)
        assert environment == {name: ".5"}
