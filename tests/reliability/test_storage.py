"""Storage that is full, read-only or slow while a run saves: the run goes on, and the last good checkpoint stays."""

import gc
import os
import subprocess
import threading
import time

import pytest

from fp8jax.config import ConfigError
from fp8jax.monitor.retrying_file import RetryingFile
from fp8jax.monitor.writers import read_metrics
from fp8jax.training import manifest, save_policy
from fp8jax.training.checkpoint import CheckpointError, Checkpoints
from tests.helpers.runs import logged, micro, saved, train

# Where a save fails, Orbax leaves coroutines that nobody awaits any more, which Python remarks on when it frees them.
pytestmark = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore:coroutine:RuntimeWarning"
)
CONFIG = {
    "training": {"steps": 16},
    "checkpoint": {"every": 4},
    "evaluation": {"every": 8, "batches": 1},
}


def mount(*arguments):
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True).returncode == 0


@pytest.fixture
def disk(tmp_path):
    """A file system of 4 MB of its own."""
    path = tmp_path / "disk"
    path.mkdir()
    if not mount("-t", "tmpfs", "-o", "size=4m", "tmpfs", path):
        pytest.skip("only root can mount a file system")
    yield path
    gc.collect()
    while subprocess.run(["umount", "-l", path], capture_output=True).returncode == 0:
        pass


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The same run on good storage."""
    workdir = tmp_path_factory.mktemp("whole")
    assert train(micro(**CONFIG), workdir) == 0
    return workdir


def same(whole, workdir):
    config = micro(**CONFIG)
    (a, _), (b, _) = saved(config, whole), saved(config, workdir)
    return logged(whole) == logged(workdir) and all(
        array.tobytes() == b[name].tobytes() for name, array in a.items()
    )


def failures(workdir):
    return [
        event["reason"]
        for event in read_metrics(workdir / "events.jsonl")
        if event["kind"] == "save_failed"
    ]


def settled(workdir):
    """The newest good checkpoint, which an outage must not have cost."""
    found = Checkpoints(workdir).newest()
    assert found in [(4, {}), (8, {})]
    return found


def first_save(workdir):
    """Wait for it: it goes on in the background, and an outage may begin only then."""
    while Checkpoints(workdir).newest()[0] is None:
        time.sleep(0.05)


def test_a_disk_that_is_full_for_a_while(disk, whole, at_batch, monkeypatch, capsys):
    """Neither checkpoints nor logs can be written from step 7 to step 13; then everything is there, bit for bit."""
    monkeypatch.setattr(save_policy, "RETRY_SECONDS", 0.0)

    def fill():
        first_save(disk / "run")
        with (disk / "filler").open("wb", buffering=0) as file:
            with pytest.raises(OSError, match="No space left"):
                while True:
                    file.write(bytes(4096))

    def free():
        settled(disk / "run")
        os.unlink(disk / "filler")

    at_batch({6: fill, 12: free})
    assert train(micro(**CONFIG), disk / "run") == 0
    assert failures(disk / "run") and all(
        "No space left" in reason for reason in failures(disk / "run")
    )
    assert same(whole, disk / "run") and Checkpoints(disk / "run").newest() == (16, {})
    told = capsys.readouterr().out
    assert (
        "logs wait in memory" in told
        and "logs are written again" in told
        and "saving failed" in told
    )


@pytest.mark.slow
def test_storage_that_is_read_only_for_a_while(disk, whole, at_batch, monkeypatch):
    monkeypatch.setattr(save_policy, "RETRY_SECONDS", 0.0)
    path = disk / "run" / "checkpoints"

    def lock():
        first_save(disk / "run")
        assert mount("--bind", path, path) and mount("-o", "remount,ro,bind", path)

    def unlock():
        settled(disk / "run")
        assert mount("-o", "remount,rw,bind", path)

    at_batch({6: lock, 12: unlock})
    assert train(micro(**CONFIG), disk / "run") == 0
    assert failures(disk / "run") and same(whole, disk / "run")


def test_slow_storage_postpones_saves_but_no_step(tmp_path, whole, at_batch, monkeypatch, capsys):
    """The save of step 4 takes until step 11; the one due at 8 waits for it, no step does."""
    write, goes_on = manifest.write, threading.Event()

    def slow(directory, facts):
        assert goes_on.wait(120)
        write(directory, facts)

    monkeypatch.setattr(manifest, "write", slow)
    at_batch({10: goes_on.set})
    assert train(micro(**CONFIG), tmp_path) == 0
    assert [
        event["step"]
        for event in read_metrics(tmp_path / "events.jsonl")
        if event["kind"] == "save_postponed"
    ][0] == 8
    assert same(whole, tmp_path) and "training goes on" in capsys.readouterr().out


def test_the_last_save_is_tried_again_before_the_run_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr(save_policy, "RETRY_SECONDS", 0.0)
    config = micro(training={"steps": 2}, evaluation={"every": 0, "batches": 1})
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match="check free space and permissions"):
        train(config, tmp_path)
    assert len(failures(tmp_path)) == save_policy.LAST_TRIES - 1
    os.unlink(tmp_path / "checkpoints")
    assert train(config, tmp_path) == 0


def test_a_workdir_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match="file/run: cannot be written: Not a directory; .*--workdir"
    ):
        train(micro(), tmp_path / "file" / "run")


def test_a_line_cut_by_a_full_disk_is_completed_later(disk):
    file, content = RetryingFile(disk / "log"), os.urandom(6 << 20)
    file.write(content)
    assert "No space left" in file.reason and os.path.getsize(disk / "log") < len(content)
    assert mount("-o", "remount,size=16m", disk)
    file.write(b"more")
    file.close()
    assert not file.reason and (disk / "log").read_bytes() == content + b"more"
