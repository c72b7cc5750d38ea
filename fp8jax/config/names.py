"""Check names of sections and fields, and suggest the nearest for a wrong one."""

import dataclasses
import difflib
import typing
from typing import Any

from fp8jax.config.errors import ConfigError
from fp8jax.config.run import Config

# Section → its dataclass.
SECTIONS: dict[str, Any] = typing.get_type_hints(Config)


def check_name(section: str, field: str | None = None) -> None:
    """Raise ConfigError, which names the nearest, if there is no such section, or no such field in
    it.
    """
    if section not in SECTIONS:
        raise ConfigError(f"config.{section}: unknown section{_nearest(section, SECTIONS)}")
    known = [found.name for found in dataclasses.fields(SECTIONS[section])]
    if field is not None and field not in known:
        like = " or ".join(f"config.{'.'.join(found)}" for found in fields_like(field)[:4])
        raise ConfigError(
            f"config.{section}.{field}: unknown field"
            + (f"; did you mean {like}?" if like else _nearest(field, known))
        )


def fields_like(name: str) -> list[tuple[str, str]]:
    """Return fields that have this name, or whose words begin with its letters: `lr` is
    optimizer.learning_rate.
    """
    fields = [
        (section, field.name)
        for section, kind in SECTIONS.items()
        for field in dataclasses.fields(kind)
    ]
    same = [found for found in fields if found[1] == name or ".".join(found) == name]
    return same or [
        found
        for found in fields
        if "_" in found[1] and "".join(word[0] for word in found[1].split("_") if word) == name
    ]


def _nearest(name: str, known: Any) -> str:
    """Return '; did you mean X?' or the list of known names."""
    return did_you_mean(name, known) or f"; known: {', '.join(known)}"


def did_you_mean(name: str, known: Any) -> str:
    """Return a suggestion such as "; did you mean 'steps'?", empty if no known name is near."""
    close = difflib.get_close_matches(name[:200], list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
