"""Fill in fields that are not set from the rest of a configuration: schedules follow the run's
length.

    preset = config.pop("preset")                # a preset's plan: its steps, and warm-up and intervals for them
    fill(config, preset)                         # replaces None

A preset leaves its warm-up and its intervals open (None) and writes them under `preset`, beside the
steps that they are for. A run of fewer steps gets less of each. A value that is not None was set by
the user, so only the user can set too much.

The functions take plain dictionaries, before they are checked: reading.py does both.
"""

from typing import Any

WARMUP = ("optimizer", "warmup_steps")
INTERVALS = (("checkpoint", "every"), ("evaluation", "every"))
# The fields that a preset plans; with fsdp they are all that is None until it is filled in.
PLANNED = (("training", "steps"), WARMUP, *INTERVALS)
OPEN = (WARMUP, *INTERVALS, ("mesh", "fsdp"))

Values = dict[str, dict[str, Any]]  # section → field → value


def planned(values: Values) -> Values:
    """Return the plan of a preset with these values."""
    return {
        section: {field: values[section][field] for of, field in PLANNED if of == section}
        for section, _ in PLANNED
    }


def fill(values: Values, preset: Values, run: Values | None = None) -> None:
    """Fill in the open fields.

    Args:
        values: all sections and fields.
        preset: values of PLANNED.
        run: the configuration of a continued run, if any: its warm-up has begun, and stays the same
            if possible.
    """
    steps, planned = values["training"]["steps"], preset["training"]["steps"]
    shorter = 0 < steps < planned
    for section, field in (WARMUP, *INTERVALS):
        if values[section][field] is None:
            values[section][field] = preset[section][field]
            if shorter:
                values[section][field] = _shortened(
                    (section, field), preset[section][field], steps, planned
                )
            if run and (section, field) == WARMUP and run[section][field] <= steps:
                values[section][field] = run[section][field]
    values["mesh"] = filled_mesh(values["mesh"])


def filled_mesh(mesh: dict[str, Any]) -> dict[str, Any]:
    """Return the mesh, with an open fsdp taking the devices that are left, unless another axis
    takes them.
    """
    if mesh.get("fsdp") is not None:
        return mesh
    return mesh | {
        "fsdp": 1 if any(size == -1 for axis, size in mesh.items() if axis != "fsdp") else -1
    }


def _shortened(field: tuple[str, str], value: int, steps: int, planned: int) -> int:
    """Return a warm-up of the same share of the run, or an interval that comes at least twice; 0,
    for never, stays.
    """
    if field == WARMUP:
        return round(value * steps / planned)
    return min(value, (steps + 1) // 2)
