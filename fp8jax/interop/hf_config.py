"""A Hugging Face config.json as a model config, and back: `llama`, `mistral`, `qwen3`, `olmo2`, `olmo3`, `apertus`, `fog`.

    model, model_type = from_config(json_values)      # ModelConfig with every switch set, "llama"
    values = to_config(model, vocab_size, "llama")    # what config.json holds

Every key is either understood, fixed to the one value that the models here have, or listed in NO_INFLUENCE. Of others,
private ones (_attn_implementation_autoset), those that are null, false or empty, and those in HARMLESS are passed over with a
note; any that is left may change numbers and is an error that names it. Keys that are left out have the defaults of
transformers.
"""

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from fp8jax import config as config_lib
from fp8jax.config import ModelConfig
from fp8jax.interop import hf_rope
from fp8jax.interop.hf_rope import FULL, SLIDING
from fp8jax.interop.hf_safetensors import HuggingFaceError
from fp8jax.interop.hf_values import boolean, number
from fp8jax.models import architectures

# Keys without influence on logits, loss or gradients.
NO_INFLUENCE = frozenset(
    (
        "_name_or_path",
        "architectures",
        "auto_map",
        "bos_token_id",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "max_position_embeddings",
        "model_type",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "return_dict",
        "tokenizer_class",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    )
)
# Keys that programs leave in config.json and that say nothing of the model: of generation, of other heads, of who wrote them.
HARMLESS = frozenset(
    (
        "attn_implementation",
        "bad_words_ids",
        "begin_suppress_tokens",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "finetuning_task",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "is_llama_config",
        "length_penalty",
        "max_length",
        "min_length",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "prefix",
        "problem_type",
        "pruned_heads",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "sep_token_id",
        "suppress_tokens",
        "task_specific_params",
        "temperature",
        "tf_legacy_loss",
        "top_k",
        "top_p",
        "torchscript",
        "transformers.js_config",
        "typical_p",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
    )
)
_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)
_OPTIONAL = ("num_key_value_heads", "head_dim")
_APERTUS_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_FOG_ACTIVATIONS = {
    "xielu": "xielu",
    "gelu": "gelu",
    "relu2": "relu2",
    "silu": "swiglu",
    "smoothswiglu": "smooth_swiglu",
}


class Format(NamedTuple):
    """What tells one model_type from another.

    class_name: in transformers. theta, rope_scaling: where config.json is silent. defaults: of all other optional keys, as
    transformers has them; fixed: keys that must have this value. switches: of the model (empty: read from the keys). context:
    max_position_embeddings where config.json is silent.
    """

    class_name: str
    theta: float
    rope_scaling: dict[str, Any] | None
    defaults: dict[str, Any]
    fixed: dict[str, Any]
    switches: dict[str, Any]
    context: int | None = None


_SILU = {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0}
_LLAMA = dict(
    pre_norm=True,
    qk_regulariser="none",
    activation="swiglu",
    branch_output="none",
    input_scale=1.0,
    final_norm=True,
)
_FOG_DEFAULTS = {
    "hidden_act": "xielu",
    "qk_norm": True,
    "qk_type": "rms",
    "freeze_qk": True,
    "pre_norm": False,
    "post_norm": True,
    "input_upscale": 1.0,
    "softmax_scale": None,
    "layerscale": True,
    "final_layernorm": True,
}

FORMATS: dict[str, Format] = {
    "llama": Format(
        "LlamaForCausalLM",
        10000.0,
        None,
        {"rms_norm_eps": 1e-6},
        _SILU | {"mlp_bias": False},
        _LLAMA,
        2048,
    ),
    "mistral": Format(
        "MistralForCausalLM",
        10000.0,
        None,
        {"rms_norm_eps": 1e-6, "num_key_value_heads": 8},
        {"hidden_act": "silu", "attention_dropout": 0.0},
        _LLAMA,
        131072,
    ),
    "qwen3": Format(
        "Qwen3ForCausalLM",
        10000.0,
        None,
        {"rms_norm_eps": 1e-6, "num_key_value_heads": 32, "head_dim": 128},
        _SILU,
        _LLAMA | dict(qk_regulariser="rmsnorm"),
        32768,
    ),
    "olmo2": Format(
        "Olmo2ForCausalLM",
        10000.0,
        None,
        {"rms_norm_eps": 1e-5},
        _SILU,
        _LLAMA | dict(pre_norm=False, qk_regulariser="rmsnorm_full", branch_output="rmsnorm"),
        2048,
    ),
    "olmo3": Format(
        "Olmo3ForCausalLM",
        500000.0,
        None,
        {"rms_norm_eps": 1e-5},
        _SILU,
        _LLAMA | dict(pre_norm=False, qk_regulariser="rmsnorm_full", branch_output="rmsnorm"),
        2048,
    ),
    "apertus": Format(
        "ApertusForCausalLM",
        12000000.0,
        _APERTUS_ROPE,
        {"rms_norm_eps": 1e-5},
        _SILU
        | {
            "hidden_act": "xielu",
            "mlp_bias": False,
            "hidden_dropout": 0.0,
            "qk_norm": True,
            "post_norm": False,
        },
        _LLAMA | dict(qk_regulariser="rmsnorm", activation="xielu"),
        65536,
    ),
    "fog": Format(
        "FOGForCausalLM",
        500000.0,
        None,
        {"rms_norm_eps": 1e-5} | _FOG_DEFAULTS,
        {"attention_bias": False, "attention_dropout": 0.0, "mlp_bias": False},
        {},
    ),
}
# Windows of attention where config.json is silent, and kinds of layers.
_WINDOWS = {"mistral": 4096, "qwen3": 4096, "olmo3": 4096}
_DEFAULT_LAYERS = {"mistral": (SLIDING,), "qwen3": (FULL, SLIDING), "olmo3": (FULL, SLIDING)}
# Regularisers of queries and keys whose gains are 1, and those that keep other gains as they are.
KEPT = {"rmsnorm_frozen": "rmsnorm_kept", "tanh": "tanh_kept"}
# Written by Apertus's and Llama's own transformers releases; the others' configs do not know them.
_NOT_WRITTEN = ("hidden_dropout", "qk_norm", "post_norm", "mlp_bias")


def from_config(
    values: Mapping[str, Any],
    ignore: Collection[str] = (),
    note: Callable[[str], None] = lambda line: None,
) -> tuple[ModelConfig, str]:
    """The model config of a config.json, and its model_type.

    Args:
        values: the content of config.json.
        ignore: keys to pass over, whatever they say.
        note: receives a line that names the keys that were passed over, if any.

    Raises:
        HuggingFaceError: an unknown model_type or key, a missing key, a value that the models here do not have.
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
        given.pop("num_key_value_heads", None)  # null: as many as query heads, whatever the default
    size = {
        key: number(given, key, int)
        for key in (*_REQUIRED, *_OPTIONAL)
        if key in _REQUIRED or key in given
    }
    head_dim = size.get("head_dim") or size["hidden_size"] // size["num_attention_heads"]
    if not head_dim:
        raise HuggingFaceError(
            f"config.json: hidden_size: {size['hidden_size']} is less than num_attention_heads"
        )
    switches = form.switches or _fog_switches(given)
    hidden, gated = size["intermediate_size"], switches["activation"] in architectures.GATED
    fields = dict(
        layers=size["num_hidden_layers"],
        width=size["hidden_size"],
        heads=size["num_attention_heads"],
        kv_heads=size.get("num_key_value_heads") or size["num_attention_heads"],
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


def to_config(model: ModelConfig, vocab_size: int, model_type: str) -> dict[str, Any]:
    """The config.json of a resolved model config.

    Raises:
        HuggingFaceError: this model_type cannot hold the model; the message names the field.
    """
    form, head_dim = FORMATS[model_type], config_lib.head_dim(model)
    switches = form.switches or _fog_keys(model)[1]
    for field, value in switches.items():
        if getattr(model, field) != value:
            raise HuggingFaceError(
                f"model.{field}: {model_type} has {value!r}, this model {getattr(model, field)!r}"
            )
    default_scale = math.isclose(model.softmax_scale, 1 / math.sqrt(head_dim), rel_tol=1e-9)
    if not default_scale and model_type != "fog":
        raise HuggingFaceError(
            f"model.softmax_scale: {model_type} has 1/sqrt(head_dim), this model {model.softmax_scale!r}"
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
    values |= _without_windows(model, model_type)
    if model.rope_scaling_factor != 1.0 and model.rope_scaling == "dynamic":
        values["max_position_embeddings"] = model.rope_original_context
    if model_type == "fog":
        values |= _fog_keys(model)[0] | {
            "softmax_scale": None if default_scale else model.softmax_scale
        }
    return values


def _without_windows(model: ModelConfig, model_type: str) -> dict[str, Any]:
    """Keys that say that every layer attends to all that came before."""
    if model_type not in _WINDOWS:
        return {}
    if model_type == "mistral":
        return {"sliding_window": None}
    return {"layer_types": [FULL] * model.layers} | (
        {"use_sliding_window": False} if model_type == "qwen3" else {}
    )


def fitting_type(model: ModelConfig) -> str:
    """The first model_type that can hold a resolved model config.

    Raises:
        HuggingFaceError: none can; the message has each one's reason.
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
    if values["model_type"] in _WINDOWS:
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
                f"config.json: {key}: {str(value)[:60]!r} is not understood{config_lib.did_you_mean(key, known)}; "
                f"if it changes no number, say --ignore_keys={key}"
            )
    if passed_over:
        note(f"config.json: passed over {', '.join(sorted(passed_over))}")
    missing = next((key for key in _REQUIRED if values.get(key) is None), None)
    if missing:
        raise HuggingFaceError(f"config.json: {missing}: missing")


def _is_harmless(key: str, value: Any) -> bool:
    """Whether a key that is not known changes nothing: private, says that something is not there, or is not of the model."""
    empty = value is None or value is False or value in ([], {}, "")
    return key.startswith("_") or empty or key in HARMLESS


def _rope(values: Mapping[str, Any], form: Format, model_type: str) -> dict[str, Any]:
    """Fields of RoPE, for all layers alike."""
    context = values.get("max_position_embeddings", form.context)
    context = context if type(context) is int and context > 0 else None
    layers = _kinds_of_layers(values, model_type, context)
    return hf_rope.read(
        values, theta=form.theta, left_out=form.rope_scaling, context=context, layers=layers
    )


def _kinds_of_layers(values: Mapping[str, Any], model_type: str, context: int | None) -> set[str]:
    """Kinds of layers that there are.

    Raises:
        HuggingFaceError: a window of attention that is shorter than the context, or a kind that is not known.
    """
    if model_type not in _WINDOWS:
        return {FULL}
    listed, window = values.get("layer_types"), values.get("sliding_window", _WINDOWS[model_type])
    if listed is not None and (
        not isinstance(listed, list) or any(kind not in (FULL, SLIDING) for kind in listed)
    ):
        raise HuggingFaceError(
            f"config.json: layer_types: {str(listed)[:60]} is not a list of {FULL!r} and {SLIDING!r}"
        )
    kinds = set(listed or _DEFAULT_LAYERS[model_type])
    if model_type == "mistral":
        kinds = {SLIDING}
    if model_type == "qwen3":
        window = window if values.get("use_sliding_window") else None
        first = values.get("max_window_layers", 28)
        kinds = (
            {FULL}
            if listed is None and isinstance(first, int) and first >= values["num_hidden_layers"]
            else kinds
        )
    if SLIDING not in kinds or window is None:
        return {FULL} if model_type != "olmo3" else kinds
    window = number({"sliding_window": window}, "sliding_window", int)
    if context is None or window < context:
        raise HuggingFaceError(
            f"config.json: sliding_window: {window} is below max_position_embeddings={context}, and windows of attention "
            f"are not supported; with max_position_embeddings of {window} or less there it changes nothing"
        )
    return kinds if model_type == "olmo3" else {FULL}


def _ffn(hidden: int, gated: bool) -> dict[str, int]:
    """ffn_width, and ffn_hidden where 1.5 times no ffn_width makes it."""
    width = hidden if gated else -(-hidden * 2 // 3)
    return (
        {"ffn_width": width}
        if gated or width * 3 // 2 == hidden
        else {"ffn_width": hidden, "ffn_hidden": hidden}
    )


def _fog_switches(given: Mapping[str, Any]) -> dict[str, Any]:
    """Switches of a `fog` config."""
    pre, post, layerscale = (boolean(given, key) for key in ("pre_norm", "post_norm", "layerscale"))
    if pre == post:
        raise HuggingFaceError(
            f"config.json: post_norm: {post}, like pre_norm; one must be true, the other false"
        )
    if layerscale and pre:
        raise HuggingFaceError(
            "config.json: layerscale: true with pre_norm; it is known only as the post-norm's initial gain"
        )
    if given["hidden_act"] not in _FOG_ACTIVATIONS:
        raise HuggingFaceError(
            f"config.json: hidden_act: {given['hidden_act']!r} is not one of {', '.join(_FOG_ACTIVATIONS)}"
        )
    if given["qk_type"] not in ("rms", "dyt"):
        raise HuggingFaceError(f"config.json: qk_type: {given['qk_type']!r} is not one of rms, dyt")
    frozen = boolean(given, "freeze_qk")
    kinds = {
        "rms": "rmsnorm_frozen" if frozen else "rmsnorm",
        "dyt": "tanh" if frozen else "tanh_gain",
    }
    qk = kinds[given["qk_type"]] if boolean(given, "qk_norm") else "none"
    switches = dict(
        pre_norm=pre,
        qk_regulariser=qk,
        activation=_FOG_ACTIVATIONS[given["hidden_act"]],
        branch_output="rmsnorm" if post else "none",
        input_scale=number(given, "input_upscale"),
        final_norm=boolean(given, "final_layernorm"),
    )
    if given["softmax_scale"]:
        switches["softmax_scale"] = number(given, "softmax_scale")
    if layerscale:
        switches["branch_gain_init"] = 1 / math.sqrt(number(given, "num_hidden_layers", int))
    return switches


def _fog_keys(model: ModelConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keys of a `fog` config, and the switches that such a config cannot tell otherwise."""
    activation = next(
        (name for name, ours in _FOG_ACTIVATIONS.items() if ours == model.activation), None
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


def _nearest_architecture(fields: Mapping[str, Any]) -> str:
    """The row of the architecture table with the most switches in common; all switches are set, so this is but a name."""

    def agreeing(row: Mapping[str, Any]) -> int:
        return sum(fields.get(switch) == value for switch, value in row.items())

    return max(architectures.TABLE, key=lambda name: agreeing(architectures.TABLE[name]))
