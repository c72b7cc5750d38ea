"""Parameter counts against closed formulas, and every architecture running in every recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from fp8jax import config as config_lib
from fp8jax.models import gemms
from fp8jax.models.definition import define
from fp8jax.models.model_recipes import model_recipes
from fp8jax.models.transformer import ForwardOptions
from fp8jax.numerics.compiling import compiler_options

TINY = {"layers": 2, "width": 64, "ffn_width": 64, "heads": 4, "kv_heads": 2, "head_dim": 16}


def closed_formula(size: str, architecture: str) -> int:
    """Parameters, worked out from the paper's table by hand."""
    s = common.SIZES[size]
    layers, d, f, v = s["layers"], s["width"], s["ffn_width"], s["vocab_size"]
    h = d // s["heads"]
    attention = d * d + 2 * d * s["kv_heads"] * h + d * d
    ffn = 3 * d * f  # gated: three matrices of f; two-layer: two of 1.5 f
    norms = {
        "fog_max": 2 * d + 2,
        "fog_opt": 2 * d,
        "fog_flash": 2 * d + 2,
        "op": 2 * d + 2 * h,
        "op_frozen_qk": 2 * d,
        "llama3": 2 * d,
        "llama3_smooth": 2 * d,
        "olmo2": 2 * d + d + s["kv_heads"] * h,
    }[architecture]
    final = d if architecture in ("llama3", "llama3_smooth", "olmo2") else 0
    embeddings = v * d * (1 if s.get("tied_embeddings", True) else 2)
    return layers * (attention + ffn + norms) + final + embeddings


@pytest.mark.parametrize("size", ["390m", "1p5b", "8b"])
@pytest.mark.parametrize("architecture", config_lib.ARCHITECTURES)
def test_parameter_counts(size, architecture):
    values = common.make(size, architecture=architecture, recipe="fp8_dpa")
    config = config_lib.from_dict(values)
    assert define(config.model, config.model.vocab_size).parameter_count() == closed_formula(
        size, architecture
    )


@pytest.mark.parametrize("architecture", config_lib.ARCHITECTURES)
def test_every_architecture_has_gradients_everywhere(architecture):
    config = config_lib.from_dict({"model": TINY | {"architecture": architecture}})
    definition = define(config.model, 128)
    recipes = model_recipes(config, gated=definition.gated(), emulated=True).scaled_by("current")
    params = definition.init(0)
    batch = {"inputs": jnp.asarray(np.random.default_rng(0).integers(0, 128, (2, 32)), jnp.int32)}
    weights = definition.bind(params).prepare(recipes)

    def loss(params, tokens):
        logits, _ = definition.bind(params)(batch, weights.with_tokens(tokens))
        return jnp.mean(jax.nn.logsumexp(logits[:, :-1], axis=-1) - logits[:, :-1, 7])

    grads, amaxes = jax.jit(jax.grad(loss, (0, 1)))(params, gemms.zero_tokens(recipes))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0, path
    for role, token in amaxes.items():
        amax = token.values
        assert (np.asarray(amax) > 0).all() and np.isfinite(amax).all(), role


def run_tiny(overrides: str = "", recipe: str = "fp8_dpa", **model):
    config = config_lib.from_dict(
        {"model": TINY | model, "fp8": {"recipe": recipe, "overrides": overrides}}
    )
    definition = define(config.model, 128)
    recipes = model_recipes(config, gated=definition.gated(), emulated=True).scaled_by("current")
    params = definition.init(0)
    batch = {"inputs": jnp.asarray(np.random.default_rng(0).integers(0, 128, (2, 32)), jnp.int32)}

    def loss(params, tokens, remat):
        model = definition.bind(params)
        prepared = model.prepare(recipes).with_tokens(tokens)
        logits, taps = model(batch, prepared, ForwardOptions(remat=remat, collect=True))
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3]), taps

    options = compiler_options(
        jax.default_backend()
    )  # with excess precision, jax 0.12 rounds unrolled layers elsewhere
    step = jax.jit(
        jax.value_and_grad(loss, (0, 1), has_aux=True), static_argnums=2, compiler_options=options
    )
    return lambda remat="none": step(params, gemms.zero_tokens(recipes), remat)


@pytest.mark.parametrize("remat", ["full", "save_fp8", "save_branches"])
def test_remat_changes_nothing(remat):
    """jax.checkpoint once turned saved e4m3 values above 240 into NaN (see numerics.dot_general.named)."""
    run = run_tiny()
    (plain, _), (grads, amaxes) = run()
    (again, _), (grads_again, amaxes_again) = run(remat)
    np.testing.assert_allclose(plain, again, rtol=1e-6)
    for a, b in zip(
        jax.tree.leaves((grads, amaxes)), jax.tree.leaves((grads_again, amaxes_again)), strict=True
    ):
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(a)


def test_unrolled_layers_equal_scanned_ones():
    (scanned, _), (grads, _) = run_tiny()()
    (unrolled, _), (grads_again, _) = run_tiny(scan_layers=False)()
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(grads_again), strict=True):
        assert np.linalg.norm(a - b) <= 2e-2 * np.linalg.norm(a)


def test_layer_override_takes_one_role_of_one_layer_out_of_fp8():
    _, (_, tokens) = run_tiny("mlp_down@1=bf16")()
    amaxes = np.asarray(tokens["mlp_down"].values)
    assert amaxes[0].min() > 0 and amaxes[1].max() == 0


def test_float32_bf16_recipe_equals_plain_jax():
    """The whole custom-VJP stack with nothing quantised, against autodiff of the same arithmetic written plainly."""
    run = run_tiny(recipe="bf16", dtype="float32", architecture="llama3")
    (loss, _), (grads, _) = run()
    config = config_lib.from_dict({"model": TINY | {"architecture": "llama3", "dtype": "float32"}})
    params = define(config.model, 128).init(0)
    batch = np.random.default_rng(0).integers(0, 128, (2, 32))

    def norm(x, gain):
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * gain

    def rope(x):  # [b, t, n, h]
        half = x.shape[-1] // 2
        angle = jnp.arange(32)[:, None].astype(jnp.float32) * 500000.0 ** (
            -jnp.arange(half).astype(jnp.float32) / half
        )
        cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
        a, b = x[..., :half], x[..., half:]
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    def plain(params):
        x, blocks = params["embedding"]["w"][batch], params["blocks"]
        for i in range(2):
            p = jax.tree.map(lambda a, i=i: a[i], blocks)
            y = norm(x, p["pre_attention"]["gain"])
            qkv = jnp.einsum("btd,dkgh->btkgh", y, p["attention"]["qkv"]["w"])
            q, k, v = (
                rope(qkv[..., :2, :].reshape(2, 32, 4, 16)),
                rope(qkv[..., 2, :]),
                qkv[..., 3, :],
            )
            s = jnp.einsum("btnh,bsnh->bnts", q, jnp.repeat(k, 2, axis=2)) / 4.0
            s = jnp.where(jnp.tril(jnp.ones((32, 32), bool)), s, -jnp.inf)
            o = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(s, -1), jnp.repeat(v, 2, axis=2))
            x = x + jnp.einsum(
                "btkgh,kghd->btd", o.reshape(2, 32, 2, 2, 16), p["attention"]["out"]["w"]
            )
            y = norm(x, p["pre_ffn"]["gain"])
            ffn = p["feed_forward"]
            x = x + (jax.nn.silu(y @ ffn["gate"]["w"]) * (y @ ffn["up"]["w"])) @ ffn["down"]["w"]
        logits = norm(x, params["final_norm"]["gain"]) @ params["embedding"]["w"].T
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - logits[..., 3])

    wanted, wanted_grads = jax.value_and_grad(plain)(params)
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(wanted_grads), jax.tree.leaves(grads), strict=True
    ):
        assert np.linalg.norm(a - b) <= 1e-4 * np.linalg.norm(a), path
