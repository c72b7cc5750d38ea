"""Make a configuration from values and write it back; read untrusted files."""

import dataclasses
import hashlib
import json
import math
import pathlib
import types
import typing
from typing import Any

import ml_collections
from ml_collections import config_dict

from fp8jax import files
from fp8jax.config import bounds, open_fields
from fp8jax.config.checks import check
from fp8jax.config.errors import ConfigError
from fp8jax.config.names import SECTIONS, check_name, did_you_mean
from fp8jax.config.run import Config


def defaults() -> ml_collections.ConfigDict:
    """Return every field at its default; fields that may be None are typed placeholders, so
    overrides are type-checked.

    Fields that follow the run's length and the mesh unless set (open_fields.py) are placeholders,
    too, with defaults in `preset`.
    """
    out = ml_collections.ConfigDict()
    for section, fields in SECTIONS.items():
        values = ml_collections.ConfigDict()
        for field in dataclasses.fields(fields):
            kind, _ = kind_of(field.type)
            unset = field.default is None or (section, field.name) in open_fields.OPEN
            values[field.name] = config_dict.placeholder(kind) if unset else field.default
        out[section] = values
    out.preset = open_fields.planned(to_dict(Config()))
    return out


def to_dict(config: Config) -> dict[str, dict[str, Any]]:
    """Return a plain nested dictionary, for config.json."""
    return dataclasses.asdict(config)


def digest(config: Config) -> str:
    """Return a short hash of every field, which identifies a configuration."""
    return hashlib.blake2b(
        json.dumps(to_dict(config), sort_keys=True).encode(), digest_size=8
    ).hexdigest()


def from_dict(
    values: ml_collections.ConfigDict | dict[str, Any], run: Config | None = None
) -> Config:
    """Make a frozen, validated configuration.

    Args:
        values: nested mapping of section → field → value. Missing fields take their defaults; in a
            ConfigDict, schedules that are not set follow the run's length (open_fields.py).
        run: the configuration of the run in the directory, if it continues.

    Raises:
        ConfigError: a section or field is unknown, a value has a wrong type or is forbidden, or a
            combination is impossible.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
        if preset := values.pop("preset", None):
            open_fields.fill(values, preset, run and to_dict(run))
    elif isinstance(values.get("mesh"), dict):
        values = values | {"mesh": open_fields.filled_mesh(values["mesh"])}
    built = {}
    for name, fields in values.items():
        check_name(name)
        if not isinstance(fields, dict):
            raise ConfigError(f"config.{name}: {fields!r} is not a section of fields")
        built[name] = _build_section(name, SECTIONS[name], fields)
    config = Config(**built)
    check(config)
    return config


def read_json(path: pathlib.Path, most: int = files.JSON_BYTES) -> Any:
    """Read the JSON of an untrusted file.

    Args:
        path: path of the file.
        most: the most bytes that are read; its values may take four times as many.

    Raises:
        ConfigError: it cannot be read, is larger than `most`, or is not JSON. A missing file is a
            FileNotFoundError.
    """
    try:
        return files.read_json(path, most, memory=4 * most)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: cannot be read as JSON: {str(error)[:100]}") from None


def _build_section(section: str, kind: Any, values: dict[str, Any]) -> Any:
    known = {field.name: field for field in dataclasses.fields(kind)}
    checked = {}
    for name, value in values.items():
        check_name(section, name)
        checked[name] = _check_value(f"config.{section}.{name}", known[name], value)
    return kind(**checked)


def check_field(section: str, name: str, value: Any) -> None:
    """Raise ConfigError if there is no such field, or if it cannot have this value."""
    check_name(section, name)
    field = next(field for field in dataclasses.fields(SECTIONS[section]) if field.name == name)
    _check_value(f"config.{section}.{name}", field, value)


def _check_value(path: str, field: dataclasses.Field, value: Any) -> Any:
    kind, optional = kind_of(field.type)
    if value is None and optional:
        return None
    if kind is float and type(value) is int and abs(value) < 2**1000:
        value = float(value)
    if type(value) is not kind:
        raise ConfigError(
            f"{path}: {value!r} is not {kind.__name__}{' or None' if optional else ''}: "
            f"{field.metadata['doc']}"
        )
    if type(value) is float and not math.isfinite(value):
        raise ConfigError(f"{path}: {value!r} is not a finite number")
    choices = field.metadata["choices"]
    if choices and value not in choices:
        raise ConfigError(
            f"{path}: {value!r} is not one of "
            f"{', '.join(choices)}{did_you_mean(str(value), choices)}"
        )
    if outside := bounds.outside(value, field.metadata):
        raise ConfigError(f"{path}: {value!r} is {outside}: {field.metadata['doc']}")
    return value


def kind_of(annotation: Any) -> tuple[type, bool]:
    """Return the plain type of an annotation, and whether None is allowed too."""
    if isinstance(annotation, types.UnionType):
        kinds = [a for a in typing.get_args(annotation) if a is not type(None)]
        return kinds[0], True
    return annotation, False
