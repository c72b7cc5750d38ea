"""Real processes over loopback: the same batches and losses as one process, whatever their number; and what happens when one dies."""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax.data import pipeline
from fp8jax.monitor.writers import read_metrics
from fp8jax.parallel.mesh import make_mesh
from fp8jax.parallel.rows import Rows
from fp8jax.parallel.sharding import RULES
from fp8jax.training import manifest
from tests.helpers.processes import free_port
from tests.helpers.runs import on_mesh

ROOT = pathlib.Path(__file__).resolve().parents[2]
MICRO = [
    "--config=configs/fp8_base.py:tiny",
    "--config.model.layers=2",
    "--config.model.width=32",
    "--config.model.ffn_width=32",
    "--config.model.kv_heads=2",
    "--config.data.sequence_length=32",
    "--config.optimizer.warmup_steps=2",
    "--config.optimizer.decay_fraction=0",
    "--config.log.every=1",
    "--config.log.report_minutes=0",
    "--config.monitor.every=0",
    "--config.evaluation.every=0",
    "--config.evaluation.batches=2",
    "--config.checkpoint.every=3",
]
PATIENCE = 900  # seconds; a crowded machine compiles slowly


def start(workdir, cache, *, processes, devices, steps, mesh, **flags):
    """The processes of a run, each with so many CPU devices."""
    port = free_port()
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.5",
    }
    options = [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()] + [
        f"--{name}={value}" for name, value in flags.items()
    ]
    command = [
        sys.executable,
        "train.py",
        *MICRO,
        f"--workdir={workdir}",
        f"--config.training.steps={steps}",
        "--start_timeout=300",
        *options,
    ]
    several = [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={processes}"]
    return [
        subprocess.Popen(
            command + (several + [f"--process_id={i}"] if processes > 1 else []),
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for i in range(processes)
    ]


def finish(started, code=0):
    told = [process.communicate(timeout=PATIENCE)[0] for process in started]
    assert [process.returncode for process in started] == [code] * len(started), "\n".join(told)
    return told


def losses(workdir):
    return {entry["step"]: entry["loss"] for entry in read_metrics(workdir / "metrics.jsonl")}


def test_two_processes_are_one_run(tmp_path):
    cache, mesh = tmp_path / "cache", {"data": 2, "fsdp": 1}
    told = finish(start(tmp_path / "run", cache, processes=2, devices=1, steps=3, mesh=mesh))
    assert (
        "mesh     data 2 (2 devices on 2 nodes; data goes between nodes)" in told[0]
        and "step" not in told[1]
    )
    finish(start(tmp_path / "whole", cache, processes=1, devices=2, steps=3, mesh=mesh))
    assert (
        losses(tmp_path / "run") == losses(tmp_path / "whole")
        and len(losses(tmp_path / "run")) == 3
    )


@pytest.mark.slow
def test_one_process_goes_on_where_two_were(tmp_path):
    """With twice the devices and another mesh: as one process with the first mesh all along."""
    cache, two = tmp_path / "cache", {"data": 2, "fsdp": 1}
    finish(start(tmp_path / "run", cache, processes=2, devices=1, steps=3, mesh=two))
    finish(
        start(
            tmp_path / "run", cache, processes=1, devices=4, steps=5, mesh={"fsdp": 2, "tensor": 2}
        )
    )
    finish(start(tmp_path / "whole", cache, processes=1, devices=2, steps=5, mesh=two))
    run, whole = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert run.keys() == whole.keys() == set(range(1, 6)) and [run[step] for step in (1, 2, 3)] == [
        whole[step] for step in (1, 2, 3)
    ]
    np.testing.assert_allclose(
        [run[step] for step in (4, 5)], [whole[step] for step in (4, 5)], atol=2e-3
    )


@pytest.mark.slow
def test_four_processes_go_on_as_two_and_as_one(tmp_path):
    cache, four = tmp_path / "cache", {"data": 2, "fsdp": 2}
    finish(start(tmp_path / "run", cache, processes=4, devices=1, steps=3, mesh=four))
    finish(start(tmp_path / "whole", cache, processes=1, devices=4, steps=9, mesh=four))
    finish(
        start(tmp_path / "run", cache, processes=2, devices=2, steps=6, mesh=four)
    )  # the same mesh, other processes
    run, whole = losses(tmp_path / "run"), losses(tmp_path / "whole")
    assert [run[step] for step in range(1, 7)] == [whole[step] for step in range(1, 7)]
    finish(
        start(
            tmp_path / "run", cache, processes=2, devices=2, steps=9, mesh={"fsdp": 2, "tensor": 2}
        )
    )
    run = losses(tmp_path / "run")
    np.testing.assert_allclose(
        [run[step] for step in range(1, 10)], [whole[step] for step in range(1, 10)], atol=2e-3
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 0])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(tmp_path, victim):
    cache, mesh = tmp_path / "cache", {"data": 2, "fsdp": 1}
    started = start(tmp_path / "run", cache, processes=2, devices=1, steps=100_000, mesh=mesh)
    deadline = time.monotonic() + PATIENCE
    while not list((tmp_path / "run").glob("checkpoints/*/MANIFEST.json")):
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.2)
    started[victim].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    told = started[1 - victim].communicate(timeout=100)[0]
    assert started[1 - victim].returncode == 1 and time.monotonic() - killed < 100
    assert (
        f"error: process {victim} (pid {started[victim].pid} on {socket.gethostname()}) is lost"
        in told
    )
    newest = max(
        int(path.parent.name) for path in (tmp_path / "run").glob("checkpoints/*/MANIFEST.json")
    )
    finish(start(tmp_path / "run", cache, processes=2, devices=1, steps=newest + 4, mesh=mesh))
    events = [
        json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()
    ]
    assert [event["step"] for event in events if event["kind"] == "started"][-1] >= newest


SHARED = """
import json, sys
from fp8jax.parallel import distributed
from fp8jax.parallel.launchers import Launch
from fp8jax.training import manifest
from fp8jax.training.checkpoint import Checkpoints
process, read, digests = int(sys.argv[1]), [], manifest._digests
manifest._digests = lambda directory, paths: read.extend(f"{directory.name}/{path}" for path in paths) or digests(directory, paths)
with distributed.start(Launch("test", sys.argv[2], 2, process), start_timeout=300, heartbeat_timeout=100):
    print(json.dumps([*Checkpoints(sys.argv[3]).newest(), read]))
"""


def test_processes_share_the_check_of_a_checkpoint(tmp_path):
    """Each file is read by one of them, and all know what one of them found."""
    for step in (10, 20):
        directory = tmp_path / "checkpoints" / str(step)
        directory.mkdir(parents=True)
        for number in range(5):
            (directory / f"file{number}").write_bytes(bytes([number]) * 1000)
        manifest.write(directory, {"step": step})
    (directory / "file3").write_bytes(bytes(1000))
    address, environment = (
        f"127.0.0.1:{free_port()}",
        os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""},
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, str(i), address, str(tmp_path)],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    told = [process.communicate(timeout=PATIENCE) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    found = [json.loads(out.splitlines()[-1]) for out, _ in told]
    assert [answer[:2] for answer in found] == [
        [10, {"20": "file3 is damaged: its digest differs"}]
    ] * 2
    of_ten = [[path for path in answer[2] if path.startswith("10/")] for answer in found]
    assert sorted(sum(of_ten, [])) == [f"10/file{number}" for number in range(5)] and [
        len(paths) for paths in of_ten
    ] == [3, 2]


BUSY = """
import os, signal, sys, time
from fp8jax.parallel import distributed
from fp8jax.parallel.launchers import Launch
process = int(sys.argv[1])
with distributed.start(Launch("test", sys.argv[2], 2, process), start_timeout=60, heartbeat_timeout=100):
    sys.setswitchinterval(0.5)  # the thread that listens has to wait for its turn, as in a long trace
    end = time.monotonic() + (1 if process == 0 else 60)
    while time.monotonic() < end:
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
def test_process_0_is_named_though_jax_aborts(tmp_path):
    """A thread of JAX's misses process 0 before Python has its turn."""
    address, environment = f"127.0.0.1:{free_port()}", os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", BUSY, str(i), address],
            cwd=ROOT,
            env=environment,
            text=True,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    told = str(processes[1].communicate(timeout=PATIENCE)[1])
    processes[0].communicate()
    assert (
        processes[1].returncode == 1
        and f"error: process 0 (pid {processes[0].pid} on {socket.gethostname()}) is lost" in told
    )
    assert "JAX distributed service detected fatal errors" in told, (
        "JAX was late, nothing was tested"
    )


@pytest.mark.slow
def test_a_signal_to_one_stops_all(tmp_path):
    started = start(
        tmp_path / "run",
        tmp_path / "cache",
        processes=2,
        devices=1,
        steps=100_000,
        mesh={"data": 2, "fsdp": 1},
    )
    deadline = time.monotonic() + PATIENCE
    while not (tmp_path / "run" / "metrics.jsonl").exists() or len(losses(tmp_path / "run")) < 2:
        assert time.monotonic() < deadline and all(process.poll() is None for process in started)
        time.sleep(0.2)
    started[1].send_signal(signal.SIGTERM)
    told = finish(started, code=4)
    assert "stopped on a signal to another process" in told[0]


@pytest.mark.parametrize(
    ("missing", "patience", "expected"),
    [
        (1, 12, "1 of 2 processes have not come within 12 s: 1"),
        (0, 3, "process 1 has not reached process 0 at 127.0.0.1"),
    ],
)
def test_who_does_not_come_is_named(tmp_path, missing, patience, expected):
    started = start(
        tmp_path / "run",
        tmp_path / "cache",
        processes=2,
        devices=1,
        steps=2,
        mesh={},
        start_timeout=patience,
    )
    killed = started.pop(missing)
    killed.kill()
    killed.communicate()
    told = finish(started, code=2)[0]
    assert expected in told and "Traceback" not in told


@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 8, "fsdp": 1},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"sequence": 2, "fsdp": 4},
        {"fsdp": 1, "tensor": 8},
    ],
)
def test_rows_reach_their_devices(mesh):
    """Whatever the mesh, the global array is the batch; on one process all rows are loaded."""
    config = on_mesh(mesh, training={"microbatches": 2, "batch_size": 32})
    sharding = NamedSharding(
        make_mesh(config, jax.devices()), PartitionSpec(None, RULES["batch"], RULES["sequence"])
    )
    rows, batch = Rows((2, 16, 32), sharding), pipeline.train_batches(config)[3]
    assert rows.numbers == list(range(32))
    np.testing.assert_array_equal(rows.put(batch["inputs"]), batch["inputs"].reshape(2, 16, 32))
