"""Show a run while it trains: a live view on a terminal, plain lines anywhere else.

    with Progress(total_steps=600, start_step=0) as progress:
        progress.update(120, {"loss": 1.234, "tokens_per_second": 2.1e4, "learning_rate": 1e-3, "step_seconds": 0.27})
        progress.message("evaluation: loss 1.300")

Away from a terminal, each update is a line:

    step 120/600  loss 1.234  2.1e4 tok/s  lr 1.0e-3  ETA 2m10s

A terminal shows a bar and below it the same with the course of the loss, MFU if the device's peak
is known, and a light for FP8: green; yellow if casts clip more than a thousandth or at a warning;
red in a bad step or at a warning to act; grey before the first statistics.

The remaining time is that of the steps alone, as measured by the caller, without future
compilation, evaluation and checkpoints. The view is not saved; the record of a run is
`metrics.jsonl`.
"""

import collections
import math
import sys
from typing import Any

import rich.console
import rich.live
import rich.progress
import rich.text

RECENT = 10  # logged steps that the remaining time is computed from: follows changes of speed, smooths a single slow step
COURSE = 32  # logged losses that are drawn
SATURATED = 1e-3  # share of all elements that are cast
BARS = "▁▂▃▄▅▆▇█"
LIGHTS = {
    "": ("○", "bright_black"),
    "ok": ("●", "green"),
    "watch": ("●", "yellow"),
    "warn": ("●", "yellow"),
    "act": ("●", "red"),
}


class Progress:
    """The progress of a run on the terminal.

    Args:
        total_steps: steps at which the run ends.
        start_step: steps already taken.
        console: where to print; standard output by default.
        seconds_at_peak: time of a step at the devices' peak rate, for the MFU; None if unknown.
    """

    def __init__(
        self,
        total_steps: int,
        start_step: int = 0,
        console: rich.console.Console | None = None,
        *,
        seconds_at_peak: float | None = None,
    ):
        self._total, self._at_peak = total_steps, seconds_at_peak
        self._console = console or standard_output()
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        self._losses: collections.deque[float] = collections.deque(maxlen=COURSE)
        self._light, self._warned = "", ""
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=None),
            rich.progress.TaskProgressColumn(),
            expand=True,
            console=self._console,
        )
        self._task = self._bar.add_task("", total=total_steps, completed=start_step)
        # No refresh thread: the view changes when a step is logged, and costs the host no time in
        # between.
        self._live = rich.live.Live(
            self._view(f"step {start_step}/{total_steps}"),
            console=self._console,
            auto_refresh=False,
        )

    def update(self, step: int, metrics: dict[str, float | int]) -> None:
        """Show a logged step.

        Args:
            step: steps taken so far.
            metrics: shown where present: `loss`, `tokens_per_second`, `learning_rate`;
                `step_seconds`, the time of one step without compilation, evaluation and
                checkpoints, gives the remaining time; `bad_step` and `fp8/saturated_fraction` set
                the light.
        """
        if math.isfinite(metrics.get("step_seconds", math.nan)):
            self._recent.append(metrics["step_seconds"])
        if "loss" in metrics:
            self._losses.append(metrics["loss"])
        if metrics.get("bad_step"):
            self._light = "act"
        elif "fp8/saturated_fraction" in metrics:  # a NaN is not healthy
            self._light = self._warned or (
                "ok" if metrics["fp8/saturated_fraction"] <= SATURATED else "warn"
            )
            self._warned = ""
        text = self._describe(step, metrics)
        if self._console.is_terminal:
            if not self._live.is_started:
                self._live.start(refresh=True)
            self._bar.update(self._task, completed=step)
            self._live.update(self._view(text), refresh=True)
        else:
            self.message(text)

    def warn(self, level: str) -> None:
        """Raise the light to a warning's level, `watch`, `warn` or `act`, until the next
        statistics.

        Call it before `update` with the statistics that raised the warning.
        """
        self._light = self._warned = max(level, self._warned, key=list(LIGHTS).index)

    def message(self, text: str) -> None:
        """Print a line, above the view if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Progress":
        """Return itself; the view begins with the first update, so that the start has the terminal
        to itself.
        """
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the view at its last state."""
        if self._console.is_terminal:
            self._live.stop()

    def _view(self, text: str) -> rich.console.Group:
        mark, style = LIGHTS[self._light]
        line = rich.text.Text.assemble(
            (mark, style),
            " FP8  ",
            text,
            ("  " + _course(self._losses), "cyan"),
            overflow="ellipsis",
            no_wrap=True,
        )
        return rich.console.Group(self._bar, line)

    def _describe(self, step: int, metrics: dict[str, float | int]) -> str:
        parts = [f"step {step:>{len(str(self._total))}}/{self._total}"]
        if "loss" in metrics:
            parts.append(f"loss {metrics['loss']:.3f}")
        if "tokens_per_second" in metrics:
            parts.append(f"{_short(metrics['tokens_per_second'])} tok/s")
        if self._at_peak and metrics.get("step_seconds"):
            parts.append(f"MFU {self._at_peak / metrics['step_seconds']:.1%}")
        if "learning_rate" in metrics:
            parts.append(f"lr {_short(metrics['learning_rate'])}")
        if self._recent:
            seconds = sum(self._recent) / len(self._recent)
            parts.append(f"ETA {_duration(seconds * max(self._total - step, 0))}")
        return "  ".join(parts)


def standard_output(**options: Any) -> rich.console.Console:
    """Return a console that is a terminal only if standard output is one.

    rich takes a pipe for a terminal if FORCE_COLOR is set, and writes HTML under a notebook's
    kernel.
    """
    return rich.console.Console(force_terminal=sys.stdout.isatty(), force_jupyter=False, **options)


def _course(values: collections.deque[float]) -> str:
    """Draw values as a line of bars, with an x for one that is not finite."""
    finite = [value for value in values if math.isfinite(value)]
    if len(finite) < 2:
        return ""
    low, high = min(finite), max(finite)
    return "".join(
        BARS[int((value - low) / (high - low or 1) * 7.999)] if math.isfinite(value) else "x"
        for value in values
    )


def _short(value: float) -> str:
    """Write two digits and an exponent without padding: 2.1e4."""
    if not math.isfinite(value):
        return str(float(value))
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _duration(seconds: float) -> str:
    """Name the two largest units: 45s, 2m10s, 1h05m, 3d04h."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days}d{hours:02}h"
    if hours:
        return f"{hours}h{minutes:02}m"
    return f"{minutes}m{seconds:02}s" if minutes else f"{seconds}s"
