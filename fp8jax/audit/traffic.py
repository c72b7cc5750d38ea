"""Count what moves through a device's memory besides the GEMMs: bytes that fusions, copies and
transposes read and write.

    rows = traffic(module)                          # [Traffic("fusion", "attention", read, written, executions), ...]

A fusion reads each of its inputs once and writes its results once; of an array that it only slices,
or updates in place, it touches the slice. Caches are not modelled. FP8 arrays written transposed,
as tensor cores need them that take both operands contraction-major, are rows of their own
(TRANSPOSED_FP8).
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

from fp8jax.audit import hlo
from fp8jax.audit.collectives import KINDS
from fp8jax.audit.compiled_gemms import is_gemm
from fp8jax.audit.gemms import is_fp8
from fp8jax.audit.hlo import Array, Computation, Executed, Instruction, Module

TRANSPOSED_FP8 = "FP8 transposed copies"
_FREE = frozenset(
    (
        "after-all",
        "add-dependency",
        "async-done",
        "async-update",
        "bitcast",
        "call",
        "conditional",
        "constant",
        "copy-done",
        "domain",
        "fusion-done",
        "fusion-update",
        "get-tuple-element",
        "opt-barrier",
        "optimization-barrier",
        "parameter",
        "partition-id",
        "replica-id",
        "tuple",
        "while",
        *(kind + end for kind in KINDS for end in ("", "-start", "-done")),
    )
)
_FUSIONS = (
    "fusion",
    "fusion-start",
)  # the latter runs beside others, as XLA of jax 0.11 runs loops' slices and updates
_CALLS = ("async-start", "call")
_NO_WORK = ("AllocateBuffer", "ConcatBitcast", "Sharding", "annotate_device_placement")
_SAME = ("bitcast", "copy", "reshape")
_RENAMES = frozenset((*_SAME, "bitcast-convert", "convert"))
_SLICES = frozenset(("dynamic-slice", "slice", "gather"))
_PLACES = ("quantise_weight", "optimizer", "loss", "attention", "feed_forward")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The bytes of all executions in a step, on one device; `where` is the part of the step, by its
    named scope.
    """

    kind: str
    where: str
    read: int
    written: int
    executions: int


class _Moved(NamedTuple):
    """The bytes of one execution; of those written, the FP8 bytes that are transposed, and whether
    that is all it does.
    """

    read: int
    written: int
    transposed: int = 0
    only_transposes: bool = False


def traffic(module: Module) -> list[Traffic]:
    """Return every executed instruction that is neither a GEMM nor a collective, summed by kind and
    place.
    """
    totals: dict[tuple[str, str], list[int]] = {}
    for run in hlo.executed(module):
        if _is_free(run.instruction) or _is_collective(module, run) or is_gemm(module, run):
            continue
        moved, where = _moved(module, run), place(run.instruction.scope)
        read = moved.read if moved.only_transposes else 0
        _add(
            totals,
            (TRANSPOSED_FP8, where),
            read,
            moved.transposed,
            run.count if moved.transposed else 0,
        )
        _add(
            totals,
            (_kind(run.instruction), where),
            moved.read - read,
            moved.written - moved.transposed,
            run.count,
        )
    rows = [Traffic(*key, *values) for key, values in totals.items() if values[0] + values[1]]
    return sorted(rows, key=lambda row: -(row.read + row.written))


def total(rows: Iterable[Traffic]) -> int:
    """Return the bytes read and written."""
    return sum(row.read + row.written for row in rows)


def _add(totals: dict, key: tuple[str, str], read: int, written: int, count: int) -> None:
    entry = totals.setdefault(key, [0, 0, 0])
    for i, value in enumerate((read * count, written * count, count)):
        entry[i] += value


def _is_free(instruction: Instruction) -> bool:
    return instruction.opcode in _FREE or instruction.target in _NO_WORK


def _is_collective(module: Module, run: Executed) -> bool:
    if run.instruction.opcode not in (*_FUSIONS, "async-start", "custom-call"):
        return False
    return any(
        inner.instruction.opcode.removesuffix("-start") in KINDS
        for inner in hlo.nested(module, run)
    )


def _kind(instruction: Instruction) -> str:
    opcode = instruction.opcode.removesuffix("-start")
    return opcode if opcode in ("fusion", "copy", "transpose", "custom-call") else "other"


def place(scope: str) -> str:
    """Return the part of the step that a name stack lies in, the innermost one."""
    parts = [part for part in scope.replace("(", "/").replace(")", "/").split("/") if part]
    return next(
        (place for part in reversed(parts) for place in _PLACES if part.startswith(place)), ""
    )


def _moved(module: Module, run: Executed) -> _Moved:
    instruction, operands = run.instruction, run.operands()
    if instruction.opcode in _FUSIONS:
        return _fusion(
            module, module.computations.get(instruction.called("calls") or "", {}), operands
        )
    if instruction.opcode in _CALLS:  # operands may come with a later async-update
        return _called(
            module,
            module.computations.get(
                instruction.called("calls") or instruction.called("to_apply") or "", {}
            ),
        )
    if instruction.opcode in _SLICES:
        return _Moved(instruction.bytes, instruction.bytes)
    if instruction.opcode == "dynamic-update-slice":
        return _Moved(operands[1].bytes, operands[1].bytes)
    if instruction.opcode == "copy-start":
        return _Moved(operands[0].bytes, operands[0].bytes)
    read, written = sum(operand.bytes for operand in operands), instruction.bytes
    transposes = _reorders(instruction, operands)
    return _Moved(read, written, written if transposes else 0, transposes)


def _called(module: Module, body: Computation) -> _Moved:
    """Return the bytes of a whole computation."""
    work = [i for i in body.values() if i.opcode in _CALLS or not _is_free(i)]
    parts = [_moved(module, Executed(i, body)) for i in work]
    read, written, transposed = (sum(part[n] for part in parts) for n in range(3))
    return _Moved(
        read, written, transposed, bool(parts) and all(part.only_transposes for part in parts)
    )


def _reorders(instruction: Instruction, operands: list[Instruction]) -> bool:
    """Return whether a copy or transpose writes FP8 bytes in another order than it reads them."""
    if (
        instruction.opcode not in ("copy", "transpose")
        or not operands
        or not _one_byte(instruction.shapes[0])
    ):
        return False
    return (
        instruction.opcode == "transpose"
        or instruction.shapes[0].layout != operands[0].shapes[0].layout
    )


def _fusion(module: Module, body: Computation, operands: list[Instruction]) -> _Moved:
    users, parameters = _users(body), _parameters(body)
    read = sum(
        _read(parameters[n], users, module) if n in parameters else operand.bytes
        for n, operand in enumerate(operands)
    )
    root = hlo.root(body) if body else None
    leaves = (
        [body[name] for name in root.operands if name in body]
        if root and root.opcode == "tuple"
        else [root]
        if root
        else []
    )
    transposed = sum(leaf.bytes for leaf in leaves if _transposed(leaf, body))
    written = sum(_written(leaf, body) for leaf in leaves)
    inputs = [operand for operand in operands if operand.shapes and operand.shapes[0].dims]
    only = (
        bool(transposed)
        and transposed == written
        and all(_one_byte(operand.shapes[0]) for operand in inputs)
    )
    return _Moved(read, written, transposed, only)


def _users(body: Computation) -> dict[str, list[Instruction]]:
    users: dict[str, list[Instruction]] = {}
    for instruction in body.values():
        for name in instruction.operands:
            users.setdefault(name, []).append(instruction)
    return users


def _parameters(body: Computation) -> dict[int, Instruction]:
    return {
        int(i.arguments): i
        for i in body.values()
        if i.opcode == "parameter" and i.arguments.isdigit()
    }


def _read(value: Instruction, users: dict[str, list[Instruction]], module: Module) -> int:
    """Return the bytes of a fusion's input that are read: only slices of it, if only slices are
    used.
    """
    needed = 0
    for user in users.get(value.name, []):
        body = (
            module.computations.get(user.called("calls") or "", {})
            if user.opcode == "fusion"
            else {}
        )
        if user.opcode in _SLICES:
            needed += user.bytes
        elif not user.root and (
            user.opcode in _SAME or body and _only_renames(body)
        ):  # on TPUs in other tiles
            needed += _read(user, users, module)
        elif body:
            needed += _read(
                _parameters(body)[user.operands.index(value.name)], _users(body), module
            )
        elif user.opcode != "dynamic-update-slice" or user.operands[0] != value.name:
            return value.bytes
    return min(needed, value.bytes)


def _only_renames(body: Computation) -> bool:
    return all(instruction.opcode in ("parameter", *_SAME) for instruction in body.values())


def _written(leaf: Instruction, body: Computation) -> int:
    """Return the bytes that a fusion writes for one result; for an update in place, those of the
    update.
    """
    origin = leaf
    while origin.opcode in _RENAMES and origin.operands and origin.operands[0] in body:
        origin = body[origin.operands[0]]
    if origin.opcode == "dynamic-update-slice" and origin.operands[1] in body:
        return body[origin.operands[1]].bytes
    return leaf.bytes


def _transposed(leaf: Instruction, body: Computation) -> bool:
    """Return whether a fusion's FP8 result comes out of a transpose."""
    if not _one_byte(leaf.shapes[0]):
        return False
    origin = leaf
    while origin.opcode in _RENAMES and origin.operands and origin.operands[0] in body:
        if _reorders(origin, [body[name] for name in origin.operands]):
            return True
        origin = body[origin.operands[0]]
    return origin.opcode == "transpose"


def _one_byte(array: Array) -> bool:
    """Return whether an array is FP8, or its bytes as integers, as quantised tensors are saved for
    the backward pass.
    """
    return (is_fp8(array.dtype) or array.dtype == "uint8") and array.size > 1
