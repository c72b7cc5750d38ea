"""Take statistics of parameters and of the optimizer's moments, on demand.

    found = jax.jit(state_statistics)(state)         # name → statistic → float32 [layers]
    found["mu.attention.qkv.w"]["kurtosis"]

A run takes them in steps with statistics if `config.monitor.parameters` is set.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fp8jax.models.definition import STACKED
from fp8jax.models.taps import Taps
from fp8jax.numerics import formats, statistics
from fp8jax.training import state_formats
from fp8jax.training.state import TrainState


def state_statistics(state: TrainState) -> Taps:
    """Return mean, rms, kurtosis and amax of each parameter ('params.attention.qkv.w') and its
    moments ('mu....', 'nu....').

    A parameter has no tokens: the whole of it, in each layer, is one sample of the kurtosis.
    Outside the blocks there is one layer.
    """
    params, moments = state_formats.unpack(state.params, state.opt_state)
    out: Taps = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path({"params": params, "moments": moments}):
        group = next((key.name for key in reversed(path) if hasattr(key, "name")), "params")
        names = [str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey)][1:]
        if names:  # counters have none
            inside = names[0] == STACKED
            out[".".join([group, *names[inside:]])] = jax.vmap(_of)(leaf if inside else leaf[None])
    return out


def _of(x: jax.Array) -> dict[str, Any]:
    found = statistics.choose(statistics.distribution(x[None].astype(jnp.float32)), pooled=True)
    return found | {"amax": formats.amax(x)}
