"""Does an attention backend compute on this device what the definition says? Asked once, before training starts.

    errors = self_check("composed", {"attention_scores": recipe, "attention_values": recipe})
    errors = self_check("pallas", recipes, statistics=True)      # also what steps with statistics run

Runs the backend with the recipes as they are, and `emulated` with the same recipes emulated, on random inputs: grouped
queries, two documents a sequence, more than one chunk, an odd last one, and operands whose scales all differ, so that a
scale that is left out, doubled or given to the wrong operand shows as an error of a factor of two at the least.

It compares results, not speed, and says nothing about the kernels that ran: that is the audit's business.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.numerics.attention import SCORES, VALUES, attention
from fp8jax.numerics.attention_statistics import score_statistics
from fp8jax.numerics.compiling import compiler_options
from fp8jax.numerics.recipes import OPERANDS, GemmRecipe
from fp8jax.numerics.statistics import HEALTH, REPORT

# Where the accumulation differs, some elements of P and dS round to the neighbour in FP8. The worst accumulation known,
# Hopper's fast one, is accurate to 1e-3 or so at this length; a wrong scale is off by 0.5 or more.
TOLERANCE = 0.02
LENGTH = 640
_MAGNITUDES = {"q": 3.0, "k": 0.05, "v": 20.0, "do": 1e-3}


def self_check(backend: str, recipes: Mapping[str, GemmRecipe], *, head_dim: int = 64, statistics: bool = False,
               tolerance: float = TOLERANCE) -> dict[str, float]:
    """Compares a backend with `emulated` on the default device.

    Args:
        backend: one of `attention.BACKENDS`.
        recipes: of `attention_scores` and `attention_values`, as training will use them.
        head_dim: width of a head.
        statistics: as a step with statistics runs it.
        tolerance: largest relative error that passes.

    Returns:
        Relative errors (norm of the difference over norm) of `o`, `dq`, `dk`, `dv`, and, where they are measured, of `amax_q`,
        `amax_k`, `amax_ds`, `amax_v`, `amax_do`. With `statistics`, of output and gradients, of what the cast of dS does, `underflow_ds`,
        `signal_ds` and `noise_ds`, and of `max_logit` and `entropy`.

    Raises:
        ValueError: an error is above the tolerance or not a number; names the backend, the device, every such error.
    """
    recipes = {role: recipes[role] for role in (SCORES, VALUES)}
    emulated = {role: dataclasses.replace(recipe, emulated=True) for role, recipe in recipes.items()}
    inputs = _inputs(head_dim)
    scales = _scales(emulated, inputs)
    run = _run_with_statistics if statistics else _run
    expected, found = run("emulated", emulated, inputs, scales), run(backend, recipes, inputs, scales)
    errors = {name: _relative(found[name], expected[name]) for name in expected}
    wrong = ", ".join(f"{name} {error:.3g}" for name, error in errors.items() if not error <= tolerance)
    if wrong:
        raise ValueError(f"attention backend {backend!r} disagrees with 'emulated' on {jax.devices()[0].device_kind}: "
                         f"relative errors {wrong}; tolerance {tolerance:g}; use 'emulated', or another backend")
    return errors


def _inputs(head_dim: int) -> dict[str, jax.Array]:
    """q, k, v, do in bfloat16 and segment_ids: one sequence, two KV heads, two query heads each."""
    random = np.random.default_rng(0)
    few, many = (1, LENGTH, 2, head_dim), (1, LENGTH, 2, 2, head_dim)
    shapes = {"q": many, "k": few, "v": few, "do": many}
    arrays = {name: jnp.asarray(random.normal(scale=_MAGNITUDES[name], size=shape), jnp.bfloat16)
              for name, shape in shapes.items()}
    return arrays | {"segment_ids": jnp.asarray(np.arange(LENGTH)[None] >= LENGTH // 3, jnp.int32)}


def _scales(recipes: Mapping[str, GemmRecipe], inputs: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Scales for delayed scaling: those that the definition finds with current scaling."""
    delayed = {role: recipe for role, recipe in recipes.items() if recipe.scaling == "delayed"}
    if not delayed:
        return {}
    current = {role: dataclasses.replace(recipe, scaling="current") for role, recipe in delayed.items()}
    found = _run("emulated", {**recipes, **current}, inputs, {})

    def scale(recipe: GemmRecipe, name: str) -> jax.Array:
        return recipe.scale(jnp.float32(found[f"amax_{name}"]), recipe.format(name))

    return {role: jnp.stack([scale(recipe, name) for name in OPERANDS[role]]) for role, recipe in delayed.items()}


def _softmax_scale(head_dim: int) -> float:
    """Brings the scores to a standard deviation of about 1."""
    return 1 / (_MAGNITUDES["q"] * _MAGNITUDES["k"] * head_dim**0.5)


def _run(backend: str, recipes: Mapping[str, GemmRecipe], inputs: Mapping[str, jax.Array],
         scales: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Output, gradients and amaxes by name."""
    tokens = {role: jnp.zeros(len(OPERANDS[role]), jnp.float32) for role, recipe in recipes.items() if recipe.measured}
    found, amaxes = _attend(backend, recipes, inputs, scales, tokens)
    return found | {f"amax_{name}": amaxes[role][i] for role in tokens for i, name in enumerate(OPERANDS[role])}


def _run_with_statistics(backend: str, recipes: Mapping[str, GemmRecipe], inputs: Mapping[str, jax.Array],
                         scales: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Output, gradients, what the cast of dS does, and the spread of scores, by name."""
    tokens = {role: jnp.zeros((len(OPERANDS[role]), len(REPORT)), jnp.float32) for role in recipes}
    found, reports = _attend(backend, recipes, inputs, scales, tokens)
    ds = reports[SCORES][OPERANDS[SCORES].index("ds")]

    @_compiled
    def spread(q, k):
        return score_statistics(q, k, recipes[SCORES], softmax_scale=_softmax_scale(q.shape[-1]), scales=scales.get(SCORES),
                                segment_ids=inputs["segment_ids"], backend=backend)

    casts = {f"{name}_ds": ds[HEALTH.index(name)] for name in ("underflow", "signal", "noise") if recipes[SCORES].fp8}
    return found | casts | jax.device_get(spread(inputs["q"], inputs["k"]))


def _attend(backend: str, recipes: Mapping[str, GemmRecipe], inputs: Mapping[str, jax.Array], scales: Mapping[str, jax.Array],
            tokens: Mapping[str, jax.Array]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Output and gradients by name, and what the tokens bring back."""
    q, k, v, do = (inputs[name] for name in ("q", "k", "v", "do"))

    @_compiled
    def both(q, k, v, do, segment_ids, scales, tokens):
        def forward(q, k, v, tokens):
            return attention(q, k, v, recipes, softmax_scale=_softmax_scale(q.shape[-1]), segment_ids=segment_ids, scales=scales,
                             tokens=tokens, backend=backend)

        o, backward = jax.vjp(forward, q, k, v, tokens)
        return o, *backward(do)

    o, dq, dk, dv, reports = jax.device_get(both(q, k, v, do, inputs["segment_ids"], scales, dict(tokens)))
    return {"o": o, "dq": dq, "dk": dk, "dv": dv}, reports


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As training compiles it: with excess precision, the error of a cast is 0."""
    return jax.jit(function, compiler_options=compiler_options(jax.default_backend()))


def _relative(found: np.ndarray, expected: np.ndarray) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    difference = np.linalg.norm(found - expected)
    return float(difference / np.linalg.norm(expected)) if difference else 0.0
