"""What a run says from its first second to its last, and what is not counted into its speed."""

import contextlib
import io
import signal
import time

import pytest

from fp8jax.monitor.writers import read_metrics
from fp8jax.training import farewell, loop, signals, starting
from fp8jax.training.step import TrainProgram
from tests.helpers.runs import micro, train

SHORT = {
    "training": {"steps": 4},
    "evaluation": {"every": 0, "batches": 1},
    "checkpoint": {"every": 0},
    "monitor": {"every": 3},
}
PARTS = (
    "compiling the training step, finding what fits",
    "initialising the weights",
    "tracing the training step",
    "checking attention on this device",
    "calibrating scales",
    "reading data",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 4 steps whose every compilation takes another two seconds: its directory, and what it said."""
    workdir, told, original = (
        tmp_path_factory.mktemp("run"),
        io.StringIO(),
        TrainProgram.compiled_step,
    )

    def slow(self, *, collect=False):
        if not self.is_compiled(collect=collect):
            time.sleep(2)
        return original(self, collect=collect)

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(told):
        patch.setattr(TrainProgram, "compiled_step", slow)
        assert train(micro(**SHORT), workdir) == 0
    return workdir, told.getvalue().splitlines()


def test_compiling_the_statistics_is_announced_and_not_counted(run):
    workdir, lines = run
    compiling = lines.index(
        "compiling the step with statistics, once; not counted in tok/s and ETA"
    )
    assert lines[compiling - 1].startswith("step 2/4") and lines[compiling + 1].startswith(
        "compiled in "
    )
    entries = read_metrics(workdir / "metrics.jsonl")
    assert [entry["step"] for entry in entries if "kurtosis/qkv_avg" in entry] == [3]
    assert [entry["step"] for entry in entries if "step_seconds" in entry] == [1, 2, 4]
    assert all(entry["step_seconds"] < 2 for entry in entries if "step_seconds" in entry)


def test_a_run_says_what_it_does_and_what_comes_next(run, capsys):
    workdir, lines = run
    places = [lines.index(f"start    {part}") for part in PARTS]
    assert places == sorted(places)
    end = lines[lines.index(f"finished step 4; checkpoint {workdir}/checkpoints/4") :]
    assert (
        f"python eval.py --workdir={workdir}" in end[1]
        and "sample" in end[2]
        and "--config.training.steps=8" in end[3]
    )
    # Again: there is nothing to do.
    before = (workdir / "metrics.jsonl").read_text()
    assert train(micro(**SHORT), workdir) == 0
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if line.startswith("finished already")
    ]
    assert (
        "is at step 4 of 4" in line
        and "--config.training.steps=8" in line
        and before == (workdir / "metrics.jsonl").read_text()
    )
    # Further.
    assert train(micro(**SHORT | {"training": {"steps": 5}}), workdir) == 0
    told = capsys.readouterr().out
    assert (
        "start    restoring the checkpoint of step 4" in told
        and "continuing from step 4 of 5" in told
    )


@pytest.fixture
def terminal():
    """A process that a lost terminal reaches, even if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_a_lost_terminal_saves_and_a_signal_in_the_last_step_leaves_a_finished_run(
    tmp_path, terminal, stop_at, capsys
):
    stop_at(1, signal.SIGHUP)  # while step 2 runs
    assert train(micro(**SHORT), tmp_path) == 4
    assert "stopped on SIGHUP after step 2 of 4; saved" in capsys.readouterr().out
    stop_at(3, signal.SIGINT)
    assert train(micro(**SHORT), tmp_path) == 0
    assert "finished step 4" in capsys.readouterr().out


def test_what_is_ignored_stays_so():
    """Under nohup, a lost terminal stops nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.stop_signals() as stop:
            signal.raise_signal(signal.SIGHUP)
            signal.raise_signal(signal.SIGTERM)
        assert stop == [signal.SIGTERM] and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_acknowledged_at_once(capfd):
    """By another thread: handlers of Python wait until a compilation is over."""
    with signals.stop_signals() as stop:
        signal.raise_signal(signal.SIGTERM)
    assert stop == [signal.SIGTERM]
    assert "SIGTERM: stopping when what is under way is done" in capfd.readouterr().out


@pytest.mark.parametrize("at", ["fit", "restore"])
def test_a_signal_before_the_first_step_ends_the_run_there(at, tmp_path, monkeypatch, capsys):
    original = getattr(loop, at)

    def signalled(*given):
        found = original(*given)
        signal.raise_signal(signal.SIGINT)
        return found

    monkeypatch.setattr(loop, at, signalled)
    monkeypatch.setattr(starting, "calibrate", lambda *given: pytest.fail("went on"))
    assert train(micro(**SHORT), tmp_path) == 4
    assert (
        "stopped on SIGINT before the first step; there is nothing new to save"
        in capsys.readouterr().out
    )
    assert not list(tmp_path.glob("checkpoints/[0-9]*"))


def test_commands_can_be_pasted(tmp_path):
    lines = farewell.what_next(tmp_path / "my run", 3, report=False)
    assert (
        not any("report " in line for line in lines)
        and f"--workdir='{tmp_path}/my run'" in lines[1]
    )
