"""Log a run: one call writes an incident to its files and shows it on the terminal.

    with MetricsWriter(workdir) as writer, Progress(total_steps=600) as progress:
        log = RunLog(writer, progress)
        log.event("save_failed", 120, "step 120: disk full; training goes on", reason="disk full")
        log.message("a line for the terminal alone")
        log.write(120, {"loss": 2.3})
        log.show(120, {"loss": 2.3})

Only one process of a run writes and shows; the others have `RunLog.silent()`.
"""

from typing import Any

from fp8jax.monitor.progress import Progress
from fp8jax.monitor.writers import MetricsWriter, Silent


class RunLog:
    """The files and terminal of a run.

    Args:
        writer: writer of metrics.jsonl and events.jsonl.
        progress: the terminal.
    """

    def __init__(self, writer: MetricsWriter | Silent, progress: Progress | Silent):
        self._writer = writer
        self._progress = progress
        self._waiting: str | None = None

    @staticmethod
    def silent() -> "RunLog":
        """Return a log that neither writes nor shows anything."""
        return RunLog(Silent(), Silent())

    def event(self, kind: str, step: int, text: str | None = None, **fields: Any) -> None:
        """Log an incident.

        Args:
            kind: kind of the event in events.jsonl.
            step: steps taken so far.
            text: the line for the terminal; None shows nothing.
            **fields: fields of the event in events.jsonl.
        """
        self._writer.event(kind, step, **fields)
        self.message(text)

    def message(self, text: str | None) -> None:
        """Show a line, if there is one, on the terminal alone."""
        if text:
            self._progress.message(text)

    def warn(self, level: str) -> None:
        """Raise the light on the terminal to a warning's level; before `show` of the step that
        raised it.
        """
        self._progress.warn(level)

    def write(self, step: int, entry: dict[str, Any]) -> None:
        """Write the metrics of a step."""
        self._writer.write(step, entry)

    def show(self, step: int, entry: dict[str, Any]) -> None:
        """Show the metrics of a step, and whether lines of the log wait to be written."""
        self._progress.update(step, entry)
        waiting = self._writer.waiting()
        if waiting == self._waiting:
            return
        self._waiting = waiting
        if waiting:
            self.message(f"logs wait in memory: {waiting}; training goes on")
        else:
            self.message("logs are written again")
