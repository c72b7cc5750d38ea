"""Small random models whose next token depends on all that came before."""

import jax

from fp8jax import config as config_lib
from fp8jax.data import tokenizer
from fp8jax.models.definition import LoadedModel, define
from fp8jax.parallel.mesh import make_mesh

MICRO = {"layers": 2, "width": 32, "ffn_width": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "dtype": "float32",
         "architecture": "llama3", "tied_embeddings": False}


def load(context: int = 64, mesh: dict | None = None, **model) -> LoadedModel:
    """An untrained model with large matrices: small ones would make every next token alike."""
    mesh = mesh or {"fsdp": 1}
    config = config_lib.from_dict({"model": MICRO | model, "data": {"sequence_length": context}, "mesh": mesh})
    definition = define(config.model, tokenizer.vocab_size(config))
    params = jax.tree.map(lambda p: p * 10 if p.ndim > 1 else p, definition.init(1))
    count = mesh.get("data", 1) * mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    return LoadedModel(config, definition, params, make_mesh(config, jax.devices()[:count]))
