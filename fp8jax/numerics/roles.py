"""Name GEMM roles, scalings and recipes, and parse exceptions by role and layer, for
configurations.

    parse_overrides("mlp_down=bf16,qkv@0-3=current", layers=4)

The module imports no JAX, so that a mistake in a configuration is found before it is loaded.
recipes.py computes with these names.
"""

import dataclasses

RECIPES = ("bf16", "fp8", "fp8_dpa")
SCALINGS = ("delayed", "current", "static", "blockwise")
WEIGHT_SCALINGS = ("current", "delayed")
FAST_ACCUMULATION = ("fprop", "all", "none")

HEAD = "lm_head"
LINEAR_ROLES = ("qkv", "attention_out", "mlp_gate", "mlp_up", "mlp_down", HEAD)
ATTENTION_ROLES = ("attention_scores", "attention_values")
ROLES = LINEAR_ROLES + ATTENTION_ROLES
BLOCK_ROLES = tuple(role for role in ROLES if role != HEAD)

# Operands whose amax comes back from a GEMM, in the order in which tokens, histories and scales
# hold them. Weights have none: they are quantised once a step, outside; nor has P, which is at most
# 1 and has a fixed scale.
LINEAR_OPERANDS = ("x", "g")
OPERANDS = dict.fromkeys(LINEAR_ROLES, LINEAR_OPERANDS) | {
    "attention_scores": ("q", "k", "ds"),
    "attention_values": ("v", "do"),
}
GRADIENTS = ("g", "ds", "do")

# Formats for an optimizer's moments: the keys of low_bit_state.FORMATS.
STORED = ("float32", "bfloat16", "float16", "fp8")


@dataclasses.dataclass(frozen=True)
class Override:
    """One exception: `role` uses `scaling` in layers `first` to `last`, both included."""

    role: str
    scaling: str
    first: int
    last: int


def parse_overrides(text: str, *, layers: int) -> tuple[Override, ...]:
    """Parse 'role=scaling' pairs, separated by commas; 'role@2-5=scaling' limits one to layers 2 to
    5.

    Raises:
        ValueError: a part is wrong; one line names it and what is allowed.
    """
    return tuple(_parse_override(part.strip(), layers) for part in text.split(",") if part.strip())


def in_bf16(targets: str) -> str:
    """Return overrides that take 'role' or 'role@2-5', separated by commas, out of FP8."""
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
