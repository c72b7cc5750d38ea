"""FP8 for models in Flax NNX: drop-in layers, the update of their scaling state, and conversion of existing models."""

from fp8jax.nnx.linear import Einsum, Linear, LinearGeneral
from fp8jax.nnx.scaling import Scaling, update_scaling, value_and_grad

__all__ = ["Einsum", "Linear", "LinearGeneral", "Scaling", "update_scaling", "value_and_grad"]
