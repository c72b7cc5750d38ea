"""The FP8 linear layer against torchao's emulated Float8Linear, where torch and torchao are installed; skipped elsewhere.

    pip install torch torchao      # CPU builds will do

With `current` scaling and unrounded scales both cast tensorwise to e4m3, output gradients to e5m2. torchao multiplies by
448 / amax, rounded once; here it is the inverse of amax / 448: scales may differ in the last bit, and an element of which
the quotient falls on a tie may go to the other neighbour. Measured with torch 2.13 and torchao 0.18, whose dequantised
GEMMs are float32: at most 2.7e-7, which is the accumulation.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.numerics.gemm import dot_general
from fp8jax.numerics.recipes import GemmRecipe

torch = pytest.importorskip("torch")
float8_linear = pytest.importorskip("torchao.float8.float8_linear")

RECIPE = GemmRecipe("current", power_of_two=False)
# Largest relative error (norm over norm) of y, dx and dw.
SAME = 2e-6


def torchao_layer(x, w, g):
    """y, dx, dw of x · wᵀ, w as torch has it, [outputs, inputs]."""
    from torchao.float8 import Float8LinearConfig

    linear = torch.nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight.data = torch.tensor(np.asarray(w))
    layer = float8_linear.Float8Linear.from_float(linear, Float8LinearConfig(emulate=True))
    x = torch.tensor(np.asarray(x), requires_grad=True)
    y = layer(x)
    y.backward(torch.tensor(np.asarray(g)))
    return tuple(a.detach().numpy() for a in (y, x.grad, layer.weight.grad))


@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs"), [((64,), 96, 32), ((3, 50), 128, 80), ((16,), 1024, 48)]
)
@pytest.mark.parametrize("seed", range(4))
def test_linear_layer_equals_torchao(tokens, inputs, outputs, seed):
    rng = np.random.default_rng(seed)
    x, w, g = (
        jnp.asarray(rng.standard_t(4, shape) * size, jnp.float32)
        for shape, size in (
            ((*tokens, inputs), 2.0),
            ((outputs, inputs), 0.02),
            ((*tokens, outputs), 1e-6),
        )
    )
    dims = (((len(tokens),), (1,)), ((), ()))
    y, vjp = jax.vjp(lambda x, w: dot_general(x, w, dims, RECIPE), x, w)
    for name, found, expected in zip(
        ("y", "dx", "dw"), (y, *vjp(g)), torchao_layer(x, w, g), strict=True
    ):
        error = np.linalg.norm(np.float64(found) - expected) / np.linalg.norm(np.float64(expected))
        assert error < SAME, f"{name}: {error:.3g}"
