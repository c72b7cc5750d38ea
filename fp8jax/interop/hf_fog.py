"""Translate the keys of a `fog` config.json, as in the released models of the FOG paper, to
switches and back.
"""

import math
from collections.abc import Mapping
from typing import Any

from fp8jax.config import ModelConfig
from fp8jax.interop.hf_formats import KEPT
from fp8jax.interop.hf_safetensors import HuggingFaceError
from fp8jax.interop.hf_values import boolean, number

_ACTIVATIONS = {
    "xielu": "xielu",
    "gelu": "gelu",
    "relu2": "relu2",
    "silu": "swiglu",
    "smoothswiglu": "smooth_swiglu",
}


def switches_of(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the switches of a `fog` config."""
    pre, post, layerscale = (boolean(given, key) for key in ("pre_norm", "post_norm", "layerscale"))
    if pre == post:
        raise HuggingFaceError(
            f"config.json: post_norm: {post}, like pre_norm; one must be true, the other false"
        )
    if layerscale and pre:
        raise HuggingFaceError(
            "config.json: layerscale: true with pre_norm; it is known only as the post-norm's "
            "initial gain"
        )
    if given["hidden_act"] not in _ACTIVATIONS:
        raise HuggingFaceError(
            f"config.json: hidden_act: {given['hidden_act']!r} is not one of "
            f"{', '.join(_ACTIVATIONS)}"
        )
    if given["qk_type"] not in ("rms", "dyt"):
        raise HuggingFaceError(f"config.json: qk_type: {given['qk_type']!r} is not one of rms, dyt")
    frozen = boolean(given, "freeze_qk")
    kinds = {
        "rms": "rmsnorm_frozen" if frozen else "rmsnorm",
        "dyt": "tanh" if frozen else "tanh_gain",
    }
    qk = kinds[given["qk_type"]] if boolean(given, "qk_norm") else "none"
    switches: dict[str, Any] = dict(
        pre_norm=pre,
        qk_regulariser=qk,
        activation=_ACTIVATIONS[given["hidden_act"]],
        branch_output="rmsnorm" if post else "none",
        input_scale=number(given, "input_upscale"),
        final_norm=boolean(given, "final_layernorm"),
    )
    if given["softmax_scale"]:
        switches["softmax_scale"] = number(given, "softmax_scale")
    if layerscale:
        switches["branch_gain_init"] = 1 / math.sqrt(number(given, "num_hidden_layers", int))
    return switches


def keys_of(model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the keys of a `fog` config, and the switches that the model must have for them."""
    activation = next(
        (name for name, ours in _ACTIVATIONS.items() if ours == model.activation), None
    )
    keys = {
        "hidden_act": activation,
        "qk_norm": model.qk_regulariser != "none",
        "qk_type": "dyt" if str(model.qk_regulariser).startswith("tanh") else "rms",
        "freeze_qk": model.qk_regulariser in (*KEPT, *KEPT.values()),
        "pre_norm": model.pre_norm,
        "post_norm": not model.pre_norm,
        "input_upscale": model.input_scale,
        "layerscale": not model.pre_norm,
        "final_layernorm": model.final_norm,
    }
    needs: dict[str, Any] = {"branch_output": "none" if model.pre_norm else "rmsnorm"}
    if model.qk_regulariser == "rmsnorm_full":
        needs["qk_regulariser"] = "rmsnorm"
    return keys, needs
