"""Hugging Face directories: numbers against transformers (kept results) and a NumPy FOG, round trips, and every error."""

import json

import jax
import numpy as np
import pytest

from fp8jax.data import pipeline
from fp8jax.interop import hf, hf_config, hf_logits
from fp8jax.interop.hf_safetensors import DTYPES, HuggingFaceError, TensorFiles
from tests.helpers.runs import MICRO, micro, program_of
from tests.interop.hf_directories import DATA, KINDS, SCALED, bits, rewrite

from . import fog_reference


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
