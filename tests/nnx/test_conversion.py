"""A Llama of somebody else's becomes FP8 and plain again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import fp8jax
from fp8jax.audit.jaxpr import traced_gemms
from tests.helpers.llama import Llama, StackedLlama, next_token_loss

CURRENT = fp8jax.Recipe("current", emulated=True)
DELAYED = fp8jax.Recipe("delayed", history_length=4, emulated=True)
TOKENS = jax.random.randint(jax.random.key(0), (2, 17), 0, 64)


def gradient(model):
    run = nnx.jit(lambda m, tokens: fp8jax.nnx.value_and_grad(next_token_loss)(m, tokens))
    return run(model, TOKENS)


def linear_gemms(model):
    """GEMMs of a traced gradient that have a weight: attention's have batch dimensions."""
    definition, state = nnx.split(model)

    def loss_and_gradient(state):
        loss, grads = fp8jax.nnx.value_and_grad(next_token_loss)(
            nnx.merge(definition, state), TOKENS
        )
        return loss, nnx.state(grads)

    gemms = traced_gemms(jax.make_jaxpr(loss_and_gradient)(state))
    return [gemm for gemm in gemms if gemm.shape[0] == 1]


@pytest.mark.parametrize("make", [Llama, StackedLlama])
@pytest.mark.parametrize("emulated", [True, False])
def test_every_linear_has_three_fp8_gemms_in_the_traced_program(make, emulated):
    recipe = fp8jax.Recipe("delayed", history_length=4, emulated=emulated)
    gemms = linear_gemms(fp8jax.nnx.quantize(make(rngs=nnx.Rngs(0)), [("*", recipe)], log=None))
    first = [gemm for gemm in gemms if not gemm.repeated]
    assert all(gemm.fp8 for gemm in gemms)
    assert sum(gemm.count for gemm in first) >= 3 * (2 * 7 + 1)


def cast(x, dtype):
    """FP8 and back, at the power-of-two scale of the largest magnitude."""
    scale = 2.0 ** jnp.ceil(jnp.log2(jnp.max(jnp.abs(x)) / float(jnp.finfo(dtype).max)))
    return (x / scale).astype(dtype).astype(jnp.float32) * scale


@jax.custom_vjp
def by_hand(x, w):
    return cast(x, jnp.float8_e4m3fn) @ cast(w, jnp.float8_e4m3fn)


def by_hand_backward(saved, g):
    x, w = (cast(operand, jnp.float8_e4m3fn) for operand in saved)
    g = cast(g, jnp.float8_e5m2)
    return g @ w.T, jnp.einsum("btd,btf->df", x, g)


by_hand.defvjp(lambda x, w: (by_hand(x, w), (x, w)), by_hand_backward)


def test_loss_and_gradients_are_those_of_casts_written_by_hand():
    model = Llama(rngs=nnx.Rngs(0))
    plain_loss, plain = gradient(model)
    found = [gradient(fp8jax.nnx.quantize(model, r, log=None)) for r in (CURRENT, DELAYED)]
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.Linear):
            module.dot_general = lambda x, w, *_, **__: by_hand(x, w)
    by_hand_loss, expected = gradient(model)
    for loss, grads in found:
        np.testing.assert_allclose(loss, by_hand_loss, rtol=1e-4)
        np.testing.assert_allclose(loss, plain_loss, rtol=0.01)
        assert nnx.to_flat_state(grads).paths == nnx.to_flat_state(plain).paths
        leaves = map(jax.tree.leaves, (grads, expected, plain))
        for one, other, exact in zip(*leaves, strict=True):
            assert np.linalg.norm(one - other) < 0.03 * np.linalg.norm(other)
            assert np.linalg.norm(one - exact) < 0.4 * np.linalg.norm(exact)


@pytest.mark.parametrize("make", [Llama, StackedLlama])
def test_there_and_back_is_the_same_model_and_shares_every_parameter(make):
    model = make(rngs=nnx.Rngs(0))
    fp8 = fp8jax.nnx.quantize(model, {"*": DELAYED}, log=None)
    gradient(fp8)
    back = fp8jax.nnx.dequantize(fp8)
    assert nnx.graphdef(back) == nnx.graphdef(model)
    np.testing.assert_array_equal(back(TOKENS), model(TOKENS))
    assert np.any(np.asarray(fp8(TOKENS)) != np.asarray(model(TOKENS)))
    for one in (fp8, back):
        assert one.lm_head.kernel is model.lm_head.kernel
        assert one.embed.embedding is model.embed.embedding


def test_the_first_rule_that_applies_counts_and_the_rest_stays():
    printed = []
    rules = [("lm_head", None), ("layers.1", None), ("*.attention.*", CURRENT)]
    fp8 = fp8jax.nnx.quantize(Llama(rngs=nnx.Rngs(0)), rules, log=printed.append)
    found = fp8jax.nnx.report(fp8)
    names = ("wk", "wo", "wq", "wv")
    assert [line.path for line in found.changed] == [f"layers.0.attention.{n}" for n in names]
    assert len(found.unchanged) == 11
    (text,) = printed
    assert "4 of 15 layers with GEMMs in FP8" in text
    assert "layers.0.attention.wq (Linear): FP8, current scaling" in text
    assert "lm_head (Linear): unchanged: rule 'lm_head'" in text
    assert "layers.0.mlp.up (Linear): unchanged: no rule" in text


def test_a_pattern_for_nothing_names_the_nearest_path():
    with pytest.raises(
        ValueError, match=r"'\*\.atention\.\*' matches no layer.*'layers\.\d\.attention"
    ):
        fp8jax.nnx.quantize(Llama(rngs=nnx.Rngs(0)), [("*.atention.*", CURRENT)])
    with pytest.raises(ValueError, match="'head' matches no layer; nearest path: 'lm_head'"):
        fp8jax.nnx.quantize(Llama(rngs=nnx.Rngs(0)), [("head", CURRENT)])
    with pytest.raises(ValueError, match="the model has no Linear"):
        fp8jax.nnx.quantize(nnx.RMSNorm(3, rngs=nnx.Rngs(0)), [("*", CURRENT)])
    with pytest.raises(TypeError, match=r"rule '\*': recipe='fp8' is neither"):
        fp8jax.nnx.quantize(Llama(rngs=nnx.Rngs(0)), [("*", "fp8")])


def test_layers_with_a_product_of_their_own_stay_and_the_report_says_why():
    class Own(nnx.Linear):
        pass

    class Model(nnx.Module):
        def __init__(self):
            rngs = nnx.Rngs(0)
            self.own = Own(2, 2, rngs=rngs)
            self.product = nnx.Linear(2, 2, dot_general=lambda *a, **k: None, rngs=rngs)
            self.einsum = nnx.Einsum("ab,bc->ac", (2, 3), rngs=rngs)
            self.general = nnx.LinearGeneral(2, (3, 4), rngs=rngs)

    printed = []
    fp8 = fp8jax.nnx.quantize(Model(), CURRENT, log=printed.append)
    assert "own (Own): unchanged: a subclass may compute otherwise" in printed[0]
    assert "product (Linear): unchanged: it has a dot_general of its own" in printed[0]
    assert {line.path for line in fp8jax.nnx.report(fp8).changed} == {"einsum", "general"}


def test_a_layer_used_in_two_places_is_converted_once():
    layer = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
    fp8 = fp8jax.nnx.quantize({"a": layer, "b": layer}, DELAYED, log=None)
    assert fp8["a"] is fp8["b"]

    def loss(model, x):
        return jnp.sum(model["b"](model["a"](x)))

    x = jnp.ones((2, 4))
    nnx.jit(lambda model, x: fp8jax.nnx.value_and_grad(loss)(model, x))(fp8, x)
    assert np.asarray(fp8["a"].scaling.scale[...]).all()


class TestMultiHeadAttention:
    X = jax.random.normal(jax.random.key(2), (2, 8, 16))

    def make(self, lib=nnx, **kwargs):
        return lib.MultiHeadAttention(
            4, 16, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0), **kwargs
        )

    def test_five_layers_in_fp8_near_flaxs_in_all_gradients(self):
        plain = self.make()
        fp8 = fp8jax.nnx.quantize(plain, DELAYED, log=None)
        own = self.make(fp8jax.nnx, recipe=DELAYED)

        def loss(model, x):
            return jnp.sum(jnp.sin(model(x, is_causal=True)))

        run = nnx.jit(lambda m, x: fp8jax.nnx.value_and_grad(loss, argnums=(0, 1))(m, x))
        expected = jax.tree.leaves(run(plain, self.X))
        largest = max(map(np.linalg.norm, expected))
        for model in (fp8, own):
            assert len(fp8jax.nnx.report(model).changed) == 5
            for one, other in zip(jax.tree.leaves(run(model, self.X)), expected, strict=True):
                # A bias of keys changes nothing: its gradient is 0 but for rounding.
                assert np.linalg.norm(one - other) < 0.2 * np.linalg.norm(other) + 0.02 * largest
            states = jax.tree.leaves(nnx.state(model.core, fp8jax.nnx.Scaling))
            assert sum(bool(np.asarray(state).any()) for state in states) == 4

    @pytest.mark.parametrize(
        ("kwargs", "why"),
        [
            ({}, "not causal"),
            ({"mask": jnp.ones((2, 1, 8, 8), bool)}, "not known to be the causal one"),
            ({"is_causal": True, "sow_weights": True}, "sow_weights"),
        ],
    )
    def test_other_attention_is_flaxs_with_a_reason(self, kwargs, why):
        model = fp8jax.nnx.quantize(self.make(), [("attention_fn", CURRENT)], log=None)
        with pytest.warns(UserWarning, match=why):
            np.testing.assert_array_equal(model(self.X, **kwargs), self.make()(self.X, **kwargs))

    def test_a_causal_mask_known_while_tracing_is_seen(self):
        model = fp8jax.nnx.quantize(self.make(), CURRENT, log=None)
        mask = nnx.make_causal_mask(jnp.ones((2, 8)))
        np.testing.assert_array_equal(model(self.X, mask=mask), model(self.X, is_causal=True))

    def test_without_a_recipe_it_is_flaxs(self):
        ours, theirs = self.make(fp8jax.nnx), self.make()
        np.testing.assert_array_equal(ours(self.X), theirs(self.X))


def test_gemms_carry_their_path_as_role_in_programs():
    rules = [("*.attention", DELAYED), ("lm_head", CURRENT)]
    gemms = linear_gemms(fp8jax.nnx.quantize(Llama(rngs=nnx.Rngs(0)), rules, log=None))
    found = {(gemm.role, gemm.pass_name) for gemm in gemms if gemm.fp8}
    roles = [f"layers.{i}.attention.{n}" for i in (0, 1) for n in ("wq", "wk", "wv", "wo")]
    passes = ("fprop", "dgrad", "wgrad")
    assert found == {(role, p) for role in (*roles, "lm_head") for p in passes}


def test_stacked_attention_has_a_state_for_each_layer():
    def make(rngs):
        return nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)

    stacked = nnx.vmap(make, in_axes=0, out_axes=0)(nnx.Rngs(0).fork(split=3))
    fp8 = fp8jax.nnx.quantize(stacked, DELAYED, log=None)

    def loss(model, x):
        run = nnx.scan(
            lambda x, layer: layer(x, is_causal=True), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry
        )
        return jnp.sum(run(x, model) ** 2)

    x = jax.random.normal(jax.random.key(0), (2, 4, 8))
    nnx.jit(lambda m, x: fp8jax.nnx.value_and_grad(loss)(m, x))(fp8, x)
    assert fp8.core.scores.scale.shape == (3, 3)
    assert fp8.core.values.scale.shape == (3, 2)
    for _, state in fp8jax.nnx.scaling.role_scalings(fp8):
        assert np.asarray(state.scale[...]).all()


def test_attention_as_a_module_keeps_histories_and_masks_documents():
    q = jax.random.normal(jax.random.key(0), (2, 8, 2, 4))
    segments = jnp.repeat(jnp.arange(2), 4)[None].repeat(2, axis=0)
    attend = fp8jax.nnx.Attention(recipe=DELAYED)

    def loss(attend, q):
        return jnp.sum(attend(q, q, q, segment_ids=segments) ** 2)

    run = nnx.jit(lambda m, q: fp8jax.nnx.value_and_grad(loss)(m, q)[0])
    expected = jnp.sum(fp8jax.attention(q, q, q, CURRENT, segment_ids=segments) ** 2)
    np.testing.assert_allclose(run(attend, q), expected, rtol=1e-6)
    largest = float(jnp.max(jnp.abs(q)))
    np.testing.assert_array_equal(attend.scores.history[:2, 0], [largest] * 2)
    np.testing.assert_array_equal(attend.values.history[0, 0], largest)
    assert attend.scores.history[2, 0] > 0
