"""Model FLOPs by hand, matrix by matrix."""

import pytest

from fp8jax import config as config_lib
from fp8jax.models import architectures
from fp8jax.models.flops import model_flops


@pytest.mark.parametrize("architecture", ["fog_max", "llama3"])
def test_every_product_is_counted_three_times(architecture):
    """Each of m x k by k x n as 2 m n k, forward and twice backward; of attention the half that a causal mask leaves."""
    layers, d, n, k, h, f, v, b, t = 3, 24, 6, 2, 10, 20, 40, 4, 9
    model = config_lib.from_dict(
        {
            "model": {
                "architecture": architecture,
                "layers": layers,
                "width": d,
                "heads": n,
                "kv_heads": k,
                "head_dim": h,
                "ffn_width": f,
            }
        }
    ).model
    found = model_flops(architectures.resolve(model, v), v, sequences=b, sequence_length=t)
    projections = d * n * h + d * k * h + d * k * h + n * h * d
    ffn = 3 * d * f if architecture == "llama3" else 2 * d * 30
    assert found.linear == 3 * 2 * b * t * layers * (projections + ffn)
    seen = sum(position + 1 for position in range(t))  # keys of each query
    assert found.attention == 3 * layers * b * n * seen * (2 * h + 2 * h)
    assert found.head == 3 * 2 * b * t * d * v
    assert found.total == found.linear + found.attention + found.head
