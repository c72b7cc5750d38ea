"""List the options that a run may choose from: microbatches, rows of a loss chunk, what is
recomputed.

for option in candidates(plan): ...     # all that the config leaves open
"""

import itertools
from typing import Any, NamedTuple

from fp8jax import config as config_lib
from fp8jax.config import AUTO, CHUNK_AUTO, Config
from fp8jax.plan import Plan
from fp8jax.training.estimates import Option

OPEN = {"microbatches": 0, "loss_chunk": CHUNK_AUTO, "remat": AUTO}
CHUNK = 8192  # rows of a vocabulary; fewer make GEMMs too small for a GPU
_REMATS = (
    "none",
    "save_branches",
    "save_fp8",
    "full",
)  # offload_fp8 needs host memory, which is not planned


class Compiled(NamedTuple):
    """An option, the bytes that one device needs, what was compiled, and its seconds at peak rates
    if known.
    """

    option: Option
    needs: int
    program: Any = None
    seconds: float | None = None


def open_fields(config: Config) -> list[str]:
    """Return the names of the fields that the config leaves open."""
    return [name for name, value in OPEN.items() if getattr(config.training, name) == value]


def candidates(plan: Plan) -> list[Option]:
    """Return every option that the config leaves open and the model allows, the simplest first."""
    config, training = plan.config, plan.config.training
    rows = training.batch_size // plan.replicas
    splits = [count for count in range(1, rows + 1) if rows % count == 0]
    blockwise_head = config.fp8.head and config.fp8.scaling == "blockwise"
    chunks = [0, CHUNK] if plan.definition.vocab_size > 2 * CHUNK and not blockwise_head else [0]
    remats = [remat for remat in _REMATS if remat != "save_fp8" or config.fp8.recipe != "bf16"]
    microbatches = (
        splits if training.microbatches == OPEN["microbatches"] else [training.microbatches]
    )
    chunks = chunks if training.loss_chunk == OPEN["loss_chunk"] else [training.loss_chunk]
    remats = (
        remats
        if training.remat == OPEN["remat"] and config.model.layers > 1
        else [config_lib.settled(config).training.remat]
    )
    return [Option(*values) for values in itertools.product(microbatches, chunks, remats)]


def gigabytes(size: float) -> str:
    """Format bytes, such as '12.3 GB'."""
    return f"{size / 1e9:,.1f} GB" if size >= 0.05 * 1e9 else f"{size / 1e6:,.1f} MB"
