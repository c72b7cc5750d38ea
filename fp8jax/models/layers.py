"""The parts of every block: Dense, Embedding, RMSNorm, LayerScale, RoPE.

Each parameter is an `nnx.Param` with metadata `axes`, the logical axis of each dimension
(parallel/sharding.py). Matrices are called `w` and are the parameters with weight decay; gains and
scalars have other names and none.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from fp8jax.config import ModelConfig, head_dim
from fp8jax.models.activations import pointwise
from fp8jax.models.embedding import lookup
from fp8jax.models.gemms import LayerGemms
from fp8jax.numerics.gemm import dot_general
from fp8jax.numerics.gemm_sharding import Placement
from fp8jax.parallel.sharding import activation_specs

Axes = tuple[str | None, ...]


def matrix(rngs: nnx.Rngs, shape: tuple[int, ...], axes: Axes, std: float) -> nnx.Param:
    """Return a float32 matrix ~ N(0, std)."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes)


def gain(shape: tuple[int, ...], axes: Axes, value: float = 1.0) -> nnx.Param:
    """Return a float32 gain, constant at the start."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes)


class Dense(nnx.Module):
    """A linear map over the last features of x, without bias, computed by the recipe of its role.

    The weight's first `inputs` dimensions are contracted with as many last dimensions of x, e.g.
    qkv [d, k, g + 2, h].
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        role: str,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        std: float,
        inputs: int = 1,
    ):
        self.role, self.inputs = role, inputs
        self.features = axes[0], axes[inputs]
        self.w = matrix(rngs, shape, axes, std)

    def __call__(self, x: jax.Array, gemms: LayerGemms) -> jax.Array:
        """Map x [..., inputs] to [..., outputs], in the dtype of x."""
        role = self.role
        lead = x.ndim - self.inputs
        outputs = self.w.shape[self.inputs :]
        # FP8 kernels are matched on two-dimensional weights; merged dimensions stay contiguous.
        flat = (math.prod(self.w.shape[: self.inputs]), math.prod(outputs))
        x = x.reshape(*x.shape[:lead], flat[0])
        weight = gemms.weights[role]
        y = dot_general(
            x,
            self.w[...].reshape(flat),
            (((lead,), (0,)), ((), ())),
            gemms.recipes[role],
            quantised_w=weight._replace(data=weight.data.reshape(flat)),
            scales=gemms.scales.get(role),
            token=gemms.tokens.get(role),
            placements=(
                Placement(*activation_specs(self.features[0])),
                Placement(*activation_specs(self.features[1])),
            ),
            role=role,
            counted=gemms.counted,
        )
        return y.reshape(*y.shape[:lead], *outputs)


class Embedding(nnx.Module):
    """The token table [vocab, embed]; float32 rows, scaled before the cast to the activations'
    dtype.
    """

    def __init__(self, rngs: nnx.Rngs, vocab_size: int, width: int, std: float):
        self.w = matrix(rngs, (vocab_size, width), ("vocab", "embed"), std)

    def __call__(self, ids_bt: jax.Array, scale: float, dtype: jnp.dtype) -> jax.Array:
        """Return rows of the table times `scale`, [b, t, d]."""
        return lookup(self.w[...], ids_bt, scale, dtype)


class RMSNorm(nnx.Module):
    """The norm x / rms(x) over the last dimensions, computed in float32.

    Args:
        shape: normalised dimensions.
        axes: their logical axes.
        init: initial gain; None means no gain (frozen at 1).
        eps: added to the mean square.
        trained: with False the gain has no gradient, and so does not change.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: Axes,
        *,
        eps: float,
        init: float | None = 1.0,
        trained: bool = True,
    ):
        self.eps, self.dims, self.trained = eps, tuple(range(-len(shape), 0)), trained
        self.gain = None if init is None else gain(shape, axes, init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return normalised x in the dtype of x."""
        return _rms_norm(x, _gain_of(self), self.eps, self.dims)


@functools.partial(pointwise, static_argnums=(2, 3))
def _rms_norm(x: jax.Array, gain: jax.Array | None, eps: float, dims: tuple[int, ...]) -> jax.Array:
    wide = x.astype(jnp.float32)
    y = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=dims, keepdims=True) + eps)
    return (y if gain is None else y * gain).astype(x.dtype)


class LayerScale(nnx.Module):
    """A trained gain vector on a branch."""

    def __init__(self, width: int, init: float):
        self.gain = gain((width,), ("embed",), init)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return x * gain, in the dtype of x."""
        return pointwise(lambda x, gain: (x.astype(jnp.float32) * gain).astype(x.dtype))(
            x, self.gain[...]
        )


class Tanh(nnx.Module):
    """The function tanh(alpha x) with one trained scalar, FOG-flash's QK regulariser, times an
    optional gain.

    Args:
        features: the last dimension of x, for a gain [features] that is 1 at the start; None means
            no gain.
        trained: with False the gain has no gradient, and so does not change.
    """

    def __init__(self, features: int | None = None, *, trained: bool = True):
        self.alpha, self.trained = gain((), (), 0.5), trained
        self.gain = None if features is None else gain((features,), ("head_dim",))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute in float32, and return in the dtype of x."""
        return _tanh(x, self.alpha[...], _gain_of(self))


@functools.partial(pointwise, summed_argnums=(1, 2))
def _tanh(x: jax.Array, alpha: jax.Array, gain: jax.Array | None) -> jax.Array:
    y = jnp.tanh(alpha * x.astype(jnp.float32))
    return (y if gain is None else y * gain).astype(x.dtype)


def _gain_of(module: RMSNorm | Tanh) -> jax.Array | None:
    if module.gain is None:
        return None
    return module.gain[...] if module.trained else lax.stop_gradient(module.gain[...])


def rope_frequencies(config: ModelConfig, length: int = 0) -> np.ndarray:
    """Return the angle per position of every rotated pair, float64 [head_dim / 2], scaled by
    `config.rope_scaling`.

    llama3 (Llama 3.1): frequencies that turn less than `low` times in the original context are
    divided by the factor, those that turn more than `high` times do not change, and between them
    the division is interpolated. yarn (Peng et al. 2023, arXiv:2309.00071): the same with bounds
    that are linear in the number of the pair. linear: all are divided. dynamic: the base grows with
    the length once that is above the original context, as in transformers.

    Args:
        config: the model's configuration.
        length: positions of the sequence; used if scaling is dynamic.
    """
    features, factor = head_dim(config), config.rope_scaling_factor
    pairs = np.arange(0, features, 2)
    frequencies = config.rope_theta ** (-pairs / features)
    if factor == 1.0:
        return frequencies
    if config.rope_scaling == "linear":
        return frequencies / factor
    if config.rope_scaling == "dynamic":
        stretch = max(length / config.rope_original_context, 1.0)
        base = config.rope_theta * (factor * stretch - (factor - 1)) ** (
            features / max(features - 2, 1)
        )
        return base ** (-pairs / features)
    kept = (
        _kept_by_yarn(config)
        if config.rope_scaling == "yarn"
        else _kept_by_llama3(config, frequencies)
    )
    return kept * frequencies + (1 - kept) * frequencies / factor


def _kept_by_llama3(config: ModelConfig, frequencies: np.ndarray) -> np.ndarray:
    """Return the part of each frequency that is kept, 0 to 1."""
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_context * frequencies / (2 * np.pi)
    return np.clip((turns - low) / (high - low), 0.0, 1.0)


def _kept_by_yarn(config: ModelConfig) -> np.ndarray:
    """Return the part of each frequency that is kept, 0 to 1: a ramp over the pairs between fast
    and slow ones.
    """
    features = head_dim(config)

    def pair_that_turns(times: float) -> float:
        ratio = config.rope_original_context / (times * 2 * math.pi)
        return features * math.log(ratio) / (2 * math.log(config.rope_theta))

    first, last = pair_that_turns(config.rope_beta_fast), pair_that_turns(config.rope_beta_slow)
    if config.rope_truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, features - 1)
    ramp = (np.arange(features // 2) - first) / (last - first or 0.001)
    return 1 - np.clip(ramp, 0.0, 1.0)


def rope_table(
    positions_bt: jax.Array, frequencies: np.ndarray, factor: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """Return cos and sin of the rotary angles, times a factor, float32 [b, t, head_dim / 2], to
    1e-6 at any position.

    In float32 a product of position and frequency has lost 8e-3 of its angle at 131072 and 6e-2 at
    a million. Here it is in turns, in fixed point: integers wrap where turns do, without loss.

    Args:
        positions_bt: integers, at least 0 and below 2**32.
        frequencies: float64 [head_dim / 2], radians per position.
        factor: factor on both.
    """
    turns = np.mod(frequencies / (2 * np.pi), 1.0) * 2.0**32
    whole, rest = np.floor(turns), np.floor(np.mod(turns, 1.0) * 2.0**32)
    position = positions_bt.astype(jnp.uint32)[..., None]
    wrapped = position * whole.astype(np.uint32) + _upper_half(position, rest.astype(np.uint32))
    angles = lax.bitcast_convert_type(wrapped, jnp.int32).astype(jnp.float32) * np.float32(
        2 * np.pi / 2.0**32
    )
    if factor == 1.0:
        return jnp.cos(angles), jnp.sin(angles)
    return jnp.cos(angles) * np.float32(factor), jnp.sin(angles) * np.float32(factor)


def _upper_half(a: jax.Array, b: np.ndarray) -> jax.Array:
    """Return the upper 32 of the 64 bits of a product, uint32, by long multiplication in digits of
    16 bits.
    """
    a_high, a_low = a >> 16, a & 0xFFFF
    b_high, b_low = b >> 16, b & 0xFFFF
    middle = a_high * b_low + (a_low * b_low >> 16)
    return a_high * b_high + (middle >> 16) + ((a_low * b_high + (middle & 0xFFFF)) >> 16)


def apply_rope(x: jax.Array, table: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotate the halves of the last dimension (rotate-half layout), in float32.

    Args:
        x: [b, t, ..., h].
        table: cos and sin, [b or 1, t, h / 2].
    """
    shape = table[0].shape[:2] + (1,) * (x.ndim - 3) + table[0].shape[2:]
    cos, sin = (part.reshape(shape) for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)
