"""Every architecture of the paper's table: where it starts, and its loss and gradients against plain float64 mathematics."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.models.definition import define
from fp8jax.models.model_recipes import model_recipes

LAYERS, WIDTH, HEADS, KV_HEADS, HEAD_DIM, FFN, VOCAB, LENGTH = 2, 24, 6, 2, 10, 20, 96, 9
MODEL = {
    "layers": LAYERS,
    "width": WIDTH,
    "heads": HEADS,
    "kv_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "ffn_width": FFN,
    "tied_embeddings": False,
    "init_std": 0.02,
    "dtype": "float32",
}
DEFAULT_SCALE = 1 / math.sqrt(HEAD_DIM)
# The paper's table (appendix B), a row each: pre-norm, QK regulariser, activation, branch output, its gain at the start,
# factor on the embedding, softmax scale, final norm.
ROOT = 1 / math.sqrt(LAYERS)
PAPER = {
    "fog_max": (False, "frozen", "xielu", "norm", ROOT, 50.0, 0.125, False),
    "fog_opt": (False, "frozen", "gelu", "norm", ROOT, 50.0, 0.125, False),
    "fog_flash": (False, "tanh", "gelu", "norm", ROOT, 50.0, 0.125, False),
    "op": (False, "trained", "gelu", "scale", ROOT, 50.0, DEFAULT_SCALE, False),
    "op_frozen_qk": (False, "frozen", "gelu", "scale", ROOT, 50.0, DEFAULT_SCALE, False),
    "llama3": (True, "none", "swiglu", "none", None, 1.0, DEFAULT_SCALE, True),
    "llama3_smooth": (True, "none", "smooth", "none", None, 1.0, DEFAULT_SCALE, True),
    "olmo2": (False, "whole", "swiglu", "norm", 1.0, 1.0, DEFAULT_SCALE, True),
}
# These programs run once: what they are optimised for does not pay.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
architectures = pytest.mark.parametrize("architecture", config_lib.ARCHITECTURES)


@functools.cache
def definition_of(architecture):
    config = config_lib.from_dict(
        {"model": MODEL | {"architecture": architecture}, "fp8": {"recipe": "bf16"}}
    )
    return config, define(config.model, VOCAB)


@functools.cache
def started(architecture, seed=0):
    """Initial parameters by name."""
    params = jax.jit(lambda: definition_of(architecture)[1].init(seed), compiler_options=QUICK)()
    return {
        ".".join(key.key for key in path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }


@architectures
def test_where_it_starts(architecture):
    """The parameters that there are, their shapes, gains and scalars exactly; matrices by mean, deviation and kurtosis."""
    pre, qk, activation, branch, gain, _, _, final = PAPER[architecture]
    gated, g, b = activation in ("swiglu", "smooth"), HEADS // KV_HEADS, "blocks."
    hidden = FFN if gated else FFN * 3 // 2
    matrices = {
        "embedding.w": (VOCAB, WIDTH),
        "head.w": (VOCAB, WIDTH),
        b + "attention.qkv.w": (LAYERS, WIDTH, KV_HEADS, g + 2, HEAD_DIM),
        b + "attention.out.w": (LAYERS, KV_HEADS, g, HEAD_DIM, WIDTH),
        b + "feed_forward.up.w": (LAYERS, WIDTH, hidden),
        b + "feed_forward.down.w": (LAYERS, hidden, WIDTH),
    }
    if gated:
        matrices[b + "feed_forward.gate.w"] = LAYERS, WIDTH, hidden
    constants = {}
    if final:
        constants["final_norm.gain"] = (WIDTH,), 1.0
    for name in ("pre_attention", "pre_ffn") if pre else ():
        constants[f"{b}{name}.gain"] = (LAYERS, WIDTH), 1.0
    for name in ("post_attention", "post_ffn") if branch != "none" else ():
        constants[f"{b}{name}.gain"] = (LAYERS, WIDTH), gain
    for name, whole in (
        ("q_norm", (LAYERS, KV_HEADS, g, HEAD_DIM)),
        ("k_norm", (LAYERS, KV_HEADS, HEAD_DIM)),
    ):
        shapes = {"trained": (LAYERS, HEAD_DIM), "whole": whole, "tanh": (LAYERS,)}
        if qk in shapes:
            constants[f"{b}attention.{name}.{'alpha' if qk == 'tanh' else 'gain'}"] = (
                shapes[qk],
                0.5 if qk == "tanh" else 1.0,
            )
    if activation == "xielu":
        constants[b + "feed_forward.xielu.alpha_p"] = (LAYERS,), math.log(math.expm1(0.8))
        constants[b + "feed_forward.xielu.alpha_n"] = (LAYERS,), math.log(math.expm1(0.3))
    found = started(architecture)
    assert {name: leaf.shape for name, leaf in found.items()} == matrices | {
        name: shape for name, (shape, _) in constants.items()
    }
    for name, (_, value) in constants.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)
    every = np.concatenate([found[name].ravel() for name in matrices]).astype(np.float64) / 0.02
    n = len(every)  # 10,000 and more; four standard errors each
    assert abs(every.mean()) < 4 / math.sqrt(n) and abs(every.std() - 1) < 4 / math.sqrt(2 * n)
    assert abs(np.mean(every**4) - 3) < 4 * math.sqrt(96 / n)


def test_seeds_and_layers_differ():
    """Every matrix of every layer is another, and follows the seed."""
    one, other = started("llama3"), started("llama3", 1)
    for name, leaf in one.items():
        if name.endswith(".w"):
            assert abs(np.corrcoef(leaf.ravel(), other[name].ravel())[0, 1]) < 0.2, name
        if name.endswith(".w") and name.startswith("blocks"):
            assert abs(np.corrcoef(leaf[0].ravel(), leaf[1].ravel())[0, 1]) < 0.2, name
    assert abs(np.corrcoef(one["embedding.w"].ravel(), one["head.w"].ravel())[0, 1]) < 0.2


def rms(x, axes=(-1,)):
    return x / jnp.sqrt(jnp.mean(x**2, axis=axes, keepdims=True) + 1e-5)


def rotated(x):
    """[b, t, n, h], each pair (i, i + h/2) turned by t * 500000^(-2i/h)."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * 500000.0 ** (-jnp.arange(half) / half)
    turned = jax.lax.complex(x[..., :half], x[..., half:]) * jnp.exp(1j * angle)[:, None]
    return jnp.concatenate([turned.real, turned.imag], -1)


def attention(p, x, qk, scale):
    qkv = jnp.einsum("btd,dkgh->btkgh", x, p["qkv"]["w"])
    b, t, g = *x.shape[:2], HEADS // KV_HEADS
    q, k, v = qkv[..., :g, :], qkv[..., g, :], qkv[..., g + 1, :]
    if qk == "frozen":
        q, k = rms(q), rms(k)
    elif qk == "trained":
        q, k = rms(q) * p["q_norm"]["gain"], rms(k) * p["k_norm"]["gain"]
    elif qk == "whole":
        q, k = rms(q, (-3, -2, -1)) * p["q_norm"]["gain"], rms(k, (-2, -1)) * p["k_norm"]["gain"]
    elif qk == "tanh":
        q, k = jnp.tanh(p["q_norm"]["alpha"] * q), jnp.tanh(p["k_norm"]["alpha"] * k)
    q, k = rotated(q.reshape(b, t, HEADS, HEAD_DIM)), rotated(k)
    k, v = jnp.repeat(k, g, axis=2), jnp.repeat(v, g, axis=2)
    s = jnp.einsum("btnh,bsnh->bnts", q, k) * scale
    p_ts = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((t, t), bool)), s, -jnp.inf), axis=-1)
    o = jnp.einsum("bnts,bsnh->btnh", p_ts, v)
    return jnp.einsum("btkgh,kghd->btd", o.reshape(b, t, KV_HEADS, g, HEAD_DIM), p["out"]["w"])


def feed_forward(p, x, activation):
    up = x @ p["up"]["w"]
    if activation == "gelu":
        return jax.nn.gelu(up, approximate=False) @ p["down"]["w"]
    if activation == "xielu":
        positive = jnp.log1p(jnp.exp(p["xielu"]["alpha_p"]))
        negative = 0.5 + jnp.log1p(jnp.exp(p["xielu"]["alpha_n"]))
        return (
            jnp.where(up > 0, positive * up**2, negative * (jnp.expm1(jnp.minimum(up, -1e-6)) - up))
            + 0.5 * up
        ) @ p["down"]["w"]
    gate = x @ p["gate"]["w"]
    # Smooth-SwiGLU divides by a scale and multiplies by it again: without rounding it is SwiGLU, and so are its gradients
    # as long as none goes through one of the two alone.
    return (gate / (1 + jnp.exp(-gate)) * up) @ p["down"]["w"]


def reference_loss(params, tokens, mask, architecture):
    """Mean negative log-likelihood under the mask."""
    pre, qk, activation, branch, _, upscale, scale, final = PAPER[architecture]

    def into(x, p, name):
        return rms(x) * p[name]["gain"] if pre else x

    def out_of(y, p, name):
        return {
            "none": lambda: y,
            "norm": lambda: rms(y) * p[name]["gain"],
            "scale": lambda: y * p[name]["gain"],
        }[branch]()

    x = upscale * params["embedding"]["w"][tokens[:, :-1]]
    for layer in range(LAYERS):
        p = jax.tree.map(lambda a, layer=layer: a[layer], params["blocks"])
        x = x + out_of(
            attention(p["attention"], into(x, p, "pre_attention"), qk, scale), p, "post_attention"
        )
        x = x + out_of(
            feed_forward(p["feed_forward"], into(x, p, "pre_ffn"), activation), p, "post_ffn"
        )
    logits = (rms(x) * params["final_norm"]["gain"] if final else x) @ params["head"]["w"].T
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), tokens[:, 1:, None], axis=-1)[
        ..., 0
    ]
    return -jnp.sum(chosen * mask) / jnp.sum(mask)


def sample(architecture):
    """Parameters that all matter: each a random factor from where it starts; tokens; a mask."""
    rng = np.random.default_rng(1)
    shapes = definition_of(architecture)[1].shapes
    start = started(architecture)

    def one(path, leaf):
        name = ".".join(key.key for key in path)
        size = (
            8.0 if name.endswith(".w") and name != "embedding.w" else 1.0
        )  # at 0.02 a branch is next to nothing
        return (size * start[name] * rng.uniform(0.5, 1.5, leaf.shape)).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(one, shapes)
    return (
        params,
        rng.integers(0, VOCAB, (2, LENGTH + 1)),
        (rng.random((2, LENGTH)) < 0.7).astype(np.float32),
    )


@architectures
def test_loss_and_gradients_are_those_of_the_mathematics(architecture):
    config, definition = definition_of(architecture)
    recipes = model_recipes(config, gated=definition.gated(), emulated=True)
    params, tokens, mask = sample(architecture)

    def loss(params):
        model = definition.bind(params)
        logits, _ = model(
            {"inputs": jnp.asarray(tokens[:, :-1], jnp.int32)},
            model.prepare(recipes),
        )
        chosen = jnp.take_along_axis(
            jax.nn.log_softmax(logits, axis=-1), jnp.asarray(tokens[:, 1:, None]), axis=-1
        )[..., 0]
        return -jnp.sum(chosen * mask) / jnp.sum(mask)

    found, grads = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        exact = jax.jit(
            jax.value_and_grad(functools.partial(reference_loss, architecture=architecture)),
            compiler_options=QUICK,
        )
        wanted, wanted_grads = jax.device_get(
            exact(wide, jnp.asarray(tokens), jnp.asarray(mask, jnp.float64))
        )
    assert wanted_grads["embedding"]["w"].dtype == np.float64
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(wanted_grads), jax.tree.leaves(grads), strict=True
    ):
        assert np.linalg.norm(a) > 0 and np.linalg.norm(a - b) <= 2e-5 * np.linalg.norm(a), path
