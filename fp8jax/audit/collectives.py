"""List the collectives of a compiled program: kind, dtype, mesh axes, bytes.

    collectives(module, {"fsdp": 8})        # [Collective("all-gather", "float8_e4m3fn", ("fsdp",), 8, ...), ...]

Mesh axes are found by comparing replica groups with the groups that each set of axes makes, devices
numbered along the mesh. A combined collective is one entry per dtype. The list does not say which
collectives overlap with computation.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping

import numpy as np

from fp8jax.audit import hlo
from fp8jax.audit.hlo import Executed, Module

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
# The part of the whole array that each device sends in a ring of n.
_SENT = {
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^{]*)\))? \{([^}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,{}\s]*)\}\}")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective on arrays of one dtype.

    Attributes:
        kind: one of KINDS.
        dtype: dtype of the arrays.
        axes: mesh axes that the groups span; `?` if they fit none.
        group_size: devices that take part together.
        bytes: bytes of the whole arrays, after gathering or before scattering, one execution.
        sent: bytes that one device sends in a ring, one execution.
        count: executions in a step.
        scope: name stack of the JAX operation.
        reduction: opcode that combines the parts of a reduction, such as `add` or `maximum`; empty
            without one.
    """

    kind: str
    dtype: str
    axes: tuple[str, ...]
    group_size: int
    bytes: int
    sent: int
    count: int
    scope: str = ""
    reduction: str = ""


def collectives(module: Module, mesh: Mapping[str, int]) -> list[Collective]:
    """Return every collective that runs on more than one device; `mesh` gives the sizes of the
    axes, in order.
    """
    names = _axes_by_groups(mesh)
    found = []
    for run in hlo.executed(module):
        for inner in (run, *hlo.nested(module, run)):
            kind = inner.instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                by = module.computations.get(inner.instruction.called("to_apply") or "", {})
                found += _read(
                    inner, kind, names, math.prod(mesh.values()), hlo.root(by).opcode if by else ""
                )
    return found


def _read(
    run: Executed,
    kind: str,
    names: Mapping[frozenset, tuple[str, ...]],
    devices: int,
    reduction: str,
) -> list[Collective]:
    groups = replica_groups(run.instruction.attributes, devices)
    size = max((len(group) for group in groups), default=1)
    if kind == "collective-permute":
        groups = _joined(groups)
    axes = names.get(frozenset(frozenset(group) for group in groups), ("?",))
    by_dtype: dict[str, int] = {}
    for operand in run.operands():
        for shape in operand.shapes:
            by_dtype[shape.dtype] = by_dtype.get(shape.dtype, 0) + shape.bytes * (
                size if kind == "all-gather" else 1
            )
    sent = _SENT.get(kind, lambda n: (n - 1) / n)(size)
    return [
        Collective(
            kind,
            dtype,
            axes,
            size,
            total,
            round(sent * total),
            run.count,
            run.instruction.scope,
            reduction,
        )
        for dtype, total in by_dtype.items()
        if size > 1
    ]


def replica_groups(attributes: str, devices: int) -> list[tuple[int, ...]]:
    """Return groups of device numbers from any form in which XLA writes them; without one, all
    devices.
    """
    listed, iota, mesh = (
        _LISTED.search(attributes),
        _IOTA.search(attributes),
        _MESH.search(attributes),
    )
    if mesh:
        sizes = [(name, int(size)) for name, size in re.findall(r"'([^']+)'=(\d+)", mesh.group(1))]
        split = [
            i
            for i, (name, _) in enumerate(sizes)
            if name in re.findall(r"'([^']+)'", mesh.group(3))
        ]
        order = _ORDER.search(mesh.group(2) or "")
        ids = _iota(*order.groups()) if order else np.arange(math.prod(size for _, size in sizes))
        ids = ids.reshape([size for _, size in sizes]).transpose(
            [i for i in range(len(sizes)) if i not in split] + split
        )
        return [
            tuple(row) for row in ids.reshape(-1, math.prod(sizes[i][1] for i in split)).tolist()
        ]
    if iota:
        shape = [int(n) for n in iota.group(1).split(",")]
        return [tuple(row) for row in _iota(iota.group(2), iota.group(3)).reshape(shape).tolist()]
    if listed:
        return [
            tuple(int(n) for n in part.split(",") if n.strip())
            for part in re.split(r"\}\s*,\s*\{", listed.group(1))
        ]
    return [tuple(range(devices))]


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Return all device numbers, laid out in `dims` and transposed."""
    sizes = [int(n) for n in dims.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(n) for n in order.split(",")]) if order else ids


def _joined(pairs: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the groups that source and target pairs connect."""
    groups: list[set[int]] = []
    for pair in pairs:
        touching = [group for group in groups if group & set(pair)]
        groups = [group for group in groups if group not in touching] + [set(pair).union(*touching)]
    return [tuple(sorted(group)) for group in groups]


def _axes_by_groups(mesh: Mapping[str, int]) -> dict[frozenset, tuple[str, ...]]:
    """Return a dictionary from sets of groups to the mesh axes that make them."""
    names, sizes = [n for n, s in mesh.items() if s > 1], [s for s in mesh.values() if s > 1]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    found = {}
    for length in range(1, len(names) + 1):
        for chosen in itertools.combinations(range(len(names)), length):
            rest = [i for i in range(len(names)) if i not in chosen]
            rows = ids.transpose([*rest, *chosen]).reshape(-1, math.prod(sizes[i] for i in chosen))
            found[frozenset(frozenset(row) for row in rows.tolist())] = tuple(
                names[i] for i in chosen
            )
    return found
