"""Progress display: plain lines away from a terminal, one bar on it, a forecast from recent steps."""

import io
import math

import pytest
import rich.console

from fp8jax.monitor import progress


def metrics(seconds=0.25, loss=1.2344):
    return {
        "loss": loss,
        "tokens_per_second": 21234.0,
        "learning_rate": 1e-3,
        "step_seconds": seconds,
    }


def shown(terminal, body, total_steps=600, start_step=0):
    file = io.StringIO()
    console = rich.console.Console(file=file, force_terminal=terminal, width=100)
    with progress.Progress(total_steps, start_step, console) as display:
        body(display)
    return file.getvalue()


def test_plain_lines(capsys):
    with progress.Progress(600) as display:
        display.update(20, metrics())
        display.update(120, metrics())
        display.message("evaluation: [b]loss[/b] 1.300 " + "x" * 200)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step  20/600  loss 1.234  2.1e4 tok/s  lr 1.0e-3  ETA 2m25s",
        "step 120/600  loss 1.234  2.1e4 tok/s  lr 1.0e-3  ETA 2m00s",
        "evaluation: [b]loss[/b] 1.300 " + "x" * 200,
    ]


def test_absent_and_non_finite_metrics_do_not_stop_a_run():
    def body(display):
        display.update(
            1, {"loss": math.nan, "tokens_per_second": math.inf, "step_seconds": math.nan}
        )
        display.update(2, {})

    assert shown(False, body).splitlines() == ["step   1/600  loss nan  inf tok/s", "step   2/600"]


def test_forecast_follows_recent_steps():
    def body(display):
        for step in range(10):
            display.update(step, metrics(seconds=100.0))
        for step in range(10, 20):
            display.update(step, metrics(seconds=0.5))

    assert shown(False, body, total_steps=119).splitlines()[-1].endswith("ETA 50s")


def test_terminal_shows_one_bar_and_messages_above_it():
    def body(display):
        display.update(120, metrics())
        display.message("evaluation: loss 1.300")
        display.update(600, metrics())

    text = shown(True, body, start_step=100)
    assert (
        "step 100/600" in text
        and "step 120/600  loss 1.234  2.1e4 tok/s  lr 1.0e-3  ETA 2m00s" in text
    )
    assert "evaluation: loss 1.300" in text and "━" in text
    assert (
        text.rstrip().endswith("\x1b[?25h") and "step 600/600" in text.split("evaluation")[1]
    )  # cursor is back


def lights(*updates, warned=None):
    """The light's colour after each update on a terminal."""
    file = io.StringIO()
    console = rich.console.Console(
        file=file, force_terminal=True, width=120, color_system="standard"
    )
    found = []
    with progress.Progress(600, 0, console) as display:
        for step, update in enumerate(updates):
            if warned and step == 1:
                display.warn(warned)
            display.update(step, update)
            found.append(progress.LIGHTS[display._light][1])
    return found, file.getvalue()


def test_light_of_fp8():
    healthy, clipped, unknown = (
        {"fp8/saturated_fraction": value} for value in (0.0, 2e-3, math.nan)
    )
    found, text = lights({"loss": 2.0}, healthy, {"loss": 2.0}, clipped, {"bad_step": 1}, unknown)
    assert (
        found == ["bright_black", "green", "green", "yellow", "red", "yellow"]
        and "\x1b[32m●" in text
        and "\x1b[31m●" in text
    )
    assert lights({}, {"loss": 1.0}, warned="act")[0][1] == "red"
    assert lights({}, healthy, healthy, warned="watch")[0] == ["bright_black", "yellow", "green"]


def test_mfu_where_the_peak_is_known_and_the_course_of_the_loss():
    file = io.StringIO()
    with progress.Progress(
        10, 0, rich.console.Console(file=file, width=100), seconds_at_peak=0.1
    ) as display:
        display.update(1, metrics(seconds=0.25))
    assert "tok/s  MFU 40.0%  lr" in file.getvalue()
    assert progress._course([5.0, 3.0, math.nan, 1.0]) == "█▄x▁" and progress._course([1.0]) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (45.4, "45s"), (130, "2m10s"), (3900, "1h05m"), (273600, "3d04h"), (59.9, "1m00s")],
)
def test_durations(seconds, text):
    assert progress._duration(seconds) == text


@pytest.mark.parametrize("name", ["FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"])
def test_a_pipe_is_no_terminal_whatever_the_environment_says(monkeypatch, capsys, name):
    """Notebooks set FORCE_COLOR, and show what a command prints as it is."""
    monkeypatch.setenv(name, "1")
    with progress.Progress(10) as display:
        display.update(1, {"loss": 2.5})
        display.message("saved")
    assert capsys.readouterr().out == "step  1/10  loss 2.500\nsaved\n"
