"""Recipes and the user's overrides by role and layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.numerics.recipes import GemmRecipe, Override, parse_overrides

from .reference import E4M3, E5M2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", ()),
        (" , ", ()),
        ("mlp_down=bf16", (Override("mlp_down", "bf16", 0, 7),)),
        (
            " mlp_down = bf16 , qkv@0-3=current",
            (Override("mlp_down", "bf16", 0, 7), Override("qkv", "current", 0, 3)),
        ),
        ("attention_scores@7=delayed", (Override("attention_scores", "delayed", 7, 7),)),
        ("lm_head@2-2=bf16", (Override("lm_head", "bf16", 2, 2),)),
    ],
)
def test_overrides(text, expected):
    assert parse_overrides(text, layers=8) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mlp_down", "'mlp_down' is not role=scaling"),
        ("qkv=bf16;mlp_up=bf16", "'bf16;mlp_up=bf16' in .* is not one of delayed, current, .*bf16"),
        ("mlp=bf16", "'mlp' in 'mlp=bf16' is not one of qkv, "),
        ("=bf16", "'' in '=bf16' is not one of qkv, "),
        ("qkv=fp8", "'fp8' in 'qkv=fp8' is not one of delayed, current"),
        ("qkv=", "'' in 'qkv=' is not one of delayed, current"),
        ("qkv@=bf16", "'' in 'qkv@=bf16' is not a layer or a range"),
        ("qkv@a=bf16", "'a' in 'qkv@a=bf16' is not a layer or a range"),
        ("qkv@-1=bf16", "'-1' in 'qkv@-1=bf16' is not a layer or a range"),
        ("qkv@1-=bf16", "'1-' in 'qkv@1-=bf16' is not a layer or a range"),
        ("qkv@1-2-3=bf16", "'1-2-3' in .* is not a layer or a range"),
        ("qkv@1.5=bf16", "'1.5' in .* is not a layer or a range"),
        ("qkv@8=bf16", "layers 8 in 'qkv@8=bf16' are not within 0-7"),
        ("qkv@3-8=bf16", "layers 3-8 in .* are not within 0-7"),
        ("qkv@5-3=bf16", "layers 5-3 in .* are not within 0-7"),
    ],
)
def test_bad_overrides_are_named(text, message):
    """In one line; the first of several parts that is wrong."""
    for whole in (text, f"mlp_down=bf16,{text}"):
        with pytest.raises(ValueError, match=message) as caught:
            parse_overrides(whole, layers=8)
        assert "\n" not in str(caught.value)


def test_formats_by_operand():
    """HYBRID: e4m3 for everything but gradients; e4m3 gradients on request."""
    formats = {
        operand: GemmRecipe().format(operand)
        for operand in ("x", "w", "q", "k", "v", "g", "ds", "do")
    }
    assert formats == {
        "x": E4M3,
        "w": E4M3,
        "q": E4M3,
        "k": E4M3,
        "v": E4M3,
        "g": E5M2,
        "ds": E5M2,
        "do": E5M2,
    }
    assert GemmRecipe(gradient_format="e4m3").format("g") == E4M3


def test_which_scale_an_operand_gets():
    """Delayed: the one given, but weights their own; current: always their own. bf16: none, and no cast."""
    x, given = jnp.asarray([448.0, 1.0], jnp.float32), jnp.float32(4)
    assert [
        float(GemmRecipe("delayed").quantise(x, given, operand)[0].scale) for operand in ("x", "w")
    ] == [4, 1]
    assert (
        float(GemmRecipe("delayed", weight_scaling="delayed").quantise(x, given, "w")[0].scale) == 4
    )
    assert [
        float(GemmRecipe("current").quantise(x, given, operand)[0].scale) for operand in ("x", "g")
    ] == [1, 2.0**-7]
    q, amax = GemmRecipe("bf16").quantise(x, given, "x")
    assert q.data is x and q.scale is None and amax is None


def test_recipes_are_hashable():
    """They are static arguments of compiled functions."""
    assert (
        hash(GemmRecipe("current"))
        == hash(GemmRecipe("current"))
        != hash(GemmRecipe("current", margin=1))
    )
    np.testing.assert_equal({GemmRecipe(): 1}[GemmRecipe()], 1)
