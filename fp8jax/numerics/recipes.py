"""What one GEMM does in FP8: its scaling, formats, rounding of scales, accumulation and backend.

Every GEMM of a block has a role (`qkv`, `mlp_up`, ...) and three passes (`fprop`, `dgrad`, `wgrad`); attention has two
roles and seven passes. A `GemmRecipe` says how one role is computed; `parse_overrides` reads the user's exceptions by
role and layer. Scaling `bf16` means: this role is not in FP8.
"""

import dataclasses

import jax
import jax.numpy as jnp

from fp8jax.numerics import formats

RECIPES = ("bf16", "fp8", "fp8_dpa")
SCALINGS = ("delayed", "current")

LINEAR_ROLES = ("qkv", "attention_out", "mlp_gate", "mlp_up", "mlp_down", "lm_head")
ATTENTION_ROLES = ("attention_scores", "attention_values")
ROLES = LINEAR_ROLES + ATTENTION_ROLES

# Operands with an amax of their own, in the order in which tokens, histories and scales hold them. Weights have none:
# they are quantised once a step with the amax of that moment; nor has P, which is at most 1 and has a fixed scale.
OPERANDS = {role: ("x", "g") for role in LINEAR_ROLES} | {"attention_scores": ("q", "k", "ds"), "attention_values": ("v", "do")}
_GRADIENTS = ("g", "ds", "do")


@dataclasses.dataclass(frozen=True)
class GemmRecipe:
    """How one role's GEMMs are computed. Hashable, so it can be a static argument."""

    scaling: str = "delayed"
    history_length: int = 1024
    history_reduction: str = "max"
    margin: int = 0
    power_of_two: bool = True
    gradient_format: str = "e5m2"
    emulated: bool = True

    @property
    def fp8(self) -> bool:
        """Whether operands are cast at all."""
        return self.scaling != "bf16"

    def format(self, operand: str) -> jnp.dtype:
        """FP8 format of an operand: e4m3, or the gradient format for output gradients."""
        return formats.FORMATS[self.gradient_format] if operand in _GRADIENTS else formats.E4M3

    def scale(self, amax: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Scale for an amax, with this recipe's margin and rounding."""
        return formats.scale_of(amax, dtype, margin=self.margin, power_of_two=self.power_of_two)

    def quantise(self, x: jax.Array, scale: jax.Array | None, operand: str) -> tuple[formats.Quantised, jax.Array | None]:
        """Casts one operand.

        Args:
            x: the operand, any shape.
            scale: the scale to use with delayed scaling; ignored by `current`, which takes the amax of x itself.
            operand: its name in OPERANDS, or "w".

        Returns:
            The quantised operand and its raw amax (float32 scalar); with scaling `bf16`, x itself, unscaled, and None.
        """
        if not self.fp8:
            return formats.Quantised(x, None), None
        largest = formats.amax(x)
        if self.scaling == "current" or operand == "w":
            scale = self.scale(largest, self.format(operand))
        return formats.quantise(x, scale, self.format(operand), emulated=self.emulated), largest


@dataclasses.dataclass(frozen=True)
class Override:
    """One exception: `role` uses `scaling` in layers `first` to `last`, both included."""

    role: str
    scaling: str
    first: int
    last: int


def parse_overrides(text: str, *, layers: int) -> tuple[Override, ...]:
    """Reads 'role=scaling' pairs, separated by commas; 'role@2-5=scaling' limits one to layers 2 to 5.

    Raises:
        ValueError: one line that names the part that is wrong and what is allowed.
    """
    return tuple(_parse_override(part.strip(), layers) for part in text.split(",") if part.strip())


def _parse_override(part: str, layers: int) -> Override:
    target, equals, scaling = part.partition("=")
    role, at, span = target.strip().partition("@")
    scaling = scaling.strip()
    if not equals:
        raise ValueError(f"{part!r} is not role=scaling")
    if role not in ROLES:
        raise ValueError(f"{role!r} in {part!r} is not one of {', '.join(ROLES)}")
    if scaling not in (*SCALINGS, "bf16"):
        raise ValueError(f"{scaling!r} in {part!r} is not one of {', '.join((*SCALINGS, 'bf16'))}")
    first, last = _parse_span(span, part, layers) if at else (0, layers - 1)
    return Override(role, scaling, first, last)


def _parse_span(span: str, part: str, layers: int) -> tuple[int, int]:
    first, dash, last = span.partition("-")
    if not first.isdecimal() or (dash and not last.isdecimal()):
        raise ValueError(f"{span!r} in {part!r} is not a layer or a range such as 2-5")
    bounds = int(first), int(last) if dash else int(first)
    if not bounds[0] <= bounds[1] < layers:
        raise ValueError(f"layers {span} in {part!r} are not within 0-{layers - 1}")
    return bounds
