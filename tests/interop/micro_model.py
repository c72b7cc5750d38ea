"""Small random models whose next token depends on all that came before."""

from collections.abc import Callable

import jax
import numpy as np

from fp8jax import config as config_lib
from fp8jax.plan import LoadedModel, make_plan

MICRO = {
    "layers": 2,
    "width": 32,
    "ffn_width": 32,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 8,
    "dtype": "float32",
    "architecture": "llama3",
    "tied_embeddings": False,
}


def load(context: int = 64, mesh: dict | None = None, **model) -> LoadedModel:
    """An untrained model with large matrices: small ones would make every next token alike."""
    mesh = mesh or {"fsdp": 1}
    config = config_lib.from_dict(
        {"model": MICRO | model, "data": {"sequence_length": context}, "mesh": mesh}
    )
    count = mesh.get("data", 1) * mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    plan = make_plan(config, jax.devices()[:count])
    params = jax.tree.map(lambda p: p * 10 if p.ndim > 1 else p, plan.definition.init(1))
    return LoadedModel(plan, params)


def uncached(model: LoadedModel) -> Callable[[list[int]], np.ndarray]:
    """ids → logits of what follows each of them, float32 [t, v]: the forward pass over at most a whole context."""
    plan = model.plan
    recipes = plan.bf16_recipes

    @jax.jit
    def forward(params, ids):
        bound = plan.definition.bind(params)
        return bound({"inputs": ids}, bound.prepare(recipes))[0]

    def logits(ids):
        padded = np.zeros((1, plan.config.data.sequence_length), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(forward(model.params, padded)[0, : len(ids)])

    return logits
