"""The configuration's sections of the model and of FP8."""

import dataclasses

from fp8jax.config.bounds import LARGE
from fp8jax.config.field import field
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
# They act on each head: without a gain (frozen), with a trained one, or with one that is kept as
# loaded (kept).
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


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder; switches left at None take the value that `architecture` gives them
    (models/architectures.py).
    """

    architecture: str = field(
        "fog_max", "row of the architecture table that fills the switches", choices=ARCHITECTURES
    )
    layers: int = field(4, "number of blocks", at_least=1, below=10_001)
    width: int = field(256, "model width d", at_least=1, below=LARGE)
    ffn_width: int = field(
        512, "width of a gated FFN; a two-layer FFN takes 1.5 times this", at_least=1, below=LARGE
    )
    ffn_hidden: int | None = field(
        None,
        "hidden features of an FFN of any kind; None: by ffn_width",
        at_least=1,
        below=LARGE,
    )
    heads: int = field(2, "query heads", at_least=1, below=LARGE)
    kv_heads: int = field(1, "key and value heads", at_least=1, below=LARGE)
    head_dim: int | None = field(
        None, "features per head; None: width / heads", at_least=1, below=LARGE
    )
    vocab_size: int | None = field(
        None,
        "rows of the embedding; None: the tokenizer's, up to a multiple of 128",
        at_least=1,
        below=LARGE,
    )
    tied_embeddings: bool = field(True, "the head is the embedding, transposed")
    init_std: float = field(
        0.02, "sigma0: standard deviation of every matrix at the start", at_least=0.0, at_most=10.0
    )
    norm_eps: float = field(1e-5, "epsilon of RMSNorm", at_least=1e-12, at_most=1.0)
    rope_theta: float = field(
        500000.0, "base of the rotary frequencies", at_least=1.0, at_most=1e12
    )
    rope_scaling: str = field(
        "llama3",
        "how RoPE is scaled by rope_scaling_factor. llama3 and yarn: low frequencies; linear: "
        "all; dynamic: "
        "the base, from rope_original_context on",
        choices=("llama3", "linear", "dynamic", "yarn"),
    )
    rope_scaling_factor: float = field(
        1.0,
        "RoPE scaling: rotary frequencies are divided by this, see rope_scaling; 1: off",
        at_least=1.0,
        at_most=1e6,
    )
    rope_low_freq_factor: float = field(
        1.0,
        "frequencies that turn less often in the original context are low",
        at_least=1e-6,
        at_most=1e6,
    )
    rope_high_freq_factor: float = field(
        4.0,
        "frequencies that turn more often in the original context do not change",
        at_least=1e-6,
        at_most=1e6,
    )
    rope_beta_fast: float = field(
        32.0,
        "yarn: frequencies that turn more often in the original context do not change",
        at_least=1e-6,
        at_most=1e6,
    )
    rope_beta_slow: float = field(
        1.0, "yarn: frequencies that turn less often are divided", at_least=1e-6, at_most=1e6
    )
    rope_truncate: bool = field(
        True, "yarn: the bounds between which frequencies are interpolated are whole pairs"
    )
    rope_attention_factor: float = field(
        1.0, "yarn: factor on rotated queries and keys", at_least=1e-3, at_most=1e3
    )
    rope_original_context: int = field(
        8192, "tokens of context before RoPE scaling", at_least=1, below=LARGE
    )
    dtype: str = field(
        "bfloat16", "dtype of activations between GEMMs", choices=("bfloat16", "float32")
    )
    scan_layers: bool | None = field(
        None,
        "True: compile one block and loop over layers; False: compile every layer; "
        "unset: False for up to 32 layers on the GPUs of one node, where it moves less memory",
    )
    pre_norm: bool | None = field(None, "RMSNorm before each branch")
    qk_regulariser: str | None = field(
        None, "what acts on queries and keys before RoPE", choices=QK_REGULARISERS
    )
    activation: str | None = field(
        None, "the FFN's nonlinearity; swiglu kinds are gated", choices=ACTIVATIONS
    )
    branch_output: str | None = field(
        None, "what acts on a branch before the residual addition", choices=BRANCH_OUTPUTS
    )
    branch_gain_init: float | None = field(
        None, "initial gain of branch_output", at_least=0.0, at_most=100.0
    )
    input_scale: float | None = field(
        None, "u: fixed factor on the embedding's output", at_least=1e-6, at_most=1e6
    )
    softmax_scale: float | None = field(
        None, "s: factor on attention scores", at_least=1e-6, at_most=1e3
    )
    final_norm: bool | None = field(None, "RMSNorm before the head")


@dataclasses.dataclass(frozen=True)
class Fp8Config:
    """The computations in FP8, and how scales are found."""

    recipe: str = field(
        "fp8_dpa", "bf16: nothing, fp8: linear GEMMs, fp8_dpa: attention too", choices=roles.RECIPES
    )
    scaling: str = field("delayed", "how scales are found", choices=roles.SCALINGS)
    weight_scaling: str = field(
        "current",
        "delayed: scales of weights, quantised once a step, from their amax at that moment "
        "or from a history as well",
        choices=roles.WEIGHT_SCALINGS,
    )
    history_length: int = field(1024, "delayed: steps of amax kept", at_least=1, below=1025)
    history_reduction: str = field(
        "max", "delayed: amax of the history", choices=("max", "most_recent")
    )
    margin: int = field(
        0,
        "scales are 2**margin times larger than needed: headroom against saturation",
        at_least=0,
        at_most=8,
    )
    power_of_two: bool = field(True, "round scales up to powers of two: exact on every device")
    gradient_format: str = field(
        "e5m2", "format of output gradients (HYBRID: e5m2)", choices=("e4m3", "e5m2")
    )
    static_weight_scale: float | None = field(
        None,
        "static: scale of weights; None: model.init_std. Activations: 1",
        above=0.0,
        at_most=1e9,
    )
    static_gradient_scale: float | None = field(
        None, "static: scale of output gradients; None: 1 / tokens per step", above=0.0, at_most=1e9
    )
    fast_accumulation: str = field(
        "fprop",
        "passes that accumulate fast and less exactly on Hopper",
        choices=roles.FAST_ACCUMULATION,
    )
    head: bool = field(False, "the language-model head in FP8 as well; needs untied embeddings")
    backend: str = field(
        "auto",
        "native: FP8 GEMMs; emulated: exact FP8 values in BF16 GEMMs; auto: what the device has",
        choices=("auto", "native", "emulated"),
    )
    attention_backend: str = field(
        "auto",
        "implementation of attention; auto: pallas on Hopper GPUs, else composed, else "
        "emulated, as the "
        "scalings and heads allow; for BF16 attention on a GPU, cudnn",
        choices=("auto", "emulated", "composed", "pallas", "cudnn"),
    )
    overrides: str = field(
        "", "role=scaling pairs, e.g. 'mlp_down=bf16,qkv@0-3=current' (layers 0 to 3)"
    )


def head_dim(model: ModelConfig) -> int:
    """Return the features per head."""
    return model.head_dim or model.width // model.heads
