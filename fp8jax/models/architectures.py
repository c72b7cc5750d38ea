"""The architectures as data: the table of the FOG paper (appendix B), one row each.

`resolve(model_config)` fills the switches that a config leaves at None from its architecture's row,
so that any mixture (FOG-max with SwiGLU, OP with a post-norm) is one row and one field.
"""

import dataclasses
import math
from typing import Any

from fp8jax.config import ModelConfig, head_dim
from fp8jax.models.activations import GATED

# `resolve` computes "1/sqrt(layers)", "1/init_std" and "1/sqrt(head_dim)".
_FOG = dict(
    pre_norm=False,
    qk_regulariser="rmsnorm_frozen",
    branch_output="rmsnorm",
    branch_gain_init="1/sqrt(layers)",
    input_scale="1/init_std",
    softmax_scale=0.125,
    final_norm=False,
)
_LLAMA = dict(
    pre_norm=True,
    qk_regulariser="none",
    activation="swiglu",
    branch_output="none",
    branch_gain_init=1.0,
    input_scale=1.0,
    softmax_scale="1/sqrt(head_dim)",
    final_norm=True,
)
_OP = _FOG | dict(activation="gelu", branch_output="layerscale", softmax_scale="1/sqrt(head_dim)")

TABLE: dict[str, dict[str, Any]] = {
    "fog_max": _FOG | dict(activation="xielu"),
    "fog_opt": _FOG | dict(activation="gelu"),
    "fog_flash": _FOG | dict(activation="gelu", qk_regulariser="tanh"),
    "op": _OP | dict(qk_regulariser="rmsnorm"),
    "op_frozen_qk": _OP,
    "llama3": _LLAMA,
    "llama3_smooth": _LLAMA | dict(activation="smooth_swiglu"),
    "olmo2": _LLAMA | dict(pre_norm=False, qk_regulariser="rmsnorm_full", branch_output="rmsnorm"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ResolvedModel(ModelConfig):
    """A model's config without open fields; `resolve` sets every field, whose defaults are for type
    checkers.
    """

    ffn_hidden: int = 0
    head_dim: int = 0
    vocab_size: int = 0
    scan_layers: bool = True
    pre_norm: bool = False
    qk_regulariser: str = ""
    activation: str = ""
    branch_output: str = ""
    branch_gain_init: float = 0.0
    input_scale: float = 0.0
    softmax_scale: float = 0.0
    final_norm: bool = False


def resolve(model: ModelConfig, vocab_size: int) -> ResolvedModel:
    """Return a config with every switch and size filled in.

    Args:
        model: the config; fields that are None take their architecture's value; scan_layers, which
            devices decide (parallel/mesh.py), is True.
        vocab_size: rows of the embedding.
    """
    derived = {
        "1/sqrt(layers)": 1 / math.sqrt(model.layers),
        "1/init_std": 1 / model.init_std if model.init_std else 1.0,
        "1/sqrt(head_dim)": 1 / math.sqrt(head_dim(model)),
    }
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(ModelConfig)}
    for name, value in TABLE[model.architecture].items():
        if values[name] is None:
            values[name] = derived.get(value, value) if isinstance(value, str) else value
    values["ffn_hidden"] = ffn_hidden(ModelConfig(**values))
    values["head_dim"] = head_dim(model)
    values["vocab_size"] = vocab_size
    values["scan_layers"] = model.scan_layers is not False
    return ResolvedModel(**values)


def gated(model: ModelConfig) -> bool:
    """Return whether a resolved model's FFN has a gate."""
    return model.activation in GATED


def ffn_hidden(model: ModelConfig) -> int:
    """Return the hidden width of a resolved model's FFN: as listed if gated, else 1.5 times, so
    that parameters match.
    """
    return model.ffn_hidden or (model.ffn_width if gated(model) else model.ffn_width * 3 // 2)
