"""Turn a Hugging Face config.json into a model config, and back: llama, mistral, qwen3, olmo2,
olmo3, apertus, fog.

    model, model_type = from_config(json_values)      # ModelConfig with every switch set, "llama"
    values = to_config(model, vocab_size, "llama")    # what config.json holds

Every key is either understood, fixed to the one value that the models here have, or listed in
NO_INFLUENCE. Of the others, private ones (_attn_implementation_autoset), those that are null, false
or empty, and those in HARMLESS are ignored with a note; any other may change numbers and is an
error that names it. Missing keys have the defaults of transformers.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fp8jax import config as config_lib
from fp8jax.config import ModelConfig
from fp8jax.interop import hf_fog, hf_rope, hf_windows
from fp8jax.interop.hf_formats import FORMATS, HARMLESS, NO_INFLUENCE, Format
from fp8jax.interop.hf_safetensors import HuggingFaceError
from fp8jax.interop.hf_values import boolean, number
from fp8jax.models import architectures
from fp8jax.models.architectures import ResolvedModel

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL = ("num_key_value_heads", "head_dim")


# Apertus's and Llama's transformers releases write these; the others' configs do not know them.
_NOT_WRITTEN = ("hidden_dropout", "qk_norm", "post_norm", "mlp_bias")


def from_config(
    values: Mapping[str, Any],
    ignore: Collection[str] = (),
    note: Callable[[str], None] = lambda line: None,
) -> tuple[ModelConfig, str]:
    """Return the model config of a config.json, and its model_type.

    Args:
        values: the content of config.json.
        ignore: keys to ignore, with any value.
        note: receives a line that names the ignored keys, if any.

    Raises:
        HuggingFaceError: the model_type or a key is unknown, a key is missing, or the models here
            do not support a value.
    """
    model_type = values.get("model_type")
    if not isinstance(model_type, str) or model_type not in FORMATS:
        raise HuggingFaceError(
            f"config.json: model_type: {model_type!r} is not one of {', '.join(FORMATS)}"
        )
    form = FORMATS[model_type]
    values = {key: value for key, value in values.items() if key not in ignore}
    _check_keys(values, form, note)
    given = (
        {"tie_word_embeddings": False}
        | form.defaults
        | {key: value for key, value in values.items() if value is not None}
    )
    if "num_key_value_heads" in values and values["num_key_value_heads"] is None:
        given.pop("num_key_value_heads", None)  # null means as many as query heads, not the default
    size = _sizes(given)
    head_dim = size["head_dim"]
    switches = form.switches or hf_fog.switches_of(given)
    hidden, gated = size["intermediate_size"], switches["activation"] in architectures.GATED
    fields: dict[str, Any] = dict(
        layers=size["num_hidden_layers"],
        width=size["hidden_size"],
        heads=size["num_attention_heads"],
        kv_heads=size["num_key_value_heads"],
        head_dim=head_dim,
        vocab_size=size["vocab_size"],
        tied_embeddings=boolean(given, "tie_word_embeddings"),
        norm_eps=number(given, "rms_norm_eps"),
        **_ffn(hidden, gated),
        **_rope(values, form, model_type),
        branch_gain_init=1.0,
        softmax_scale=1 / math.sqrt(head_dim),
    )
    if "initializer_range" in given:
        fields["init_std"] = number(given, "initializer_range")
    fields |= switches
    fields["architecture"] = _nearest_architecture(fields)
    try:
        return config_lib.from_dict({"model": fields}).model, model_type
    except config_lib.ConfigError as error:
        raise HuggingFaceError(f"config.json: {error}") from None


def _sizes(given: Mapping[str, Any]) -> dict[str, int]:
    """Return the numbers of _REQUIRED and _OPTIONAL keys; of the latter also those that are left
    out or 0.
    """
    size = {
        key: number(given, key, int)
        for key in (*_REQUIRED, *_OPTIONAL)
        if key in _REQUIRED or key in given
    }
    heads = size["num_attention_heads"]
    size["head_dim"] = size.get("head_dim") or size["hidden_size"] // heads
    size["num_key_value_heads"] = size.get("num_key_value_heads") or heads
    if not size["head_dim"]:
        raise HuggingFaceError(
            f"config.json: hidden_size: {size['hidden_size']} is less than num_attention_heads"
        )
    return size


def to_config(model: ResolvedModel, vocab_size: int, model_type: str) -> dict[str, Any]:
    """Return the config.json of a resolved model config.

    Raises:
        HuggingFaceError: this model_type cannot hold the model; the message names the field.
    """
    form, head_dim = FORMATS[model_type], config_lib.head_dim(model)
    switches = form.switches or hf_fog.keys_of(model)[1]
    for field, value in switches.items():
        if getattr(model, field) != value:
            raise HuggingFaceError(
                f"model.{field}: {model_type} has {value!r}, this model {getattr(model, field)!r}"
            )
    default_scale = math.isclose(model.softmax_scale, 1 / math.sqrt(head_dim), rel_tol=1e-9)
    if not default_scale and model_type != "fog":
        raise HuggingFaceError(
            f"model.softmax_scale: {model_type} has 1/sqrt(head_dim), this model "
            f"{model.softmax_scale!r}"
        )
    values = {
        "architectures": [form.class_name],
        "model_type": model_type,
        "vocab_size": vocab_size,
        "hidden_size": model.width,
        "intermediate_size": architectures.ffn_hidden(model),
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tied_embeddings,
        "initializer_range": model.init_std,
        "rope_theta": model.rope_theta,
        "rope_scaling": hf_rope.write(model, always=form.rope_scaling is not None),
        **{key: value for key, value in form.fixed.items() if key not in _NOT_WRITTEN},
    }
    if head_dim * model.heads != model.width or "head_dim" in form.defaults:
        values["head_dim"] = head_dim
    values |= hf_windows.without(model, model_type)
    if model.rope_scaling_factor != 1.0 and model.rope_scaling == "dynamic":
        values["max_position_embeddings"] = model.rope_original_context
    if model_type == "fog":
        values |= hf_fog.keys_of(model)[0] | {
            "softmax_scale": None if default_scale else model.softmax_scale
        }
    return values


def fitting_type(model: ResolvedModel) -> str:
    """Return the first model_type that can hold a resolved model config.

    Raises:
        HuggingFaceError: no model_type can; the message has each one's reason.
    """
    reasons = []
    for model_type in FORMATS:
        try:
            to_config(model, 1, model_type)
            return model_type
        except HuggingFaceError as error:
            reasons.append(str(error))
    raise HuggingFaceError(f"no Hugging Face model_type holds this model: {'; '.join(reasons)}")


def _check_keys(values: Mapping[str, Any], form: Format, note: Callable[[str], None]) -> None:
    known = {
        *_REQUIRED,
        *_OPTIONAL,
        *hf_rope.KEYS,
        "tie_word_embeddings",
        *form.defaults,
        *form.fixed,
        *NO_INFLUENCE,
    }
    if values["model_type"] in hf_windows.WINDOWS:
        known |= {"sliding_window", "use_sliding_window", "max_window_layers", "layer_types"}
    passed_over = []
    for key, value in values.items():
        if key in known:
            if key in form.fixed and value is not None and value != form.fixed[key]:
                raise HuggingFaceError(
                    f"config.json: {key}: {value!r} is not supported, only {form.fixed[key]!r}"
                )
        elif _is_harmless(key, value):
            passed_over.append(key)
        else:
            raise HuggingFaceError(
                f"config.json: {key}: {str(value)[:60]!r} is not "
                f"understood{config_lib.did_you_mean(key, known)}; "
                f"if it changes no number, say --ignore_keys={key}"
            )
    if passed_over:
        note(f"config.json: passed over {', '.join(sorted(passed_over))}")
    missing = next((key for key in _REQUIRED if values.get(key) is None), None)
    if missing:
        raise HuggingFaceError(f"config.json: {missing}: missing")


def _is_harmless(key: str, value: Any) -> bool:
    """Return whether an unknown key has no effect: it is private, null, false or empty, or not of
    the model.
    """
    empty = value is None or value is False or value in ([], {}, "")
    return key.startswith("_") or empty or key in HARMLESS


def _rope(values: Mapping[str, Any], form: Format, model_type: str) -> dict[str, Any]:
    """Return the fields of RoPE, for all layers alike."""
    context = values.get("max_position_embeddings", form.context)
    context = context if type(context) is int and context > 0 else None
    layers = hf_windows.kinds_of_layers(values, model_type, context)
    return hf_rope.read(
        values, theta=form.theta, left_out=form.rope_scaling, context=context, layers=layers
    )


def _ffn(hidden: int, gated: bool) -> dict[str, int]:
    """Return ffn_width, and ffn_hidden if it is not 1.5 times an ffn_width."""
    width = hidden if gated else -(-hidden * 2 // 3)
    return (
        {"ffn_width": width}
        if gated or width * 3 // 2 == hidden
        else {"ffn_width": hidden, "ffn_hidden": hidden}
    )


def _nearest_architecture(fields: Mapping[str, Any]) -> str:
    """Return the row of the architecture table with the most switches in common; as all switches
    are set, it is only a name.
    """

    def agreeing(row: Mapping[str, Any]) -> int:
        return sum(fields.get(switch) == value for switch, value in row.items())

    return max(architectures.TABLE, key=lambda name: agreeing(architectures.TABLE[name]))
