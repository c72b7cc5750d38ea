"""Model directories of transformers that the tests have, and changes to them."""

import json
import pathlib
import shutil

import numpy as np

from fp8jax.interop import hf_config
from fp8jax.interop.hf_safetensors import TensorFiles

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


def from_keys(model_type, **keys):
    sizes = {
        "vocab_size": 32,
        "hidden_size": 128,
        "intermediate_size": 24,
        "num_hidden_layers": 4,
        "num_attention_heads": 32,
    }
    return hf_config.from_config({"model_type": model_type, **sizes, **keys})[0]
