"""What happens to the process itself: two runs in one directory, hangs, storage that fails."""

import os
import pathlib
import signal
import subprocess
import sys
import textwrap
import time

import jax.numpy as jnp
import pytest

from fp8jax.config import ConfigError
from fp8jax.monitor.writers import read_metrics
from fp8jax.training import manifest, save_policy
from fp8jax.training.checkpoint import CheckpointError, Checkpoints
from fp8jax.training.lock import exclusive
from tests.helpers.runs import micro, train

ROOT = pathlib.Path(__file__).resolve().parents[2]


def start(code, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


HOLD = """
    import pathlib, sys, time
    from fp8jax.training.lock import exclusive
    with exclusive(pathlib.Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path):
    process = start(HOLD, tmp_path)
    assert process.stdout.readline() == "held\n"
    with (
        pytest.raises(
            ConfigError, match=f"process {process.pid} on .* is training here.*--workdir"
        ),
        exclusive(tmp_path),
    ):
        pass
    process.kill()
    process.wait()
    with exclusive(tmp_path):
        assert str(os.getpid()) in (tmp_path / "lock").read_text()


def test_a_hang_ends_with_all_stacks():
    process = start("""
        import time
        from fp8jax.training.watchdog import Watchdog
        def a_step_that_hangs():
            time.sleep(60)
        with Watchdog({"start": 40, "step": 1, "save": 40}) as watchdog:
            watchdog.begin("start", "start-up")
            watchdog.begin("step", "step 17 (batch 16)")
            a_step_that_hangs()
    """)
    _, told = process.communicate(timeout=50)
    assert process.returncode == 1
    assert (
        "step 17 (batch 16) has taken" in told
        and "step_limit=1" in told
        and "a_step_that_hangs" in told
    )


def test_sigusr2_shows_stacks_and_the_process_goes_on():
    process = start("""
        import time
        from fp8jax.training.watchdog import Watchdog
        with Watchdog({"step": 0}) as watchdog:
            print("up", flush=True)
            time.sleep(2)
        print("done")
    """)
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGUSR2)
    out, told = process.communicate(timeout=50)
    assert process.returncode == 0 and out == "done\n" and "File" in told


def test_progress_keeps_the_watchdog_quiet():
    process = start("""
        import time
        from fp8jax.training.watchdog import Watchdog
        with Watchdog({"start": 1, "step": 1, "save": 1}) as watchdog:
            watchdog.begin("start", "start-up")
            watchdog.begin("save", "saving step 0")
            watchdog.end("start")
            for step in range(8):
                watchdog.begin("step", f"step {step}")
                time.sleep(0.3)
                watchdog.end("save")
    """)
    process.communicate(timeout=50)
    assert process.returncode == 0


def test_storage_that_fails_does_not_stop_training(tmp_path, monkeypatch, capsys):
    """The second save fails; the run goes on, tries again, and the checkpoint before stays until then."""
    original, calls = Checkpoints.save, []

    def save(self, step, state, data_state, **facts):
        calls.append(step)
        if len(calls) == 2:
            assert self.latest_step() in (None, 2)
            raise CheckpointError("saving failed: No space left on device")
        return original(self, step, state, data_state, **facts)

    monkeypatch.setattr(Checkpoints, "save", save)
    monkeypatch.setattr(
        Checkpoints, "busy", lambda self: False
    )  # or a slow disk would postpone saves
    monkeypatch.setattr(save_policy, "RETRY_SECONDS", 0.0)
    assert train(micro(training={"steps": 8}, checkpoint={"every": 2}), tmp_path) == 0
    assert calls == [2, 4, 5, 6, 8]
    failed = [
        event for event in read_metrics(tmp_path / "events.jsonl") if event["kind"] == "save_failed"
    ]
    assert [event["step"] for event in failed] == [4] and "No space left" in failed[0]["reason"]
    assert "training goes on" in capsys.readouterr().out


def test_a_failure_in_the_background_is_told(tmp_path, monkeypatch):
    """Once, and the step is no checkpoint; the next save takes its place."""

    def full(*_):
        raise OSError(28, "No space left on device")

    checkpoints, state = Checkpoints(tmp_path), {"params": {"w": jnp.ones(3)}}
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        checkpoints.save(1, state, {})
        deadline = time.monotonic() + 60
        while (failure := checkpoints.failure()) is None and time.monotonic() < deadline:
            time.sleep(0.05)
    assert failure and "No space left on device" in failure and checkpoints.failure() is None
    assert checkpoints.latest_step() is None
    checkpoints.save(1, state, {})
    checkpoints.wait()
    assert checkpoints.newest() == (1, {})
