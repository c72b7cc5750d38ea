"""The configuration's sections of the data, the optimizer, training and the mesh."""

import dataclasses

from fp8jax.config.bounds import COUNT, LARGE, YEARS
from fp8jax.config.field import field
from fp8jax.numerics import roles

OPTIMIZERS = ("adamw", "ademamix", "muon")
GRADIENT_DTYPES = ("mixed", "float32", "bfloat16")
MASTER_DTYPES = ("float32", "float16", "bfloat16")
MASTER_ROUNDINGS = ("stochastic", "compensated")
AUTO = "auto"
REMAT_POLICIES = (AUTO, "none", "full", "save_fp8", "offload_fp8", "save_branches")
CHUNK_AUTO = -1
MESH_AXES = ("data", "fsdp", "tensor", "sequence")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The sources of tokens, and their packing."""

    sequence_length: int = field(
        256, "tokens per sequence", at_least=1, below=2**24 + 1
    )  # positions are float32 in RoPE
    source: str = field(
        "embedded",
        "'embedded' (the novels shipped with fp8jax), a directory of prepared token shards, a "
        "Megatron "
        "prefix, or a mixture of them: 'dirA=0.7,dirB=0.3'",
    )
    held_out: str = field(
        "auto",
        "text of the held-out loss. auto: what the sources hold out; none: no evaluation; or "
        "sources, each logged "
        "by its name if there are several: 'dirA' or 'wiki=dirA,code=dirB'",
    )
    tokenizer: str = field(
        "auto", "auto: the source's own; 'byte', 'tekken' or the path of a tokenizer.json"
    )
    allow_normalisation: bool = field(
        False,
        "accept a tokenizer that brings text into a Unicode form (NFC) first; bits per byte is then of "
        "that text",
    )
    packing: str = field(
        "concat",
        "concat: documents continue from window to window; best_fit: whole documents, padded",
        choices=("concat", "best_fit"),
    )
    document_masks: bool = field(False, "packed documents do not attend to each other")
    on_fault: str = field(
        "fail",
        "a shard that is cut off, or an invalid token id: fail, or skip its sequences and count them",
        choices=("fail", "skip"),
    )
    read_threads: int = field(
        1, "background reading threads; 0 reads in the loop", at_least=0, at_most=1024
    )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its warm-up, stable, decay schedule (FOG paper, Table 6), and the formats
    of its state.
    """

    name: str = field(
        "adamw",
        "AdamW; AdEMAMix (a slow average of gradients beside the fast one); Muon for the "
        "blocks' matrices, Adam "
        "for the rest",
        choices=OPTIMIZERS,
    )
    learning_rate: float = field(1e-3, "peak learning rate", at_least=0.0, at_most=10.0)
    final_learning_rate: float = field(
        1e-8, "learning rate at the last step", at_least=0.0, at_most=10.0
    )
    warmup_steps: int = field(
        100,
        "steps of linear warm-up; if not set, the preset's share of training.steps",
        at_least=0,
        at_most=COUNT,
    )
    decay_fraction: float = field(
        0.2, "last part of the steps, falling as 1 - sqrt(progress)", at_least=0.0, at_most=1.0
    )
    b1: float = field(0.9, "decay of the first moment", at_least=0.0, below=1.0, at_most=0.99999)
    b2: float = field(0.95, "decay of the second moment", at_least=0.0, below=1.0, at_most=0.99999)
    eps: float = field(1e-8, "added to the root of the second moment", at_least=1e-30, at_most=1.0)
    weight_decay: float = field(
        0.1,
        "decoupled weight decay of matrices; norms and scalars have none",
        at_least=0.0,
        at_most=10.0,
    )
    clip_norm: float = field(
        1.0,
        "global norm to which gradients are clipped; 0: no clipping",
        at_least=0.0,
        at_most=1e30,
    )
    b3: float = field(
        0.9999, "ademamix: decay of the slow average", at_least=0.0, below=1.0, at_most=0.99999
    )
    alpha: float = field(
        5.0, "ademamix: weight of the slow average in the update", at_least=0.0, at_most=100.0
    )
    gradient_dtype: str = field(
        "mixed",
        "dtype in which matrices' gradients are reduced over devices and summed over microbatches; "
        "mixed: model.dtype for the first (tables float32), float32 for the second",
        choices=GRADIENT_DTYPES,
    )
    master_dtype: str = field("float32", "dtype in which matrices are kept", choices=MASTER_DTYPES)
    master_rounding: str = field(
        "stochastic",
        "rounding of matrices of 16 bits: unbiased, or to nearest with the next 8 bits in a byte",
        choices=MASTER_ROUNDINGS,
    )
    first_moment: str = field(
        "float32", "how averages of matrices' gradients are kept", choices=roles.STORED
    )
    second_moment: str = field(
        "float32", "how averages of their squares are kept", choices=roles.STORED
    )
    z_loss: float = field(
        0.0,
        "weight of the mean squared log-partition of the logits in the training loss; 0: none",
        at_least=0.0,
        at_most=1.0,
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """The length and shape of the run."""

    steps: int = field(600, "optimizer steps", at_least=1, below=2**31)  # counted in int32
    batch_size: int = field(
        16, "sequences per step, over all devices and microbatches", at_least=1, below=LARGE
    )
    microbatches: int = field(
        0,
        "parts into which a step's batch is split, one after another; 0: the fewest that fit "
        "the devices",
        at_least=0,
        below=LARGE,
    )
    seed: int = field(0, "seed of initial weights and of the data order", at_least=0, below=2**32)
    start_limit: int = field(
        3600,
        "seconds until the first step begins, compilation included, before the process ends; 0: no limit",
        at_least=0,
        at_most=YEARS,
    )
    step_limit: int = field(
        1800,
        "seconds that a step may take, without its evaluation, before the process ends; 0: no limit",
        at_least=0,
        at_most=YEARS,
    )
    evaluation_limit: int = field(
        1800,
        "seconds that a batch of an evaluation may take, compilation included, before the "
        "process ends; 0: no limit",
        at_least=0,
        at_most=YEARS,
    )
    save_limit: int = field(
        3600,
        "seconds that a save may take, in the background or not, before the process ends; 0: no limit",
        at_least=0,
        at_most=YEARS,
    )
    bad_steps: int = field(
        20,
        "bad steps in a row after which the run goes back to its newest checkpoint",
        at_least=1,
        at_most=COUNT,
    )
    rollbacks: int = field(
        2,
        "times that a run may go back and skip the batches that it could not handle, before it stops",
        at_least=0,
        at_most=COUNT,
    )
    skip_spikes: float = field(
        0.0,
        "skip a step whose loss or gradient norm lies this many robust standard deviations "
        "above the "
        "median of the last 128, skipped ones included, so that a new level that lasts is "
        "accepted; 0: never",
        at_least=0.0,
        at_most=1e6,
    )
    loss_chunk: int = field(
        CHUNK_AUTO,
        "rows of the vocabulary whose logits are in memory at a time, computed once more in the "
        "backward pass; 0: all; -1: all where they fit",
        at_least=-1,
        below=LARGE,
    )
    remat: str = field(
        AUTO,
        "what the backward pass recomputes: nothing, each block, or all but FP8 tensors, which "
        "wait on the device or "
        "(offload_fp8) in the host's memory, or all but these and the branches' outputs; auto: "
        "as little as fits",
        choices=REMAT_POLICIES,
    )
    fitted: str = field(
        "",
        "microbatches, loss_chunk and remat that a run chose if they were open, and for which "
        "devices; "
        "the run writes it into its config.json, do not set it",
    )


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The devices along each mesh axis; at most one -1 takes what is left."""

    data: int = field(1, "data parallelism", at_least=-1, at_most=2**20)
    fsdp: int = field(
        -1,
        "data parallelism with sharded parameters; if not set, the devices left, or 1 beside "
        "another axis that is -1",
        at_least=-1,
        at_most=2**20,
    )
    tensor: int = field(1, "heads, FFN and vocabulary split", at_least=-1, at_most=2**20)
    sequence: int = field(1, "sequence split between blocks", at_least=-1, at_most=2**20)
