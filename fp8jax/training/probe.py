"""Measure what FP8 does to the gradients of a batch, beside those of a reference recipe on the same
state.

    found = compare(run_grads, reference_grads)      # matrix → sums, float32 [layers, 4]; jit this
    harm = Harm.of(jax.device_get(found))
    harm.error, harm.cosine, harm.norm_ratio         # over all matrices of the blocks
    harm.by_place("error")                           # matrix → float64 [layers]

    probe = Probe(program)                           # the run's recipe against BF16
    probe.harm(state, batch)

The state is used as it stands, delayed scales included, and nothing of it changes. The error is
|g_run - g_ref| / |g_ref| over the matrices of the blocks. Queries, keys and values, which are one
matrix, are compared one by one.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fp8jax.config import ConfigError
from fp8jax.models.definition import STACKED, Params, define
from fp8jax.models.model_recipes import ModelRecipes
from fp8jax.plan import Plan
from fp8jax.training.gradients import gradients
from fp8jax.training.losses import Batch
from fp8jax.training.optimizer import MATRIX
from fp8jax.training.state import TrainState
from fp8jax.training.step import TrainProgram

AGAINST = ("bf16", "float32")
Sums = dict[str, jax.Array]
_NAMES = {"feed_forward": "mlp"}


def compare(run: Params, reference: Params) -> Sums:
    """Return |run - reference|², run · reference, |run|² and |reference|² of each matrix of the
    blocks.

    Args:
        run: gradients in the run's recipe, like the parameters, of any dtypes.
        reference: gradients in the reference recipe.

    Returns:
        Name ('q', 'attention_out', 'mlp_up', ...) → float32 [layers, 4].
    """
    ours, theirs = _matrices(run), _matrices(reference)
    return {name: _sums(ours[name], theirs[name]) for name in ours}


def _sums(run: jax.Array, reference: jax.Array) -> jax.Array:
    a, b = run.astype(jnp.float32), reference.astype(jnp.float32)
    return jnp.stack([_dot(a - b, a - b), _dot(a, b), _dot(a, a), _dot(b, b)], axis=-1)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    rows = jnp.sum(a * b, axis=-1)  # first the rows: one long sum in float32 loses digits
    return jnp.sum(rows, axis=tuple(range(1, rows.ndim)))


def _matrices(grads: Params) -> dict[str, jax.Array]:
    """Return the matrices of the blocks, [layers, ...], by name."""
    out: dict[str, jax.Array] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads[STACKED]):
        *inside, last = (str(key.key) for key in path)
        if last != MATRIX:
            continue
        if inside[-1] == "qkv":  # [layers, embed, kv heads, queries + k + v, features]
            out |= {"q": leaf[..., :-2, :], "k": leaf[..., -2, :], "v": leaf[..., -1, :]}
        else:
            out["_".join(_NAMES.get(part, part) for part in inside)] = leaf
    return out


@dataclasses.dataclass(frozen=True)
class Harm:
    """What FP8 did to gradients: sums of `compare` on the host, float64, added over batches.

    Attributes:
        sums: matrix → [layers, 4].
        batches: how many batches they are of.
    """

    sums: Mapping[str, np.ndarray]
    batches: int = 1

    @staticmethod
    def of(found: Mapping[str, Any]) -> "Harm":
        """Return the harm of fetched sums."""
        return Harm({name: np.asarray(values, np.float64) for name, values in found.items()})

    def __add__(self, other: "Harm") -> "Harm":
        """Return the harm over the batches of both."""
        sums = {name: values + other.sums[name] for name, values in self.sums.items()}
        return Harm(sums, self.batches + other.batches)

    @functools.cached_property
    def total(self) -> np.ndarray:
        """Return the sums over all matrices and layers, [4]."""
        return np.sum([values.sum(axis=0) for values in self.sums.values()], axis=0)

    @property
    def error(self) -> float:
        """Return |run - reference| / |reference|; infinite where a gradient is not finite."""
        return float(_error(self.total))

    @property
    def cosine(self) -> float:
        """Return the cosine between both gradients."""
        return float(_cosine(self.total))

    @property
    def norm_ratio(self) -> float:
        """Return |run| / |reference|."""
        return float(_norm_ratio(self.total))

    @property
    def worst(self) -> float:
        """Return the largest error of one matrix in one layer, of all but queries and keys.

        Those have almost no gradient in the first steps of a run, and so errors of that size in
        healthy ones.
        """
        places = self.by_place()
        return max(float(np.max(places[name])) for name in places if name not in ("q", "k"))

    def entries(self) -> dict[str, float]:
        """Return the numbers for a line of the log: `probe/error`, `probe/error_mlp_up_layer003`,
        ...
        """
        whole = {"error": self.error, "cosine": self.cosine, "norm_ratio": self.norm_ratio}
        return {f"probe/{name}": value for name, value in whole.items()} | {
            f"probe/error_{name}_layer{layer:03d}": float(value)
            for name, values in self.by_place().items()
            for layer, value in enumerate(values)
        }

    def by_place(self, measure: str = "error") -> dict[str, np.ndarray]:
        """Return `error`, `cosine`, `norm_ratio`, or the `share` of the squared error; matrix →
        [layers].
        """
        if measure == "share":
            whole = self.total[0] or 1.0
            return {name: values[:, 0] / whole for name, values in self.sums.items()}
        chosen = {"error": _error, "cosine": _cosine, "norm_ratio": _norm_ratio}[measure]
        return {name: chosen(values) for name, values in self.sums.items()}


def _error(sums: np.ndarray) -> np.ndarray:
    return _ratio(np.sqrt(sums[..., 0]), np.sqrt(sums[..., 3]))


def _norm_ratio(sums: np.ndarray) -> np.ndarray:
    return _ratio(np.sqrt(sums[..., 2]), np.sqrt(sums[..., 3]))


def _cosine(sums: np.ndarray) -> np.ndarray:
    norms = np.sqrt(sums[..., 2]) * np.sqrt(sums[..., 3])
    found = sums[..., 1] / np.where(norms > 0, norms, 1.0)
    both_zero = (sums[..., 2] == 0) & (sums[..., 3] == 0)
    return np.where(both_zero, 1.0, found)


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return above / below; 0 for two zeros, infinite where it is no number."""
    with np.errstate(divide="ignore", invalid="ignore"):
        found = np.where((above == 0) & (below == 0), 0.0, above / below)
    return np.where(np.isnan(found), np.inf, found)


class Probe:
    """Gradients of a program's recipe beside those of a reference, compiled at the first use.

    Memory: one pass of gradients, and a second gradient tree.

    Args:
        program: the run's program.
        against: the reference, `bf16` or `float32`.

    Raises:
        ConfigError: `against` is unknown.
    """

    def __init__(self, program: TrainProgram, against: str = "bf16"):
        if against not in AGAINST:
            raise ConfigError(f"against={against!r}: is not one of {', '.join(AGAINST)}")
        self.program = program
        plan = program.plan if against == "bf16" else _in_float32(program.plan)
        self._reference = self._jitted(plan, plan.bf16_recipes)
        self._compare = jax.jit(compare, out_shardings=program.replicated)
        self._run = self._jitted(program.plan, program.recipes)

    def _jitted(self, plan: Plan, recipes: ModelRecipes) -> Any:
        program, config = self.program, plan.config

        def grads(state: TrainState, batch: Batch) -> Params:
            with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
                return gradients(state, batch, config, plan.definition, recipes).grads

        return jax.jit(
            grads,
            out_shardings=program.state_shardings.params,
            compiler_options=program.compiler_options,
        )

    def jitted(self) -> dict[str, Any]:
        """Return the jitted functions of (state, batch), for tracing."""
        return {"probe": self._run, "probe, reference": self._reference}

    def reference(self, state: TrainState, batch: Batch) -> Params:
        """Return the gradients of the reference."""
        return self._reference(state, batch)

    def harm(self, state: TrainState, batch: Batch, reference: Params | None = None) -> Harm:
        """Return the harm on one batch; `reference` is that of the same state and batch, if it is
        known.
        """
        reference = self.reference(state, batch) if reference is None else reference
        return Harm.of(jax.device_get(self._compare(self._run(state, batch), reference)))

    def without(self, overrides: str, state: TrainState, batch: Batch, reference: Params) -> Harm:
        """Return the harm with more exceptions, as `config.fp8.overrides`; compiles a program of
        its own.
        """
        plan = self.program.plan.with_overrides(overrides)
        return self.with_recipes(plan.recipes, state, batch, reference)

    def with_recipes(
        self, recipes: ModelRecipes, state: TrainState, batch: Batch, reference: Params
    ) -> Harm:
        """Return the harm of other recipes; compiles a program of its own."""
        run = self._jitted(self.program.plan, recipes)(state, batch)
        return Harm.of(jax.device_get(self._compare(run, reference)))

    def distance(self, a: Params, b: Params) -> float:
        """Return |a - b|², over the matrices of the blocks."""
        return float(Harm.of(jax.device_get(self._compare(a, b))).total[0])


def _in_float32(plan: Plan) -> Plan:
    """Return the plan of the same model computed in float32, whose attention is that of the
    definition.
    """
    config = plan.config
    model = dataclasses.replace(config.model, dtype="float32")
    definition = define(
        dataclasses.replace(plan.definition.config, dtype="float32"), plan.definition.vocab_size
    )
    recipes = dataclasses.replace(plan.bf16_recipes, attention_backends=())
    changed = dataclasses.replace(config, model=model)
    return dataclasses.replace(plan, config=changed, definition=definition, bf16_recipes=recipes)
