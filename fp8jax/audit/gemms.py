"""Describe one GEMM for the audit, and sum over many: the FP8 share, FLOPs by role and pass.

    gemms = program.traced_gemms(jaxpr)             # or program.compiled_gemms(hlo_text)
    fp8_share(gemms, roles)                         # 1.0: all block GEMM FLOPs are FP8
    for row in summary(gemms, roles): ...

Role and pass come from the named scope `fp8jax.gemm[ROLE.PASS]` around a GEMM; the innermost one
counts. A GEMM without one has the role `other`. A kernel that computes several is under
`fp8jax.fused[ROLE.PASS+ROLE.PASS*][FLOPS]`, FLOPs of each on one device, with a star after what
another kernel computes, too. The lists come from jaxpr.py and program.py.
"""

import dataclasses
import re
from collections.abc import Collection, Iterable
from typing import Any, NamedTuple, TypedDict

OTHER = "other"
_FUSED = re.compile(r"fp8jax\.fused\[([\w.+*]+)\]\[(\d+)\]")
_SCOPE = re.compile(r"fp8jax\.gemm\[([^\]]*?)(?:\.(\w+))?\]")


@dataclasses.dataclass(frozen=True)
class Gemm:
    """One matrix multiplication of a program; a fused attention kernel is one Gemm too.

    Attributes:
        role, pass_name: from the named scope; `other` and "" without one.
        shape: (batch, m, n, k).
        lhs_dtype, rhs_dtype: dtypes of the operands' values: `float8_e4m3fn` also if an exact
            upcast stands before the dot.
        out_dtype: dtype that the dot writes.
        kernel: what computes it: `dot`, `dot (FP8 emulated)`, `cuBLASLt FP8`, `cuBLASLt BF16`,
            `Triton FP8`, `cuDNN FP8` ...
        flops: FLOPs of one execution; of one device in a compiled program, of all devices in a
            traced one.
        count: executions in a step.
        count_known: False if it stands in a loop of unknown length, which `count` takes as one
            pass.
        repeated: True for a forward GEMM done again in the backward pass: rematerialisation, or the
            scores of flash attention.
        scope: the whole name stack.
    """

    role: str
    pass_name: str
    shape: tuple[int, int, int, int]
    lhs_dtype: str
    rhs_dtype: str
    out_dtype: str
    kernel: str
    flops: int
    count: int
    count_known: bool = True
    repeated: bool = False
    scope: str = ""

    @property
    def fp8(self) -> bool:
        """Return whether both operands are FP8."""
        return is_fp8(self.lhs_dtype) and is_fp8(self.rhs_dtype)

    @property
    def total_flops(self) -> int:
        """Return the FLOPs of all executions."""
        return self.flops * self.count


class Row(NamedTuple):
    """The FLOPs of one role and pass, in all and in FP8, the executions, and the kernels that
    compute it.
    """

    role: str
    pass_name: str
    repeated: bool
    executions: int
    flops: int
    fp8_flops: int
    kernels: tuple[str, ...]


def is_fp8(dtype: str) -> bool:
    """Return whether a dtype's name is that of an 8-bit float."""
    return dtype.startswith("float8_")


class Scope(TypedDict):
    """The fields of a Gemm that its name stack tells."""

    role: str
    pass_name: str
    repeated: bool
    scope: str


def read_scope(scope: str) -> Scope:
    """Return `role`, `pass_name`, `repeated` and `scope` of a Gemm, from its name stack.

    A forward GEMM below a `transpose(...)` or a `rematted_computation` is a repetition. (The
    gradient that JAX itself derives of a plain dot keeps the forward name and so counts as one too;
    GEMMs with their own VJP name their passes.)
    """
    found = _SCOPE.findall(scope)
    role, pass_name = found[-1] if found else (OTHER, "")
    backward = "transpose(" in scope or "rematted_computation" in scope
    return {
        "role": role,
        "pass_name": pass_name,
        "repeated": pass_name == "fprop" and backward,
        "scope": scope,
    }


def read_fused(scope: str) -> list[dict[str, Any]]:
    """Return `role`, `pass_name`, `repeated`, `scope` and `flops` of each GEMM of a fused kernel;
    [] without its scope.
    """
    found = _FUSED.findall(scope)
    if not found:
        return []
    names, flops = found[-1]
    parts = [(name.rstrip("*").partition("."), name.endswith("*")) for name in names.split("+")]
    again = "rematted_computation" in scope  # the forward kernel a second time
    return [
        {
            "role": role,
            "pass_name": gemm_pass,
            "repeated": repeated or (again and gemm_pass == "fprop"),
            "scope": scope,
            "flops": int(flops),
        }
        for (role, _, gemm_pass), repeated in parts
    ]


def fp8_share(gemms: Iterable[Gemm], roles: Collection[str]) -> float:
    """Return FP8 FLOPs over all FLOPs of the GEMMs with one of these roles; 0.0 if there are none."""
    block = [gemm for gemm in gemms if gemm.role in roles]
    total = sum(gemm.total_flops for gemm in block)
    return sum(gemm.total_flops for gemm in block if gemm.fp8) / total if total else 0.0


def summary(gemms: Iterable[Gemm], roles: Collection[str]) -> list[Row]:
    """Return one row per role, pass and repetition: the roles in the order given, then the rest as
    `other`.
    """
    groups: dict[tuple[str, str, bool], list[Gemm]] = {}
    for gemm in gemms:
        key = (
            (gemm.role, gemm.pass_name, gemm.repeated) if gemm.role in roles else (OTHER, "", False)
        )
        groups.setdefault(key, []).append(gemm)
    order = {role: i for i, role in enumerate(roles)}
    passes = {"fprop": 0, "dgrad": 1, "wgrad": 2}
    keys = sorted(
        groups,
        key=lambda key: (order.get(key[0], len(order)), key[2], passes.get(key[1], 3), key[1]),
    )
    return [_row(key, groups[key]) for key in keys]


def _row(key: tuple[str, str, bool], gemms: list[Gemm]) -> Row:
    return Row(
        *key,
        executions=sum(gemm.count for gemm in gemms),
        flops=sum(gemm.total_flops for gemm in gemms),
        fp8_flops=sum(gemm.total_flops for gemm in gemms if gemm.fp8),
        kernels=tuple(sorted({gemm.kernel for gemm in gemms})),
    )
