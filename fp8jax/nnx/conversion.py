"""Turn the GEMMs of somebody else's NNX model into FP8 ones, by path, and back.

    fp8_model = quantize(model, [("lm_head", None), ("*.attention.*", recipe), ("*", recipe)])
    model = dequantize(fp8_model)

Both return a new model that shares the variables of the one given: no parameter is copied. What was
changed and what was not is printed (`log`), and `report` returns it.

The path of a layer is its attributes and indices, such as `layers.0.attention.query`. A pattern is
that of a file name, in which `*` stands for any letters, dots included. It applies to a layer whose
path it matches, and to all in a module whose path it matches. The first rule that applies counts;
with recipe None, or without a rule, a layer stays as it is.
"""

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from flax import nnx

from fp8jax.library.recipe import Recipe, check_recipe
from fp8jax.nnx import convert
from fp8jax.nnx.attention import Attention, MultiHeadAttention

Rules = Iterable[tuple[str, Recipe | None]] | Mapping[str, Recipe | None]

# Attention itself has a path, too, so that a rule may leave it out: that of its function in flax's
# module.
_CORE = "attention_fn"


@dataclasses.dataclass(frozen=True)
class Line:
    """One layer of a model.

    Attributes:
        path: its path, such as `layers.0.mlp.up`.
        kind: its class.
        recipe: its recipe; None if it is not in FP8.
        reason: why not, or what is left out.
    """

    path: str
    kind: str
    recipe: Recipe | None
    reason: str = ""

    def __str__(self) -> str:
        """Return the line as text."""
        what = "unchanged" if self.recipe is None else f"FP8, {self.recipe.scaling} scaling"
        return f"{self.path} ({self.kind}): {what}{f': {self.reason}' if self.reason else ''}"


@dataclasses.dataclass(frozen=True)
class Report:
    """Which layers of a model are in FP8 and which are not; `str` makes it text."""

    lines: tuple[Line, ...]

    @property
    def changed(self) -> tuple[Line, ...]:
        """Return the layers in FP8."""
        return tuple(line for line in self.lines if line.recipe is not None)

    @property
    def unchanged(self) -> tuple[Line, ...]:
        """Return the layers that are not."""
        return tuple(line for line in self.lines if line.recipe is None)

    def __str__(self) -> str:
        """Return a line for each layer, after one with their number."""
        head = f"{len(self.changed)} of {len(self.lines)} layers with GEMMs in FP8"
        return "\n".join([head, *(f"  {line}" for line in self.lines)])


def quantize(model: Any, rules: Rules | Recipe, *, log: Callable[[str], Any] | None = print) -> Any:
    """Return a model with FP8 GEMMs in the layers that rules name, and share its variables.

    It changes `nnx.Linear`, `LinearGeneral`, `Einsum` and `MultiHeadAttention`, also several
    stacked in one by `nnx.vmap`; not their subclasses, nor those with a product of their own.

    Attention:
    itself is in FP8 in calls with `is_causal=True` and no mask; others warn.

    Args:
        model: a module of flax.nnx, or a list or dictionary of them.
        rules: (pattern, recipe or None) in order of precedence; a recipe alone is for all layers.
        log: prints the report; None does not.

    Raises:
        ValueError: a pattern matches no layer with GEMMs; one line names the nearest path.
        TypeError: a recipe is none.
    """
    chosen = _checked(rules)
    plan = _Plan(chosen, _layers(model))
    new = nnx.recursive_map(plan.convert, model)
    if log is not None:
        log(str(Report(tuple(plan.lines))))
    return new


def dequantize(model: Any) -> Any:
    """Return a model with the layers of flax.nnx again, and share its variables; scaling state is
    left out.
    """
    return nnx.recursive_map(_restored, model)


def report(model: Any) -> Report:
    """Return which layers of a model are in FP8."""
    return Report(tuple(_line(path, layer) for path, layer in _layers(model).items()))


def _checked(rules: Rules | Recipe) -> list[tuple[str, Recipe | None]]:
    if isinstance(rules, Recipe):
        return [("*", rules)]
    pairs: list[Any] = list(rules.items() if isinstance(rules, Mapping) else rules)
    for pattern, recipe in pairs:
        check_recipe(recipe, f"fp8jax.nnx.quantize: rule {pattern!r}")
    return pairs


def _layers(model: Any) -> dict[str, Any]:
    """Return the layers with GEMMs by path, attention itself among them, each once."""
    found: dict[str, Any] = {}
    for path, node in nnx.iter_graph(model):
        if isinstance(node, nnx.Linear | nnx.LinearGeneral | nnx.Einsum):
            found[_name(path)] = node
        if isinstance(node, nnx.MultiHeadAttention):
            found[_name((*path, _CORE))] = node
    return dict(sorted(found.items()))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _line(path: str, layer: Any) -> Line:
    kind = type(layer).__name__
    return Line(path, kind, getattr(layer, "recipe", None))


class _Plan:
    """The rules for a model, and what came of them."""

    def __init__(self, rules: list[tuple[str, Recipe | None]], layers: dict[str, Any]):
        self.rules = rules
        self.lines: list[Line] = []
        for pattern, _ in rules:
            if not any(_applies(pattern, path) for path in layers):
                raise ValueError(_matches_nothing(pattern, list(layers)))

    def convert(self, path: tuple[Any, ...], node: Any) -> Any:
        """Return a node of the model, converted if a rule says so."""
        if type(node) in convert.OURS:
            return self._convert_layer(_name(path), node)
        if type(node) is nnx.MultiHeadAttention:
            return self._convert_attention(_name((*path, _CORE)), node)
        if isinstance(node, nnx.Linear | nnx.LinearGeneral | nnx.Einsum):
            given = getattr(node, "recipe", None)
            reason = "it has its recipe already" if given else "a subclass may compute otherwise"
            self.lines.append(Line(_name(path), type(node).__name__, given, reason))
        return node

    def _convert_layer(self, path: str, layer: Any) -> Any:
        recipe, reason = self._rule(path)
        reason = reason or convert.why_not(layer)
        kind = type(layer).__name__
        if reason or recipe is None:
            self.lines.append(Line(path, kind, None, reason))
            return layer
        self.lines.append(Line(path, kind, recipe))
        return convert.convert_layer(layer, recipe, role=path)

    def _convert_attention(self, path: str, layer: Any) -> Any:
        recipe, reason = self._rule(path)
        if layer.attention_fn is not nnx.dot_product_attention:
            reason = reason or "it has an attention_fn of its own"
        if reason or recipe is None:
            self.lines.append(Line(path, "attention", None, reason))
            return layer
        note = "in calls with is_causal=True, without a mask or dropout"
        self.lines.append(Line(path, "attention", recipe, note))
        new = convert.with_class(layer, MultiHeadAttention, {"attention_fn": "plain_attention"})
        new.set_core(recipe, convert.leading(layer.query))
        return new

    def _rule(self, path: str) -> tuple[Recipe | None, str]:
        """Return the recipe for a path, and why there is none."""
        for pattern, recipe in self.rules:
            if _applies(pattern, path):
                return recipe, "" if recipe else f"rule {pattern!r}"
        return None, "no rule"


def _restored(_: tuple[Any, ...], node: Any) -> Any:
    if type(node) in convert.THEIRS:
        return convert.restore_layer(node)
    if type(node) is MultiHeadAttention:
        names = {"plain_attention": _CORE, "recipe": None, "core": None}
        return convert.with_class(node, nnx.MultiHeadAttention, names)
    if type(node) is Attention:
        return Attention(None)
    return node


def _applies(pattern: str, path: str) -> bool:
    """Return whether a pattern matches a path or the path of a module around it; `*.x` also matches
    `x` at the top.
    """
    parts = path.split(".")
    around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
    return any(
        fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(f".{name}", pattern)
        for name in around
    )


def _matches_nothing(pattern: str, paths: list[str]) -> str:
    if not paths:
        return (
            "fp8jax.nnx.quantize: the model has no Linear, LinearGeneral, Einsum or "
            "MultiHeadAttention"
        )
    parts = {path[:end] for path in paths for end in _ends(path)}
    near = difflib.get_close_matches(pattern.replace("*", ""), sorted(parts), n=1, cutoff=0.0)
    return f"fp8jax.nnx.quantize: pattern {pattern!r} matches no layer; nearest path: {near[0]!r}"


def _ends(path: str) -> list[int]:
    return [i for i, letter in enumerate(path) if letter == "."] + [len(path)]
