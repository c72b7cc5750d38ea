"""Show and read fields of the configuration for the command line."""

import dataclasses

from fp8jax.config import Config, check_name, kind_of, open_fields


def reference() -> str:
    """Return every field with its default and its meaning, for --help."""
    lines = []
    for section in dataclasses.fields(Config):
        lines.append(f"{section.name}: {(section.type.__doc__ or '').strip()}")
        for field in dataclasses.fields(section.type):
            choices = (
                f" ({', '.join(field.metadata['choices'])})" if field.metadata["choices"] else ""
            )
            lines.append(
                f"  --config.{section.name}.{field.name}={field.default}{choices}\n      {field.metadata['doc']}"
            )
    return "\n".join(lines)


def field_of(section: str, field: str) -> tuple[type, bool, str]:
    """Return the type of a field, whether the command line may set it to None, and its meaning.

    Raises:
        ConfigError: the field does not exist.
    """
    check_name(section, field)
    kind = next(found.type for found in dataclasses.fields(Config) if found.name == section)
    found = next(found for found in dataclasses.fields(kind) if found.name == field)
    plain, optional = kind_of(found.type)
    return plain, optional or (section, field) in open_fields.OPEN, found.metadata["doc"]
