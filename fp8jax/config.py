"""The typed, validated configuration: what can be set, to which values, and what each field means.

A run is configured by an `ml_collections.ConfigDict` made by a file of `configs/`, changed on the command line with
`--config.section.field=value`, and turned here, once, into frozen dataclasses that the rest of fp8jax reads:

    config = fp8jax.config.from_dict(config_dict)     # raises ConfigError with one helpful line
    config.model.width, config.fp8.recipe, ...

The dataclasses below are the one place where fields, types, defaults and meanings are written. `defaults()` makes the
ConfigDict that `configs/common.py` starts from, so a field is never declared twice.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import pathlib
import re
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

from fp8jax import bounds, files, open_fields
from fp8jax.bounds import COUNT, LARGE, YEARS
from fp8jax.numerics import roles

ARCHITECTURES = (
    "fog_max",
    "fog_opt",
    "fog_flash",
    "op",
    "op_frozen_qk",
    "llama3",
    "llama3_smooth",
    "olmo2",
)
ACTIVATIONS = ("xielu", "gelu", "swiglu", "smooth_swiglu", "relu2")
# Of each head: without a gain (frozen), with a trained one, or with one that is kept as it was loaded (kept).
QK_REGULARISERS = (
    "none",
    "rmsnorm",
    "rmsnorm_frozen",
    "rmsnorm_kept",
    "rmsnorm_full",
    "tanh",
    "tanh_gain",
    "tanh_kept",
)
BRANCH_OUTPUTS = ("none", "rmsnorm", "layerscale")
OPTIMIZERS = ("adamw", "ademamix", "muon")
GRADIENT_DTYPES = ("mixed", "float32", "bfloat16")
MASTER_DTYPES = ("float32", "float16", "bfloat16")
MASTER_ROUNDINGS = ("stochastic", "compensated")
AUTO = "auto"
REMAT_POLICIES = (AUTO, "none", "full", "save_fp8", "offload_fp8")
CHUNK_AUTO = -1
WARNING_ACTIONS = ("log", "checkpoint", "fallback", "rollback", "stop")
WARNING_LEVELS = ("watch", "warn", "act")
MESH_AXES = ("data", "fsdp", "tensor", "sequence")


class ConfigError(ValueError):
    """A configuration that cannot run. The message is one line: field, value, what is allowed."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class CheckpointError(ValueError):
    """A checkpoint that cannot be written or read. The message is one line: what, where, what to do."""


class DataError(ConfigError):
    """Training data that cannot be used where a run has come to it; the message names the file and the place in it."""


def _field(
    default: Any,
    doc: str,
    *,
    choices: tuple = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
):
    metadata = {
        "doc": doc,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "below": below,
        "at_most": at_most,
    }
    return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder. Switches left at None take the value that `architecture` gives them (models/architectures.py)."""

    architecture: str = _field(
        "fog_max", "row of the architecture table that fills the switches", choices=ARCHITECTURES
    )
    layers: int = _field(4, "number of blocks", at_least=1, below=10_001)
    width: int = _field(256, "model width d", at_least=1, below=LARGE)
    ffn_width: int = _field(
        512, "width of a gated FFN; a two-layer FFN takes 1.5 times this", at_least=1, below=LARGE
    )
    ffn_hidden: int | None = _field(
        None,
        "hidden features of the FFN, whatever its kind; None: by ffn_width",
        at_least=1,
        below=LARGE,
    )
    heads: int = _field(2, "query heads", at_least=1, below=LARGE)
    kv_heads: int = _field(1, "key and value heads", at_least=1, below=LARGE)
    head_dim: int | None = _field(
        None, "features a head; None: width / heads", at_least=1, below=LARGE
    )
    vocab_size: int | None = _field(
        None,
        "rows of the embedding; None: the tokenizer's, up to a multiple of 128",
        at_least=1,
        below=LARGE,
    )
    tied_embeddings: bool = _field(True, "the head is the embedding, transposed")
    init_std: float = _field(
        0.02, "sigma0: standard deviation of every matrix at the start", at_least=0.0, at_most=10.0
    )
    norm_eps: float = _field(1e-5, "epsilon of RMSNorm", at_least=1e-12, at_most=1.0)
    rope_theta: float = _field(
        500000.0, "base of the rotary frequencies", at_least=1.0, at_most=1e12
    )
    rope_scaling: str = _field(
        "llama3",
        "how RoPE is scaled by rope_scaling_factor. llama3 and yarn: low frequencies; linear: all; dynamic: "
        "the base, from rope_original_context on",
        choices=("llama3", "linear", "dynamic", "yarn"),
    )
    rope_scaling_factor: float = _field(
        1.0,
        "RoPE scaling: rotary frequencies are divided by this, see rope_scaling; 1: off",
        at_least=1.0,
        at_most=1e6,
    )
    rope_low_freq_factor: float = _field(
        1.0,
        "frequencies that turn less often in the original context are low",
        at_least=1e-6,
        at_most=1e6,
    )
    rope_high_freq_factor: float = _field(
        4.0,
        "frequencies that turn more often in the original context stay as they are",
        at_least=1e-6,
        at_most=1e6,
    )
    rope_beta_fast: float = _field(
        32.0,
        "yarn: frequencies that turn more often in the original context stay",
        at_least=1e-6,
        at_most=1e6,
    )
    rope_beta_slow: float = _field(
        1.0, "yarn: frequencies that turn less often are divided", at_least=1e-6, at_most=1e6
    )
    rope_truncate: bool = _field(
        True, "yarn: the bounds between which frequencies are interpolated are whole pairs"
    )
    rope_attention_factor: float = _field(
        1.0, "yarn: factor on rotated queries and keys", at_least=1e-3, at_most=1e3
    )
    rope_original_context: int = _field(
        8192, "tokens of context before RoPE scaling", at_least=1, below=LARGE
    )
    dtype: str = _field(
        "bfloat16", "dtype of activations between GEMMs", choices=("bfloat16", "float32")
    )
    scan_layers: bool = _field(
        True, "compile one block and scan over layers; False unrolls, for debugging"
    )
    pre_norm: bool | None = _field(None, "RMSNorm before each branch")
    qk_regulariser: str | None = _field(
        None, "what acts on queries and keys before RoPE", choices=QK_REGULARISERS
    )
    activation: str | None = _field(
        None, "the FFN's nonlinearity; swiglu kinds are gated", choices=ACTIVATIONS
    )
    branch_output: str | None = _field(
        None, "what acts on a branch before the residual addition", choices=BRANCH_OUTPUTS
    )
    branch_gain_init: float | None = _field(
        None, "initial gain of branch_output", at_least=0.0, at_most=100.0
    )
    input_scale: float | None = _field(
        None, "u: fixed factor on the embedding's output", at_least=1e-6, at_most=1e6
    )
    softmax_scale: float | None = _field(
        None, "s: factor on attention scores", at_least=1e-6, at_most=1e3
    )
    final_norm: bool | None = _field(None, "RMSNorm before the head")


@dataclasses.dataclass(frozen=True)
class Fp8Config:
    """What is computed in FP8, and how scales are found."""

    recipe: str = _field(
        "fp8_dpa", "bf16: nothing, fp8: linear GEMMs, fp8_dpa: attention too", choices=roles.RECIPES
    )
    scaling: str = _field("delayed", "how scales are found", choices=roles.SCALINGS)
    weight_scaling: str = _field(
        "current",
        "delayed: scales of weights, quantised once a step, from their amax at that moment "
        "or from a history as well",
        choices=roles.WEIGHT_SCALINGS,
    )
    history_length: int = _field(1024, "delayed: steps of amax kept", at_least=1, below=1025)
    history_reduction: str = _field(
        "max", "delayed: amax of the history", choices=("max", "most_recent")
    )
    margin: int = _field(
        0,
        "scales are 2**margin times larger than needed: headroom against saturation",
        at_least=0,
        at_most=8,
    )
    power_of_two: bool = _field(True, "round scales up to powers of two: exact on every device")
    gradient_format: str = _field(
        "e5m2", "format of output gradients (HYBRID: e5m2)", choices=("e4m3", "e5m2")
    )
    static_weight_scale: float | None = _field(
        None,
        "static: scale of weights; None: model.init_std. Activations: 1",
        above=0.0,
        at_most=1e9,
    )
    static_gradient_scale: float | None = _field(
        None, "static: scale of output gradients; None: 1 / tokens a step", above=0.0, at_most=1e9
    )
    fast_accumulation: str = _field(
        "fprop",
        "passes that accumulate fast and less exactly on Hopper",
        choices=roles.FAST_ACCUMULATION,
    )
    head: bool = _field(False, "the language-model head in FP8 as well; needs untied embeddings")
    backend: str = _field(
        "auto",
        "native: FP8 GEMMs; emulated: exact FP8 values in BF16 GEMMs; auto: what the device has",
        choices=("auto", "native", "emulated"),
    )
    attention_backend: str = _field(
        "auto",
        "implementation of attention; auto: pallas on Hopper GPUs, else composed, else emulated, as the "
        "scalings and heads allow; for BF16 attention on a GPU, cudnn",
        choices=("auto", "emulated", "composed", "pallas", "cudnn"),
    )
    overrides: str = _field(
        "", "role=scaling pairs, e.g. 'mlp_down=bf16,qkv@0-3=current' (layers 0 to 3)"
    )


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where tokens come from."""

    sequence_length: int = _field(
        256, "tokens a sequence", at_least=1, below=2**24 + 1
    )  # positions are float32 in RoPE
    source: str = _field(
        "embedded",
        "'embedded' (the novels shipped with fp8jax), a directory of prepared token shards, a Megatron "
        "prefix, or a mixture of them: 'dirA=0.7,dirB=0.3'",
    )
    held_out: str = _field(
        "auto",
        "text of the held-out loss. auto: what the sources hold out; none: no evaluation; or sources, each logged "
        "by its name where there are several: 'dirA' or 'wiki=dirA,code=dirB'",
    )
    tokenizer: str = _field(
        "auto", "auto: the source's own; 'byte', 'tekken' or the path of a tokenizer.json"
    )
    allow_normalisation: bool = _field(
        False,
        "take a tokenizer that brings text into a Unicode form (NFC) first; bits per byte is then of "
        "that text",
    )
    packing: str = _field(
        "concat",
        "concat: documents run on from window to window; best_fit: whole documents, padded",
        choices=("concat", "best_fit"),
    )
    document_masks: bool = _field(False, "packed documents do not attend to each other")
    on_fault: str = _field(
        "fail",
        "a shard cut off, a token id that is none: fail, or skip its sequences, counted",
        choices=("fail", "skip"),
    )
    read_threads: int = _field(
        1, "background reading threads; 0 reads in the loop", at_least=0, at_most=1024
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the warm-up, stable, decay schedule (FOG paper, Table 6); what is kept of matrices, in how many bits."""

    name: str = _field(
        "adamw",
        "AdamW; AdEMAMix (a slow average of gradients beside the fast one); Muon for the blocks' matrices, Adam "
        "for the rest",
        choices=OPTIMIZERS,
    )
    learning_rate: float = _field(1e-3, "peak learning rate", at_least=0.0, at_most=10.0)
    final_learning_rate: float = _field(
        1e-8, "learning rate at the last step", at_least=0.0, at_most=10.0
    )
    warmup_steps: int = _field(
        100,
        "steps of linear warm-up; where not set, the preset's share of training.steps",
        at_least=0,
        at_most=COUNT,
    )
    decay_fraction: float = _field(
        0.2, "last part of the steps, falling as 1 - sqrt(progress)", at_least=0.0, at_most=1.0
    )
    b1: float = _field(0.9, "decay of the first moment", at_least=0.0, below=1.0, at_most=0.99999)
    b2: float = _field(0.95, "decay of the second moment", at_least=0.0, below=1.0, at_most=0.99999)
    eps: float = _field(1e-8, "added to the root of the second moment", at_least=1e-30, at_most=1.0)
    weight_decay: float = _field(
        0.1,
        "decoupled weight decay of matrices; norms and scalars have none",
        at_least=0.0,
        at_most=10.0,
    )
    clip_norm: float = _field(
        1.0,
        "global norm to which gradients are clipped; 0: no clipping",
        at_least=0.0,
        at_most=1e30,
    )
    b3: float = _field(
        0.9999, "ademamix: decay of the slow average", at_least=0.0, below=1.0, at_most=0.99999
    )
    alpha: float = _field(
        5.0, "ademamix: weight of the slow average in the update", at_least=0.0, at_most=100.0
    )
    gradient_dtype: str = _field(
        "mixed",
        "dtype in which matrices' gradients are reduced over devices and summed over microbatches; "
        "mixed: model.dtype for the first (tables float32), float32 for the second",
        choices=GRADIENT_DTYPES,
    )
    master_dtype: str = _field("float32", "dtype in which matrices are kept", choices=MASTER_DTYPES)
    master_rounding: str = _field(
        "stochastic",
        "of matrices of 16 bits: unbiased, or to nearest with the next 8 bits in a byte",
        choices=MASTER_ROUNDINGS,
    )
    first_moment: str = _field(
        "float32", "how averages of matrices' gradients are kept", choices=roles.STORED
    )
    second_moment: str = _field(
        "float32", "how averages of their squares are kept", choices=roles.STORED
    )
    z_loss: float = _field(
        0.0,
        "weight of the mean squared log-partition of the logits in the training loss; 0: none",
        at_least=0.0,
        at_most=1.0,
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Length and shape of the run."""

    steps: int = _field(600, "optimizer steps", at_least=1, below=2**31)  # counted in int32
    batch_size: int = _field(
        16, "sequences a step, over all devices and microbatches", at_least=1, below=LARGE
    )
    microbatches: int = _field(
        0,
        "parts into which a step's batch is split, one after another; 0: the fewest that fit the devices",
        at_least=0,
        below=LARGE,
    )
    seed: int = _field(0, "seed of initial weights and of the data order", at_least=0, below=2**32)
    start_limit: int = _field(
        3600,
        "seconds until the first step may begin, compilation included; then the process ends; 0: any",
        at_least=0,
        at_most=YEARS,
    )
    step_limit: int = _field(
        1800,
        "seconds a step may take, without its evaluation; then the process ends; 0: any",
        at_least=0,
        at_most=YEARS,
    )
    evaluation_limit: int = _field(
        1800,
        "seconds a batch of an evaluation may take, compilation included; then the process ends; 0: any",
        at_least=0,
        at_most=YEARS,
    )
    save_limit: int = _field(
        3600,
        "seconds a save may take, in the background or not; then the process ends; 0: any",
        at_least=0,
        at_most=YEARS,
    )
    bad_steps: int = _field(
        20,
        "bad steps in a row after which the run goes back to its newest checkpoint",
        at_least=1,
        at_most=COUNT,
    )
    rollbacks: int = _field(
        2,
        "times a run may go back, passing over the batches it could not digest, before it stops",
        at_least=0,
        at_most=COUNT,
    )
    skip_spikes: float = _field(
        0.0,
        "skip a step whose loss or gradient norm lies this many robust standard deviations above the "
        "median of the last 128, skipped ones included, so that a new level that lasts is accepted; 0: never",
        at_least=0.0,
        at_most=1e6,
    )
    loss_chunk: int = _field(
        CHUNK_AUTO,
        "rows of the vocabulary whose logits are in memory at a time, computed once more in the "
        "backward pass; 0: all; -1: all where they fit",
        at_least=-1,
        below=LARGE,
    )
    remat: str = _field(
        AUTO,
        "what the backward pass recomputes: nothing, each block, or all but FP8 tensors, which wait on the device or "
        "(offload_fp8) in the host's memory; auto: as little as fits",
        choices=REMAT_POLICIES,
    )
    fitted: str = _field(
        "",
        "microbatches, loss_chunk and remat that a run chose where they were left open, and for which devices; "
        "written into its config.json, not to be set",
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each mesh axis; at most one -1 takes what is left."""

    data: int = _field(1, "data parallelism", at_least=-1, at_most=2**20)
    fsdp: int = _field(
        -1,
        "data parallelism with sharded parameters; where not set, 1 beside another axis that is -1",
        at_least=-1,
        at_most=2**20,
    )
    tensor: int = _field(1, "heads, FFN and vocabulary split", at_least=-1, at_most=2**20)
    sequence: int = _field(1, "sequence split between blocks", at_least=-1, at_most=2**20)


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """Saving."""

    every: int = _field(
        1000,
        "steps between checkpoints; one is always saved at the end and on a stop; 0: only those",
        at_least=0,
        at_most=COUNT,
    )
    minutes: int = _field(
        60,
        "minutes after the last checkpoint at which another is saved; 0: only by steps",
        at_least=0,
        at_most=YEARS,
    )
    keep: int = _field(2, "newest checkpoints kept", at_least=1, at_most=COUNT)
    keep_every: int = _field(
        0,
        "checkpoints of steps that this divides are kept for good; 0: none",
        at_least=0,
        at_most=COUNT,
    )
    keep_best: int = _field(
        0,
        "checkpoints of the lowest held-out loss kept, of those saved at an evaluated step",
        at_least=0,
        at_most=COUNT,
    )


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """Held-out loss during training and in eval.py."""

    every: int = _field(
        200, "steps between evaluations; 0: only at the end", at_least=0, at_most=COUNT
    )
    batches: int = _field(
        -1,
        "held-out batches of training.batch_size sequences an evaluation reads, spread evenly over the split; 0: the "
        "whole split; -1: as many as take 2% of the time of the steps between. eval.py reads the whole split",
        at_least=-1,
        at_most=COUNT,
    )


@dataclasses.dataclass(frozen=True)
class MonitorConfig:
    """Outlier statistics."""

    every: int = _field(50, "steps between outlier statistics; 0: never", at_least=0, at_most=COUNT)
    kurtosis: str = _field(
        "per_token",
        "over one token's features, or pooled over a sequence",
        choices=("per_token", "pooled"),
    )
    parameters: bool = _field(
        False, "statistics of parameters and of the optimizer's moments as well"
    )


@dataclasses.dataclass(frozen=True)
class WarningConfig:
    """The early warning: what to do beside saying it, in events.jsonl and on the terminal."""

    action: str = _field(
        "log",
        "log: nothing; checkpoint: save; fallback: named roles go on in BF16 from the next step; rollback: to the "
        "newest checkpoint, its batches passed over; stop: save and exit with 3",
        choices=WARNING_ACTIONS,
    )
    level: str = _field("act", "lowest level at which the action is taken", choices=WARNING_LEVELS)
    fallback: str = _field(
        "",
        "roles that fall back, with or without layers, e.g. 'attention_scores,mlp_down@2-3'; empty: those that "
        "the warning names",
    )


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """Logged steps."""

    every: int = _field(
        10,
        "steps between lines of metrics.jsonl and of the progress display",
        at_least=1,
        at_most=COUNT,
    )
    report_minutes: int = _field(
        5,
        "minutes between refreshes of WORKDIR/report.html while the run trains; 0: no report",
        at_least=0,
        at_most=YEARS,
    )
    wandb: str = _field("", "project of Weights & Biases to log to; empty: none")
    wandb_offline: bool = _field(
        False, "write Weights & Biases' files to WORKDIR/wandb instead of sending them"
    )


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """A JAX profiler window, written to the workdir."""

    start: int = _field(0, "first step to trace; 0: the first that runs", at_least=0, at_most=COUNT)
    steps: int = _field(0, "how many steps to trace; 0: none", at_least=0, at_most=COUNT)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

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


def defaults() -> ml_collections.ConfigDict:
    """Every field at its default; fields that may be None are typed placeholders, so overrides are type-checked.

    So are those that follow the run's length and the mesh unless they are set (open_fields.py): their defaults are in `preset`.
    """
    out = ml_collections.ConfigDict()
    for section in dataclasses.fields(Config):
        values = ml_collections.ConfigDict()
        for field in dataclasses.fields(section.type):
            kind, _ = kind_of(field.type)
            unset = field.default is None or (section.name, field.name) in open_fields.OPEN
            values[field.name] = config_dict.placeholder(kind) if unset else field.default
        out[section.name] = values
    out.preset = open_fields.planned(to_dict(Config()))
    return out


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Plain nested dictionary, for config.json."""
    return dataclasses.asdict(config)


def digest(config: Config) -> str:
    """Short hash of every field, to recognise a configuration by."""
    return hashlib.blake2b(
        json.dumps(to_dict(config), sort_keys=True).encode(), digest_size=8
    ).hexdigest()


def from_dict(
    values: ml_collections.ConfigDict | dict[str, Any], run: Config | None = None
) -> Config:
    """Frozen, validated configuration.

    Args:
        values: nested mapping of section → field → value. Missing fields take their defaults; in a ConfigDict, schedules that
            nobody set follow the run's length (open_fields.py).
        run: the configuration of the run in the directory, if it goes on.

    Raises:
        ConfigError: an unknown section or field, an ill-typed or forbidden value, an impossible combination.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
        if preset := values.pop("preset", None):
            open_fields.fill(values, preset, run and to_dict(run))
    elif isinstance(values.get("mesh"), dict):
        values = values | {"mesh": open_fields.filled_mesh(values["mesh"])}
    sections = {field.name: field.type for field in dataclasses.fields(Config)}
    built = {}
    for name, fields in values.items():
        check_name(name)
        if not isinstance(fields, dict):
            raise ConfigError(f"config.{name}: {fields!r} is not a section of fields")
        built[name] = _build_section(name, sections[name], fields)
    config = Config(**built)
    check(config)
    return config


def read_json(path: pathlib.Path, most: int = files.JSON_BYTES) -> Any:
    """The JSON of a file that anyone may have written.

    Args:
        path: of the file.
        most: bytes that are read at all; its values may take four times as many.

    Raises:
        ConfigError: it cannot be read, is larger than `most`, or is not JSON. A missing file is a FileNotFoundError.
    """
    try:
        return files.read_json(path, most, memory=4 * most)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {str(error)[:100]}") from None


def _build_section(section: str, kind: Any, values: dict[str, Any]) -> Any:
    known = {field.name: field for field in dataclasses.fields(kind)}
    checked = {}
    for name, value in values.items():
        check_name(section, name)
        checked[name] = _check_value(f"config.{section}.{name}", known[name], value)
    return kind(**checked)


def _check_value(path: str, field: dataclasses.Field, value: Any) -> Any:
    kind, optional = kind_of(field.type)
    if value is None and optional:
        return None
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(
            f"{path}: {value!r} is not {kind.__name__}{' or None' if optional else ''}: {field.metadata['doc']}"
        )
    if kind is float and not math.isfinite(value):
        raise ConfigError(f"{path}: {value!r} is not a finite number")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(
            f"{path}: {value!r} is not one of {', '.join(choices)}{did_you_mean(value, choices)}"
        )
    if outside := bounds.outside(value, field.metadata):
        raise ConfigError(f"{path}: {value!r} is {outside}: {field.metadata['doc']}")
    return value


def kind_of(annotation: Any) -> tuple[type, bool]:
    """The plain type of an annotation, and whether None is allowed too."""
    if isinstance(annotation, types.UnionType):
        kinds = [a for a in typing.get_args(annotation) if a is not type(None)]
        return kinds[0], True
    return annotation, False


def check_name(section: str, field: str | None = None) -> None:
    """Raises ConfigError, which names the nearest, if there is no such section, or no such field in it."""
    sections = {found.name: found.type for found in dataclasses.fields(Config)}
    if section not in sections:
        raise ConfigError(f"config.{section}: unknown section{_nearest(section, sections)}")
    known = [found.name for found in dataclasses.fields(sections[section])]
    if field is not None and field not in known:
        like = " or ".join(f"config.{'.'.join(found)}" for found in fields_like(field)[:4])
        raise ConfigError(
            f"config.{section}.{field}: unknown field"
            + (f"; did you mean {like}?" if like else _nearest(field, known))
        )


def fields_like(name: str) -> list[tuple[str, str]]:
    """Fields of any section that have this name, or whose words begin with its letters: `lr` is optimizer.learning_rate."""
    fields = [
        (section.name, field.name)
        for section in dataclasses.fields(Config)
        for field in dataclasses.fields(section.type)
    ]
    same = [found for found in fields if found[1] == name or ".".join(found) == name]
    return same or [
        found
        for found in fields
        if "_" in found[1] and "".join(word[0] for word in found[1].split("_") if word) == name
    ]


def _nearest(name: str, known: Any) -> str:
    """'; did you mean X?' or the list of what is known."""
    return did_you_mean(name, known) or f"; known: {', '.join(known)}"


def did_you_mean(name: str, known: Any) -> str:
    """Like "; did you mean 'steps'?", or nothing if no known name is near."""
    close = difflib.get_close_matches(name[:200], list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def check(config: Config) -> None:
    """Raises ConfigError on combinations of fields that cannot run together, whatever the devices."""
    model, fp8, training = config.model, config.fp8, config.training
    if model.heads % model.kv_heads:
        raise ConfigError(
            f"config.model.kv_heads: {model.kv_heads} does not divide model.heads={model.heads}"
        )
    if model.head_dim is None and model.width % model.heads:
        raise ConfigError(
            f"config.model.heads: {model.heads} does not divide model.width={model.width}; "
            "or set model.head_dim"
        )
    if head_dim(model) % 2:
        raise ConfigError(f"config.model.head_dim: {head_dim(model)} is odd; RoPE rotates pairs")
    if model.rope_scaling == "yarn" and model.rope_scaling_factor > 1 and model.rope_theta == 1.0:
        raise ConfigError(
            "config.model.rope_theta: 1.0 has no frequencies for yarn to tell apart; set it above 1"
        )
    if (
        model.rope_scaling == "llama3"
        and model.rope_scaling_factor > 1
        and model.rope_high_freq_factor <= model.rope_low_freq_factor
    ):
        raise ConfigError(
            f"config.model.rope_high_freq_factor: {model.rope_high_freq_factor} is not above "
            f"model.rope_low_freq_factor={model.rope_low_freq_factor}"
        )
    if fp8.head and model.tied_embeddings:
        raise ConfigError(
            "config.fp8.head: True needs config.model.tied_embeddings=False: an FP8 head cannot share the embedding"
        )
    if fp8.weight_scaling == "delayed" and "delayed" not in fp8.scaling + fp8.overrides:
        raise ConfigError(
            f"config.fp8.weight_scaling: delayed has no effect with config.fp8.scaling={fp8.scaling}; set "
            "config.fp8.scaling=delayed, or config.fp8.weight_scaling=current"
        )
    if training.microbatches and training.batch_size % training.microbatches:
        raise ConfigError(
            f"config.training.microbatches: {training.microbatches} does not divide "
            f"training.batch_size={training.batch_size}"
        )
    if sum(getattr(config.mesh, axis) == -1 for axis in MESH_AXES) > 1:
        raise ConfigError("config.mesh: only one axis may be -1 (take what is left)")
    for axis in MESH_AXES:
        if getattr(config.mesh, axis) == 0:
            raise ConfigError(
                f"config.mesh.{axis}: 0 devices; allowed: 1 or more, or -1 to take what is left"
            )
    if config.optimizer.warmup_steps > training.steps:
        raise ConfigError(
            f"config.optimizer.warmup_steps: {config.optimizer.warmup_steps} exceeds training.steps={training.steps}; "
            "leave it out, and it follows the run's length"
        )
    if problem := bounds.problem(config):
        raise ConfigError(problem)
    parse_sources(config.data.source)
    parse_held_out(config.data.held_out)
    if config.data.held_out == "none" and config.checkpoint.keep_best:
        raise ConfigError(
            f"config.checkpoint.keep_best: {config.checkpoint.keep_best} needs a held-out loss, and "
            "config.data.held_out is 'none'; set it to 0"
        )
    try:
        roles.parse_overrides(fp8.overrides, layers=model.layers)
    except ValueError as error:
        raise ConfigError(f"config.fp8.overrides: {error}") from None
    try:
        roles.parse_overrides(roles.in_bf16(config.warning.fallback), layers=model.layers)
    except ValueError as error:
        raise ConfigError(f"config.warning.fallback: {error}") from None


def settled(config: Config) -> Config:
    """The config with what is left open set to the plainest: one microbatch, the whole loss, nothing recomputed."""
    training = config.training
    plain = dataclasses.replace(
        training,
        microbatches=training.microbatches or 1,
        loss_chunk=max(training.loss_chunk, 0),
        remat="none" if training.remat == AUTO else training.remat,
    )
    return config if plain == training else dataclasses.replace(config, training=plain)


def parse_sources(text: str) -> tuple[tuple[str, float], ...]:
    """Names and weights, which add up to 1, of `config.data.source`: 'name' or 'name=weight,name=weight'.

    A path may hold '=' itself (lang=en/tokens): one source without a weight is a name as it stands.

    Raises:
        ConfigError: a weight is missing or not above 0, or a name is missing or there twice.
    """
    last = text.rpartition("=")[2]
    if "," not in text and (
        "=" not in text or ("/" in text and _weight(last) is None) or pathlib.Path(text).exists()
    ):
        return ((text, 1.0),)
    found: dict[str, float] = {}
    for pair in text.split(","):
        name, _, weight = (part.strip() for part in pair.rpartition("="))
        value = _weight(weight) or 0.0
        if not name or name in found or not 0.0 < value < math.inf:
            raise ConfigError(
                f"config.data.source: {pair!r} in {text!r} is not a new source with a weight above 0, as in 'dirA=0.7,dirB=0.3'"
            )
        found[name] = value
    return tuple((name, value / math.fsum(found.values())) for name, value in found.items())


def parse_held_out(text: str) -> tuple[tuple[str, str], ...]:
    """Return name and source of each part of `config.data.held_out`; none where it is 'auto' or 'none'.

    A source without a name is called by the last part of its path.

    Raises:
        ConfigError: a part without a source, or a name that is there twice.
    """
    if text in ("auto", "none"):
        return ()
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, source = (word.strip() for word in part.partition("="))
        if not equals or "/" in name:  # a path may hold '=' itself
            source = part.strip()
            name = re.sub(r"[^\w.-]", "_", pathlib.PurePath(source).name)
        if not source or not re.fullmatch(r"[\w.-]+", name) or name in found:
            raise ConfigError(
                f"config.data.held_out: {part!r} in {text!r} is not a source with a name of its own, as in "
                "'wiki=dirA,code=dirB'; or say auto or none"
            )
        found[name] = source
    return tuple(found.items())


def _weight(text: str) -> float | None:
    """The number that a text is, if it is one."""
    try:
        return float(text)
    except ValueError:
        return None


def head_dim(model: ModelConfig) -> int:
    """Features a head."""
    return model.head_dim or model.width // model.heads
