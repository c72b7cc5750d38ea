"""Killed without warning at random moments and started again until done: as if nothing had happened."""

import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest

from fp8jax.training import manifest
from fp8jax.training.checkpoint import Checkpoints
from tests.training.test_run import logged, micro, saved

ROOT = pathlib.Path(__file__).resolve().parents[2]
RUN = """
import sys
import jax
from tests.training.test_run import micro, train
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
print("up", flush=True)
sys.exit(train(micro(training={"steps": 60, "seed": int(sys.argv[3])}, checkpoint={"every": 7}, evaluation={"every": 30}), sys.argv[1]))
"""


def start(workdir, cache, seed):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    return subprocess.Popen([sys.executable, "-c", RUN, str(workdir), str(cache), str(seed)], cwd=ROOT, env=environment,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def kill_until_done(workdir, cache, seed, kills):
    """Starts the run again and again; each start but the last is killed at a random moment. Returns how many were."""
    rng, killed, whole = random.Random(seed), 0, 20.0
    while True:
        process, began = start(workdir, cache, seed), time.monotonic()
        if killed < kills:
            try:
                process.wait(rng.uniform(0.1, whole))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                killed += 1
        _, told = process.communicate()
        if process.returncode == 0:
            return killed
        assert process.returncode == -signal.SIGKILL, told
        whole = max(5.0, min(whole, 2 * (time.monotonic() - began)) if killed == 1 else whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(int(os.environ.get("FP8JAX_KILL_RUNS", "10"))))
def test_killed_at_random_moments(tmp_path, tmp_path_factory, seed):
    cache = tmp_path_factory.getbasetemp() / "kills_cache"
    assert start(tmp_path / "whole", cache, seed).wait() == 0
    killed = kill_until_done(tmp_path / "killed", cache, seed, kills=10)
    print(f"{killed} kills")
    config = micro(training={"steps": 60, "seed": seed})
    (whole, _), (parts, _) = saved(config, tmp_path / "whole"), saved(config, tmp_path / "killed")
    for name, array in whole.items():
        assert array.tobytes() == parts[name].tobytes(), name
    assert logged(tmp_path / "whole") == logged(tmp_path / "killed")
    checkpoints = Checkpoints(tmp_path / "killed")
    assert len(checkpoints.steps()) <= 2 and checkpoints.newest() == (60, {})
    left = {path.name for path in checkpoints.directory.iterdir() if not path.name.isdecimal()}
    assert all(name.startswith("damaged-") for name in left), left
    for name in left:  # interrupted between the last file and the manifest, never anything worse
        assert manifest.problem(checkpoints.directory / name) == f"{manifest.NAME} is missing"
