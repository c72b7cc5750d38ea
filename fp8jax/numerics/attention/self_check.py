"""Check once, before training, that an attention backend agrees on this device with the definition
and the mathematics.

    errors = self_check("composed", {"attention_scores": recipe, "attention_values": recipe})
    errors = self_check("pallas", recipes, statistics=True)      # also checks steps with statistics

The check runs the backend with the given recipes, and `emulated` with the same recipes emulated, on
random inputs: grouped queries, two documents per sequence, more than one chunk, an odd last one,
and operands whose scales all differ, so that a scale that is left out, doubled or given to the
wrong operand shows as an error of at least a factor of two.

Agreement with the definition does not test the definition. So results are also compared with
independent code: attention and its gradients in float64, from the mathematics, within the errors of
FP8 (BOUNDS); and dO times a power of two, which must come back in every gradient.

Only results are compared, not speed; the audit shows which kernels run.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.numerics.attention.definition import SCORES, VALUES, attention
from fp8jax.numerics.attention.scores import score_statistics
from fp8jax.numerics.compiling import compiler_options
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe
from fp8jax.numerics.statistics import HEALTH, REPORT
from fp8jax.numerics.tokens import FULL, Token

# Where the accumulation differs, some elements of P and dS round to the neighbour in FP8. The worst
# accumulation known, Hopper's fast one, is accurate to 1e-3 or so at this length; a wrong scale is
# off by 0.5 or more.
TOLERANCE = 0.02
LENGTH = 640
_MAGNITUDES = {"q": 3.0, "k": 0.05, "v": 20.0, "do": 1e-3}
# Largest relative errors against float64, twice what was measured of such inputs on a CPU with e5m2
# gradients.
BOUNDS = {"o": 0.1, "dq": 0.2, "dk": 0.2, "dv": 0.13}


def self_check(
    backend: str,
    recipes: Mapping[str, GemmRecipe],
    *,
    head_dim: int = 64,
    statistics: bool = False,
    tolerance: float = TOLERANCE,
) -> dict[str, float]:
    """Compare a backend with `emulated` on the default device.

    Args:
        backend: one of `attention.BACKENDS`.
        recipes: recipes of `attention_scores` and `attention_values`, as training will use them.
        head_dim: width of a head.
        statistics: check it as a step with statistics runs it.
        tolerance: largest relative error that passes.

    Returns:
        Relative errors (norm of the difference over norm) of `o`, `dq`, `dk`, `dv`, and, if they
        are measured, of `amax_q`, `amax_k`, `amax_ds`, `amax_v`, `amax_do`. With `statistics`,
        those of output and gradients,
            of the cast of dS (`underflow_ds`,
        `signal_ds` and `noise_ds`), and of `max_logit` and `entropy`.

    Raises:
        ValueError: an error is above the tolerance or not a number, or results are further from
            attention in float64 than FP8 explains; the message names the backend, the device, every
            such error. Static scaling and margins have no bound on their losses and are not
            compared with float64.
    """
    recipes = {role: recipes[role] for role in (SCORES, VALUES)}
    emulated = {
        role: dataclasses.replace(recipe, emulated=True) for role, recipe in recipes.items()
    }
    inputs = _inputs(head_dim)
    scales = _scales(emulated, inputs)
    run, program = _run_with_statistics if statistics else _run, _program(backend, recipes)
    expected = run(_program("emulated", emulated), "emulated", emulated, inputs, scales)
    found = run(program, backend, recipes, inputs, scales)
    errors = {name: _relative(found[name], expected[name]) for name in expected}
    _refuse(backend, "disagrees with 'emulated'", errors, dict.fromkeys(errors, tolerance))
    if all(recipe.scaling != "static" and recipe.margin == 0 for recipe in recipes.values()):
        _check_mathematics(backend, found, inputs)
    if not statistics:
        _check_powers_of_two(program, backend, recipes, inputs, scales, found)
    return errors


def true_attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    do: np.ndarray,
    softmax_scale: float,
    segment_ids: np.ndarray,
) -> dict[str, np.ndarray]:
    """Return output and gradients of causal attention in float64, by name, without casts; shapes as
    for `attention`.
    """
    q, k, v, do = (np.asarray(x).astype(np.float64) for x in (q, k, v, do))
    position = np.arange(q.shape[1])
    seen = (position[:, None] >= position) & (segment_ids[:, :, None] == segment_ids[:, None, :])
    scores = softmax_scale * np.einsum("btkgh,bskh->bkgts", q, k)
    scores = np.where(seen[:, None, None], scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = np.einsum("btkgh,bskh->bkgts", do, v)
    ds = p * (dp - np.sum(p * dp, -1, keepdims=True)) * softmax_scale
    return {
        "o": np.einsum("bkgts,bskh->btkgh", p, v),
        "dq": np.einsum("bkgts,bskh->btkgh", ds, k),
        "dk": np.einsum("bkgts,btkgh->bskh", ds, q),
        "dv": np.einsum("bkgts,btkgh->bskh", p, do),
    }


def _check_mathematics(
    backend: str, found: Mapping[str, np.ndarray], inputs: Mapping[str, jax.Array]
) -> None:
    q, k, v, do, segment_ids = (
        np.asarray(inputs[name]) for name in ("q", "k", "v", "do", "segment_ids")
    )
    expected = true_attention(q, k, v, do, _softmax_scale(q.shape[-1]), segment_ids)
    errors = {name: _relative(found[name], expected[name]) for name in BOUNDS}
    _refuse(backend, "is further from attention in float64 than FP8 explains", errors, BOUNDS)


def _check_powers_of_two(
    program: Callable[..., Any],
    backend: str,
    recipes: Mapping[str, GemmRecipe],
    inputs: Mapping[str, jax.Array],
    scales: Mapping[str, jax.Array],
    found: Mapping[str, np.ndarray],
) -> None:
    """Check that dO, with delayed scales of dO and dS, 16 times larger gives 16 times the
    gradients; static scales stay.
    """
    if any(recipe.scaling == "static" for recipe in recipes.values()):
        return
    larger = {role: some.at[-1].multiply(16) for role, some in scales.items()}
    again = _run(
        program, backend, recipes, {**inputs, "do": inputs["do"] * jnp.bfloat16(16)}, larger
    )
    errors = {
        name: _relative(again[name], 16 * np.asarray(found[name], np.float64))
        for name in ("dq", "dk", "dv")
    }
    _refuse(
        backend,
        "does not pass on powers of two of the output's gradient",
        errors,
        dict.fromkeys(errors, 1e-3),
    )


def _refuse(
    backend: str, fault: str, errors: Mapping[str, float], bounds: Mapping[str, float]
) -> None:
    wrong = [name for name, error in errors.items() if not error <= bounds[name]]
    if wrong:
        found = ", ".join(f"{name} {errors[name]:.3g}" for name in wrong)
        allowed = ", ".join(f"{bound:g}" for bound in sorted({bounds[name] for name in wrong}))
        raise ValueError(
            f"attention backend {backend!r} {fault} on {jax.devices()[0].device_kind}: "
            f"relative errors {found}; tolerance {allowed}; use 'emulated', or another backend"
        )


def _inputs(head_dim: int) -> dict[str, jax.Array]:
    """Return q, k, v, do in bfloat16 and segment_ids: one sequence, two KV heads, two query heads
    each.
    """
    random = np.random.default_rng(0)
    few, many = (1, LENGTH, 2, head_dim), (1, LENGTH, 2, 2, head_dim)
    shapes = {"q": many, "k": few, "v": few, "do": many}
    arrays = {
        name: jnp.asarray(random.normal(scale=_MAGNITUDES[name], size=shape), jnp.bfloat16)
        for name, shape in shapes.items()
    }
    return arrays | {"segment_ids": jnp.asarray(np.arange(LENGTH)[None] >= LENGTH // 3, jnp.int32)}


def _scales(
    recipes: Mapping[str, GemmRecipe], inputs: Mapping[str, jax.Array]
) -> dict[str, jax.Array]:
    """Return scales for delayed scaling: those that the definition finds with current scaling."""
    delayed = {role: recipe for role, recipe in recipes.items() if recipe.scaling == "delayed"}
    if not delayed:
        return {}
    current = {
        role: dataclasses.replace(recipe, scaling="current") for role, recipe in delayed.items()
    }
    mixed = {**recipes, **current}
    found = _run(_program("emulated", mixed), "emulated", mixed, inputs, {})

    def scale(recipe: GemmRecipe, name: str) -> jax.Array:
        return recipe.scale(jnp.float32(found[f"amax_{name}"]), recipe.format(name))

    return {
        role: jnp.stack([scale(recipe, name) for name in OPERANDS[role]])
        for role, recipe in delayed.items()
    }


def _softmax_scale(head_dim: int) -> float:
    """Return the factor that brings the scores to a standard deviation of about 1."""
    return 1 / (_MAGNITUDES["q"] * _MAGNITUDES["k"] * head_dim**0.5)


def _run(
    program: Callable[..., Any],
    backend: str,
    recipes: Mapping[str, GemmRecipe],
    inputs: Mapping[str, jax.Array],
    scales: Mapping[str, jax.Array],
) -> dict[str, np.ndarray]:
    """Return output, gradients and amaxes by name; the program is that of backend and recipes."""
    tokens = {
        role: jnp.zeros(len(OPERANDS[role]), jnp.float32)
        for role, recipe in recipes.items()
        if recipe.measured
    }
    found, amaxes = _attend(program, inputs, scales, tokens)
    return found | {
        f"amax_{name}": amaxes[role][i] for role in tokens for i, name in enumerate(OPERANDS[role])
    }


def _run_with_statistics(
    program: Callable[..., Any],
    backend: str,
    recipes: Mapping[str, GemmRecipe],
    inputs: Mapping[str, jax.Array],
    scales: Mapping[str, jax.Array],
) -> dict[str, np.ndarray]:
    """Return output, gradients, the effects of the cast of dS, and the spread of scores, by name."""
    widths = {role: (len(OPERANDS[role]), len(REPORT)) for role in recipes}
    tokens = {role: Token(jnp.zeros(shape, jnp.float32), FULL) for role, shape in widths.items()}
    found, reports = _attend(program, inputs, scales, tokens)
    ds = reports[SCORES].values[OPERANDS[SCORES].index("ds")]

    @_compiled
    def spread(q, k):
        return score_statistics(
            q,
            k,
            recipes[SCORES],
            softmax_scale=_softmax_scale(q.shape[-1]),
            scales=scales.get(SCORES),
            segment_ids=inputs["segment_ids"],
            backend=backend,
        )

    casts = {
        f"{name}_ds": ds[HEALTH.index(name)]
        for name in ("underflow", "signal", "noise")
        if recipes[SCORES].fp8
    }
    return found | casts | jax.device_get(spread(inputs["q"], inputs["k"]))


def _program(backend: str, recipes: Mapping[str, GemmRecipe]) -> Callable[..., Any]:
    """Return a function of (q, k, v, do, segment_ids, scales, tokens) to output, gradients, and
    token cotangents; compiled once.
    """

    @_compiled
    def both(q, k, v, do, segment_ids, scales, tokens):
        def forward(q, k, v, tokens):
            return attention(
                q,
                k,
                v,
                recipes,
                softmax_scale=_softmax_scale(q.shape[-1]),
                segment_ids=segment_ids,
                scales=scales,
                tokens=tokens,
                backend=backend,
            )

        o, backward = jax.vjp(forward, q, k, v, tokens)
        return o, *backward(do)

    return both


def _attend(
    program: Callable[..., Any],
    inputs: Mapping[str, jax.Array],
    scales: Mapping[str, jax.Array],
    tokens: Mapping[str, Token | jax.Array],
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return output and gradients by name, and the tokens' cotangents."""
    arrays = (inputs[name] for name in ("q", "k", "v", "do", "segment_ids"))
    o, dq, dk, dv, reports = jax.device_get(program(*arrays, scales, dict(tokens)))
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}, reports


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function as training does: with excess precision, the error of a cast would be 0."""
    return jax.jit(function, compiler_options=compiler_options(jax.default_backend()))


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    difference = np.linalg.norm(found - expected)
    return float(difference / np.linalg.norm(expected)) if difference else 0.0
