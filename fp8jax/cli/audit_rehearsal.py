"""Print a rehearsal: `python -m fp8jax audit --rehearse`."""

import dataclasses
from typing import Any

from rich.console import Console

from fp8jax import config as config_lib
from fp8jax.cli.audit_tables import bytes_text, new_table
from fp8jax.monitor.progress import standard_output
from fp8jax.training.rehearsal import Rehearsal, Rehearsed


def rehearsal_json(found: Rehearsal) -> dict[str, Any]:
    """Return a rehearsal as plain values."""
    limit = found.limit
    return {
        "fits": found.ok,
        "programs": [dataclasses.asdict(row) for row in found.programs],
        "checks": [{"name": row.name, "ok": row.ok, "error": row.error} for row in found.checks],
        "usable_bytes_per_device": None if limit is None else limit.bytes,
        "resolved": config_lib.to_dict(found.config),
    }


def show_rehearsal(found: Rehearsal, console: Console | None = None) -> None:
    """Print programs and checks, what fails, and the verdict."""
    console = console or standard_output(width=150, highlight=False)
    numbers = ("peak of a device", "FP8 share", "seconds to compile")
    table = new_table("Programs of the run", ("program", ""), numbers)
    for row in found.programs:
        peak = "" if row.peak_bytes_per_device is None else bytes_text(row.peak_bytes_per_device)
        share = "" if row.fp8_share is None else f"{row.fp8_share:.0%}"
        table.add_row(row.name, _mark(row), peak, share, f"{row.seconds or 0:.1f}")
    console.print(table)
    for row in found.checks:
        console.print(f"{row.name:<16} {_mark(row)}")
    for row in (*found.programs, *found.checks):
        if not row.ok:
            console.print(f"{row.name}: {row.error}", markup=False, soft_wrap=True)
    there = (
        f", {bytes_text(found.limit.bytes)} a device ({found.limit.source})" if found.limit else ""
    )
    verdict = "nothing would fail" if found.ok else "this run would fail"
    console.print(f"rehearsed: {verdict}{there}", markup=False)


def _mark(row: Rehearsed) -> str:
    return "ok" if row.ok else "FAILS"
