"""Keys of config.json: understood, passed over with a note, or refused by name."""

import json

import numpy as np
import pytest

from fp8jax.interop import hf, hf_config
from fp8jax.interop.hf_safetensors import HuggingFaceError
from tests.interop.hf_directories import DATA, from_keys, set_key

from . import fog_reference


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "gpt2"}, "model_type: 'gpt2'"),
        ({"hidden_sizes": 3}, "hidden_sizes.*hidden_size"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"attention_bias": True}, "attention_bias: True"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
        ({"hidden_size": "16"}, "hidden_size: '16'"),
        ({"hidden_size": 4.5}, "hidden_size: 4.5"),
        ({"num_attention_heads": 0}, "num_attention_heads: 0"),
        ({"rms_norm_eps": float("nan")}, "norm_eps: nan"),
        ({"num_hidden_layers": "absent"}, "num_hidden_layers: missing"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings: 1"),
        ({"num_key_value_heads": 3}, "kv_heads: 3"),
        (
            {"rope_parameters": {"rope_type": "longrope", "factor": 2.0}},
            "rope_parameters: type 'longrope'",
        ),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor is missing"),
        (
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            "partial_rotary_factor is not understood",
        ),
        ({"rope_theta": 5.0}, "rope_theta: 5.0"),
    ],
)
def test_config_that_is_not_understood_is_an_error_naming_the_key(directory, changes, words):
    set_key(directory, **changes)
    with pytest.raises(HuggingFaceError, match=words) as caught:
        hf.load(directory)
    assert "\n" not in str(caught.value)


def test_keys_that_change_nothing_are_passed_over_and_said(directory):
    expected = hf.load(directory).model
    harmless = {
        "_attn_implementation_autoset": True,
        "is_llama_config": True,
        "rope_interleaved": False,
        "sliding_window": None,
        "quantization_config": None,
        "unsloth_version": "2024.9",
        "pruned_heads": {},
        "top_k": 50,
        "_private": 3,
    }
    set_key(directory, **harmless)
    said = []
    assert hf.load(directory, note=said.append).model == expected
    assert said == [f"config.json: passed over {', '.join(sorted(harmless))}"]
    set_key(directory, sliding_window=128)
    with pytest.raises(HuggingFaceError, match="sliding_window.*--ignore_keys=sliding_window"):
        hf.load(directory)
    assert hf.load(directory, ignore_keys=["sliding_window"]).model == expected


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"pre_norm": True}, "post_norm"),
        ({"pre_norm": True, "post_norm": False}, "layerscale"),
        ({"qk_type": "layer"}, "qk_type: 'layer'"),
        ({"hidden_act": "mish"}, "hidden_act: 'mish'"),
    ],
)
def test_fog_keys_without_meaning_are_errors(keys, words):
    with pytest.raises(HuggingFaceError, match=words):
        hf_config.from_config(fog_reference.BASE | keys)


def test_yarn_without_a_factor_has_that_of_the_contexts():
    keys = {
        "max_position_embeddings": 131072,
        "rope_scaling": {"type": "yarn", "original_max_position_embeddings": 32768},
    }
    model = from_keys("llama", **keys)
    assert (model.rope_scaling_factor, model.rope_original_context) == (4.0, 32768)
    assert model.rope_attention_factor == pytest.approx(0.1 * np.log(4) + 1)
    qwen = from_keys(
        "qwen3", max_position_embeddings=32768, rope_scaling={"rope_type": "yarn", "factor": 4.0}
    )
    assert qwen.rope_original_context == 32768  # as transformers takes it where it is left out


@pytest.mark.parametrize(
    ("model_type", "keys", "words"),
    [
        (
            "mistral",
            {"max_position_embeddings": 32768},
            "sliding_window: 4096 is below max_position_embeddings=32768",
        ),
        ("mistral", {}, "sliding_window: 4096 is below max_position_embeddings=131072"),
        ("olmo3", {"max_position_embeddings": 65536}, "sliding_window: 4096 is below"),
        ("olmo3", {"layer_types": ["chunked_attention"] * 4}, "layer_types"),
        (
            "qwen3",
            {"use_sliding_window": True, "max_window_layers": 2},
            "sliding_window: 4096 is below max_position_embeddings=32768",
        ),
        (
            "olmo3",
            {
                "max_position_embeddings": 4096,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            "rope_scaling: is that of full",
        ),
        (
            "olmo3",
            {
                "max_position_embeddings": 4096,
                "rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}},
            },
            "rope_parameters: differ between kinds of layers",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "longrope", "factor": 2.0}},
            "rope_scaling: type 'longrope' is not supported",
        ),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: factor is missing"),
        (
            "llama",
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "alpha": 1}},
            "rope_scaling: alpha is not understood",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "yarn", "factor": 2.0, "truncate": 1}},
            "truncate: 1 is not true or false",
        ),
        (
            "llama",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 0.5}},
            "rope_scaling_factor: 0.5",
        ),
    ],
)
def test_what_would_change_numbers_is_refused(model_type, keys, words):
    with pytest.raises(HuggingFaceError, match=words):
        from_keys(model_type, **keys)


@pytest.mark.parametrize(
    ("model_type", "keys"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"max_position_embeddings": 4096}),
        ("mistral", {"sliding_window": 32768, "max_position_embeddings": 32768}),
        ("olmo3", {"layer_types": ["full_attention"] * 4}),
        ("olmo3", {"max_position_embeddings": 4096}),
        ("qwen3", {"sliding_window": 128}),
        ("qwen3", {"use_sliding_window": True}),
        (
            "qwen3",
            {
                "use_sliding_window": False,
                "max_window_layers": 0,
                "sliding_window": None,
                "layer_types": ["full_attention"] * 4,
            },
        ),
        (
            "olmo3",
            {
                "layer_types": ["full_attention"] * 4,
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_theta": 1e4,
            },
        ),
    ],
)
def test_windows_that_reach_over_the_context_change_nothing(model_type, keys):
    model = from_keys(model_type, **keys)
    heads = {"mistral": 8, "qwen3": 32, "olmo3": 32}[model_type]
    assert (
        model.qk_regulariser
        == {"mistral": "none", "qwen3": "rmsnorm", "olmo3": "rmsnorm_full"}[model_type]
    )
    assert model.kv_heads == heads and model.head_dim == (128 if model_type == "qwen3" else 4)


def test_keys_of_small_llamas_that_people_have(tmp_path):
    """As in SmolLM2's config.json."""
    model = from_keys(
        "llama",
        num_attention_heads=4,
        num_key_value_heads=2,
        is_llama_config=True,
        rope_interleaved=False,
        rope_scaling=None,
        rope_theta=130000,
        pretraining_tp=1,
        tie_word_embeddings=True,
        initializer_range=0.041666666666666664,
        **{"transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}},
    )
    assert (
        model.tied_embeddings
        and model.rope_theta == 130000.0
        and model.kv_heads == 2
        and model.rope_scaling_factor == 1.0
    )


def test_apertus_without_a_word_on_rope_has_its_scaling_and_null_is_refused():
    values = json.loads((DATA / "apertus" / "config.json").read_text())
    explicit, _ = hf_config.from_config(values)
    del values["rope_parameters"]
    assert hf_config.from_config(values)[0] == explicit and explicit.rope_scaling_factor == 8.0
    with pytest.raises(HuggingFaceError, match="rope_scaling: null"):
        hf_config.from_config(values | {"rope_scaling": None})
