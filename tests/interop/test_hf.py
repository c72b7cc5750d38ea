"""Hugging Face directories: numbers against transformers (kept results) and a NumPy FOG, round trips, and every error."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from fp8jax.data import pipeline
from fp8jax.interop import hf, hf_config, hf_logits
from fp8jax.interop.hf_safetensors import DTYPES, HuggingFaceError, TensorFiles
from tests.helpers.runs import MICRO, micro, program_of

from . import fog_reference

DATA = pathlib.Path(__file__).parent / "data" / "hf"
KINDS = ("llama", "olmo2", "apertus", "mistral", "qwen3", "olmo3")
SCALED = ("llama_linear", "llama_dynamic", "llama_yarn", "qwen3_yarn")


def bits(directory):
    files = TensorFiles(directory)
    return {
        name: (entry.dtype, entry.shape, files.read(name).tobytes())
        for name, entry in files.entries.items()
    }


@pytest.fixture
def directory(tmp_path):
    """A llama directory that a test may spoil."""
    return pathlib.Path(shutil.copytree(DATA / "llama", tmp_path / "llama"))


def set_key(directory, **changes):
    values = json.loads((directory / "config.json").read_text()) | changes
    (directory / "config.json").write_text(
        json.dumps({key: value for key, value in values.items() if value != "absent"})
    )


def rewrite(directory, change):
    """Writes the directory's tensors again, as `change` returns them."""
    files = TensorFiles(directory)
    tensors = change({name: files.read(name).astype(np.float32) for name in files.entries})
    config = json.loads((directory / "config.json").read_text())
    shutil.rmtree(directory)
    fog_reference.write_directory(directory, config, tensors)


@pytest.mark.parametrize("kind", KINDS + SCALED)
def test_logits_loss_and_gradients_are_those_of_transformers(kind):
    found = hf.load(DATA / kind)
    expected = dict(np.load(DATA / kind / "expected.npz"))
    computed = hf_logits.compute(
        found.model, found.vocab_size, found.params, expected.pop("tokens"), gradients=True
    )
    np.testing.assert_allclose(computed["logits"], expected.pop("logits"), atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(computed["loss"], expected.pop("loss"), atol=1e-5)
    gradients = hf.by_name(computed["gradients"], found.model, found.vocab_size, found.model_type)
    assert set(gradients) == set(expected)
    for name, gradient in expected.items():
        assert gradients[name].shape == gradient.shape
        np.testing.assert_allclose(
            gradients[name], gradient, atol=1e-4 * np.abs(gradient).max(), err_msg=name
        )


@pytest.mark.parametrize("variant", fog_reference.VARIANTS)
def test_fog_is_what_the_paper_says(variant, tmp_path):
    keys = fog_reference.BASE | fog_reference.VARIANTS[variant]
    tensors = fog_reference.random_tensors({"qk_type": "rms"} | keys)
    agrees_with_the_reference(keys, tensors, tmp_path)


def agrees_with_the_reference(keys, tensors, tmp_path):
    """Logits, loss and gradients, and every tensor that is written again; what was loaded."""
    fog_reference.write_directory(tmp_path / "fog", keys, tensors)
    found = hf.load(tmp_path / "fog")
    tokens = np.random.default_rng(1).integers(0, fog_reference.VOCAB, (2, 9))
    logits, loss = fog_reference.forward({"qk_type": "rms"} | keys, tensors, tokens)
    computed = hf_logits.compute(
        found.model, found.vocab_size, found.params, tokens, gradients=True
    )
    assert np.abs(logits).max() > 1
    np.testing.assert_allclose(computed["logits"], logits, atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(computed["loss"], loss, atol=1e-5)

    gradients, rng, step = (
        hf.by_name(computed["gradients"], found.model, found.vocab_size, "fog"),
        np.random.default_rng(2),
        1e-5,
    )
    for name, gradient in gradients.items():
        direction = rng.normal(size=gradient.shape)
        sides = [
            fog_reference.forward(
                {"qk_type": "rms"} | keys,
                tensors | {name: tensors[name] + sign * step * direction},
                tokens,
            )[1]
            for sign in (1.0, -1.0)
        ]
        slope, size = (sides[0] - sides[1]) / (2 * step), np.abs(gradient * direction).sum()
        assert abs(slope - (gradient * direction).sum()) <= 2e-5 * size + 1e-7, name

    hf.save(
        tmp_path / "again",
        found.model,
        found.vocab_size,
        found.params,
        "fog",
        np.dtype(np.float32),
        10**9,
    )
    assert bits(tmp_path / "fog") == bits(tmp_path / "again")
    again = hf.load(tmp_path / "again")
    assert again.model == found.model
    return found, computed["gradients"]


@pytest.mark.parametrize(
    ("variant", "keys", "regulariser"),
    [
        ("fog_max", {}, "rmsnorm_kept"),
        ("fog_flash", {}, "tanh_kept"),
        ("fog_flash", {"freeze_qk": False}, "tanh_gain"),
    ],
)
def test_gains_of_queries_and_keys_are_loaded_as_they_are(variant, keys, regulariser, tmp_path):
    """Frozen ones have no gradient, so training leaves them; those of dyt are trained where freeze_qk is false."""
    keys = fog_reference.BASE | fog_reference.VARIANTS[variant] | keys
    tensors = fog_reference.random_tensors(keys, ones=False)
    tensors["model.norm.weight"] = np.ones_like(tensors["model.norm.weight"])
    found, gradients = agrees_with_the_reference(keys, tensors, tmp_path)
    assert found.model.qk_regulariser == regulariser
    for name in ("q_norm", "k_norm"):
        gain = np.asarray(gradients["blocks"]["attention"][name]["gain"])
        assert gain.shape == (fog_reference.LAYERS, fog_reference.HEAD_DIM) and (
            gain != 0
        ).any() == (regulariser == "tanh_gain")


def test_training_leaves_kept_gains_bit_for_bit():
    """AdamW, weight decay included, with gradients of everything else."""
    config = micro(
        model={**MICRO["model"], "qk_regulariser": "rmsnorm_kept"}, fp8={"recipe": "bf16"}
    )
    program = program_of(config)
    state = program.init()
    gains = {
        name: jax.numpy.asarray(np.random.default_rng(0).normal(1, 0.3, (2, 16)), jax.numpy.float32)
        for name in ("q_norm", "k_norm")
    }
    for name, gain in gains.items():
        state.params["blocks"]["attention"][name]["gain"] = gain
    kept = {name: np.asarray(gain) for name, gain in gains.items()}
    before = np.asarray(state.params["blocks"]["attention"]["qkv"]["w"])
    state, *_ = program.step(state, program.put(pipeline.train_batches(config)[0]))
    for name, gain in kept.items():
        assert np.array_equal(np.asarray(state.params["blocks"]["attention"][name]["gain"]), gain)
    assert not np.array_equal(np.asarray(state.params["blocks"]["attention"]["qkv"]["w"]), before)


def test_a_norm_that_the_model_does_not_have_is_noted(tmp_path):
    keys = fog_reference.BASE | fog_reference.VARIANTS["fog_max"]
    tensors = fog_reference.random_tensors(keys)
    fog_reference.write_directory(tmp_path / "ones", keys, tensors)
    fog_reference.write_directory(
        tmp_path / "fog", keys, tensors | {"model.norm.weight": tensors["model.norm.weight"] * 3}
    )
    told = []
    found, ones = (hf.load(tmp_path / name, note=told.append) for name in ("fog", "ones"))
    assert told == [
        "model.norm.weight: passed over, the model has no such norm (final_layernorm is false)"
    ]
    assert found.model == ones.model and "final_norm" not in found.params


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("limit", [10**9, 3000])
def test_every_tensor_comes_back_bit_for_bit(kind, dtype, limit, tmp_path):
    found = hf.load(DATA / kind)
    hf.save(
        tmp_path / "first", found.model, found.vocab_size, found.params, kind, DTYPES[dtype], limit
    )
    once = hf.load(tmp_path / "first")
    assert once.model == found.model and once.model_type == kind
    hf.save(
        tmp_path / "second", once.model, once.vocab_size, once.params, kind, DTYPES[dtype], 10**9
    )
    assert bits(tmp_path / "first") == bits(tmp_path / "second")
    assert (tmp_path / "first" / "model.safetensors.index.json").exists() == (limit == 3000)
    if dtype == "BF16":
        assert bits(tmp_path / "first") == bits(DATA / kind)


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


def from_keys(model_type, **keys):
    sizes = {
        "vocab_size": 32,
        "hidden_size": 128,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
    }
    return hf_config.from_config({"model_type": model_type, **sizes, **keys})[0]


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_rope_comes_back(kind, tmp_path):
    """Every number that transformers would derive is written, in the keys of transformers 4."""
    found = hf.load(DATA / kind)
    hf.save(
        tmp_path / "again",
        found.model,
        found.vocab_size,
        found.params,
        found.model_type,
        np.dtype(np.float32),
        10**9,
    )
    assert hf.load(tmp_path / "again").model == found.model
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert written["rope_scaling"]["rope_type"] == kind.split("_")[1] == found.model.rope_scaling
    assert found.model.rope_scaling_factor > 1 and ("max_position_embeddings" in written) == (
        kind == "llama_dynamic"
    )


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda t: {n: a for n, a in t.items() if n != "model.layers.1.mlp.up_proj.weight"},
            "layers.1.mlp.up_proj.weight: missing",
        ),
        (
            lambda t: t | {"model.layers.2.mlp.up_proj.weight": np.zeros((24, 16), np.float32)},
            "layers.2.mlp.up_proj.weight: is not a tensor",
        ),
        (
            lambda t: t | {"model.norm.weight": np.ones((17,), np.float32)},
            r"model.norm.weight has shape \[17\].*\[16\]",
        ),
        (
            lambda t: t | {"model.layers.0.self_attn.q_proj.bias": np.ones((16,), np.float32)},
            "q_proj.bias: is not a tensor",
        ),
        (
            lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"] + 1},
            "lm_head.weight: differs",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_errors_naming_them(directory, change, words):
    rewrite(directory, change)
    with pytest.raises(HuggingFaceError, match=words) as caught:
        hf.load(directory)
    assert "\n" not in str(caught.value)


def test_copies_and_derived_tensors_of_old_files_are_accepted(directory):
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones((2,), np.float32)}
    rewrite(directory, lambda t: t | extra | {"lm_head.weight": t["model.embed_tokens.weight"]})
    assert hf.load(directory).model.tied_embeddings


def test_xielu_constants_are_checked_as_whichever_dtype_they_were(tmp_path):
    files, name = TensorFiles(DATA / "apertus"), "model.layers.1.mlp.act_fn.eps"
    tensors = {name: files.read(name).astype(np.float32) for name in files.entries}
    assert tensors[name] != np.float32(-1e-6)
    config = json.loads((DATA / "apertus" / "config.json").read_text())
    fog_reference.write_directory(tmp_path / "rounded", config, tensors)
    assert hf.load(tmp_path / "rounded").model_type == "apertus"
    fog_reference.write_directory(
        tmp_path / "other", config, tensors | {name: np.float32(-1e-5).reshape(())}
    )
    with pytest.raises(HuggingFaceError, match=name):
        hf.load(tmp_path / "other")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_are_refused(directory, value):
    name = "model.layers.1.mlp.up_proj.weight"
    rewrite(
        directory,
        lambda t: (
            t
            | {name: np.where(np.arange(t[name].size).reshape(t[name].shape) == 3, value, t[name])}
        ),
    )
    with pytest.raises(HuggingFaceError, match=f"{name} holds NaN or infinity"):
        hf.load(directory)


def test_what_no_format_holds_and_what_does_not_fit_a_dtype_are_refused(tmp_path):
    found = hf.load(DATA / "llama")
    op = found.model.__class__(
        **{**vars(found.model), "branch_output": "layerscale", "pre_norm": False}
    )
    with pytest.raises(HuggingFaceError, match="branch_output"):
        hf_config.fitting_type(op)
    assert hf_config.fitting_type(found.model) == "llama"
    found.params["final_norm"]["gain"][0] = 1e6
    with pytest.raises(HuggingFaceError, match="model.norm.weight.*float16"):
        hf.save(
            tmp_path / "out",
            found.model,
            found.vocab_size,
            found.params,
            "llama",
            np.dtype(np.float16),
            10**9,
        )
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (np.zeros((2, 3)), "float64"),
        (np.zeros((4,), int), "integers"),
        (np.full((1, 4), 32), "0 to 31"),
        (np.zeros((1, 1), int), "at least 2"),
    ],
)
def test_tokens_that_cannot_be_scored_are_refused(tokens, words):
    found = hf.load(DATA / "llama")
    with pytest.raises(ValueError, match=words):
        hf_logits.compute(found.model, found.vocab_size, found.params, tokens)
