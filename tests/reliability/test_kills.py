"""Killed without warning at random moments and started again until done: as if nothing had happened."""

import collections
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest

from fp8jax.training.checkpoint import Checkpoints
from tests.training.test_run import logged, micro, saved

STEPS, KILLS, PHASES = 60, 10, ("start-up", "step", "save")
# Forked from one process that has imported everything, as a shell and Python would do it, only sooner.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["fp8jax.training.loop", "tests.training.test_run"])


def config_of(seed):
    return micro(training={"steps": STEPS, "seed": seed}, checkpoint={"every": 5, "keep": 2, "keep_every": 20, "keep_best": 1},
                 evaluation={"every": 20, "batches": 1}, monitor={"every": 0})


def run(workdir, cache, seed):
    """The process that is killed."""
    os.environ["XLA_FLAGS"] = ""
    sys.stdout = open(os.devnull, "w", encoding="utf-8")
    import jax

    from fp8jax.training import loop

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    sys.exit(loop.train(config_of(seed), workdir))


def start(*arguments):
    process = FORKS.Process(target=run, args=arguments)
    process.start()
    return process


def seen(phase, workdir):
    """What changes when a run comes to a phase: the size of its log, or the checkpoints under way, which a killed run leaves behind."""
    if phase == "save":
        return {path.stat().st_ino for path in (workdir / "checkpoints").glob("saving-*") if path.exists()}
    log = workdir / "metrics.jsonl"
    return {log.stat().st_size} if phase == "step" and log.exists() else set()


def kill(process, phase, workdir, rng):
    """Kills the run at a random moment of a phase; False if it ended before."""
    before = seen(phase, workdir)
    while process.is_alive() and phase != "start-up" and not seen(phase, workdir) - before:
        time.sleep(0.002)
    process.join({"start-up": rng.uniform(0.0, 4.0), "step": rng.uniform(0.0, 0.5), "save": rng.uniform(0.0, 0.2)}[phase])
    process.kill()
    process.join()
    return process.exitcode == -signal.SIGKILL


def run_to_the_end(workdir, cache, seed):
    """Starts the run again and again; each start but the last is killed. Returns the kills by phase."""
    rng, killed = random.Random(seed), collections.Counter()
    while killed.total() < KILLS:
        phase, process = rng.choice(PHASES), start(workdir, cache, seed)
        if kill(process, phase, workdir, rng):
            killed[phase] += 1
        else:
            assert process.exitcode == 0
            break
    process = start(workdir, cache, seed)
    process.join()
    assert process.exitcode == 0
    return killed


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("FP8JAX_KILL_RUNS", "10"))))
def test_killed_at_random_moments(tmp_path, tmp_path_factory, seed):
    cache = tmp_path_factory.getbasetemp() / "kills_cache"
    process = start(tmp_path / "whole", cache, seed)
    process.join()
    assert process.exitcode == 0
    killed = run_to_the_end(tmp_path / "killed", cache, seed)
    if tally := os.environ.get("FP8JAX_KILL_TALLY"):
        with open(tally, "a", encoding="utf-8") as file:
            file.write(f"seed {seed}: {killed.total()} kills, {dict(killed)}\n")
    (whole, _), (parts, _) = saved(config_of(seed), tmp_path / "whole"), saved(config_of(seed), tmp_path / "killed")
    assert any("history" in name for name in whole)
    for name, array in whole.items():
        assert array.tobytes() == parts[name].tobytes(), name
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
    checkpoints = Checkpoints(tmp_path / "killed")
    steps = checkpoints.steps()
    assert sorted(path.name for path in checkpoints.directory.iterdir()) == sorted(map(str, steps)), "nothing but checkpoints is left"
    assert checkpoints.newest() == (STEPS, {}) and all(step % 20 == 0 for step in steps[:-2])  # and of those what `keep` allows
    assert not list((tmp_path / "killed").glob("*.tmp"))
    for step in steps:
        checkpoints.restore(step, {}, partial=True)  # compares every file with the manifest
