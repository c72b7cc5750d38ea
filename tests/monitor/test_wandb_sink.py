"""Weights & Biases: offline with the real package, and what is told where it is missing."""

import pathlib
import subprocess
import sys

import pytest

from fp8jax.config import ConfigError, LogConfig
from fp8jax.monitor.wandb_sink import WandbSink, open_sink

ROOT = pathlib.Path(__file__).parents[2]
# In a process of its own: the package leaves threads behind.
WRITE = """
import pathlib, sys
from fp8jax.config import LogConfig
from fp8jax.monitor.wandb_sink import open_sink
from fp8jax.monitor.writers import MetricsWriter
workdir = pathlib.Path(sys.argv[1])
sink = open_sink(LogConfig(wandb="tests", wandb_offline=True), workdir, {"training": {"steps": 3}})
with MetricsWriter(workdir, followers=[sink]) as writer:
    for step in (1, 2, 2, 3):
        writer.write(step, {"loss": 1 / step, "kurtosis/qkv_avg": float("nan")})
"""


@pytest.mark.slow
def test_offline_runs_are_written_and_continued(tmp_path):
    """In the run's directory, with the id that it had before."""
    pytest.importorskip("wandb", reason="pip install -r requirements-wandb.txt")
    for _ in range(2):
        result = subprocess.run(
            [sys.executable, "-c", WRITE, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert result.returncode == 0, result.stderr
    name = (tmp_path / "wandb_id").read_text()
    files = list((tmp_path / "wandb").glob(f"offline-run-*-{name}/run-{name}.wandb"))
    assert files and all(b"kurtosis/qkv_avg" in file.read_bytes() for file in files)


def test_nothing_is_opened_unless_asked_for(tmp_path):
    assert open_sink(LogConfig(), tmp_path, {}) is None
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(
        ConfigError,
        match=r"config.log.wandb: 'mine' needs the package wandb: pip install -r requirements-wandb.txt$",
    ):
        open_sink(LogConfig(wandb="mine"), tmp_path, {})


def test_steps_are_the_axis():
    class Run:
        def __init__(self):
            self.calls = []

        def __getattr__(self, name):
            return lambda *args, **options: self.calls.append((name, args, options))

    run = Run()
    sink = WandbSink(run)
    sink.write(7, {"loss": 2.0})
    sink.close()
    assert run.calls == [
        ("define_metric", ("step",), {}),
        ("define_metric", ("*",), {"step_metric": "step"}),
        ("log", ({"step": 7, "loss": 2.0},), {}),
        ("finish", (), {}),
    ]
