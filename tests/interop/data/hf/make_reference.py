"""Makes the directories beside it: tiny random models of transformers, and what transformers computes with them.

    pip install torch transformers && python tests/interop/data/hf/make_reference.py

Each directory has config.json and model.safetensors (bfloat16), as transformers saves them, and expected.npz: `tokens`
[2, 12], and in float32, with the same weights, `logits`, `loss` and every gradient under its parameter's name.
Made with transformers 5.23.0 (those from mistral on: 5.24.0) and torch 2.13.0. What is there already stays as it is.
"""

import pathlib

import numpy as np
import torch
import transformers

SIZES = dict(
    vocab_size=32,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)


def rope(kind, **keys):
    """RoPE of a kind, with a base small enough that its pairs differ within a few positions."""
    return {"rope_type": kind, "rope_theta": 100.0, **keys}


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS = {
    "llama": transformers.LlamaConfig(
        **SIZES, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
    ),
    "olmo2": transformers.Olmo2Config(**SIZES),
    "apertus": transformers.ApertusConfig(**SIZES),
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=None, head_dim=8),
    "qwen3": transformers.Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True),
    "olmo3": transformers.Olmo3Config(**SIZES, max_position_embeddings=64, sliding_window=64),
    "llama_linear": transformers.LlamaConfig(**SIZES, rope_parameters=rope("linear", factor=4.0)),
    "llama_dynamic": transformers.LlamaConfig(
        **SIZES, max_position_embeddings=8, rope_parameters=rope("dynamic", factor=2.0)
    ),
    "llama_yarn": transformers.LlamaConfig(
        **SIZES,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters=rope("yarn", factor=4.0, original_max_position_embeddings=16),
    ),
    "qwen3_yarn": transformers.Qwen3Config(
        **SIZES,
        head_dim=16,
        max_position_embeddings=64,
        rope_parameters=rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            beta_fast=8.0,
            beta_slow=0.5,
            mscale=1.0,
            mscale_all_dim=0.5,
            truncate=False,
        ),
    ),
}


def random_model(config: transformers.PreTrainedConfig, seed: int) -> transformers.PreTrainedModel:
    """A model in float32 with every parameter drawn so that it matters, representable in bfloat16."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = (
                1 + 0.3 * torch.randn_like(parameter)
                if parameter.ndim == 1
                else 0.3 * torch.randn_like(parameter)
            )
            parameter.copy_(drawn.to(torch.bfloat16))
    return model


def compute(model: transformers.PreTrainedModel, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Logits, mean next-token loss, gradients by name."""
    out = model(torch.tensor(tokens), labels=torch.tensor(tokens))
    model.zero_grad()
    out.loss.backward()
    gradients = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    return {"logits": out.logits.detach().numpy(), "loss": out.loss.detach().numpy()} | gradients


if __name__ == "__main__":
    for seed, (name, config) in enumerate(MODELS.items()):
        directory = pathlib.Path(__file__).parent / name
        if directory.exists():
            continue
        tokens = np.random.default_rng(seed).integers(0, SIZES["vocab_size"], (2, 12))
        model = random_model(config, seed)
        expected = compute(model, tokens)
        model.to(torch.bfloat16).save_pretrained(directory)
        (directory / "generation_config.json").unlink(missing_ok=True)
        np.savez_compressed(directory / "expected.npz", tokens=tokens, **expected)
