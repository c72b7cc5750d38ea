"""What is said while a program starts: a line before each part, elapsed time on a terminal, signs of life in a log."""

import io
import subprocess
import sys
import time

import pytest

from fp8jax.monitor import stages


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_has_the_line_before_the_part_begins(capsys):
    stage = stages.Stages()
    with stage("loading"):
        assert capsys.readouterr().out == "start    loading\n"
    assert capsys.readouterr().out == ""


def test_a_terminal_counts_the_seconds():
    out = Terminal()
    with stages.Stages(out=out)("compiling") as note:
        note("batch 3 of 12")
        time.sleep(1.2)
    parts = out.getvalue().split("\r")[1:]
    assert (
        parts[0] == "start    compiling ... 0 s\x1b[K"
        and parts[1] == "start    compiling, batch 3 of 12 ... 1 s\x1b[K"
    )
    assert parts[-1].startswith("start    compiling: 1.") and parts[-1].endswith(" s\x1b[K\n")


def test_a_long_part_shows_signs_of_life(monkeypatch):
    monkeypatch.setattr(stages, "QUIET", 0.1)
    out = io.StringIO()
    with stages.Stages(out=out)("evaluating") as note:
        note("batch 3 of 12")
        time.sleep(0.35)
    lines = out.getvalue().splitlines()
    assert (
        lines[0] == "start    evaluating"
        and set(lines[1:]) == {"start    evaluating, batch 3 of 12 ... 0 s"}
        and len(lines) in (3, 4)
    )


def test_other_processes_and_errors_leave_nothing_behind():
    out = Terminal()
    with stages.Stages(False, out)("loading") as note:
        note("x")
    assert out.getvalue() == ""
    with pytest.raises(ValueError), stages.Stages(out=out)("loading"):
        raise ValueError
    assert out.getvalue().endswith("\n")


def test_nothing_is_loaded_to_say_that_jax_is():
    code = "import sys; import fp8jax.monitor.stages; sys.exit(any(name in sys.modules for name in ('jax', 'numpy', 'rich')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
