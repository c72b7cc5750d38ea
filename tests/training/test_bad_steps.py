"""What is remembered of bad steps, and in what order trouble is named, on arrays alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.training import bad_steps
from fp8jax.training.bad_steps import Health

AMAXES = {
    "qkv": (2, 2),
    "attention_scores": (2, 3),
    "attention_values": (2, 2),
    "attention_out": (2, 2),
    "mlp_up": (2, 2),
    "mlp_down": (2, 2),
    "lm_head": (1, 2),
}
PARAMS = {"blocks": {"up": {"w": jnp.zeros((2, 3))}}, "embedding": {"w": jnp.zeros((4, 3))}}
NONE = jnp.zeros((), bool)
FLAGS = jax.jit(bad_steps.flags)
IS_SPIKE = jax.jit(lambda health, values: health.is_spike(values, 5.0))


def ones():
    return {role: np.ones(shape, np.float32) for role, shape in AMAXES.items()}


def squares():
    return bad_steps.squares(jax.tree.map(jnp.ones_like, PARAMS))


def first(**changes):
    """Name of the first bad tensor; what is not changed is finite."""
    given = {
        "loss": jnp.float32(2.0),
        "amaxes": ones(),
        "squares": squares(),
        "spike": NONE,
    } | changes
    found = np.asarray(FLAGS(*given.values()))
    names = bad_steps.names(ones(), PARAMS)
    assert len(names) == len(found)
    return names[int(found.argmax())] if found.any() else None


def with_nan(*places):
    """Amaxes that are infinite at these (role, layer, operand)."""
    found = ones()
    for role, layer, operand in places:
        found[role][layer, operand] = np.inf
    return found


def test_every_tensor_has_its_name():
    for role, (layers, operands) in AMAXES.items():
        for layer in range(layers):
            for operand in range(operands):
                name = first(amaxes=with_nan((role, layer, operand)))
                where = "" if role == "lm_head" else f" in layer {layer}"
                assert name == f"amax of {role}.{bad_steps.OPERANDS[role][operand]}{where}"
    assert (
        first() is None
        and first(loss=jnp.float32(jnp.nan)) == "loss"
        and first(spike=~NONE) == "spike of the loss or gradient norm"
    )
    bad = [square.at[-1].set(jnp.inf) for square in squares()]
    assert (
        first(squares=bad) == "gradient of blocks.up.w in layer 1"
        and first(squares=[squares()[0], bad[1]]) == "gradient of embedding.w"
    )


def test_trouble_is_named_where_the_step_meets_it_first():
    """Forward from the first layer up, then the loss, then backward from the last layer down, at last the gradients."""
    everywhere = with_nan(
        ("mlp_down", 0, 0), ("qkv", 1, 0), ("mlp_down", 0, 1), ("qkv", 1, 1), ("lm_head", 0, 1)
    )
    assert first(amaxes=everywhere) == "amax of mlp_down.x in layer 0"
    forward = with_nan(("qkv", 1, 0), ("lm_head", 0, 0))
    assert first(amaxes=forward, loss=jnp.float32(jnp.inf)) == "amax of qkv.x in layer 1"
    backward = with_nan(("mlp_down", 0, 1), ("qkv", 1, 1), ("mlp_up", 1, 1))
    bad = [square.at[:].set(jnp.nan) for square in squares()]
    assert first(amaxes=backward, loss=jnp.float32(jnp.nan)) == "loss"
    assert first(amaxes=backward, squares=bad, spike=~NONE) == "amax of mlp_up.g in layer 1"
    assert first(squares=bad, spike=~NONE).startswith("gradient of")


def after(health, bad, loss, norm=1.0):
    return health.after(jnp.asarray(bad), jnp.asarray([loss, norm], jnp.float32))


def test_bad_steps_in_a_row_begin_anew_after_a_good_one():
    health, rows = Health.initial(), []
    for bad in (True, True, False, False, True):
        health = after(health, bad, 2.0)
        rows.append((int(health.bad_steps), int(health.in_a_row)))
    assert rows == [(1, 1), (2, 2), (2, 0), (2, 0), (3, 1)]


def filled(seen=bad_steps.WINDOW):
    """A window of losses near 2 and norms near 1, with robust deviations of 0.1 / 0.6745 and 0.01 / 0.6745."""
    sign = np.where(np.arange(bad_steps.WINDOW) % 2, 1.0, -1.0)
    recent = np.stack([2.0 + 0.1 * sign, 1.0 + 0.01 * sign]).astype(np.float32)
    empty = np.asarray(Health.initial().recent)[:, seen:]
    return dataclasses.replace(
        Health.initial(), recent=jnp.asarray(np.concatenate([empty, recent[:, :seen]], axis=1))
    )


def test_a_spike_of_either_is_one():
    health = filled()
    edge = np.array([2.0 + 5 * 0.1 / 0.6745, 1.0 + 5 * 0.01 / 0.6745])
    for loss, norm, wanted in (
        (edge[0] * 0.99, edge[1] * 0.99, False),
        (edge[0] * 1.02, 1.0, True),
        (2.0, edge[1] * 1.02, True),
        (-9.0, 0.0, False),
    ):
        assert bool(IS_SPIKE(health, jnp.asarray([loss, norm], jnp.float32))) == wanted, (
            loss,
            norm,
        )
    assert not bool(
        IS_SPIKE(filled(bad_steps.WINDOW - 1), jnp.asarray([50.0, 50.0]))
    )  # not before the window is full
