"""Define the catalogue of runs for the early warning: how each is disturbed, and when a run counts as diverged.

    python benchmarks/early_warning.py run        # trains what is missing, one run after another

Models are micro (4 layers, width 128, 1,024 tokens a step), with FP8 attention, on the embedded
corpus. Those of held_out_3 and the deep ones of held_out_4 (8 layers of width 512 and 12 of 384,
8,192 tokens a step) are for a GPU with FP8 units. A disturbance acts on the training step from
outside, so that the code under test is what users run: the update of some steps is stretched (a
spike of the learning rate), their tokens are replaced (a bad batch), or a parameter of one layer
grows by a factor a step (injected drift).

The definition of divergence (`departure`) was written before the predictor saw any of the runs.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from configs import common
from fp8jax import config as config_lib
from fp8jax.training.step import TrainProgram

# A run departs where its loss, smoothed over WINDOW steps, rises LEAVES spreads above the best it
# had reached, and does not come back to within RETURNS spreads of that best in the steps that
# follow, LASTS at least. The spread is the robust deviation of single losses from the smoothed
# curve.
WINDOW, LEAVES, RETURNS, LASTS = 15, 3.0, 1.0, 30

MICRO = {
    "model.width": 128,
    "model.ffn_width": 256,
    "data.sequence_length": 128,
    "training.batch_size": 8,
    "training.steps": 400,
    "optimizer.warmup_steps": 50,
    "optimizer.decay_fraction": 0.0,
    "monitor.every": 5,
    "log.every": 1,
    "evaluation.every": 0,
    "evaluation.batches": 1,
    "checkpoint.every": 0,
    "training.rollbacks": 0,
}
# The fields of MICRO that held_out_3 changes. Width and depth move the rate at which a model
# diverges; it was not searched for, so rates are spread.
LARGE = {
    "model.layers": 8,
    "model.width": 512,
    "model.ffn_width": 1024,
    "model.heads": 4,
    "model.kv_heads": 2,
    "data.sequence_length": 512,
    "training.batch_size": 16,
    "training.steps": 600,
    "optimizer.warmup_steps": 100,
    "log.report_minutes": 0,
}
TWIN = "BF16 twin"


class Disturbance(NamedTuple):
    """A change of the steps `first` to `last`: `rate` (update times amount), `batch` (tokens replaced), `drift` (a gain grows)."""

    kind: str
    first: int
    last: int
    amount: float = 1.0


class Run(NamedTuple):
    """One run: its half of the catalogue, its intended kind of failure, its fields besides MICRO, its disturbance."""

    split: str
    kind: str
    architecture: str
    fields: Mapping[str, Any]
    disturbance: Disturbance | None = None


def _disturbed_step(plain: Callable[..., Any], disturbance: Disturbance) -> Callable[..., Any]:
    """Return the step of a training program, `plain`, with the disturbance before or after it."""
    kind, first, last, amount = disturbance

    def step(program: TrainProgram, state: Any, batch: Any, *, collect: bool = False) -> Any:
        if not first <= int(state.step) + 1 <= last:
            return plain(program, state, batch, collect=collect)
        if kind == "batch":
            noise = {
                "inputs": _noise(batch["inputs"], 0),
                "targets": _noise(batch["inputs"], 1),
            }
            return plain(program, state, {**batch, **noise}, collect=collect)
        before = jax.tree.map(jnp.copy, state.params)
        state, metrics, taps = plain(program, state, batch, collect=collect)
        change = _stretched if kind == "rate" else _drifted
        params = jax.tree.map(
            lambda a, leaf: jax.device_put(a, leaf.sharding),
            change(before, state.params, amount),
            state.params,
        )
        scale = amount if kind == "rate" else 1.0
        rate = {"learning_rate": metrics["learning_rate"] * scale}
        return _replaced(state, params), metrics | rate, taps

    return step


def _noise(inputs: jax.Array, seed: int) -> jax.Array:
    """Return random tokens, the same in every bad batch, so that the model can memorise them."""
    return jax.device_put(
        jax.random.randint(jax.random.key(seed), inputs.shape, 0, 256, inputs.dtype),
        inputs.sharding,
    )


def _stretched(before: Any, after: Any, factor: float) -> Any:
    """Apply a rate `factor` times as high: AdamW's update, weight decay included, is linear in the rate."""
    return jax.tree.map(lambda a, b: a + factor * (b - a), before, after)


def _drifted(_before: Any, after: Any, factor: float) -> Any:
    """Grow the last layer's projection to queries, keys and values, or with a norm on queries, its gain."""
    attention = after["blocks"]["attention"]
    name, key = ("q_norm", "gain") if "q_norm" in attention else ("qkv", "w")
    grown = attention[name][key].at[-1].multiply(factor)
    return {
        **after,
        "blocks": {
            **after["blocks"],
            "attention": {**attention, name: {**attention[name], key: grown}},
        },
    }


def _replaced(state: Any, params: Any) -> Any:
    return type(state)(state.step, params, state.scaling, state.opt_state, state.health)


SLOW = {"optimizer.learning_rate": 2e-3}
SHORT, COOLDOWN = {**SLOW, "training.steps": 300}, {"optimizer.decay_fraction": 0.5}


def _hot(rate: float, warmup: int) -> dict[str, Any]:
    return {"optimizer.learning_rate": rate, "optimizer.warmup_steps": warmup}


def _large(kind: str, architecture: str, rate: float, seed: int, **more: Any) -> Run:
    warmup = {"optimizer.warmup_steps": 300} if kind == "high rate" else {}
    fields = {**LARGE, **warmup, "optimizer.learning_rate": rate, "training.seed": seed, **more}
    return Run("held_out_3", kind, architecture, fields)


def _twin(run: Run) -> Run:
    """Return the same run with every GEMM in BF16: if it trains on where `run` does not, FP8 is the cause."""
    return run._replace(kind=TWIN, fields={**run.fields, "fp8.recipe": "bf16"})


def _seeded(
    split: str,
    rows: Sequence[tuple[str, str, str, Mapping[str, Any], Disturbance | None]],
    seed: int,
    base: Mapping[str, Any] | None = None,
) -> dict[str, Run]:
    """Return the runs of a split by name, from name, kind, architecture, fields, disturbance; seeds count up from `seed`."""
    return {
        name: Run(
            split,
            kind,
            architecture,
            {**(base or {}), **fields, "training.seed": seed + i},
            disturbance,
        )
        for i, (name, kind, architecture, fields, disturbance) in enumerate(rows)
    }


# Kinds of failure are split, not runs: what a threshold is tuned on is of another kind than what it
# is judged by. held_out_1 was judged first, and the warning changed afterwards
# (docs/early_warning.md); held_out_2 was judged by what came of that. held_out_3 is of the
# development half's kind, high rates, the one at which FP8 itself fails: held out by width, depth,
# batch, seed, and FP8 hardware.
RUNS = {
    "llama3": Run("development", "healthy", "llama3", SHORT),
    "llama3_warm": Run("development", "healthy", "llama3", _hot(1e-2, 200)),
    "llama3_warm_bf16": Run(
        "development", "healthy", "llama3", {**_hot(1e-2, 200), "fp8.recipe": "bf16"}
    ),
    "fog_max": Run("development", "healthy", "fog_max", SHORT),
    "op_frozen_qk": Run("development", "healthy", "op_frozen_qk", {**SHORT, **COOLDOWN}),
    "llama3_hot": Run("development", "high rate", "llama3", _hot(2e-2, 200)),
    "llama3_hotter": Run("development", "high rate", "llama3", _hot(3e-2, 300)),
    "llama3_hottest": Run("development", "high rate", "llama3", _hot(5e-2, 300)),
    "llama3_smooth_hot": Run("development", "high rate", "llama3_smooth", _hot(3e-2, 300)),
    "op_hot": Run("development", "high rate", "op", _hot(2e-2, 20)),
    "llama3_drift": Run(
        "development", "injected drift", "llama3", SHORT, Disturbance("drift", 101, 300, 1.02)
    ),
    "fog_opt_cooldown": Run("held_out_2", "healthy", "fog_opt", {**SHORT, **COOLDOWN}),
    "fog_flash": Run("held_out_2", "healthy", "fog_flash", SHORT),
    "fog_max_current": Run("held_out_1", "healthy", "fog_max", {**SLOW, "fp8.scaling": "current"}),
    "llama3_bf16": Run("held_out_1", "healthy", "llama3", {**_hot(1e-2, 20), "fp8.recipe": "bf16"}),
    "olmo2_hot": Run("held_out_1", "healthy", "olmo2", _hot(2e-1, 300)),
    "op_gains": Run("held_out_1", "trained QK gains", "op", _hot(1e-1, 300)),
    "llama3_spike": Run(
        "held_out_1",
        "rate spike",
        "llama3",
        {**SLOW, "optimizer.warmup_steps": 20},
        Disturbance("rate", 151, 170, 20.0),
    ),
    "op_spike": Run(
        "held_out_1",
        "rate spike",
        "op",
        {**SLOW, "optimizer.warmup_steps": 20},
        Disturbance("rate", 151, 170, 20.0),
    ),
    "llama3_bad_batch": Run(
        "held_out_2",
        "bad batch",
        "llama3",
        {**SHORT, "optimizer.learning_rate": 5e-3},
        Disturbance("batch", 151, 170),
    ),
    "op_bad_batch": Run(
        "held_out_2",
        "bad batch",
        "op",
        {**SHORT, **_hot(1e-2, 200)},
        Disturbance("batch", 151, 170),
    ),
    "llama3_hot_cooldown": Run("held_out_2", "cooldown", "llama3", {**_hot(2e-2, 200), **COOLDOWN}),
    "op_frozen_qk_cooldown": Run(
        "held_out_1", "cooldown", "op_frozen_qk", {**_hot(3e-2, 200), **COOLDOWN}
    ),
    "op_static": Run(
        "held_out_2",
        "fixed scales",
        "op",
        {**SHORT, **_hot(1e-2, 150), "fp8.scaling": "static", "fp8.static_weight_scale": 2.0**-12},
    ),
    "op_drift": Run(
        "held_out_2", "injected drift", "op", SHORT, Disturbance("drift", 101, 300, 1.02)
    ),
    "large_llama3_hot": _large("high rate", "llama3", 6e-3, 31),
    "large_llama3_hotter": _large("high rate", "llama3", 1e-2, 32),
    "large_llama3_hottest": _large("high rate", "llama3", 2e-2, 33),
    "large_llama3_smooth_hot": _large("high rate", "llama3_smooth", 1e-2, 34),
    "large_op_hot": _large("high rate", "op", 3e-2, 35),
    "large_olmo2_hot": _large("high rate", "olmo2", 5e-2, 36),
    "large_llama3": _large("healthy", "llama3", 1e-3, 37),
    "large_fog_max": _large("healthy", "fog_max", 1e-3, 38),
    "large_fog_opt": _large("healthy", "fog_opt", 1e-3, 39),
    "large_fog_flash": _large("healthy", "fog_flash", 1e-3, 40),
}
# Runs that the rules were changed on, besides all of the above, when those had been judged: more of
# every kind, other seeds.
RUNS |= _seeded(
    "development_2",
    [
        ("llama3_again", "healthy", "llama3", _hot(3e-3, 50), None),
        ("llama3_smooth", "healthy", "llama3_smooth", _hot(5e-3, 100), None),
        ("op", "healthy", "op", _hot(5e-3, 50), None),
        ("fog_max_fast", "healthy", "fog_max", _hot(1e-2, 100), None),
        ("olmo2_cooldown", "cooldown", "olmo2", {**_hot(1e-2, 50), **COOLDOWN}, None),
        ("llama3_warm_cooldown", "cooldown", "llama3", {**_hot(1e-2, 100), **COOLDOWN}, None),
        ("llama3_hot_again", "high rate", "llama3", _hot(2e-2, 150), None),
        ("op_gains_again", "trained QK gains", "op", _hot(1e-1, 300), None),
        ("op_gains_fewer", "trained QK gains", "op", _hot(6e-2, 300), None),
        ("fog_flash_spike", "rate spike", "fog_flash", SLOW, Disturbance("rate", 201, 220, 50.0)),
        (
            "llama3_bad_batches",
            "bad batch",
            "llama3",
            _hot(1e-2, 100),
            Disturbance("batch", 201, 260),
        ),
        ("olmo2_bad_batch", "bad batch", "olmo2", SLOW, Disturbance("batch", 201, 220)),
    ],
    51,
)
# Runs held out from the rules as they have been since: every kind again, at rates chosen without a
# trial, other seeds; and with native FP8 at another shape.
DEEP = {
    **LARGE,
    "model.layers": 12,
    "model.width": 384,
    "model.ffn_width": 768,
    "model.heads": 3,
    "model.kv_heads": 1,
    "training.steps": 450,
    "optimizer.warmup_steps": 75,
}

RUNS |= _seeded(
    "held_out_4",
    [
        ("llama3_4", "healthy", "llama3", _hot(4e-3, 50), None),
        ("op_frozen_qk_4", "healthy", "op_frozen_qk", _hot(5e-3, 50), None),
        ("fog_opt_4", "healthy", "fog_opt", _hot(3e-3, 50), None),
        ("olmo2_4", "healthy", "olmo2", _hot(5e-3, 50), None),
        ("llama3_hot_4", "high rate", "llama3", _hot(4e-2, 300), None),
        ("llama3_smooth_hot_4", "high rate", "llama3_smooth", _hot(2e-2, 200), None),
        ("op_gains_4", "trained QK gains", "op", _hot(8e-2, 300), None),
        ("op_gains_hot_4", "trained QK gains", "op", _hot(1.2e-1, 200), None),
        (
            "llama3_smooth_spike_4",
            "rate spike",
            "llama3_smooth",
            SLOW,
            Disturbance("rate", 201, 220, 30.0),
        ),
        ("olmo2_spike_4", "rate spike", "olmo2", SLOW, Disturbance("rate", 201, 220, 50.0)),
        ("op_bad_batch_4", "bad batch", "op", _hot(5e-3, 50), Disturbance("batch", 201, 240)),
        ("llama3_hot_cooldown_4", "cooldown", "llama3", {**_hot(3e-2, 200), **COOLDOWN}, None),
        ("fog_flash_cooldown_4", "cooldown", "fog_flash", {**_hot(5e-3, 50), **COOLDOWN}, None),
        ("olmo2_drift_4", "injected drift", "olmo2", SLOW, Disturbance("drift", 101, 400, 1.02)),
    ],
    71,
)
RUNS |= _seeded(
    "held_out_4",
    [
        ("deep_llama3_hot", "high rate", "llama3", _hot(8e-3, 225), None),
        ("deep_llama3_hotter", "high rate", "llama3", _hot(1.5e-2, 225), None),
        ("deep_llama3_smooth_hot", "high rate", "llama3_smooth", _hot(1.5e-2, 225), None),
        ("deep_op_hot", "high rate", "op", _hot(1.5e-2, 225), None),
        ("deep_olmo2_hot", "high rate", "olmo2", _hot(1e-1, 225), None),
        ("deep_op_frozen_qk_hot", "high rate", "op_frozen_qk", _hot(5e-2, 225), None),
        ("deep_llama3", "healthy", "llama3", _hot(2e-3, 75), None),
        ("deep_llama3_smooth", "healthy", "llama3_smooth", _hot(1e-3, 75), None),
        ("deep_op", "healthy", "op", _hot(1e-3, 75), None),
        ("deep_olmo2", "healthy", "olmo2", _hot(2e-3, 75), None),
        ("deep_fog_max", "healthy", "fog_max", _hot(3e-3, 75), None),
        ("deep_fog_flash", "healthy", "fog_flash", _hot(2e-3, 75), None),
        (
            "deep_llama3_spike",
            "rate spike",
            "llama3",
            _hot(1e-3, 75),
            Disturbance("rate", 226, 245, 30.0),
        ),
        (
            "deep_fog_max_spike",
            "rate spike",
            "fog_max",
            _hot(1e-3, 75),
            Disturbance("rate", 226, 245, 30.0),
        ),
        (
            "deep_llama3_bad_batch",
            "bad batch",
            "llama3",
            _hot(2e-3, 75),
            Disturbance("batch", 226, 265),
        ),
        ("deep_llama3_hot_cooldown", "cooldown", "llama3", {**_hot(8e-3, 150), **COOLDOWN}, None),
        ("deep_fog_opt_cooldown", "cooldown", "fog_opt", {**_hot(2e-3, 75), **COOLDOWN}, None),
    ],
    91,
    DEEP,
)
RUNS |= {
    f"{name}_bf16": _twin(run)
    for name, run in RUNS.items()
    if name.startswith(("large_", "deep_")) and run.kind == "high rate"
}


def twin_of(name: str) -> str:
    """Return the name of a run's BF16 twin; empty if it has none."""
    twin = f"{name}_bf16"
    return twin if twin in RUNS and RUNS[twin].kind == TWIN else ""


# llama3_hot again: left alone, in BF16 throughout, and rescued by the early warning, at once or
# late.
_RESCUED = {**_hot(2e-2, 200), "warning.action": "fallback", "warning.level": "watch"}
RESCUES = {
    "llama3_hot_alone": Run("rescue", "reference", "llama3", _hot(2e-2, 200)),
    "llama3_hot_bf16": Run(
        "rescue", "reference", "llama3", {**_hot(2e-2, 200), "fp8.recipe": "bf16"}
    ),
    "llama3_hot_fallback": Run("rescue", "fallback", "llama3", _RESCUED),
    "llama3_hot_fallback_all": Run(
        "rescue",
        "fallback",
        "llama3",
        {
            **_RESCUED,
            "warning.fallback": ",".join(
                (
                    "qkv",
                    "attention_scores",
                    "attention_values",
                    "attention_out",
                    "mlp_gate",
                    "mlp_up",
                    "mlp_down",
                )
            ),
        },
    ),
    "llama3_hot_fallback_act": Run(
        "rescue", "fallback", "llama3", {**_RESCUED, "warning.level": "act"}
    ),
}


def config_of(run: Run, **more: Any) -> config_lib.Config:
    """Return the run's configuration; `more` are fields with '__' for the dot."""
    config = common.make("tiny", architecture=run.architecture, recipe="fp8_dpa")
    for name, value in {
        **MICRO,
        **run.fields,
        **{key.replace("__", "."): value for key, value in more.items()},
    }.items():
        section, field = name.split(".")
        config[section][field] = value
    return config_lib.from_dict(config)


@contextlib.contextmanager
def disturbed(disturbance: Disturbance | None) -> Iterator[None]:
    """Make training programs take disturbed steps inside this context."""
    plain = TrainProgram.step
    if disturbance is not None:
        TrainProgram.step = _disturbed_step(plain, disturbance)
    try:
        yield
    finally:
        TrainProgram.step = plain


class Departure(NamedTuple):
    """When the loss left its band for good, None if never; `spiked` if it came back; `calm`: when, by the spread of calm."""

    step: int | None
    spiked: bool
    calm: int | None


def departure(steps: Sequence[int], losses: Sequence[float]) -> Departure:
    """Find the moment of divergence from the whole curve; hindsight is allowed only here.

    A loss that is not finite counts as infinite. The curve is smoothed by a centred running median,
    so that the moment is the middle of the window, not its end. The spread is that of the whole
    curve, which a loss of 1e18 inflates until no loss leaves the band; `calm` takes that of the
    steps up to the lowest smoothed loss. It was added after all logs were made.
    """
    loss = np.where(np.isfinite(losses), losses, np.inf)
    half = WINDOW // 2
    smooth = np.array([np.median(loss[max(i - half, 0) : i + half + 1]) for i in range(len(loss))])
    finite = np.isfinite(smooth) & np.isfinite(loss)
    step, spiked = _leaves(steps, loss, smooth, finite)
    calm, _ = _leaves(steps, loss, smooth, finite & (np.arange(len(loss)) <= np.argmin(smooth)))
    return Departure(step, spiked, calm)


def _leaves(
    steps: Sequence[int], loss: np.ndarray, smooth: np.ndarray, counted: np.ndarray
) -> tuple[int | None, bool]:
    """Return the step at which the smoothed loss leaves its band for good, and if it ever left; `counted` make the spread."""
    spread = 1.4826 * float(np.median(np.abs(loss[counted] - smooth[counted])))
    best = np.minimum.accumulate(smooth)
    out = smooth > best + LEAVES * spread
    for i in np.flatnonzero(out):
        if (len(loss) - i >= LASTS or not np.isfinite(smooth[-1])) and smooth[i:].min() > best[
            i
        ] + RETURNS * spread:
            return int(steps[i]), False
    return None, bool(out.any())
