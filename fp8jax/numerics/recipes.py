"""Describe how one GEMM is computed in FP8: its scaling, formats, rounding of scales, accumulation
and backend.

Every GEMM of a block has a role (`qkv`, `mlp_up`, ...) and three passes (`fprop`, `dgrad`,
`wgrad`); attention has two roles and seven passes. A `GemmRecipe` describes how one role is
computed; `parse_overrides` reads the user's exceptions by role and layer. Scaling `bf16` means that
this role is not in FP8.

`static` scaling follows Unit Scaling (Blake et al. 2023, arXiv 2303.11257) and its successor for
FP8 training, µnit Scaling (Narayan et al. 2025, arXiv 2502.05967): tensors of about unit variance
are cast without a scale, and no amax is measured. Both make weights and gradients unit-sized by
fixed factors on the GEMMs' results; here the same factors are the operands' fixed scales, so that
the model does not change. Activations have scale 1.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from fp8jax.numerics import blockwise, formats, roles
from fp8jax.numerics.roles import FAST_ACCUMULATION, GRADIENTS, SCALINGS, WEIGHT_SCALINGS

# The names in roles.py, which needs no JAX, are exported here as well.
RECIPES, OPERANDS, ROLES, LINEAR_ROLES, ATTENTION_ROLES = (
    roles.RECIPES,
    roles.OPERANDS,
    roles.ROLES,
    roles.LINEAR_ROLES,
    roles.ATTENTION_ROLES,
)
Override, parse_overrides, in_bf16 = roles.Override, roles.parse_overrides, roles.in_bf16


@dataclasses.dataclass(frozen=True)
class GemmRecipe:
    """The recipe of one role's GEMMs; it is hashable, so it can be a static argument.

    Attributes:
        weight_scaling: for roles with delayed scaling: take weights' scales from the amax of the
            moment, or delayed as well.
        fill_unknown: for delayed scaling: a scale of 0 stands for an empty history, and the amax of
            the moment then gives the scale. False needs scales that are known, and spares the cast
            waiting for the amax.

    Raises:
        ValueError: the scaling or the choice of fast accumulation is unknown, or blockwise scaling
            is not emulated.
    """

    scaling: str = "delayed"
    weight_scaling: str = "current"
    history_length: int = 1024
    history_reduction: str = "max"
    margin: int = 0
    power_of_two: bool = True
    gradient_format: str = "e5m2"
    fast_accumulation: str = "fprop"
    static_weight_scale: float = 1.0
    static_gradient_scale: float = 1.0
    fill_unknown: bool = False
    emulated: bool = True

    def __post_init__(self):
        known = {
            "scaling": (*SCALINGS, "bf16"),
            "weight_scaling": WEIGHT_SCALINGS,
            "fast_accumulation": FAST_ACCUMULATION,
        }
        for field, choices in known.items():
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"GemmRecipe.{field}: {getattr(self, field)!r} is not one of "
                    f"{', '.join(choices)}"
                )
        if self.scaling == "blockwise" and not self.emulated:
            raise ValueError("blockwise scaling has no FP8 kernel: it runs emulated only")

    @property
    def fp8(self) -> bool:
        """Return whether operands are cast."""
        return self.scaling != "bf16"

    @property
    def measured(self) -> bool:
        """Return whether the amax of operands is taken: of all that are cast, unless their scales
        are fixed.
        """
        return self.scaling not in ("bf16", "static")

    @property
    def delayed_weight(self) -> bool:
        """Return whether the weight's scale comes from a history, as those of the other operands
        do.
        """
        return self.scaling == self.weight_scaling == "delayed"

    def precise(self, gemm_pass: str) -> bool:
        """Return whether a pass (`fprop`, `dgrad`, `wgrad`) avoids Hopper's fast accumulation,
        which keeps 14 bits of a sum.
        """
        return self.fast_accumulation == "none" or (
            self.fast_accumulation == "fprop" and gemm_pass != "fprop"
        )

    def format(self, operand: str) -> jnp.dtype:
        """Return the FP8 format of an operand: e4m3, or the gradient format for output gradients."""
        return formats.FORMATS[self.gradient_format] if operand in GRADIENTS else formats.E4M3

    def scale(self, amax: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """Return the scale for an amax, with this recipe's margin and rounding."""
        return formats.scale_of(amax, dtype, margin=self.margin, power_of_two=self.power_of_two)

    def static_scale(self, operand: str) -> jax.Array:
        """Return the scale of an operand under `static`, with this recipe's margin and rounding: a
        constant of the program.
        """
        unit = 1.0
        if operand == "w" or operand in GRADIENTS:
            unit = self.static_weight_scale if operand == "w" else self.static_gradient_scale
        mantissa, exponent = math.frexp(math.ldexp(unit, self.margin))
        if self.power_of_two:
            mantissa, exponent = 0.5, exponent + (mantissa > 0.5)
        return jnp.float32(math.ldexp(mantissa, exponent))

    def quantise(
        self, x: jax.Array, scale: jax.Array | None, operand: str, axes: tuple[int, ...] = ()
    ) -> tuple[formats.Quantised, jax.Array | None]:
        """Cast one operand.

        Args:
            x: the operand, any shape.
            scale: the scale for delayed scaling; None gives a weight that of its own amax. It is
                ignored by `current`, which takes the amax of x itself, and by `static`.
            operand: its name in OPERANDS, or "w".
            axes: with `blockwise`, the dimensions cut into blocks: the one that the GEMM contracts,
                or both of a weight.

        Returns:
            The quantised operand and its raw amax (float32 scalar; None with `static`, which does
            not take it); with scaling `bf16`, x itself, unscaled, and None.
        """
        if not self.fp8:
            return formats.Quantised(x, None), None
        dtype = self.format(operand)
        if self.scaling == "blockwise":
            return blockwise.quantise(
                x, axes, lambda amax: self.scale(amax, dtype), dtype, emulated=self.emulated
            )
        if self.scaling == "static":
            return formats.quantise(
                x, self.static_scale(operand), dtype, emulated=self.emulated
            ), None
        largest = formats.amax(x, emulated=self.emulated)
        if self.scaling == "current" or (
            operand == "w" and (scale is None or not self.delayed_weight)
        ):
            scale = self.scale(largest, dtype)
        elif self.fill_unknown and scale is not None:
            scale = jnp.where(scale == 0, self.scale(largest, dtype), scale)
        if scale is None:
            raise ValueError(f"{self.scaling} scaling of {operand!r} needs its scale")
        return formats.quantise(x, scale, dtype, emulated=self.emulated), largest
