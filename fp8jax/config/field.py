"""Declare the fields of a section of the configuration."""

import dataclasses
from typing import Any


def field(
    default: Any,
    doc: str,
    *,
    choices: tuple = (),
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
):
    """Declare a field: its default, its meaning, and its choices or bounds."""
    metadata = {
        "doc": doc,
        "choices": choices,
        "at_least": at_least,
        "above": above,
        "below": below,
        "at_most": at_most,
    }
    return dataclasses.field(default=default, metadata=metadata)
