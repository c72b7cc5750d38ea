"""What one GEMM does in FP8: its scaling, formats, rounding of scales, accumulation and backend.

Every GEMM of a block has a role (`qkv`, `mlp_up`, ...) and three passes (`fprop`, `dgrad`, `wgrad`); attention has two
roles and seven passes. A `GemmRecipe` says how one role is computed; `parse_overrides` reads the user's exceptions by
role and layer. Scaling `bf16` means: this role is not in FP8.

`static` scaling follows Unit Scaling (Blake et al. 2023, arXiv 2303.11257) and its successor for FP8 training, µnit
Scaling (Narayan et al. 2025, arXiv 2502.05967): where tensors have about unit variance, they are cast as they are, and
nothing is measured. Both make weights and gradients unit-sized by fixed factors on the GEMMs' results; here the same
factors are the operands' fixed scales, so that the model stays as it is. Activations have scale 1.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from fp8jax.numerics import blockwise, formats

RECIPES = ("bf16", "fp8", "fp8_dpa")
SCALINGS = ("delayed", "current", "static", "blockwise")
FAST_ACCUMULATION = ("fprop", "all", "none")

LINEAR_ROLES = ("qkv", "attention_out", "mlp_gate", "mlp_up", "mlp_down", "lm_head")
ATTENTION_ROLES = ("attention_scores", "attention_values")
ROLES = LINEAR_ROLES + ATTENTION_ROLES

# Operands with an amax of their own, in the order in which tokens, histories and scales hold them. Weights have none:
# they are quantised once a step with the amax of that moment; nor has P, which is at most 1 and has a fixed scale.
OPERANDS = {role: ("x", "g") for role in LINEAR_ROLES} | {"attention_scores": ("q", "k", "ds"), "attention_values": ("v", "do")}
GRADIENTS = ("g", "ds", "do")


@dataclasses.dataclass(frozen=True)
class GemmRecipe:
    """How one role's GEMMs are computed. Hashable, so it can be a static argument.

    Raises:
        ValueError: a scaling or a choice of fast accumulation that is unknown; blockwise scaling that is not emulated.
    """

    scaling: str = "delayed"
    history_length: int = 1024
    history_reduction: str = "max"
    margin: int = 0
    power_of_two: bool = True
    gradient_format: str = "e5m2"
    fast_accumulation: str = "fprop"
    static_weight_scale: float = 1.0
    static_gradient_scale: float = 1.0
    emulated: bool = True

    def __post_init__(self):
        for field, choices in (("scaling", (*SCALINGS, "bf16")), ("fast_accumulation", FAST_ACCUMULATION)):
            if getattr(self, field) not in choices:
                raise ValueError(f"GemmRecipe.{field}: {getattr(self, field)!r} is not one of {', '.join(choices)}")
        if self.scaling == "blockwise" and not self.emulated:
            raise ValueError("blockwise scaling has no FP8 kernel: it runs emulated only")

    @property
    def fp8(self) -> bool:
        """Whether operands are cast at all."""
        return self.scaling != "bf16"

    @property
    def measured(self) -> bool:
        """Whether the amax of operands is taken: of all that are cast, unless their scales are fixed."""
        return self.scaling not in ("bf16", "static")

    def precise(self, gemm_pass: str) -> bool:
        """Whether a pass (`fprop`, `dgrad`, `wgrad`) does without Hopper's fast accumulation, which keeps 14 bits of a sum."""
        return self.fast_accumulation == "none" or (self.fast_accumulation == "fprop" and gemm_pass != "fprop")

    def format(self, operand: str) -> jnp.dtype:
        """FP8 format of an operand: e4m3, or the gradient format for output gradients."""
        return formats.FORMATS[self.gradient_format] if operand in GRADIENTS else formats.E4M3

    def scale(self, amax: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Scale for an amax, with this recipe's margin and rounding."""
        return formats.scale_of(amax, dtype, margin=self.margin, power_of_two=self.power_of_two)

    def static_scale(self, operand: str) -> jax.Array:
        """Scale of an operand under `static`, with this recipe's margin and rounding: a constant of the program."""
        unit = 1.0
        if operand == "w" or operand in GRADIENTS:
            unit = self.static_weight_scale if operand == "w" else self.static_gradient_scale
        mantissa, exponent = math.frexp(math.ldexp(unit, self.margin))
        if self.power_of_two:
            mantissa, exponent = 0.5, exponent + (mantissa > 0.5)
        return jnp.float32(math.ldexp(mantissa, exponent))

    def quantise(self, x: jax.Array, scale: jax.Array | None, operand: str,
                 axes: tuple[int, ...] = ()) -> tuple[formats.Quantised, jax.Array | None]:
        """Casts one operand.

        Args:
            x: the operand, any shape.
            scale: the scale to use with delayed scaling; ignored by `current`, which takes the amax of x itself, and by
                `static`.
            operand: its name in OPERANDS, or "w".
            axes: with `blockwise`, the dimensions cut into blocks: the one that the GEMM contracts, or both of a weight.

        Returns:
            The quantised operand and its raw amax (float32 scalar; None with `static`, which does not look at it); with
            scaling `bf16`, x itself, unscaled, and None.
        """
        if not self.fp8:
            return formats.Quantised(x, None), None
        dtype = self.format(operand)
        if self.scaling == "blockwise":
            return blockwise.quantise(x, axes, lambda amax: self.scale(amax, dtype), dtype, emulated=self.emulated)
        if self.scaling == "static":
            return formats.quantise(x, self.static_scale(operand), dtype, emulated=self.emulated), None
        largest = formats.amax(x)
        if self.scaling == "current" or operand == "w":
            scale = self.scale(largest, dtype)
        return formats.quantise(x, scale, dtype, emulated=self.emulated), largest


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


def in_bf16(targets: str) -> str:
    """Overrides that take 'role' or 'role@2-5', separated by commas, out of FP8."""
    return ",".join(f"{part.strip()}=bf16" for part in targets.split(",") if part.strip())


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
