"""Errors, time and memory of one linear layer in FP8: fp8jax, flax's fp8_ops, qwix and torchao on the same inputs.

    python benchmarks/library_peers.py          # peers: pip install qwix torch torchao

Forward, dX and dW are held against float64 products of the same BF16 inputs, as the norm of the
difference over the norm of the reference, for inputs that are well behaved, that have outliers, and
whose gradients are below FP8's range. Each peer has the setting that its documentation recommends
for training; delayed scaling, ours and flax's, is measured after WARM_UP steps on inputs of the
kind, as in training. On a CPU every one is emulated: the times say nothing about a GPU. Candidates
take turns. What is kept for the backward pass is counted in bytes, weights included. A peer that is
not installed is a row with its error.
"""

import argparse
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT

import fp8jax

WARM_UP = 3
SEEDS = 3
KINDS = ("well behaved", "outliers", "tiny gradients")


class Inputs(NamedTuple):
    """Operands of a layer, float32 arrays of BF16 values: x [n, d], w [d, f], gradient of the output g [n, f]."""

    x: np.ndarray
    w: np.ndarray
    g: np.ndarray


class Candidate(NamedTuple):
    """A layer to measure.

    Attributes:
        call: () → (y, dx, dw), started.
        saved: bytes that are kept for the backward pass.
    """

    call: Callable[[], Any]
    saved: int


def inputs(kind: str, seed: int, tokens: int, width: int, hidden: int) -> Inputs:
    """Return inputs of a kind.

    Outliers: 4 features of x are 100 times as large, as in a Llama's residual stream, and so are
    the gradients of 4 tokens. Tiny gradients have a standard deviation of 2**-30, where e5m2 ends
    at 2**-16.
    """
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, width))
    w = rng.standard_normal((width, hidden)) / np.sqrt(width)
    g = rng.standard_normal((tokens, hidden)) / tokens
    if kind == "outliers":
        x[:, rng.choice(width, 4, replace=False)] *= 100
        g[rng.choice(tokens, 4, replace=False)] *= 100
    elif kind == "tiny gradients":
        g *= 2.0**-30 * tokens
    return Inputs(*(np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in (x, w, g)))


def reference(given: Inputs) -> tuple[np.ndarray, ...]:
    """Return y, dx and dw in float64."""
    x, w, g = (a.astype(np.float64) for a in given)
    return x @ w, g @ w.T, x.T @ g


def errors(found: Sequence[Any], true: Sequence[np.ndarray]) -> list[float]:
    """Return the norm of the difference over that of the reference, for each of y, dx, dw."""
    out = []
    for ours, theirs in zip(found, true, strict=True):
        ours = np.asarray(ours, np.float64)
        out.append(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)))
    return out


def of_jax(f: Callable[[Any, jax.Array], jax.Array], w: Any, given: Inputs) -> Candidate:
    """Return the candidate of y = f(parameters, x)."""
    x, g = jnp.asarray(given.x, jnp.bfloat16), jnp.asarray(given.g, jnp.bfloat16)

    def run(w: Any, x: jax.Array, g: jax.Array) -> tuple[Any, ...]:
        y, pull_back = jax.vjp(f, w, x)
        dw, dx = pull_back(g)
        return y, dx, jax.tree.leaves(dw)[0]

    saved = jax.eval_shape(lambda w, x: jax.vjp(f, w, x)[1], w, x)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(saved))
    compiled = jax.jit(run)
    return Candidate(lambda: compiled(w, x, g), size)


def ours(recipe: fp8jax.Recipe | None, warm_up: int = WARM_UP) -> Callable[[Inputs], Candidate]:
    """Return what makes fp8jax.nnx.Linear; recipe None is flax's own in BF16."""

    def make(given: Inputs) -> Candidate:
        width, hidden = given.w.shape
        layer = fp8jax.nnx.Linear(
            width, hidden, use_bias=False, dtype=jnp.bfloat16, recipe=recipe, rngs=nnx.Rngs(0)
        )
        layer.kernel.set_value(jnp.asarray(given.w))
        x, g = jnp.asarray(given.x, jnp.bfloat16), jnp.asarray(given.g, jnp.bfloat16)

        @nnx.jit
        def step(layer: Any) -> None:
            def loss(layer: Any) -> jax.Array:
                return jnp.sum(layer(x).astype(jnp.float32) * g)

            fp8jax.nnx.value_and_grad(loss)(layer)

        for _ in range(warm_up):
            step(layer)
        graph, params, rest = nnx.split(layer, nnx.Param, ...)
        return of_jax(lambda w, x: nnx.merge(graph, w, rest)(x), params, given)

    return make


def flax(warm_up: int = WARM_UP) -> Callable[[Inputs], Candidate]:
    """Return what makes flax's Dense with Fp8DirectDotGeneralOp: delayed scaling, 1024 steps of history."""

    def make(given: Inputs) -> Candidate:
        layer = nn.Dense(
            given.w.shape[1],
            use_bias=False,
            dtype=jnp.bfloat16,
            dot_general_cls=nn.Fp8DirectDotGeneralOp,
        )
        x, g = jnp.asarray(given.x, jnp.bfloat16), jnp.asarray(given.g, jnp.bfloat16)
        variables = layer.init(jax.random.key(0), x)
        variables = {**variables, "params": {"kernel": jnp.asarray(given.w)}}

        @jax.jit
        def step(variables: Any) -> Any:
            _, pull_back = jax.vjp(lambda v: layer.apply(v, x), variables)
            return {**variables, OVERWRITE_WITH_GRADIENT: pull_back(g)[0][OVERWRITE_WITH_GRADIENT]}

        for _ in range(warm_up):
            variables = step(variables)
        state = variables[OVERWRITE_WITH_GRADIENT]

        def apply(params: Any, x: jax.Array) -> jax.Array:
            return layer.apply({"params": params, OVERWRITE_WITH_GRADIENT: state}, x)

        return of_jax(apply, variables["params"], given)

    return make


def qwix(given: Inputs) -> Candidate:
    """Make flax's Dense quantised by qwix for training: channelwise absmax of the moment, e4m3, gradients e5m2."""
    import qwix as library  # noqa: PLC0415

    rule = library.QtRule(
        module_path=".*",
        weight_qtype=jnp.float8_e4m3fn,
        act_qtype=jnp.float8_e4m3fn,
        bwd_qtype=jnp.float8_e5m2,
    )
    plain = nn.Dense(given.w.shape[1], use_bias=False, dtype=jnp.bfloat16)
    layer = library.quantize_model(plain, library.QtProvider([rule]))
    params = {"kernel": jnp.asarray(given.w)}
    return of_jax(lambda w, x: layer.apply({"params": w}, x), params, given)


def torchao(recipe: str) -> Callable[[Inputs], Candidate]:
    """Return what makes torch's Linear converted by torchao, with the scales of the moment, in a recipe of its."""

    def make(given: Inputs) -> Candidate:
        import dataclasses  # noqa: PLC0415

        import torch  # noqa: PLC0415
        from torchao.float8 import (  # noqa: PLC0415
            Float8LinearConfig,
            convert_to_float8_training,
        )

        x = torch.tensor(given.x, dtype=torch.bfloat16, requires_grad=True)
        g = torch.tensor(given.g, dtype=torch.bfloat16)
        layer = torch.nn.Linear(*given.w.shape, bias=False, dtype=torch.bfloat16)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(given.w.T))
        config = Float8LinearConfig.from_recipe_name(recipe)
        config = dataclasses.replace(config, emulate=True)
        layer = convert_to_float8_training(torch.nn.Sequential(layer), config=config)
        weight = layer[0].weight
        kept: dict[int, int] = {}

        def keep(tensor: Any) -> Any:
            data = getattr(tensor, "_data", tensor)
            kept[data.untyped_storage().data_ptr()] = data.numel() * data.element_size()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            layer(x)

        def call() -> tuple[np.ndarray, ...]:
            y = layer(x)
            dx, dw = torch.autograd.grad(y, (x, weight), g)
            return tuple(a.detach().float() for a in (y, dx, dw.T))

        return Candidate(call, sum(kept.values()))

    return make


CANDIDATES: dict[str, Callable[[Inputs], Candidate]] = {
    "bf16": ours(None),
    "fp8jax delayed": ours(fp8jax.Recipe("delayed")),
    "fp8jax delayed, first step": ours(fp8jax.Recipe("delayed"), warm_up=0),
    "fp8jax current": ours(fp8jax.Recipe("current")),
    "fp8jax current, e4m3 gradients": ours(fp8jax.Recipe("current", gradient_format="e4m3")),
    "flax fp8_ops": flax(),
    "flax fp8_ops, first step": flax(warm_up=0),
    "qwix": qwix,
    "torchao tensorwise": torchao("tensorwise"),
    "torchao rowwise": torchao("rowwise"),
}


def measured(name: str, shape: Sequence[int]) -> dict[str, Any]:
    """Return a candidate's mean errors over seeds, by kind of input."""
    row: dict[str, Any] = {}
    for kind in KINDS:
        found = []
        for seed in range(SEEDS):
            given = inputs(kind, seed, *shape)
            found.append(errors(CANDIDATES[name](given).call(), reference(given)))
        for label, error in zip(("y", "dx", "dw"), np.mean(found, axis=0), strict=True):
            row[f"{kind}: {label}"] = float(error)
    return row


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Print the table, write the results, and return their file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="1024,512,1024", help="tokens, width, hidden width")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    shape = [int(size) for size in args.shape.split(",")]
    rows, made = {}, {}
    for name, make in CANDIDATES.items():
        try:
            rows[name] = {"layer": name} | measured(name, shape)
            made[name] = make(inputs(KINDS[0], 0, *shape))
        except Exception as error:  # a peer that is missing or fails is a result
            rows[name] = {"layer": name, "error": common.one_line(error)}
    seconds = common.interleaved({name: one.call for name, one in made.items()}, args.rounds)
    for name, one in made.items():
        rows[name] |= {"ms": seconds[name] * 1e3, "MiB kept": one.saved / 2**20}
    scope = "one layer, forward and backward; emulated where there are no FP8 units"
    return common.save("library_peers", list(rows.values()), args.results, shape=shape, scope=scope)


if __name__ == "__main__":
    main()
