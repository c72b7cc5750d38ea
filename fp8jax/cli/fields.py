"""Show and read fields of the configuration for the command line."""

import dataclasses

from fp8jax.config import SECTIONS, check_name, kind_of, open_fields


def reference() -> str:
    """Return every field with its default and its meaning, for --help."""
    lines = []
    for section, fields in SECTIONS.items():
        lines.append(f"{section}: {' '.join((fields.__doc__ or '').split())}")
        for field in dataclasses.fields(fields):
            choices = (
                f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
            )
            lines.append(
                f"  --config.{section}.{field.name}={field.default}{choices}\n      "
                f"{field.metadata['doc']}"
            )
    return "\n".join(lines)


def field_of(section: str, field: str) -> tuple[type, bool, str]:
    """Return the type of a field, whether the command line may set it to None, and its meaning.

    Raises:
        ConfigError: the field does not exist.
    """
    check_name(section, field)
    found = next(found for found in dataclasses.fields(SECTIONS[section]) if found.name == field)
    plain, optional = kind_of(found.type)
    return plain, optional or (section, field) in open_fields.OPEN, found.metadata["doc"]
