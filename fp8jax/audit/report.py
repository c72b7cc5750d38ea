"""Return the audit as one dictionary of plain values, which is written to JSON and printed as
tables.

    found = report(step, target, reading, seconds)
    found["fp8_share"], found["memory"]["peak_bytes_per_device"], ...

Units: bytes, FLOPs and seconds of one training step. `gemms`, `non_gemm_bytes`, `collectives` and
`memory` are of one device; `block_gemm_flops` and `estimate.model_flops` are summed over all
devices. docs/audit.md explains every key.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from fp8jax.audit import traffic
from fp8jax.audit.gemms import Gemm, fp8_share
from fp8jax.audit.limits import Limit
from fp8jax.audit.program import Reading, fallbacks
from fp8jax.audit.roofline import DEVICES, estimate
from fp8jax.audit.targets import Target


@dataclasses.dataclass(frozen=True)
class Step:
    """A step's facts for the audit, which knows no model.

    Attributes:
        asked: GEMMs of the traced program.
        block_roles: the roles of a block's GEMMs.
        attention_roles: those among them whose GEMMs may compute masked scores.
        model_flops: `linear`, `attention`, `head`: what the step must compute, by closed formula.
        tokens: tokens of one step.
        emulated: whether the target has no FP8 units.
    """

    mesh: Mesh
    asked: Sequence[Gemm]
    block_roles: Collection[str]
    attention_roles: Collection[str]
    model_flops: Mapping[str, int]
    tokens: int
    emulated: bool


def report(
    step: Step, target: Target, reading: Reading, seconds: float, limit: Limit | None = None
) -> dict[str, Any]:
    """Return all findings but `config`, which the caller knows.

    Args:
        step: the step that was compiled.
        target: the devices that it was compiled for.
        reading: the compiled step.
        seconds: seconds that tracing and compiling took.
        limit: a device's memory; None if unknown.
    """
    count = len(target.devices)
    block = [gemm for gemm in reading.gemms if gemm.role in step.block_roles]
    return {
        "target": {
            "name": target.name,
            "device": target.devices[0].device_kind,
            "devices": count,
            "mesh": {axis: int(size) for axis, size in step.mesh.shape.items()},
            "fp8_units": not step.emulated,
            "fp8_share_asked": fp8_share(step.asked, step.block_roles),
            "fallbacks": [] if step.emulated else fallbacks(step.asked, reading.gemms),
            "float64": reading.wide,
        },
        "gemms": _gemm_rows(reading.gemms),
        "block_gemm_flops": sum(gemm.total_flops for gemm in block) * count,
        "fp8_share": fp8_share(reading.gemms, step.block_roles),
        "non_gemm_bytes": _traffic(reading),
        "collectives": _collective_rows(reading),
        "memory": _memory(reading, target, limit),
        "estimate": _estimate(step, target, reading),
        "compile_seconds": round(seconds, 2),
    }


def _gemm_rows(gemms: Sequence[Gemm]) -> list[dict[str, Any]]:
    """Return equal GEMMs as one row, in program order."""
    rows: dict[tuple, dict[str, Any]] = {}
    for g in gemms:
        key = (
            g.role,
            g.pass_name,
            g.repeated,
            g.shape,
            g.lhs_dtype,
            g.rhs_dtype,
            g.out_dtype,
            g.kernel,
            g.count_known,
        )
        row = rows.setdefault(
            key,
            {
                "role": g.role,
                "pass": g.pass_name,
                "repeated": g.repeated,
                "shape_bmnk": list(g.shape),
                "lhs_dtype": g.lhs_dtype,
                "rhs_dtype": g.rhs_dtype,
                "out_dtype": g.out_dtype,
                "kernel": g.kernel,
                "fp8": g.fp8,
                "executions": 0,
                "executions_known": g.count_known,
                "flops": 0,
            },
        )
        row["executions"] += g.count
        row["flops"] += g.total_flops
    return list(rows.values())


def _traffic(reading: Reading) -> dict[str, Any]:
    rows = [dataclasses.asdict(row) for row in reading.traffic]
    transposed = [row for row in reading.traffic if row.kind == traffic.TRANSPOSED_FP8]
    return {
        "total": traffic.total(reading.traffic),
        "read": sum(row["read"] for row in rows),
        "written": sum(row["written"] for row in rows),
        "fp8_transposed_copies": traffic.total(transposed),
        "rows": rows,
    }


def _collective_rows(reading: Reading) -> list[dict[str, Any]]:
    """Return collectives summed by kind, dtype and axes: `bytes` of the whole arrays, `sent` by one
    device in a ring.
    """
    rows: dict[tuple, dict[str, Any]] = {}
    for c in reading.collectives:
        row = rows.setdefault(
            (c.kind, c.dtype, c.axes),
            {
                "kind": c.kind,
                "dtype": c.dtype,
                "axes": list(c.axes),
                "group_size": c.group_size,
                "executions": 0,
                "bytes": 0,
                "sent": 0,
            },
        )
        for key, value in (("executions", 1), ("bytes", c.bytes), ("sent", c.sent)):
            row[key] += value * c.count
    return sorted(rows.values(), key=lambda row: -row["sent"])


def _memory(reading: Reading, target: Target, limit: Limit | None) -> dict[str, Any]:
    memory = reading.memory
    capacity = DEVICES[target.kind].capacity if target.kind in DEVICES else None
    usable = None if limit is None else limit.bytes
    return {
        "peak_bytes_per_device": memory.peak_bytes,
        "arguments": dict(memory.arguments) | {"total": memory.argument_bytes},
        "temporaries": memory.temporary_bytes,
        "outputs": memory.output_bytes,
        "device_bytes": capacity,
        "usable_bytes": usable,
        "fits": None if usable is None else memory.peak_bytes <= usable,
    }


def _estimate(step: Step, target: Target, reading: Reading) -> dict[str, Any]:
    """Return FLOPs against the closed formula, and the roofline if the device's rates are known."""
    found: dict[str, Any] = {
        "label": "an estimate at peak rates, not a measurement",
        "model_flops": _flops(step, reading, len(target.devices)),
    }
    device = DEVICES.get(target.kind)
    if device is None:
        return found
    total = found["model_flops"]["closed_formula"]
    rates = estimate(
        reading,
        device,
        step.mesh,
        per_node=target.per_node,
        model_flops=total / len(target.devices),
    )
    return (
        found
        | dataclasses.asdict(rates)
        | {
            "tokens_per_second_per_device": step.tokens / rates.step_seconds / len(target.devices),
            "device": dataclasses.asdict(device),
        }
    )


def _flops(step: Step, reading: Reading, devices: int) -> dict[str, int]:
    """Return what the compiled step's GEMMs compute besides the model's own FLOPs; `counted` is the
    sum of the rest.
    """

    def summed(*, repeated: bool, attention: bool | None = None) -> int:
        chosen = [
            g
            for g in reading.gemms
            if g.repeated == repeated
            and (attention is None or (g.role in step.attention_roles) == attention)
        ]
        return sum(g.total_flops for g in chosen) * devices

    linear = step.model_flops["linear"] + step.model_flops["head"]
    return {
        "closed_formula": linear + step.model_flops["attention"],
        **{f"closed_formula_{key}": n for key, n in step.model_flops.items()},
        "repeated": summed(repeated=True),
        "masked_attention": summed(repeated=False, attention=True) - step.model_flops["attention"],
        "other": summed(repeated=False, attention=False) - linear,
        "counted": summed(repeated=False) + summed(repeated=True),
    }
