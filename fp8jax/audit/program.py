"""Read a program: its GEMMs and their dtypes, its collectives, its memory and the traffic besides
the GEMMs.

    gemms = program.traced_gemms(traced.jaxpr)                # before compilation, the same on every device
    reading = program.read(compiled, mesh)                    # what the compiler made of it, on one device
    print(program.fp8_share(reading.gemms, {"qkv", "mlp_up", ...}), reading.memory.peak_bytes)
    for line in program.fallbacks(gemms, reading.gemms): ...  # asked for in FP8, compiled to something else

Reading takes a fraction of a second; nothing is compiled or run. The program is a plan, not a run:
speed, autotuning and what a library does inside a call are not in it.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from fp8jax.audit import hlo
from fp8jax.audit.collectives import Collective, collectives
from fp8jax.audit.compiled_gemms import compiled_gemms
from fp8jax.audit.gemms import Gemm, fp8_share, summary
from fp8jax.audit.jaxpr import traced_gemms
from fp8jax.audit.traffic import Traffic, place, traffic

__all__ = [
    "Gemm",
    "Memory",
    "Reading",
    "UnreadableError",
    "fallbacks",
    "fp8_share",
    "largest_arrays",
    "read",
    "read_memory",
    "summary",
    "traced_gemms",
]


class UnreadableError(ValueError):
    """An error for a compiled program without a text; the message is one line."""


# Opcodes whose results are names of other arrays, or are not arrays.
_NOT_WRITTEN = (
    "parameter",
    "get-tuple-element",
    "tuple",
    "while",
    "conditional",
    "call",
    "bitcast",
    "constant",
    "opt-barrier",
)
_PARTS = {"params": "params", "scaling": "scaling", "opt_state": "optimizer"}


@dataclasses.dataclass(frozen=True)
class Memory:
    """The bytes on one device, as the compiler has planned them.

    Attributes:
        arguments: part of the arguments → bytes: `params`, `optimizer`, `scaling`, `counters`,
            `batch`.
        argument_bytes: bytes of all arguments, padding included.
        temporary_bytes: activations, gradients, workspaces: the arena that the compiler lays them
            out in.
        output_bytes: bytes of results that are not written over a donated argument.
        details: `arguments` with the optimizer's parts: `first moment`, `second moment`, `scales of
            moments`, `remainders of params`.
        host_bytes: bytes of temporaries that wait in the host's memory.
    """

    arguments: Mapping[str, int]
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int
    details: Mapping[str, int] = dataclasses.field(default_factory=dict)
    host_bytes: int = 0

    @property
    def peak_bytes(self) -> int:
        """Return the bytes that a device must have free besides the runtime's own memory."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes


@dataclasses.dataclass(frozen=True)
class Reading:
    """A compiled program as one device runs it.

    Attributes:
        wide: names of instructions with a 64-bit float result; there should be none.
    """

    gemms: list[Gemm]
    traffic: list[Traffic]
    collectives: list[Collective]
    memory: Memory
    wide: list[str]


def read(compiled: Any, mesh: Mesh, text: str | None = None) -> Reading:
    """Read an executable.

    Args:
        compiled: `jax.jit(step).lower(...).compile()`.
        mesh: the devices that it runs on.
        text: the optimized program, if `compiled.as_text()` cannot give it (see
            targets.compile_step).

    Raises:
        UnreadableError: the runtime cannot write the program as text (known of some TPU7x
            programs).
    """
    try:
        module = hlo.parse(text or compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        raise UnreadableError(
            f"the compiled program cannot be read: {str(error).splitlines()[0]}"
        ) from error
    wide = [
        run.instruction.name
        for run in hlo.executed(module)
        if any(shape.dtype in ("float64", "complex128") for shape in run.instruction.shapes)
    ]
    return Reading(
        compiled_gemms(module),
        traffic(module),
        collectives(module, mesh.shape),
        read_memory(compiled),
        wide,
    )


def largest_arrays(text: str, count: int = 12) -> list[dict[str, Any]]:
    """Return the largest arrays that a program writes, equal ones together.

    Args:
        text: the optimized program.
        count: how many.

    Returns:
        For each, `dtype`, `dims`, `bytes` of one, `writers` (instructions that write one), `where`
        (the first one's part of the step).
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for run in hlo.executed(hlo.parse(text)):
        if run.instruction.opcode in _NOT_WRITTEN or run.instruction.opcode.endswith(
            ("-start", "-update")
        ):  # -done has the result
            continue
        for shape in run.instruction.shapes:
            row = rows.setdefault(
                (shape.dtype, shape.dims),
                {
                    "dtype": shape.dtype,
                    "dims": list(shape.dims),
                    "bytes": shape.bytes,
                    "writers": 0,
                    "where": place(run.instruction.scope),
                },
            )
            row["writers"] += 1
    return sorted(rows.values(), key=lambda row: -row["bytes"])[:count]


def fallbacks(asked: Iterable[Gemm], found: Iterable[Gemm]) -> list[str]:
    """Return GEMMs, as 'role.pass: dtypes, kernel', that are FP8 in the traced program and not so
    in the compiled one.
    """
    wanted = {(gemm.role, gemm.pass_name) for gemm in asked if gemm.fp8}
    by_name: dict[tuple[str, str], list[Gemm]] = {}
    for gemm in found:
        by_name.setdefault((gemm.role, gemm.pass_name), []).append(gemm)
    lines = [
        f"{role}.{name}: no GEMM of this name in the compiled program"
        for role, name in sorted(wanted - by_name.keys())
    ]
    for role, name in sorted(wanted & by_name.keys()):
        slow = {
            f"{g.lhs_dtype} x {g.rhs_dtype}, {g.kernel}" for g in by_name[role, name] if not g.fp8
        }
        lines += [f"{role}.{name}: {what}" for what in sorted(slow)]
    return lines


def read_memory(compiled: Any) -> Memory:
    """Return the planned memory of an executable."""
    plan = compiled.memory_analysis()
    parts: dict[str, int] = {}
    details: dict[str, int] = {}
    shardings = jax.tree.leaves(compiled.input_shardings)
    arguments = jax.tree_util.tree_leaves_with_path(compiled.args_info)
    if len(arguments) != len(shardings):  # JAX leaves out arguments that a program does not use
        kept = sorted(getattr(getattr(compiled, "_executable", None), "_kept_var_idx", ()))
        arguments = [arguments[i] for i in kept] if len(kept) == len(shardings) else []
    for (path, leaf), sharding in zip(arguments, shardings, strict=False):
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        part = _part(path)
        parts[part] = parts.get(part, 0) + size
        detail = _optimizer_part(path) if part == "optimizer" else part
        details[detail] = details.get(detail, 0) + size
    outputs = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return Memory(
        parts,
        plan.argument_size_in_bytes,
        plan.temp_size_in_bytes,
        outputs,
        details,
        plan.host_temp_size_in_bytes,
    )


def _optimizer_part(path: tuple) -> str:
    names = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    kinds = {
        "remainder": "remainders of params",
        "scales": "scales of moments",
        "nu": "second moment",
        "mu": "first moment",
        "m1": "first moment",
        "m2": "slow moment",
    }
    return next((kind for name, kind in kinds.items() if name in names), "counters")


def _part(path: tuple) -> str:
    """Return the field of the state that an argument belongs to; the small ones are `counters`."""
    name = next((key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)), None)
    return _PARTS.get(name, "counters") if name else "batch"
