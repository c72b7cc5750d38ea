"""Map each Hugging Face tensor to its place in fp8jax's parameters, as a table that is read in both
directions.

    for slot in slots(model, vocab_size, "llama"):
        view = slot.view(params)                          # our array, its axes in Hugging Face's order; shares memory
        view[...] = tensor.reshape(view.shape)            # into our parameters
        tensor = view.reshape(slot.shape)                 # out of them

Hugging Face stores a linear layer as [outputs, inputs]; heads are consecutive rows, query head n
belonging to KV head n // groups. Here a projection is [inputs, outputs], blocks are stacked, and
queries, keys and values are one array [d, k, g + 2, h] (models/attention.py). Rotary halves are
laid out alike. Numbers are moved, never computed.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from fp8jax.config import ModelConfig, head_dim
from fp8jax.models import architectures
from fp8jax.models.activations import XIELU
from fp8jax.models.definition import STACKED

Params = dict[str, Any]

# Our norms' names in each format.
_NORMS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen3"),
        {"pre_attention": "input_layernorm", "pre_ffn": "post_attention_layernorm"},
    ),
    **dict.fromkeys(
        ("olmo2", "olmo3"),
        {"post_attention": "post_attention_layernorm", "post_ffn": "post_feedforward_layernorm"},
    ),
    "apertus": {"pre_attention": "attention_layernorm", "pre_ffn": "feedforward_layernorm"},
    "fog": {
        "pre_attention": "attention_layernorm",
        "pre_ffn": "feedforward_layernorm",
        "post_attention": "attention_layernorm",
        "post_ffn": "feedforward_layernorm",
    },
}
# Tensors of old files that repeat what the config says.
DERIVED_SUFFIXES = (".self_attn.rotary_emb.inv_freq",)


class Slot(NamedTuple):
    """A Hugging Face tensor's name and shape, and its place: parameter, index into it, order of the
    indexed axes.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    index: tuple[Any, ...]
    axes: tuple[int, ...]

    def view(self, params: Params) -> np.ndarray:
        """Return the tensor's numbers within numpy parameters, axes in Hugging Face's order, not
        yet merged to `shape`.
        """
        array: Any = params
        for key in self.path:
            array = array[key]
        return array[self.index].transpose(self.axes)


class Constant(NamedTuple):
    """A tensor that always holds one value and has no parameter here; it may be missing in files,
    and is always written.

    Attributes:
        unused: it may hold anything, since no number depends on it.
    """

    name: str
    shape: tuple[int, ...]
    value: float
    unused: bool = False


def slots(model: ModelConfig, vocab_size: int, model_type: str) -> Iterator[Slot]:
    """Yield every tensor of a resolved model config in the order of its computation."""
    d = model.width
    yield Slot("model.embed_tokens.weight", (vocab_size, d), ("embedding", "w"), (), (0, 1))
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        for slot in (
            *_attention(model, layer),
            *_feed_forward(model, layer),
            *_norms(model, layer, _NORMS[model_type]),
        ):
            yield slot._replace(name=prefix + slot.name, path=(STACKED, *slot.path))
    if model.final_norm:
        yield Slot("model.norm.weight", (d,), ("final_norm", "gain"), (), (0,))
    if not model.tied_embeddings:
        yield Slot("lm_head.weight", (vocab_size, d), ("head", "w"), (), (0, 1))


def constants(model: ModelConfig, model_type: str) -> Iterator[Constant]:
    """Yield every tensor that a format has and the model does not need: frozen gains, xIELU's
    constants.
    """
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        if model.qk_regulariser in (
            "rmsnorm_frozen",
            "tanh",
        ):  # other gains: hf.load takes a regulariser that has them
            yield Constant(f"{prefix}self_attn.q_norm.weight", (head_dim(model),), 1.0)
            yield Constant(f"{prefix}self_attn.k_norm.weight", (head_dim(model),), 1.0)
        if model_type == "apertus":
            yield Constant(f"{prefix}mlp.act_fn.beta", (), XIELU.beta)
            yield Constant(f"{prefix}mlp.act_fn.eps", (), XIELU.eps)
    if model_type == "fog" and not model.final_norm:
        yield Constant("model.norm.weight", (model.width,), 1.0, unused=True)


def _attention(model: ModelConfig, layer: int) -> Iterator[Slot]:
    d, n, k, h = model.width, model.heads, model.kv_heads, head_dim(model)
    g = n // k
    qkv, every = ("attention", "qkv", "w"), slice(None)
    yield Slot(
        "self_attn.q_proj.weight", (n * h, d), qkv, (layer, every, every, slice(0, g)), (1, 2, 3, 0)
    )
    yield Slot("self_attn.k_proj.weight", (k * h, d), qkv, (layer, every, every, g), (1, 2, 0))
    yield Slot("self_attn.v_proj.weight", (k * h, d), qkv, (layer, every, every, g + 1), (1, 2, 0))
    yield Slot(
        "self_attn.o_proj.weight", (d, n * h), ("attention", "out", "w"), (layer,), (3, 0, 1, 2)
    )
    if model.qk_regulariser == "rmsnorm_full":
        yield Slot(
            "self_attn.q_norm.weight",
            (n * h,),
            ("attention", "q_norm", "gain"),
            (layer,),
            (0, 1, 2),
        )
        yield Slot(
            "self_attn.k_norm.weight", (k * h,), ("attention", "k_norm", "gain"), (layer,), (0, 1)
        )
    for name in ("q_norm", "k_norm"):
        if model.qk_regulariser in ("rmsnorm", "rmsnorm_kept", "tanh_gain", "tanh_kept"):
            yield Slot(
                f"self_attn.{name}.weight", (h,), ("attention", name, "gain"), (layer,), (0,)
            )
        if str(model.qk_regulariser).startswith("tanh"):
            yield _scalar(f"self_attn.{name}.alpha", ("attention", name, "alpha"), layer)


def _feed_forward(model: ModelConfig, layer: int) -> Iterator[Slot]:
    d, f = model.width, architectures.ffn_hidden(model)
    for name in ("gate", "up") if architectures.gated(model) else ("up",):
        yield Slot(f"mlp.{name}_proj.weight", (f, d), ("feed_forward", name, "w"), (layer,), (1, 0))
    yield Slot("mlp.down_proj.weight", (d, f), ("feed_forward", "down", "w"), (layer,), (1, 0))
    if model.activation == "xielu":
        for name in ("alpha_p", "alpha_n"):
            yield _scalar(f"mlp.act_fn.{name}", ("feed_forward", "xielu", name), layer)


def _norms(model: ModelConfig, layer: int, names: dict[str, str]) -> Iterator[Slot]:
    placed = ("pre_attention", "pre_ffn") if model.pre_norm else ()
    placed += ("post_attention", "post_ffn") if model.branch_output == "rmsnorm" else ()
    for ours in placed:
        yield Slot(f"{names[ours]}.weight", (model.width,), (ours, "gain"), (layer,), (0,))


def _scalar(name: str, path: tuple[str, ...], layer: int) -> Slot:
    """Return the slot of one number per layer, [1] in Hugging Face's files."""
    return Slot(name, (1,), path, (slice(layer, layer + 1),), (0,))
