"""Killed without warning at random moments and started again until done: as if nothing had happened. Every other run is of two processes."""

import collections
import multiprocessing
import os
import random
import signal
import socket
import statistics
import sys
import time
import types

import pytest

from fp8jax.monitor.writers import read_metrics
from fp8jax.parallel.launchers import Launch
from fp8jax.training.checkpoint import Checkpoints
from tests.helpers.processes import free_port
from tests.helpers.runs import logged, micro, saved

STEPS, KILLS, PHASES = 80, 10, ("start-up", "step", "save")
MEETING, LIMIT = (
    30,
    60,
)  # seconds in which processes must meet, and in which one must end that has lost the other
PATIENCE = 600  # seconds for a run without kills; a crowded machine compiles slowly
# Forked from one process that has imported everything, as a shell and Python would do it, only sooner.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["fp8jax.cli.errors", "fp8jax.training.loop", "tests.training.test_run"]
)


def processes_of(seed):
    return 1 + seed % 2


def config_of(seed):
    return micro(
        training={"steps": STEPS, "seed": seed},
        checkpoint={"every": 5, "keep": 2, "keep_every": 20, "keep_best": 1},
        evaluation={"every": 20, "batches": 1},
        monitor={"every": 0},
        mesh={"data": processes_of(seed), "fsdp": 1},
    )


def run(workdir, cache, seed, launch, log):
    """A process that is killed; as train.py, all it says goes to a file."""
    os.environ["XLA_FLAGS"] = ""
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import jax
    from jax._src import compiler

    from fp8jax.cli.errors import complain
    from fp8jax.config import ConfigError
    from fp8jax.parallel import distributed
    from fp8jax.training import loop

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # JAX lets process 0 alone write to the cache; on CPUs, unlike GPUs, another process finds nothing of that and would compile at each start.
    compiler.distributed = types.SimpleNamespace(
        global_state=types.SimpleNamespace(process_id=0, client=None)
    )
    try:
        with distributed.start(launch, start_timeout=MEETING, heartbeat_timeout=100):
            code = loop.train(config_of(seed), workdir)
    except ConfigError as error:
        sys.exit(complain(str(error)))
    jax.distributed.shutdown()  # a forked process leaves without what Python does at its end
    sys.exit(code)


def start(workdir, cache, seed):
    """The processes of a run."""
    count, port = processes_of(seed), free_port()
    launches = [
        Launch("test", f"127.0.0.1:{port}", count, process) if count > 1 else None
        for process in range(count)
    ]
    processes = [
        FORKS.Process(target=run, args=(workdir, cache, seed, launch, log_of(workdir, i)))
        for i, launch in enumerate(launches)
    ]
    for process in processes:
        process.start()
    return processes


def log_of(workdir, process):
    return workdir.with_name(f"{workdir.name}-{process}.log")


def finish(processes, workdir, seconds=PATIENCE):
    """Exit codes; a process that does not end is a failure."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0.0))
    hang = [i for i, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    assert not hang, (
        f"processes {hang} have not ended within {seconds} s\n{told(workdir, len(processes))}"
    )
    return [process.exitcode for process in processes]


def told(workdir, count):
    return "\n".join(
        f"--- {log.name}\n{log.read_text(errors='replace')}"
        for log in (log_of(workdir, i) for i in range(count))
        if log.exists()
    )


def seen(phase, workdir):
    """What changes when a run comes to a phase: how many starts have done a step, or the checkpoints under way, which a killed run leaves."""
    if phase == "save":
        return {
            path.stat().st_ino
            for path in (workdir / "checkpoints").glob("saving-*")
            if path.exists()
        }
    return {len(first_steps(workdir))} if phase == "step" else set()


def first_steps(workdir):
    """Seconds from the start to the first step, of each start that came so far."""
    events = workdir / "events.jsonl"
    return (
        [event["seconds"] for event in read_metrics(events) if event["kind"] == "first_step"]
        if events.exists()
        else []
    )


def pace(workdir):
    """Seconds a step, saves included, in the second half of a run."""
    return statistics.mean(
        entry["step_seconds"] for entry in read_metrics(workdir / "metrics.jsonl")[STEPS // 2 :]
    )


def kill(process, phase, workdir, rng, seconds):
    """Kills a process at a random moment of a phase of its run; returns the phase it was in, None if it ended before.

    seconds: what a step takes, from which follows how long to wait.
    """
    before = {phase: seen(phase, workdir) for phase in PHASES}
    while process.is_alive() and phase != "start-up" and not seen(phase, workdir) - before[phase]:
        time.sleep(0.002)
    longest = {
        "start-up": (first_steps(workdir) or [4.0])[-1],
        "step": 12 * seconds,
        "save": 10 * seconds,
    }[phase]
    process.join(rng.uniform(0.0, longest))
    process.kill()
    process.join()
    there = [phase for phase in ("save", "step") if seen(phase, workdir) - before[phase]] + [
        "start-up"
    ]
    return there[0] if process.exitcode == -signal.SIGKILL else None


def check_survivor(processes, victim, workdir):
    """The other process of a run has ended by itself, with one line that names the lost one; or, if both had done all, in good order."""
    codes = finish(processes, workdir, LIMIT)
    if len(codes) == 1:
        return
    code, said = codes[1 - victim], log_of(workdir, 1 - victim).read_text(errors="replace")
    lost = (
        f"error: process {victim} (pid {processes[victim].pid} on {socket.gethostname()}) is lost"
    )
    early = (
        "1 of 2 processes have not come within",
        "process 1 has not reached process 0",
        "process 1 was let go",
    )[victim == 0 :]
    done = Checkpoints(workdir).latest_step() == STEPS
    assert (
        (code == 1 and lost in said)
        or (code == 2 and any(line in said for line in early))
        or (code == 0 and done)
    ), f"process {victim} was killed, the other ended with {code}\n{told(workdir, 2)}"


def run_to_the_end(workdir, cache, seed, seconds):
    """Starts the run again and again; each start but the last is killed. Returns the kills by phase."""
    rng, killed = random.Random(seed), collections.Counter()
    while killed.total() < KILLS:
        phase, processes = rng.choice(PHASES), start(workdir, cache, seed)
        victim = rng.randrange(len(processes))
        phase = kill(processes[victim], phase, workdir, rng, seconds)
        if phase is None:
            assert not any(finish(processes, workdir)), told(workdir, len(processes))
            break
        killed[phase] += 1
        check_survivor(processes, victim, workdir)
    assert not any(finish(start(workdir, cache, seed), workdir)), told(workdir, processes_of(seed))
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("FP8JAX_KILL_RUNS", "10"))))
def test_killed_at_random_moments(tmp_path, tmp_path_factory, seed):
    cache = tmp_path_factory.getbasetemp() / f"kills_cache_{processes_of(seed)}"
    assert not any(finish(start(tmp_path / "whole", cache, seed), tmp_path / "whole")), told(
        tmp_path / "whole", processes_of(seed)
    )
    killed = run_to_the_end(tmp_path / "killed", cache, seed, pace(tmp_path / "whole"))
    resumed = [
        event["step"]
        for event in read_metrics(tmp_path / "killed" / "events.jsonl")
        if event["kind"] == "started"
    ]
    if tally := os.environ.get("FP8JAX_KILL_TALLY"):
        with open(tally, "a", encoding="utf-8") as file:
            file.write(
                f"seed {seed}, {processes_of(seed)} processes: {killed.total()} kills, {dict(killed)}; went on from {resumed}\n"
            )
    (whole, _), (parts, _) = (
        saved(config_of(seed), tmp_path / "whole"),
        saved(config_of(seed), tmp_path / "killed"),
    )
    assert any("history" in name for name in whole)
    for name, array in whole.items():
        assert array.tobytes() == parts[name].tobytes(), name
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
    checkpoints = Checkpoints(tmp_path / "killed")
    steps = checkpoints.steps()
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == sorted(
        map(str, steps)
    ), "nothing but checkpoints is left"
    assert checkpoints.newest() == (STEPS, {}) and all(
        step % 20 == 0 for step in steps[:-2]
    )  # and of those what `keep` allows
    assert not list((tmp_path / "killed").glob("*.tmp"))
    for step in steps:
        checkpoints.restore(step, {}, partial=True)  # compares every file with the manifest
