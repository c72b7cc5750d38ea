"""FP8 for models in Flax NNX: drop-in layers, the update of their scaling state, and conversion of
existing models.
"""

from fp8jax.nnx.attention import Attention, MultiHeadAttention
from fp8jax.nnx.conversion import Report, dequantize, quantize, report
from fp8jax.nnx.linear import Einsum, Linear, LinearGeneral
from fp8jax.nnx.scaling import Amax, Scaling, calibrate, update_scaling, value_and_grad

__all__ = [
    "Amax",
    "Attention",
    "Einsum",
    "Linear",
    "LinearGeneral",
    "MultiHeadAttention",
    "Report",
    "Scaling",
    "calibrate",
    "dequantize",
    "quantize",
    "report",
    "update_scaling",
    "value_and_grad",
]
