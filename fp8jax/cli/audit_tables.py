"""Print audits as tables, one audit or two side by side."""

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from fp8jax.monitor.progress import standard_output

Audit = dict[str, Any]


def show(audits: Sequence[Audit], console: Console | None = None) -> None:
    """Print one audit in full, or the main figures of two side by side, each followed by its
    details.
    """
    console = console or standard_output(width=150, highlight=False)
    if len(audits) > 1:
        console.print(_side_by_side(audits))
    for audit in audits:
        if len(audits) > 1:
            console.rule(audit["config"]["file"])
        for table in (_gemms(audit), _memory(audit), _collectives(audit), _traffic(audit)):
            console.print(table)
        for line in _verdict(audit):
            console.print(line)


def _gemms(audit: Audit) -> Table:
    table = new_table(
        "GEMMs of one device, a step",
        ("role", "pass", "operands", "result", "kernel"),
        ("largest (b, m, n, k)", "executions", "FLOPs"),
    )
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in audit["gemms"]:
        name = row["pass"] + (" again" if row["repeated"] else "")
        groups.setdefault(
            (
                row["role"],
                name,
                f"{_short(row['lhs_dtype'])} x {_short(row['rhs_dtype'])}",
                _short(row["out_dtype"]),
                row["kernel"],
            ),
            [],
        ).append(row)
    for key in sorted(groups, key=lambda key: (key[0], key[1])):
        rows = groups[key]
        largest = max(rows, key=lambda row: row["flops"] / max(row["executions"], 1))
        known = "" if all(row["executions_known"] for row in rows) else "at least "
        shape = (
            ", ".join(map(str, largest["shape_bmnk"]))
            if any(largest["shape_bmnk"])
            else "in a fused kernel"
        )
        table.add_row(
            *key,
            shape,
            known + str(sum(row["executions"] for row in rows)),
            _si(sum(row["flops"] for row in rows), "FLOP"),
        )
    return table


def _memory(audit: Audit) -> Table:
    memory = audit["memory"]
    table = new_table("Memory of one device", ("",), ("bytes",))
    parts = {
        f"argument: {name}": size for name, size in memory["arguments"].items() if name != "total"
    }
    parts |= {
        "temporaries: activations, gradients, workspaces": memory["temporaries"],
        "results": memory["outputs"],
        "peak": memory["peak_bytes_per_device"],
    }
    for name, size in parts.items():
        table.add_row(name, bytes_text(size))
    return table


def _collectives(audit: Audit) -> Table:
    table = new_table(
        "Collectives of one device, a step",
        ("kind", "dtype", "mesh axes"),
        ("executions", "whole arrays", "sent"),
    )
    for row in audit["collectives"]:
        table.add_row(
            row["kind"],
            _short(row["dtype"]),
            " x ".join(row["axes"]),
            str(row["executions"]),
            bytes_text(row["bytes"]),
            bytes_text(row["sent"]),
        )
    return table


def _traffic(audit: Audit) -> Table:
    table = new_table(
        "Memory traffic beside the GEMMs, one device, a step",
        ("kind", "where"),
        ("read", "written", "executions"),
    )
    for row in audit["non_gemm_bytes"]["rows"]:
        if row["read"] + row["written"] > 1e-3 * audit["non_gemm_bytes"]["total"]:
            table.add_row(
                row["kind"],
                row["where"] or "elsewhere",
                bytes_text(row["read"]),
                bytes_text(row["written"]),
                str(row["executions"]),
            )
    total = audit["non_gemm_bytes"]
    table.add_row("total", "", bytes_text(total["read"]), bytes_text(total["written"]), "")
    return table


def _verdict(audit: Audit) -> list[str]:
    target, memory, flops = audit["target"], audit["memory"], audit["estimate"]["model_flops"]
    lines = [
        f"FP8 share    {audit['fp8_share']:.1%} of the block's GEMM FLOPs, as compiled for "
        f"{target['device']}"
    ]
    if not target["fp8_units"]:
        lines[0] += (
            f"; {target['fp8_share_asked']:.0%} asked for: no FP8 units there, FP8 values are "
            f"multiplied in BF16"
        )
    lines += [f"fell back    {line}" for line in target["fallbacks"]]
    lines += [f"float64      {name}" for name in target["float64"][:5]]
    usable = bytes_text(memory["usable_bytes"] or 0)
    fits = {
        None: "",
        True: f", of {usable} that a run may take",
        False: f", does NOT fit in the {usable} that a run may take",
    }
    lines.append(
        f"memory       {bytes_text(memory['peak_bytes_per_device'])} a device at the "
        f"peak{fits[memory['fits']]}"
    )
    lines.append(f"chosen       {audit['fit']['text']}")
    if audit["fit"]["advice"]:
        lines.append(f"             {audit['fit']['advice']}")
    extra = ", ".join(
        f"{name.replace('_', ' ')} {_si(flops[name], 'FLOP')}"
        for name in ("repeated", "masked_attention", "other")
    )
    lines += [
        f"GEMM FLOPs   compiled {_si(flops['counted'], 'FLOP')} on all devices: the model's own "
        f"{_si(flops['closed_formula'], 'FLOP')} "
        "(closed formula, causal attention)",
        f"             and {extra}",
    ]
    return [*lines, *_speed(audit), f"compiled in  {audit['compile_seconds']:.0f} s"]


def _speed(audit: Audit) -> list[str]:
    found = audit["estimate"]
    if "step_seconds" not in found:
        return ["estimate     none: the device's peak rates are not known here"]
    device = found["device"]
    return [
        f"estimate     {found['step_seconds'] * 1e3:,.1f} ms a step at peak rates (GEMMs "
        f"{found['gemm_seconds'] * 1e3:,.1f}, other memory "
        f"traffic {found['memory_seconds'] * 1e3:,.1f}, collectives "
        f"{found['collective_seconds'] * 1e3:,.1f} if hidden; "
        f"{found['step_seconds_no_overlap'] * 1e3:,.1f} if not)",
        f"             MFU {found['mfu_bf16']:.0%} of the BF16 peak "
        f"({device['bf16'] / 1e12:,.0f} TFLOP/s), {found['mfu_fp8']:.0%} of the "
        f"FP8 peak ({device['fp8'] / 1e12:,.0f}); {found['tokens_per_second_per_device']:,.0f} "
        f"tokens/s a device",
        "             an upper bound, not a measurement: real kernels do not reach peak rates",
    ]


def _side_by_side(audits: Sequence[Audit]) -> Table:
    table = new_table("Side by side", ("",), [audit["config"]["file"] for audit in audits])
    rows = {
        "FP8 share of block GEMM FLOPs": lambda a: f"{a['fp8_share']:.1%}",
        "model FLOPs, all devices": lambda a: _si(
            a["estimate"]["model_flops"]["closed_formula"], "FLOP"
        ),
        "GEMM FLOPs as compiled": lambda a: _si(a["estimate"]["model_flops"]["counted"], "FLOP"),
        "peak memory of a device": lambda a: bytes_text(a["memory"]["peak_bytes_per_device"]),
        "  arguments": lambda a: bytes_text(a["memory"]["arguments"]["total"]),
        "  temporaries": lambda a: bytes_text(a["memory"]["temporaries"]),
        "moved beside GEMMs": lambda a: bytes_text(a["non_gemm_bytes"]["total"]),
        "  FP8 transposed copies": lambda a: bytes_text(
            a["non_gemm_bytes"]["fp8_transposed_copies"]
        ),
        "sent in collectives": lambda a: bytes_text(sum(row["sent"] for row in a["collectives"])),
        "estimated ms a step": lambda a: (
            f"{a['estimate'].get('step_seconds', float('nan')) * 1e3:,.1f}"
        ),
        "estimated MFU, BF16 peak": lambda a: f"{a['estimate'].get('mfu_bf16', float('nan')):.0%}",
        "estimated MFU, FP8 peak": lambda a: f"{a['estimate'].get('mfu_fp8', float('nan')):.0%}",
        "compile seconds": lambda a: f"{a['compile_seconds']:.0f}",
    }
    for name, value in rows.items():
        table.add_row(name, *(value(audit) for audit in audits))
    return table


def new_table(title: str, left: Sequence[str], right: Sequence[str]) -> Table:
    """Return an empty table with columns aligned to the left, then to the right."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for name in left:
        table.add_column(name)
    for name in right:
        table.add_column(name, justify="right")
    return table


def _short(dtype: str) -> str:
    for long, short in (
        ("float8_", ""),
        ("bfloat", "bf"),
        ("float", "f"),
        ("uint", "u"),
        ("int", "s"),
    ):
        if dtype.startswith(long):
            return short + dtype.removeprefix(long)
    return dtype


def _si(value: float, unit: str) -> str:
    """Format a value such as '1.44 TFLOP' or '268 MB'."""
    prefixes = ["", "k", "M", "G", "T", "P", "E"]
    power = min(int(math.log10(value)) // 3, len(prefixes) - 1) if value >= 1 else 0
    scaled = value / 1000**power
    return (
        f"{scaled:,.{0 if scaled >= 100 or not power else 1 if scaled >= 10 else 2}f} "
        f"{prefixes[power]}{unit}"
    )


def bytes_text(size: float) -> str:
    """Format a size such as '268 MB'."""
    return _si(size, "B")
