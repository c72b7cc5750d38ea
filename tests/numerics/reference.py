"""What fp8jax.numerics should compute, said a second time: NumPy float64 and ml_dtypes, sharing no code with fp8jax."""

import math

import hypothesis
import ml_dtypes
import numpy as np

E4M3, E5M2 = np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)
BF16 = np.dtype(ml_dtypes.bfloat16)
TOP = {E4M3: 448.0, E5M2: 57344.0}
EPS32, EPS16 = (
    2.0**-24,
    2.0**-8,
)  # half a unit in the last place of float32; a whole one of bfloat16
TINY = 2.0**-126  # below this XLA's CPU code flushes to zero


def examples(count):
    """The same hypothesis examples in every run, however slow the machine."""
    return hypothesis.settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[
            hypothesis.HealthCheck.too_slow,
            hypothesis.HealthCheck.filter_too_much,
        ],
    )


def cast(x, dtype):
    """Saturating cast of float32 values; NaN and infinity become NaN."""
    x = np.asarray(x, np.float32)
    clipped = np.clip(np.where(np.isfinite(x), x, 0), -TOP[dtype], TOP[dtype]).astype(dtype)
    return np.where(np.isfinite(x), clipped, np.asarray(np.nan, dtype))


def amax(x):
    x = np.asarray(x).astype(np.float64)
    if x.size == 0:
        return 0.0
    return float(np.max(np.abs(x))) if np.all(np.isfinite(x)) else math.inf


def scale_of(largest, dtype, margin=0, power_of_two=True):
    """Scale of a finite amax: exact for powers of two, else in float32 as NumPy divides."""
    if largest == 0:
        return 1.0
    if not power_of_two:
        return float(np.float32(largest) / np.float32(TOP[dtype]) * np.float32(2.0**margin))
    (m, e), (top_m, top_e) = math.frexp(largest), math.frexp(TOP[dtype])
    return 2.0 ** min(max(e - top_e + (m > top_m) + margin, -126), 126)


def quantise(x, dtype, scale):
    """The float64 values (without the scale) of an array's cast, in float32 arithmetic as the docstring says."""
    with np.errstate(over="ignore"):
        return cast(
            np.asarray(x).astype(np.float32) * (np.float32(1) / np.float32(scale)), dtype
        ).astype(np.float64)


def letters(dims, x_ndim, w_ndim):
    """Einsum subscripts of x, w and y for dimension numbers of lax.dot_general."""
    (x_contract, w_contract), (x_batch, w_batch) = dims
    names = iter("abcdefghijklmnopqrstuvwxyz")
    x, w, batch = [None] * x_ndim, [None] * w_ndim, []
    for i, j in zip(x_batch, w_batch, strict=True):
        x[i] = w[j] = next(names)
        batch.append(x[i])
    for i, j in zip(x_contract, w_contract, strict=True):
        x[i] = w[j] = next(names)
    free = []
    for side in (x, w):
        for i, name in enumerate(side):
            if name is None:
                side[i] = next(names)
                free.append(side[i])
    return "".join(x), "".join(w), "".join(batch + free)


def products(a, b, subscripts):
    """Einsum in float64, its counterpart of magnitudes (for error bounds), and the number of terms of each sum."""
    left, result = subscripts.split("->")
    size = dict(zip(left.replace(",", ""), (*a.shape, *b.shape), strict=True))
    terms = math.prod(size[name] for name in size if name not in result)
    return np.einsum(subscripts, a, b), np.einsum(subscripts, np.abs(a), np.abs(b)), terms


class Linear:
    """One FP8 linear layer: y, dx, dw, tokens, each GEMM as (value, error bound).

    `scales` (of x and of g) are given for delayed scaling, with `weight_scale` for static; otherwise they come from the tensors,
    by `scale_for(amax, dtype)`.
    """

    def __init__(
        self, x, w, g, dims, scale_for, gradient_format=E5M2, scales=None, weight_scale=None
    ):
        x_s, w_s, y_s = letters(dims, x.ndim, w.ndim)
        self.tokens = np.float32([amax(x), amax(g)])
        self.scales = {
            "x": scales[0] if scales else scale_for(amax(x), E4M3),
            "w": scale_for(amax(w), E4M3) if weight_scale is None else weight_scale,
            "g": scales[1] if scales else scale_for(amax(g), gradient_format),
        }
        q = {
            "x": quantise(x, E4M3, self.scales["x"]),
            "w": quantise(w, E4M3, self.scales["w"]),
            "g": quantise(g, gradient_format, self.scales["g"]),
        }
        self.quantised = q
        self.y = self._gemm("x", "w", f"{x_s},{w_s}->{y_s}")
        self.dx = self._gemm("g", "w", f"{y_s},{w_s}->{x_s}")
        self.dw = self._gemm("x", "g", f"{x_s},{y_s}->{w_s}")

    def _gemm(self, a, b, subscripts):
        value, magnitude, terms = products(self.quantised[a], self.quantised[b], subscripts)
        scale = float(self.scales[a]) * float(self.scales[b])
        return value * scale, (terms + 4) * EPS32 * magnitude * scale

    def scale_products(self):
        """Of the three GEMMs; float32 holds them only from TINY to 2**128."""
        x, w, g = (float(self.scales[name]) for name in "xwg")
        return x * w, g * w, x * g


def agrees(found, expected, bound, what=""):
    """Asserts |found - expected| <= bound, plus one rounding where `found` is bfloat16, plus float32's smallest normal number."""
    found = np.asarray(found)
    assert found.shape == np.shape(expected), (
        f"{what}: shape {found.shape}, not {np.shape(expected)}"
    )
    rounding = EPS16 if found.dtype == BF16 else EPS32
    with np.errstate(over="ignore", invalid="ignore"):
        bound = bound + rounding * (np.abs(expected) + bound) + TINY
        # Half a unit beyond the largest finite number rounds to infinity.
        overflows = np.abs(expected) + bound >= float(ml_dtypes.finfo(found.dtype).max)
        error = np.abs(found.astype(np.float64) - expected)
    wrong = ~(error <= bound) & ~(overflows & (np.abs(found.astype(np.float64)) >= 1e38))
    worst = error[wrong].max() if wrong.any() else 0.0
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} of {found.size} beyond the bound, by up to {worst:.3g}"
    )


def quantise_blocks(x, axes, dtype, scale_for):
    """The float64 values, scales included, of a cast with one scale a block of 128 along each of `axes`, 1 along the others.

    Numbers below float32's normal range are zero, before and after.
    """
    x = flush(np.asarray(x).astype(np.float64))
    out = np.zeros(x.shape)
    steps = [128 if axis in axes else 1 for axis in range(x.ndim)]
    for index in np.ndindex(*(-(-n // step) for n, step in zip(x.shape, steps, strict=True))):
        block = tuple(slice(i * step, (i + 1) * step) for i, step in zip(index, steps, strict=True))
        scale = scale_for(amax(x[block]), dtype)
        out[block] = quantise(x[block], dtype, scale) * scale
    return flush(out)


def flush(x):
    return np.where(np.abs(x) < TINY, 0.0, x)


class BlockwiseLinear:
    """One linear layer x[..., k, ...] · w with blockwise scaling: y, dx, dw, tokens, each GEMM as (value, error bound).

    x and g in runs of 128 along what fprop and dgrad contract, again along the tokens for wgrad, where x starts from its cast.
    """

    def __init__(self, x, w, g, dims, scale_for, gradient_format=E5M2):
        ((x_contract,), (w_contract,)), _ = dims
        self.tokens = np.float32([amax(x), amax(g)])
        qw = quantise_blocks(w, (0, 1), E4M3, scale_for)
        qw = qw if w_contract == 0 else qw.T  # [k, n]
        qx = np.moveaxis(quantise_blocks(x, (x_contract,), E4M3, scale_for), x_contract, -1)
        qg = quantise_blocks(g, (g.ndim - 1,), gradient_format, scale_for)
        tokens = math.prod(qx.shape[:-1])
        again = quantise_blocks(qx.reshape(tokens, qx.shape[-1]), (0,), E4M3, scale_for)
        turned = quantise_blocks(g.reshape(tokens, g.shape[-1]), (0,), gradient_format, scale_for)
        self.y = self._gemm(qx, qw, "...k,kn->...n")
        self.dx = tuple(
            np.moveaxis(a, -1, x_contract) for a in self._gemm(qg, qw.T, "...n,nk->...k")
        )
        self.dw = tuple(
            a if w_contract == 0 else a.T for a in self._gemm(again.T, turned, "kt,tn->kn")
        )

    def _gemm(self, a, b, subscripts):
        terms = b.shape[0]
        return np.einsum(subscripts, a, b), (terms + 4) * (
            EPS32 * np.einsum(subscripts, np.abs(a), np.abs(b)) + TINY
        )


def kurtosis(x, pooled=False):
    """FOG.md section 5, in float64: of each token, or of each sequence, not centred; zero ones left out."""
    x = np.asarray(x).astype(np.float64)
    samples = x.reshape(x.shape[0], -1) if pooled else x.reshape(-1, x.shape[-1])
    samples = samples[np.any(samples != 0, axis=1)]
    return (
        np.mean(np.mean(samples**4, axis=1) / np.mean(samples**2, axis=1) ** 2)
        if len(samples)
        else 0.0
    )


def spread_of(x):
    """DISTRIBUTION in float64."""
    exact = np.asarray(x).astype(np.float64)
    return [exact.mean(), np.sqrt(np.mean(exact**2)), kurtosis(x), kurtosis(x, True)]
