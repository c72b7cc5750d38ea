"""Against transformers itself, where it is installed (pip install torch transformers): numbers both ways, no key missing or unexpected."""

import importlib.util
import json
import pathlib
import warnings

import numpy as np
import pytest

if importlib.util.find_spec("transformers") is None or importlib.util.find_spec("torch") is None:
    pytest.skip("needs torch and transformers", allow_module_level=True)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import torch
    import transformers

    from .data.hf import make_reference

from fp8jax.__main__ import main
from fp8jax.data import tokenizer
from fp8jax.interop import generation, hf, hf_tokenizer
from fp8jax.interop.inference import Inference

from . import micro_model

pytestmark = [pytest.mark.filterwarnings("ignore")]

SIZES = dict(
    vocab_size=301,
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=None,
    max_position_embeddings=256,
)
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _rope(kind, theta=1000.0, **keys):
    return {"rope_type": kind, "rope_theta": theta, **keys}


CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "llama_tied_rope": transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "llama_every_head_a_key": transformers.LlamaConfig(**SIZES | {"num_key_value_heads": 4}),
    "llama_one_key_wide_heads": transformers.LlamaConfig(
        **SIZES | {"num_key_value_heads": 1}, head_dim=32
    ),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "olmo2_tied": transformers.Olmo2Config(
        **SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "apertus": transformers.ApertusConfig(**SIZES),
    "apertus_without_scaling": transformers.ApertusConfig(
        **SIZES | {"intermediate_size": 113},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    ),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None),
    "mistral_window_over_the_context": transformers.MistralConfig(
        **SIZES, sliding_window=256, head_dim=8
    ),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "olmo3": transformers.Olmo3Config(**SIZES, layer_types=["full_attention"] * 3),
    "olmo3_windows_over_the_context": transformers.Olmo3Config(**SIZES, sliding_window=256),
    "llama_linear": transformers.LlamaConfig(**SIZES, rope_parameters=_rope("linear", factor=4.0)),
    "llama_dynamic": transformers.LlamaConfig(
        **SIZES | {"max_position_embeddings": 40}, rope_parameters=_rope("dynamic", factor=4.0)
    ),
    "llama_yarn": transformers.LlamaConfig(
        **SIZES,
        head_dim=8,
        rope_parameters=_rope("yarn", factor=4.0, original_max_position_embeddings=64),
    ),
    "qwen3_yarn": transformers.Qwen3Config(
        **SIZES,
        head_dim=16,
        rope_parameters=_rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=32,
            beta_fast=16.0,
            mscale=1.0,
            mscale_all_dim=0.7,
            truncate=False,
        ),
    ),
    "smollm2": transformers.LlamaConfig(
        **SIZES | {"num_attention_heads": 8, "num_key_value_heads": 4},
        tie_word_embeddings=True,
        rope_parameters=_rope("default", theta=130000.0),
    ),
}


def load(directory, dtype=torch.float32):
    model, told = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation="eager", output_loading_info=True
    )
    assert not any(
        told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    ), told
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_numbers_agree_both_ways(name, tmp_path):
    model = make_reference.random_model(CONFIGS[name], seed=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "source", max_shard_size="100KB")
    tokens = np.random.default_rng(4).integers(0, SIZES["vocab_size"], (2, 96))
    np.save(tmp_path / "tokens.npy", tokens)
    expected = make_reference.compute(model, tokens)

    assert (
        main(["convert", "from-hf", str(tmp_path / "source"), "--out", str(tmp_path / "run")]) == 0
    )
    assert (
        main(
            [
                "convert",
                "logits",
                str(tmp_path / "run"),
                f"--tokens={tmp_path}/tokens.npy",
                f"--out={tmp_path}/found.npz",
                "--gradients",
            ]
        )
        == 0
    )
    found = np.load(tmp_path / "found.npz")
    assert set(found.files) == set(expected)
    largest = {}
    for key, array in expected.items():
        size = 1.0 if key in ("logits", "loss") else float(np.abs(array).max())
        largest[key] = float(np.abs(found[key] - array).max()) / size
    gradients = max(value for key, value in largest.items() if key not in ("logits", "loss"))
    print(
        f"{name}: logits {largest['logits']:.1e} of {np.abs(expected['logits']).max():.1f}, loss {largest['loss']:.1e}, "
        f"gradients {gradients:.1e} of the largest"
    )
    assert largest["logits"] <= 1e-4 and largest["loss"] <= 1e-5 and gradients <= 1e-4

    out = tmp_path / "exported"
    assert (
        main(
            [
                "convert",
                "to-hf",
                "--workdir",
                str(tmp_path / "run"),
                "--out",
                str(out),
                "--max_shard_size=100KB",
            ]
        )
        == 0
    )
    again = load(out)
    state = again.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    np.testing.assert_array_equal(
        again(torch.tensor(tokens)).logits.detach().numpy(), expected["logits"]
    )


@pytest.mark.parametrize("kind", ["llama", "olmo2", "apertus"])
def test_bfloat16_goes_in_and_out_unchanged(kind, tmp_path):
    source = pathlib.Path(make_reference.__file__).parent / kind
    found = hf.load(source)
    hf.save(
        tmp_path / "out",
        found.model,
        found.vocab_size,
        found.params,
        kind,
        hf.DTYPES["BF16"],
        10**9,
        source,
    )
    before, after = (load(path, torch.bfloat16).state_dict() for path in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(
        torch.equal(before[key], after[key]) for key in before
    )


def test_an_export_stands_alone(tmp_path):
    """Tokenizer, end of text, context: greedy text is ours, in a batch with padding too, with rows that are no tokens."""
    model = micro_model.load(64)
    prompts = ["Anne", "It was a truth", "x"]
    expected = generation.generate(Inference(model), prompts, tokens=12)
    byte, rows = tokenizer.load("byte"), model.plan.definition.vocab_size
    assert rows > byte.vocab_size
    more = {"max_position_embeddings": 64, **hf_tokenizer.token_ids(byte)}
    hf.save(
        tmp_path / "out",
        model.plan.definition.config,
        rows,
        model.params,
        "llama",
        np.dtype("float32"),
        10**9,
        None,
        more,
    )
    for name, content in hf_tokenizer.files(byte, 64, rows).items():
        (tmp_path / "out" / name).write_text(json.dumps(content))
    theirs, theirs_model = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / "out"),
        load(tmp_path / "out"),
    )
    assert (
        theirs_model.generation_config.eos_token_id == 256
        and theirs_model.config.max_position_embeddings == 64
    )
    batch = theirs(prompts, return_tensors="pt", padding=True)
    found = theirs_model.generate(
        batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=12
    )
    new = found[:, batch["input_ids"].shape[1] :]
    assert [theirs.decode(ids, skip_special_tokens=True) for ids in new] == expected


def test_generate_stops_at_a_forced_end(tmp_path):
    """As ours does: the end of document is made the likeliest id after the prompt, so nothing follows it."""
    model = micro_model.load(64)
    byte, rows = tokenizer.load("byte"), model.plan.definition.vocab_size
    head = np.array(model.params["head"]["w"])
    best = int(micro_model.uncached(model)([256, *b"Anne"])[-1].argmax())
    assert best != 256
    axis = head.shape.index(rows)
    head = np.moveaxis(head, axis, 0)
    head[[256, best]] = head[[best, 256]]
    model = model._replace(params=model.params | {"head": {"w": np.moveaxis(head, 0, axis)}})
    assert generation.generate(Inference(model), ["Anne"], tokens=12) == [""]
    more = {"max_position_embeddings": 64, **hf_tokenizer.token_ids(byte)}
    hf.save(
        tmp_path / "out",
        model.plan.definition.config,
        rows,
        model.params,
        "llama",
        np.dtype("float32"),
        10**9,
        None,
        more,
    )
    for name, content in hf_tokenizer.files(byte, 64, rows).items():
        (tmp_path / "out" / name).write_text(json.dumps(content))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    found = load(tmp_path / "out").generate(
        **theirs("Anne", return_tensors="pt"), max_new_tokens=12
    )
    assert found.tolist() == [[*theirs("Anne")["input_ids"], 256]]
