"""Keep a run's own copy of its tokenizer, so that sampling, evaluating tasks and exporting need
only its directory.

    keep(workdir, tokenizer.of(config.data))            # WORKDIR/tokenizer.json or tekken.json; no file for bytes
    config = read_config(workdir)                       # reads config.json without loading JAX
    tokenizer.of(own(config, workdir).data)             # that copy; without one, the configured tokenizer

A path inside the run's directory is written as '{workdir}/hf/tokenizer.json', so that the directory
can be moved.
"""

import dataclasses
import filecmp
import os
import pathlib
import shutil
from typing import Any

from fp8jax import config as config_lib
from fp8jax.config import Config, ConfigError
from fp8jax.data.tokenizer import TekkenTokenizer, Tokenizer

WORKDIR = "{workdir}"
_JSON, _TEKKEN = "tokenizer.json", "tekken.json"


def keep(workdir: pathlib.Path, tokenizer: Tokenizer) -> None:
    """Copy the tokenizer's file into the run's directory atomically, and remove the file of another
    tokenizer.

    Raises:
        OSError: it cannot be written.
    """
    name = None
    if tokenizer.file is not None:
        name = _TEKKEN if isinstance(tokenizer, TekkenTokenizer) else _JSON
        target = workdir / name
        if not (target.is_file() and filecmp.cmp(target, tokenizer.file, shallow=False)):
            partial = workdir / f"{name}.partial"
            shutil.copyfile(tokenizer.file, partial)
            os.replace(partial, target)
    for other in {_JSON, _TEKKEN} - {name}:
        (workdir / other).unlink(missing_ok=True)


def own(config: Config, workdir: pathlib.Path, fingerprint: str | None = None) -> Config:
    """Return a run's configuration with its own tokenizer, for uses that need no data.

    Args:
        config: the run's configuration.
        workdir: the run's directory.
        fingerprint: the tokenizer's fingerprint from a checkpoint: the byte tokenizer has no file.
    """
    copy = _copy(workdir)
    if copy is not None:
        return _with(config, str(copy))
    return _with(config, "byte") if fingerprint == "byte" else config


def found(config: Config, workdir: pathlib.Path) -> Config:
    """Return the configuration to train with, which names the run's own tokenizer if the named file
    is missing.
    """
    name, copy = config.data.tokenizer, _copy(workdir)
    if copy is None or name in ("auto", "byte", "tekken") or pathlib.Path(name).exists():
        return config
    return _with(config, str(copy))


def read_config(workdir: str | os.PathLike) -> Config:
    """Read WORKDIR/config.json.

    Raises:
        FileNotFoundError: the file does not exist.
        ConfigError: it is not JSON, or holds an unknown or forbidden field.
    """
    path = pathlib.Path(workdir) / "config.json"
    values = config_lib.read_json(path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: is not an object of sections")
    try:
        config = config_lib.from_dict(values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    name = config.data.tokenizer
    if not name.startswith(WORKDIR):
        return config
    absolute = os.path.abspath(workdir) + name.removeprefix(WORKDIR)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, tokenizer=absolute))


def as_written(config: Config, workdir: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """Return what config.json holds; a tokenizer inside the directory is named by its place there."""
    values, inside = config_lib.to_dict(config), os.path.abspath(workdir) + os.sep
    name = values["data"]["tokenizer"]
    if os.path.isabs(name) and os.path.abspath(name).startswith(inside):
        values["data"]["tokenizer"] = f"{WORKDIR}/{os.path.abspath(name).removeprefix(inside)}"
    return values


def _copy(workdir: pathlib.Path) -> pathlib.Path | None:
    """Return the copy's absolute path, None where there is none."""
    names = (pathlib.Path(os.path.abspath(workdir)) / name for name in (_JSON, _TEKKEN))
    return next((path for path in names if path.is_file()), None)


def _with(config: Config, tokenizer: str) -> Config:
    # Whether text may be normalised was asked when the run began.
    data = dataclasses.replace(config.data, tokenizer=tokenizer, allow_normalisation=True)
    return dataclasses.replace(config, data=data)
