"""Run the early warning in the loop: watch the log, report warnings, and decide on the config's
action.

    reaction = Reaction(config.warning, workdir, start_step=100)
    decision = reaction(entry, log)                   # after each logged step; None without an action

The loop carries decisions out. A continued run replays the end of its log first, twice what the
early warning keeps, so that it warns as one that was never stopped; what fell back to BF16 is in
the checkpoint.
"""

import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from fp8jax.config import WARNING_LEVELS, WarningConfig
from fp8jax.monitor.early_warning import REMEMBERED, WINDOW, Alarm, EarlyWarning
from fp8jax.monitor.logs import tail
from fp8jax.monitor.run_log import RunLog
from fp8jax.numerics.recipes import in_bf16


class Decision(NamedTuple):
    """An action of the config, and what `fallback` takes out of FP8, as `config.fp8.overrides`."""

    action: str
    overrides: str


class Reaction:
    """Watches one run.

    Args:
        config: the action, and its lowest level.
        workdir: directory of the run; the end of its log up to `start_step` is replayed.
        start_step: steps already taken.
        fallen_back: overrides of earlier fallbacks, which are not repeated.
        gradient_format: `config.fp8.gradient_format`.
        losses: what `losses` returned at `start_step`; without them, whether the loss still falls
            is unknown for a while.
    """

    def __init__(
        self,
        config: WarningConfig,
        workdir: pathlib.Path,
        start_step: int,
        fallen_back: str,
        *,
        gradient_format: str = "e5m2",
        losses: Mapping[str, Any] | None = None,
    ):
        self._config, self._done = config, fallen_back.split(",")
        self._watch, log = (
            EarlyWarning(gradient_format=gradient_format, losses=losses),
            workdir / "metrics.jsonl",
        )
        if start_step and log.exists():
            for entry in tail(
                log, entries=2 * REMEMBERED, statistics=2 * WINDOW, last_step=start_step
            ):
                self._watch.observe(entry)

    def __call__(self, entry: dict[str, Any], log: RunLog) -> Decision | None:
        """Log the warnings on a logged step, with `step`, and return the action to take, if any."""
        decision = None
        for alarm in self._watch.observe(entry):
            fields = alarm._asdict()
            step = fields.pop("step")
            log.event("early_warning", step, f"early warning  {alarm.text()}", **fields)
            log.warn(alarm.level)
            decision = decision or self._decide(alarm)
        if decision:
            log.event("early_warning_action", entry["step"], **decision._asdict())
        return decision

    def losses(self) -> dict[str, Any]:
        """Return the losses of the run so far, condensed, for a checkpoint."""
        return self._watch.losses()

    def _decide(self, alarm: Alarm) -> Decision | None:
        action = self._config.action
        if action == "log" or WARNING_LEVELS.index(alarm.level) < WARNING_LEVELS.index(
            self._config.level
        ):
            return None
        wanted = in_bf16(self._config.fallback or alarm.fallback) if action == "fallback" else ""
        new = ",".join(part for part in wanted.split(",") if part and part not in self._done)
        if action == "fallback" and not new:
            return None
        self._done += new.split(",")
        return Decision(action, new)
