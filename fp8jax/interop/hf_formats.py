"""The differences between model types of Hugging Face, and the keys of config.json that change no
number.
"""

from typing import Any, NamedTuple

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
# Keys that programs leave in config.json and that do not describe the model: of generation, of
# other heads, of the program.
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
_APERTUS_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


class Format(NamedTuple):
    """The properties of one model_type.

    Attributes:
        class_name: class in transformers.
        theta, rope_scaling: defaults of config.json.
        defaults: those of all other optional keys in transformers.
        fixed: keys that must have this value.
        switches: switches of the model (empty: read from the keys).
        context: default of max_position_embeddings.
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
# Regularisers of queries and keys whose gains are 1, and those that keep other gains unchanged.
KEPT = {"rmsnorm_frozen": "rmsnorm_kept", "tanh": "tanh_kept"}
