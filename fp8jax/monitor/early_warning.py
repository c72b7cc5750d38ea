"""Warn early, from the log of a run, while it runs or afterwards, of what is about to leave FP8's
range or to diverge.

    watch = EarlyWarning()
    for entry in records("DIR/metrics.jsonl"):
        for alarm in watch.observe(entry):
            print(alarm.text())

Evidence, from entries with statistics (every `monitor.every` steps) and, for gradient and loss,
from every entry:

- **Range**: each tensor's load (fp8_range.py) is fitted against tokens (growth.py) and forecast to 1, the edge of what FP8 holds.
  A forecast is trusted no further than the length of the window that it was made from, and only once it has been made CONFIRMED
  times in a row. `watch`: a layer leaves within that span and three doublings.
- **Harm**: leaving the range does no harm by itself. `warn` if a fourth of the layers leaves within a third of the span and one
  doubling, `act` within an eighth or if they have left, and the loss has left its own trend (trend.py) or no longer falls; `warn`
  also if a single layer has left and the loss has left its trend.
- **Breaks**: the gradient's norm, or the growth of many weights and activations at once, is out of what this run has shown
  so far, by robust standard deviations; or the learning rate jumps. One gradient is `watch`; gradients that stay high while the
  loss leaves its trend, tensors and rates are `warn`; gradients and tensors together, and a number that is not finite, are `act`.
- **Kurtosis** that grows exponentially in the last layers, long before anything else moves (FOG paper, section 4): `watch`.

Late layers weigh more: the first layer counts half as much as the last one, and weights grow
linearly between.

Alarms are a pure function of the entries seen: a continued run that replays its log warns as one
that was never stopped. The training loop decides what follows an alarm
(warning_actions.py).
"""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from fp8jax.config import WARNING_LEVELS
from fp8jax.monitor import growth, trend
from fp8jax.monitor.fp8_range import LOGITS, Place, loads
from fp8jax.numerics.roles import OPERANDS

WATCH, WARN, ACT = WARNING_LEVELS
# How many entries with statistics are kept, and how many entries of all. A continued run replays
# twice as many (warning_actions.py).
WINDOW, REMEMBERED = 48, trend.PAST + trend.RECENT
SETTLED = 10  # entries with statistics before any alarm but that of a number that is not finite
CONFIRMED = 3
GRADIENTS = 64  # entries whose gradient norm and learning rate are kept
# Gradients stay high: above RAISED times the earlier median for SOON entries.
RAISED, SOON = 1.75, 5
LAYERS = 0.25  # share of a tensor's layers, by weight, that must leave for more than `watch`
HARMED = 10  # entries for which a loss counts as off its trend
JUMP = 4.0  # times the median: more than a warm-up, whose line from 0 ends at twice its median
OUTLIER = 8.0  # robust standard deviations that make a break
SHARE = 0.3  # share of the tensors, by weight, that break at once
# The least changes that are a break, however quiet the run was: of the logarithm of a gradient
# norm, and of a tensor's size.
LEAST_GRADIENT, LEAST_GROWTH = 0.7, 0.1
GRADIENT, TENSORS, RATE = "gradient", "tensors", "learning rate"
_SIZE = re.compile(r"(?:amax/(?P<weight>.+\.w)|rms/(?P<tap>\w+))_layer(?P<layer>\d+)")
_LOGIT = re.compile(r"max_logit/(\w+)_layer(\d+)")
_KURTOSIS = re.compile(r"kurtosis/(\w+)_layer(\d+)")


class Alarm(NamedTuple):
    """One warning.

    Attributes:
        layer: None if it is not a single one.
        steps, tokens: from now until the range is left; 0 if it is left already, None without a
            forecast.
        fallback: roles that BF16 would help, as in `config.warning.fallback`; empty if it would
            not.
    """

    step: int
    level: str
    tensor: str
    layer: int | None
    evidence: str
    steps: int | None
    tokens: int | None
    advice: str
    fallback: str

    def text(self) -> str:
        """Return the alarm as one readable line."""
        where = self.tensor if self.layer is None else f"{self.tensor} in layer {self.layer}"
        when = (
            ""
            if not self.steps
            else f"; out of range in {self.steps:,} steps ({self.tokens:,} tokens)"
        )
        return f"step {self.step}  {self.level:<5}  {where}: {self.evidence}{when}; {self.advice}"


class EarlyWarning:
    """The state of a run's early warning: entries seen and alarms raised.

    Args:
        gradient_format: the run's `config.fp8.gradient_format`.
        losses: what `losses` returned when the run was saved, with the entries until then.
    """

    def __init__(self, *, gradient_format: str = "e5m2", losses: Mapping[str, Any] | None = None):
        self._gradient_format = gradient_format
        self._gradients: collections.deque[float] = collections.deque(maxlen=GRADIENTS + SOON)
        self._rates: collections.deque[float] = collections.deque(maxlen=GRADIENTS)
        self._losses: collections.deque[tuple[int, float]] = collections.deque(
            maxlen=trend.PAST + trend.RECENT
        )
        self._course = trend.Course(losses)
        self._known = self._course.last  # entries until then are seen again when a run continues
        self._entries = 0
        self._steps: collections.deque[tuple[int, int]] = collections.deque(maxlen=WINDOW)
        self._loads, self._sizes, self._kurtoses = _History(), _History(), _History()
        self._largest_logits: dict[Place, float] = {}
        self._streak: dict[Place, int] = {}
        self._said: dict[str, tuple[str, int]] = {}
        self._gradient_broke = self._off_trend = -math.inf

    def observe(self, entry: Mapping[str, Any]) -> list[Alarm]:
        """Return the alarms that this entry raises: those that are new, or of a higher level than
        before.

        Args:
            entry: the next line of metrics.jsonl, as `read_metrics` returns it.
        """
        self._entries += 1
        self._loss(entry)
        found = self._gradient(entry) + self._rate(entry)
        if any(name.startswith("rms/") for name in entry):
            self._steps.append((entry["step"], entry.get("tokens", entry["step"])))
            self._loads.add(loads(entry, self._gradient_format))
            self._sizes.add(_sizes(entry))
            self._largest_logits = _by_place(_LOGIT, entry)
            self._kurtoses.add(_by_place(_KURTOSIS, entry))
            if len(self._steps) >= SETTLED:
                found += self._ranges() + self._break() + self._kurtosis()
        return [alarm for alarm in found if self._is_news(alarm)]

    def losses(self) -> dict[str, Any]:
        """Return the losses of the whole run, condensed, for JSON; other state is read from the end
        of the log.
        """
        return self._course.saved()

    def _is_news(self, alarm: Alarm) -> bool:
        """Return True if the tensor was not reported at this level recently, and record that it is
        now.
        """
        level, step = self._said.get(alarm.tensor, (WATCH, -math.inf))
        quiet = self._steps and alarm.step - step > self._span() / 2
        news = (
            math.isinf(step)
            or quiet
            or WARNING_LEVELS.index(alarm.level) > WARNING_LEVELS.index(level)
        )
        highest = alarm.level if news else max(level, alarm.level, key=WARNING_LEVELS.index)
        self._said[alarm.tensor] = highest, alarm.step
        return bool(news)

    def _span(self) -> int:
        return self._steps[-1][0] - self._steps[0][0]

    def _loss(self, entry: Mapping[str, Any]) -> None:
        """Record the loss, and when it has left its trend."""
        self._losses.append((entry["step"], entry.get("loss", math.nan)))
        if entry["step"] > self._known:
            self._course.add(*self._losses[-1])
        if trend.excess(*zip(*self._losses, strict=True)) >= trend.above(self._course.entries):
            self._off_trend = self._entries

    def _is_off_trend(self) -> bool:
        return self._entries - self._off_trend < HARMED

    def _ranges(self) -> list[Alarm]:
        """Return alarms for loads that have left the range or will leave it: for each tensor, its
        worst layer.
        """
        places, values = self._loads.matrix()
        step, tokens = self._steps[-1]
        if not places:
            return []
        law = growth.fit(np.array([t for _, t in self._steps], float), np.maximum(values, 1e-6))
        out = np.all(values[:, -2:] >= 1, axis=1)
        left = np.where(
            out, 0.0, np.maximum((law.reaches(np.ones(len(places))) / tokens - 1) * step, 1.0)
        )
        weights = self._loads.weights(places)
        distance = left / weights / max(self._span(), 1)
        for i, place in enumerate(places):
            near = distance[i] <= 1 and values[i, -1] >= 1 / 8
            self._streak[place] = self._streak.get(place, 0) + 1 if near else 0
            if not out[i] and self._streak[place] < CONFIRMED:
                distance[i] = math.inf
        harm, alarms = self._harm(), []
        for tensor in dict.fromkeys(tensor for tensor, _ in places):
            layers = np.array([i for i, place in enumerate(places) if place[0] == tensor])
            worst = int(layers[np.argmin(distance[layers])])
            if math.isfinite(distance[worst]):
                level = self._level(harm, distance[layers], values[layers, -1], weights[layers])
                alarms.append(
                    self._range_alarm(
                        places[worst],
                        growth.LAWS[law.law[worst]],
                        values[worst, -1],
                        float(left[worst]),
                        level,
                        harm,
                    )
                )
        return alarms

    def _harm(self) -> str:
        """Return the evidence of harm; empty if there is none."""
        if self._is_off_trend():
            return "the loss is above its trend"
        return "the loss no longer falls" if self._course.stands_still() else ""

    def _level(self, harm: str, distance: np.ndarray, load: np.ndarray, weights: np.ndarray) -> str:
        """Return the level for a tensor whose layers are at these distances from the edge."""
        near = _quantile(distance, weights)
        if harm and near <= 1 / 3 and -_quantile(-load, weights) >= 1 / 2:
            return WARN if near > 1 / 8 else ACT
        return WARN if self._is_off_trend() and distance.min() == 0 else WATCH

    def _range_alarm(
        self, place: Place, law: str, load: float, left: float, level: str, harm: str
    ) -> Alarm:
        (step, tokens), (tensor, layer) = self._steps[-1], place
        steps = math.ceil(left)
        what = f"its cast has {load:.2g} of the noise that costs a bit"
        if tensor == LOGITS:
            largest = self._largest_logits.get(("attention_scores", layer))
            what = f"a logit is off by {load:.2g} nats" + (
                "" if largest is None else f", the largest is {largest:.3g}"
            )
        grows = "out of range" if not steps else f"growth {law}"
        evidence = ", ".join((what, grows) if level == WATCH else (what, grows, harm))
        return Alarm(
            step,
            level,
            tensor,
            layer,
            evidence,
            steps,
            round(steps * tokens / step),
            *_advice(tensor),
        )

    def _gradient(self, entry: Mapping[str, Any]) -> list[Alarm]:
        """Return alarms for a gradient norm that is far above earlier ones or not finite."""
        step, norm = entry["step"], entry.get("grad_norm", math.nan)
        bad = not all(math.isfinite(entry.get(name, 0.0)) for name in ("loss", "grad_norm"))
        if bad:
            return [
                Alarm(
                    step,
                    ACT,
                    GRADIENT,
                    None,
                    "loss or gradient norm is not finite",
                    None,
                    None,
                    *_advice(GRADIENT),
                )
            ]
        if not norm > 0:
            return []
        self._gradients.append(math.log(norm))
        logs = np.array(self._gradients)
        seen, before, now = logs[-GRADIENTS - 1 : -1], logs[:-SOON], logs[-SOON:]
        if len(seen) < GRADIENTS // 2:
            return []
        median, raised = float(np.median(seen)), float(np.median(now) - np.median(before))
        single = logs[-1] - median >= max(OUTLIER * _spread(seen), LEAST_GRADIENT)
        stays = raised >= math.log(RAISED) and self._is_off_trend()
        if not single and not stays:
            return []
        self._gradient_broke = self._entries
        evidence = (
            f"norm {norm:.3g}, {math.exp(logs[-1] - median):.1f} times the median of the "
            f"last {len(seen)} entries"
        )
        if stays:
            evidence = (
                f"norm {math.exp(np.median(now)):.3g} in the last {SOON} entries, "
                f"{math.exp(raised):.1f} times that of the "
                f"{len(before)} before, and the loss is above its trend"
            )
        return [
            Alarm(
                step,
                WARN if stays else WATCH,
                GRADIENT,
                None,
                evidence,
                None,
                None,
                *_advice(GRADIENT),
            )
        ]

    def _rate(self, entry: Mapping[str, Any]) -> list[Alarm]:
        """Return alarms for a learning rate far above earlier ones, such as after a restart with
        another one.
        """
        rate, seen = entry.get("learning_rate", 0.0), np.array(self._rates)
        self._rates.append(rate)
        if len(seen) < GRADIENTS // 2 or rate <= JUMP * (usual := float(np.median(seen))):
            return []
        evidence = (
            f"{rate:.2g}, {rate / max(usual, 1e-30):.1f} times the median of the last "
            f"{len(seen)} entries"
        )
        return [Alarm(entry["step"], WARN, RATE, None, evidence, None, None, *_advice(RATE))]

    def _break(self) -> list[Alarm]:
        """Return alarms for many weights and activations that grow at once as never before."""
        places, values = self._sizes.matrix()
        if not places:
            return []
        growths = np.diff(np.log(np.maximum(values, 1e-30)), axis=1)
        before, now = growths[:, :-1], growths[:, -1]
        limit = np.median(before, axis=1) + np.maximum(
            OUTLIER * _spread(before, axis=1), LEAST_GROWTH
        )
        weights = self._sizes.weights(places)
        share = float(weights[now > limit].sum() / weights.sum())
        if share < SHARE:
            return []
        step, last = (
            self._steps[-1][0],
            int(np.argmax(np.where(now > limit, now * weights, -np.inf))),
        )
        both = self._entries - self._gradient_broke < SOON
        name = "{} in layer {}".format(*places[last])
        evidence = (
            f"{share:.0%} of weights and activations grow as never before, most of all "
            f"{name}, {math.exp(now[last]):.2g} times"
        )
        return [
            Alarm(
                step, ACT if both else WARN, TENSORS, None, evidence, None, None, *_advice(TENSORS)
            )
        ]

    def _kurtosis(self) -> list[Alarm]:
        """Return alarms for kurtosis in the last third of the layers that grows exponentially, over
        three times a window.
        """
        places, values = self._kurtoses.matrix()
        late = [i for i, weight in enumerate(self._kurtoses.weights(places)) if weight > 5 / 6]
        if not late:
            return []
        places, values = [places[i] for i in late], np.maximum(values[late], 1e-6)
        law = growth.fit(np.array([t for _, t in self._steps], float), values)
        factor = law.at(self._steps[-1][1]) / np.maximum(law.at(self._steps[0][1]), 1e-6)
        step, name = self._steps[-1][0], growth.LAWS.index("exponential")
        worst: dict[str, tuple[float, int]] = {}
        for i, (tensor, layer) in enumerate(places):
            if law.law[i] == name and factor[i] > 3 and law.error[i] < 0.1:
                worst[tensor] = max(worst.get(tensor, (0.0, 0)), (float(factor[i]), layer))
        return [
            Alarm(
                step,
                WATCH,
                f"kurtosis of {tensor}",
                layer,
                f"grows exponentially, {factor:.1f} times in {self._span()} steps",
                None,
                None,
                *_advice(tensor),
            )
            for tensor, (factor, layer) in worst.items()
        ]


class _History:
    """The last WINDOW rows of numbers by place; only places that occur in all of them count."""

    def __init__(self):
        self._rows: collections.deque[dict[Place, float]] = collections.deque(maxlen=WINDOW)

    def add(self, row: dict[Place, float]) -> None:
        self._rows.append(row)

    def matrix(self) -> tuple[list[Place], np.ndarray]:
        """Return places, and their values [places, rows], finite."""
        places = [
            p
            for p in self._rows[-1]
            if all(math.isfinite(row.get(p, math.nan)) for row in self._rows)
        ]
        return places, np.array([[row[p] for row in self._rows] for p in places]).reshape(
            len(places), len(self._rows)
        )

    def weights(self, places: list[Place]) -> np.ndarray:
        """Return weights from 1/2 for the first layer to 1 for the last."""
        last = max((layer for _, layer in self._rows[-1]), default=0)
        return np.array([0.5 + 0.5 * layer / last if last else 1.0 for _, layer in places])


def _by_place(pattern: re.Pattern[str], entry: Mapping[str, Any]) -> dict[Place, float]:
    matches = ((pattern.fullmatch(name), value) for name, value in entry.items())
    return {(match[1], int(match[2])): value for match, value in matches if match}


def _sizes(entry: Mapping[str, Any]) -> dict[Place, float]:
    """Return each tensor's size: the largest weight, or the root mean square of activations."""
    matches = ((_SIZE.fullmatch(name), value) for name, value in entry.items())
    return {
        (match["weight"] or match["tap"], int(match["layer"])): value
        for match, value in matches
        if match
    }


def _quantile(values: np.ndarray, weights: np.ndarray) -> float:
    """Return the least value that LAYERS of the weight do not exceed."""
    order = np.argsort(values)
    share = np.cumsum(weights[order]) / weights.sum()
    return float(values[order][np.searchsorted(share, LAYERS - 1e-9)])


def _spread(values: np.ndarray, axis: int | None = None) -> Any:
    """Return the robust standard deviation."""
    median = np.median(values, axis=axis, keepdims=axis is not None)
    return 1.4826 * np.median(np.abs(values - median), axis=axis)


def advised_fallbacks(roles: Sequence[str]) -> list[str]:
    """Return every `fallback` that an alarm can have in a run with these roles in FP8."""
    tensors = [LOGITS, *(f"{role}.{operand}" for role in roles for operand in OPERANDS[role])]
    return list(dict.fromkeys(_advice(tensor)[1] for tensor in tensors))


def _advice(tensor: str) -> tuple[str, str]:
    """Return the advice for a tensor, and the roles that BF16 would help."""
    role, _, operand = tensor.partition(".")
    if tensor in (GRADIENT, TENSORS, RATE):
        return "lower the learning rate, or roll back", ""
    if tensor == LOGITS:
        return (
            "normalise queries and keys, with frozen gains "
            "(model.qk_regulariser=rmsnorm_frozen), or move attention and qkv to BF16",
            "qkv,attention_scores,attention_values",
        )
    if not operand:
        return "add a norm after the branch (model.branch_output=rmsnorm), or freeze QK gains", ""
    if operand in ("g", "ds", "do", "w"):
        return f"let its scale follow (fp8.overrides={role}=current), or move {role} to BF16", role
    return (
        f"add a norm after the branch (model.branch_output=rmsnorm), or move {role} to BF16",
        role,
    )
