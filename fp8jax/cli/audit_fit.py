"""Print what a run chooses so that it fits: `python -m fp8jax audit --fit`."""

from typing import Any

from rich.console import Console

from fp8jax.cli.audit_tables import bytes_text, new_table
from fp8jax.monitor.progress import standard_output
from fp8jax.training.fit import describe
from fp8jax.training.fit_target import TargetFit

_SHOWN = 20  # options in the table


def fit_json(found: TargetFit) -> dict[str, Any]:
    """Return the choice and every option as plain values: bytes of one device, seconds of a step at
    peak rates.
    """
    option = found.choice.best.option
    limit = found.limit
    return {
        "microbatches": option.microbatches,
        "loss_chunk": option.loss_chunk,
        "remat": option.remat,
        "bytes_per_device": found.choice.best.needs,
        "usable_bytes_per_device": None if limit is None else limit.usable,
        "limit": None if limit is None else limit.source,
        "text": describe(found.choice, limit).removeprefix("fit").strip(),
        "advice": found.advice,
        "options": found.rows(),
    }


def show_fit(found: TargetFit, console: Console | None = None) -> None:
    """Print the fastest options, and all that were compiled."""
    console = console or standard_output(width=150, highlight=False)
    table = new_table(
        "What a run may choose, the fastest first; estimates by closed formula",
        ("microbatches", "loss_chunk", "remat"),
        ("bytes of a device", "as compiled", "seconds a step", "at peak rates, as compiled", ""),
    )
    rows = found.rows()
    shown = [row for n, row in enumerate(rows) if n < _SHOWN or row["compiled"]]
    for row in shown:
        compiled: dict[str, Any] = row["compiled"] or {
            "bytes_per_device": None,
            "step_seconds": None,
        }
        table.add_row(
            str(row["microbatches"]),
            str(row["loss_chunk"]),
            row["remat"],
            bytes_text(row["estimated_bytes_per_device"]),
            bytes_text(compiled["bytes_per_device"]) if compiled["bytes_per_device"] else "",
            f"{row['estimated_seconds']:.3f}",
            f"{compiled['step_seconds']:.3f}" if compiled["step_seconds"] else "",
            "chosen" if row["chosen"] else "",
        )
    console.print(table)
    if len(rows) > len(shown):
        console.print(f"and {len(rows) - len(shown)} slower ones")
    console.print(describe(found.choice, found.limit))
    if found.advice:
        console.print(found.advice)
