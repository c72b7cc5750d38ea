"""Time one block, forward and backward, in fp8jax, BF16, flax's fp8_ops, qwix and torchao: same shapes and mathematics.

    python benchmarks/peers.py --size=tiny          # peers: pip install qwix torch torchao

The block is FOG-opt's, and candidates take turns. The peers have FP8 linear layers only, so their
attention is JAX's own in BF16, on a GPU cuDNN's; fp8jax is timed like that (recipe `fp8`) and with
attention in FP8 as well (`fp8_dpa`). A peer that is not installed, or fails, is a row with its
error.
"""

import argparse
import functools
import pathlib
from collections.abc import Callable, Sequence

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

from configs import common as configs
from fp8jax import config as config_lib
from fp8jax.config import Config
from fp8jax.models import activations, architectures, gemms
from fp8jax.models.gemms import Gemms
from fp8jax.models.layers import apply_rope, rope_frequencies, rope_table
from fp8jax.models.model_recipes import model_recipes
from fp8jax.models.transformer import Block
from fp8jax.numerics.compiling import compiler_options
from fp8jax.numerics.formats import Quantised
from fp8jax.parallel.mesh import runs_kernels

# This holds for the peers, too: tuning XLA's own Triton GEMMs at 8b shapes takes minutes for each
# of them.
CUBLAS = {"xla_gpu_enable_triton_gemm": False}


class PeerBlock(nn.Module):
    """The block on Flax's own layers, with a peer's dot_general."""

    config: config_lib.ModelConfig
    dot: type | None = None

    @nn.compact
    def __call__(self, x_btd, rope):
        """Apply the block, [b, t, d] to [b, t, d]."""
        config, (b, t, d) = self.config, x_btd.shape
        heads, kv_heads, h = config.heads, config.kv_heads, config.head_dim
        dense = functools.partial(
            nn.Dense, use_bias=False, dtype=jnp.bfloat16, dot_general_cls=self.dot
        )
        norm = functools.partial(nn.RMSNorm, epsilon=config.norm_eps, dtype=jnp.bfloat16)
        qkv = dense((heads + 2 * kv_heads) * h)(x_btd).reshape(b, t, heads + 2 * kv_heads, h)
        q, k, v = jnp.split(qkv, (heads, heads + kv_heads), axis=2)
        q, k = (apply_rope(norm(use_scale=False)(a), rope) for a in (q, k))
        kind = "cudnn" if common.on_gpu() else None
        o = jax.nn.dot_product_attention(
            q, k, v, scale=config.softmax_scale, is_causal=True, implementation=kind
        )
        x_btd = x_btd + norm()(dense(d)(o.reshape(b, t, heads * h)))
        return x_btd + norm()(
            dense(d)(activations.gelu(dense(architectures.ffn_hidden(config))(x_btd)))
        )


def peer(model: nn.Module, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> Callable:
    """Return a function that runs the jitted forward and backward pass of a flax model."""
    variables = jax.jit(model.init)(jax.random.key(0), x, rope)
    run = jax.value_and_grad(
        lambda v, x: jnp.sum(model.apply(v, x, rope).astype(jnp.float32) ** 2),
        (0, 1),
        allow_int=True,
    )
    return functools.partial(jax.jit(run, compiler_options=CUBLAS), variables, x)


def with_qwix(model: nn.Module, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> Callable:
    """Return the same with linear layers quantised by qwix: e4m3 forward, e5m2 gradients."""
    import qwix  # noqa: PLC0415

    rule = qwix.QtRule(
        module_path="Dense_.*",
        weight_qtype=jnp.float8_e4m3fn,
        act_qtype=jnp.float8_e4m3fn,
        bwd_qtype=jnp.float8_e5m2,
    )
    return peer(qwix.quantize_model(model, qwix.QtProvider([rule])), x, rope)


def with_torch(config: Config, shape: tuple[int, ...], *, fp8: bool) -> Callable:
    """Return the block in PyTorch."""
    import peers_torch  # noqa: PLC0415

    model = architectures.resolve(config.model, 128)
    return peers_torch.block(
        model, architectures.ffn_hidden(model), batch=shape[0], length=shape[1], fp8=fp8
    )


def ours(config: Config, recipe: str, x: jax.Array, rope: tuple[jax.Array, jax.Array]) -> Callable:
    """Return the block of fp8jax, with delayed scaling, weights quantised in each call and amaxes reported."""
    recipes = model_recipes(
        config,
        gated=False,
        emulated=not common.on_gpu(),
        recipe=recipe,
        cudnn=common.on_gpu(),
        fused=runs_kernels(jax.devices()[0]),
    )
    graph, params = nnx.split(Block(architectures.resolve(config.model, 128), nnx.Rngs(params=0)))
    tokens = gemms.zero_tokens(recipes)
    scales = {role: jnp.full(token.values.shape, 1 / 64) for role, token in tokens.items()}

    def loss(params, tokens, x):
        block = nnx.merge(graph, params)
        weights = {role: w[None] for role, w in jax.lax.stop_gradient(block.gemm_weights()).items()}
        quantised = gemms.quantise_weights(weights, recipes, x.dtype, scales)
        head = Quantised(jnp.zeros(()), None)  # a block has none
        of_layers = Gemms(recipes, quantised, head, scales, tokens).segment(0)
        y, _ = block(x, rope, None, jax.tree.map(lambda a: a[0], of_layers))
        return jnp.sum(y.astype(jnp.float32) ** 2)

    options = compiler_options(jax.default_backend())
    return functools.partial(
        jax.jit(jax.value_and_grad(loss, (0, 1, 2)), compiler_options=options), params, tokens, x
    )


class Lazy:
    """A call that is built at its first use, so that it fails there if it cannot be built."""

    def __init__(self, make: Callable[[], Callable]):
        self._make = functools.cache(make)

    def __call__(self):
        """Build the call if it is not built yet, and call it."""
        return self._make()()


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Print the table, write the results, and return their file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--size", default="8b" if common.on_gpu() else "tiny", choices=configs.SIZES
    )
    parser.add_argument(
        "--batch",
        type=int,
        default=2 if common.on_gpu() else 16,
        help="sequences of the size's length",
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    values = configs.make(args.size, architecture="fog_opt", recipe="fp8_dpa")
    values.model.layers = 1
    config = config_lib.from_dict(values)
    model, length = architectures.resolve(config.model, 128), config.data.sequence_length
    x = jax.random.normal(jax.random.key(1), (args.batch, length, model.width), jnp.bfloat16)
    rope = rope_table(jnp.arange(length)[None], rope_frequencies(model))
    kinds = {
        "bf16": lambda: peer(PeerBlock(model), x, rope),
        "fp8jax bf16": lambda: ours(config, "bf16", x, rope),
        "fp8jax fp8": lambda: ours(config, "fp8", x, rope),
        "fp8jax fp8_dpa": lambda: ours(config, "fp8_dpa", x, rope),
        "flax fp8_ops": lambda: peer(PeerBlock(model, nn.Fp8DirectDotGeneralOp), x, rope),
        "qwix": lambda: with_qwix(PeerBlock(model), x, rope),
        "torch bf16": lambda: with_torch(config, x.shape, fp8=False),
        "torchao": lambda: with_torch(config, x.shape, fp8=True),
    }
    made = {name: Lazy(make) for name, make in kinds.items()}
    found, failed = common.surviving(made, args.rounds, tell=True)
    rows = [
        {"peer": name, "ms": seconds * 1e3, "speed": found["bf16"] / seconds}
        for name, seconds in found.items()
    ]
    rows += [{"peer": name, "error": error} for name, error in failed.items()]
    return common.save(
        f"peers-{args.size}",
        rows,
        args.results,
        tokens=x.shape[0] * length,
        scope="block, forward and backward",
    )


if __name__ == "__main__":
    main()
