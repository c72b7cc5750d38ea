"""Calls of attention, and inputs for them."""

import math

import jax.numpy as jnp
import numpy as np

from fp8jax.numerics.attention.definition import SCORES, VALUES
from fp8jax.numerics.recipes import OPERANDS
from tests.numerics import reference
from tests.numerics.reference import E4M3, E5M2


def inputs(shape=(2, 12, 2, 3, 8), dtype=jnp.float32, seed=0):
    """q_btkgh, k_bskh, v_bskh, do_btkgh of different sizes."""
    b, t, k, _, h = shape
    rng = np.random.default_rng(seed)
    shapes = shape, (b, t, k, h), (b, t, k, h), shape
    return tuple(
        jnp.asarray(rng.normal(size=s) * size, dtype)
        for s, size in zip(shapes, (2.0, 0.9, 1.3, 0.01), strict=True)
    )


class Attention:
    """The definition, one head of one sequence after another. A role that is not FP8 keeps its operands as they are.

    Everything is float64 but the casts, which are made of float32 values.
    """

    def __init__(self, q, k, v, do, recipes, softmax_scale=0.25, segment_ids=None, scales=None):
        self.recipes, self.scales, self.tokens, self.largest_logit = recipes, scales, {}, 0.0
        shape = q.shape
        dtype = q.dtype
        q, k, v, do = (np.asarray(a).astype(np.float64) for a in (q, k, v, do))
        q, k, v = self._cast(q, 0, 0), self._cast(k, 0, 1), self._cast(v, 1, 0)
        (q, self.tokens["q"]), (k, self.tokens["k"]), (v, self.tokens["v"]) = q, k, v
        c = softmax_scale * math.log2(math.e)
        o, p, factor = np.zeros(shape), np.zeros((*shape[:4], shape[1])), np.ones((*shape[:4], 1))
        for b, t, n, g in np.ndindex(*shape[:4]):
            seen = [
                s
                for s in range(t + 1)
                if segment_ids is None or segment_ids[b, s] == segment_ids[b, t]
            ]
            logits = k[b, seen, n] @ q[b, t, n, g] * c
            unnormalised = np.exp2(logits - np.ceil(logits.max()))
            self.largest_logit = max(self.largest_logit, np.abs(logits).max())
            weights = self._probability(unnormalised)
            o[b, t, n, g] = (weights @ v[b, seen, n] / weights.sum()).astype(dtype)
            p[b, t, n, g, seen] = unnormalised / weights.sum()
            if recipes[1].fp8:  # at most 2**6 of the sum goes into dO
                factor[b, t, n, g] = weights.sum() / 2.0 ** max(
                    math.floor(math.log2(weights.sum())) + 1 - 6, 0
                )
        self.o = o
        do, self.tokens["do"] = self._cast(
            (do / factor).astype(np.float32).astype(np.float64), 1, 1
        )
        p = p * factor
        ds, self.tokens["ds"] = self._cast(
            p * (np.einsum("btkgh,bskh->btkgs", do, v) - np.sum(do * o, -1, keepdims=True)), 0, 2
        )
        self.dv = np.einsum("btkgs,btkgh->bskh", self._probability(p), do)
        self.dq = np.einsum("btkgs,bskh->btkgh", ds, k) * softmax_scale
        self.dk = np.einsum("btkgs,btkgh->bskh", ds, q) * softmax_scale

    def _cast(self, x, role, index):
        recipe, name = self.recipes[role], (SCORES, VALUES)[role]
        if not recipe.fp8:
            return x, None
        operand = OPERANDS[name][index]
        dtype = E5M2 if recipe.gradient_format == "e5m2" and operand in ("ds", "do") else E4M3
        largest = float(np.float32(reference.amax(x)))
        scale = (
            self.scales[name][index]
            if recipe.scaling == "delayed"
            else reference.scale_of(largest, dtype, recipe.margin, recipe.power_of_two)
        )
        return reference.quantise(x, dtype, scale) * float(scale), largest

    def _probability(self, p):
        return reference.quantise(p, E4M3, 1 / 256) / 256 if self.recipes[1].fp8 else p


def close(found, expected, what, wide=False):
    """Equal to float32 accumulation, but for the few elements that a cast, falling on a tie, takes the other way.

    Such a flip moves an element of P, dS by a 16th or an 8th of itself, in one row: so at most 2% of elements may be off at
    all, and the norm of the difference stays below 1e-3. `wide`: results, and O in dS, are rounded to bfloat16.
    """
    found = np.asarray(found).astype(np.float64)
    assert found.shape == expected.shape
    error, size = np.abs(found - expected), np.abs(expected).max()
    norm = np.linalg.norm(error) / max(np.linalg.norm(expected), 1e-300)
    if wide:
        assert norm < 0.02, f"{what}: {norm:.3g}"
        return
    assert norm < 1e-3, f"{what}: {norm:.3g}"
    assert np.mean(error > 1e-5 * size) <= 0.02, (
        f"{what}: {np.mean(error > 1e-5 * size):.3g} of the elements"
    )
