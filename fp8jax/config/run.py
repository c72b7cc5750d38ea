"""The configuration's sections besides training, and the whole configuration."""

import dataclasses

from fp8jax.config.bounds import COUNT, YEARS
from fp8jax.config.field import field
from fp8jax.config.model import Fp8Config, ModelConfig
from fp8jax.config.training import AUTO, DataConfig, MeshConfig, OptimizerConfig, TrainingConfig

WARNING_ACTIONS = ("log", "checkpoint", "fallback", "rollback", "stop")
WARNING_LEVELS = ("watch", "warn", "act")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """The saving of checkpoints."""

    every: int = field(
        1000,
        "steps between checkpoints; one is always saved at the end and on a stop; 0: only those",
        at_least=0,
        at_most=COUNT,
    )
    minutes: int = field(
        60,
        "minutes after the last checkpoint at which another is saved; 0: only by steps",
        at_least=0,
        at_most=YEARS,
    )
    keep: int = field(2, "newest checkpoints kept", at_least=1, at_most=COUNT)
    keep_every: int = field(
        0,
        "checkpoints of steps that this divides are kept for good; 0: none",
        at_least=0,
        at_most=COUNT,
    )
    keep_best: int = field(
        0,
        "checkpoints of the lowest held-out loss kept, of those saved at an evaluated step",
        at_least=0,
        at_most=COUNT,
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss during training and in eval.py."""

    every: int = field(
        200, "steps between evaluations; 0: only at the end", at_least=0, at_most=COUNT
    )
    batches: int = field(
        -1,
        "held-out batches of training.batch_size sequences that an evaluation reads, spread "
        "evenly over the split; 0: the "
        "whole split; -1: as many as take 2% of the time of the steps between. eval.py reads "
        "the whole split",
        at_least=-1,
        at_most=COUNT,
    )


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """The outlier statistics."""

    every: int = field(50, "steps between outlier statistics; 0: never", at_least=0, at_most=COUNT)
    probe_every: int = field(
        0,
        "steps between probes of what FP8 does to the gradients; a probe takes about 1.5 steps; 0: never",
        at_least=0,
        at_most=COUNT,
    )
    kurtosis: str = field(
        "per_token",
        "over one token's features, or pooled over a sequence",
        choices=("per_token", "pooled"),
    )
    parameters: bool = field(
        False, "statistics of parameters and of the optimizer's moments as well"
    )


@dataclasses.dataclass(frozen=True)
class WarningConfig:
    """The early warning: what to do besides reporting it, in events.jsonl and on the terminal."""

    action: str = field(
        "log",
        "log: no more; checkpoint: save; fallback: named roles continue in BF16 from the next "
        "step; rollback: return to the "
        "newest checkpoint and skip the batches since; stop: save and exit with 3",
        choices=WARNING_ACTIONS,
    )
    level: str = field("act", "lowest level at which the action is taken", choices=WARNING_LEVELS)
    fallback: str = field(
        "",
        "roles that fall back, with or without layers, e.g. 'attention_scores,mlp_down@2-3'; "
        "empty: those that "
        "the warning names",
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """The logged steps."""

    every: int = field(
        10,
        "steps between lines of metrics.jsonl and of the progress display",
        at_least=1,
        at_most=COUNT,
    )
    report_minutes: int = field(
        5,
        "minutes between refreshes of WORKDIR/report.html while the run trains; 0: no report",
        at_least=0,
        at_most=YEARS,
    )
    wandb: str = field("", "project of Weights & Biases to log to; empty: none")
    wandb_offline: bool = field(
        False, "write Weights & Biases' files to WORKDIR/wandb instead of sending them"
    )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A JAX profiler window, written to the workdir."""

    start: int = field(0, "first step to trace; 0: the first that runs", at_least=0, at_most=COUNT)
    steps: int = field(0, "how many steps to trace; 0: none", at_least=0, at_most=COUNT)


@dataclasses.dataclass(frozen=True)
class Config:
    """The configuration of a whole run."""

    model: ModelConfig = ModelConfig()
    fp8: Fp8Config = Fp8Config()
    data: DataConfig = DataConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    monitor: MonitorConfig = MonitorConfig()
    warning: WarningConfig = WarningConfig()
    log: LogConfig = LogConfig()
    profile: ProfileConfig = ProfileConfig()


def settled(config: Config) -> Config:
    """Return the config with open fields at their simplest: one microbatch, the whole loss, no
    recomputation.
    """
    training = config.training
    plain = dataclasses.replace(
        training,
        microbatches=training.microbatches or 1,
        loss_chunk=max(training.loss_chunk, 0),
        remat="none" if training.remat == AUTO else training.remat,
    )
    return config if plain == training else dataclasses.replace(config, training=plain)
