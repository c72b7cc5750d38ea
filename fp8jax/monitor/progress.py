"""What a run shows while it trains: a live bar on a terminal, plain lines anywhere else.

    with Progress(total_steps=600, start_step=0) as progress:
        progress.update(120, {"loss": 1.234, "tokens_per_second": 2.1e4, "learning_rate": 1e-3, "step_seconds": 0.27})
        progress.message("evaluation: loss 1.300")

Away from a terminal, each update is a line:

    step 120/600  loss 1.234  2.1e4 tok/s  lr 1.0e-3  ETA 2m10s

The remaining time is that of the steps alone, as measured by the caller: compilation, evaluation and checkpoints to
come are not foreseen. Nothing is kept; the record of a run is `metrics.jsonl`.
"""

import collections
import math

import rich.console
import rich.progress

RECENT = 10  # logged steps whose time makes the forecast: follows a change of speed, smooths a single slow step


class Progress:
    """Progress of a run on the terminal.

    Args:
        total_steps: steps at which the run ends.
        start_step: steps already taken.
        console: where to print; standard output by default.
    """

    def __init__(self, total_steps: int, start_step: int = 0, console: rich.console.Console | None = None):
        self._total = total_steps
        self._console = console or rich.console.Console()
        self._recent: collections.deque[float] = collections.deque(maxlen=RECENT)
        # No refresh thread: the bar moves when a step is logged, and costs the host nothing in between.
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=24), "{task.description}", console=self._console, auto_refresh=False
        )
        self._task = self._bar.add_task(f"step {start_step}/{total_steps}", total=total_steps, completed=start_step)

    def update(self, step: int, metrics: dict[str, float | int]) -> None:
        """Show a logged step.

        Args:
            step: steps taken so far.
            metrics: shown where present: `loss`, `tokens_per_second`, `learning_rate`; `step_seconds`, the time of
                one step without compilation, evaluation and checkpoints, gives the remaining time.
        """
        if math.isfinite(metrics.get("step_seconds", math.nan)):
            self._recent.append(metrics["step_seconds"])
        text = self._describe(step, metrics)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, description=text, refresh=True)
        else:
            self.message(text)

    def message(self, text: str) -> None:
        """Print a line, above the bar if there is one."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> "Progress":
        """Show the bar, on a terminal."""
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leave the bar at its last state."""
        if self._console.is_terminal:
            self._bar.stop()

    def _describe(self, step: int, metrics: dict[str, float | int]) -> str:
        parts = [f"step {step:>{len(str(self._total))}}/{self._total}"]
        if "loss" in metrics:
            parts.append(f"loss {metrics['loss']:.3f}")
        if "tokens_per_second" in metrics:
            parts.append(f"{_short(metrics['tokens_per_second'])} tok/s")
        if "learning_rate" in metrics:
            parts.append(f"lr {_short(metrics['learning_rate'])}")
        if self._recent:
            seconds = sum(self._recent) / len(self._recent)
            parts.append(f"ETA {_duration(seconds * max(self._total - step, 0))}")
        return "  ".join(parts)


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
