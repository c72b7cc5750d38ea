"""A run's own copy of its tokenizer: whoever has the directory can sample, evaluate tasks and export, wherever the data is.

    keep(workdir, tokenizer.of(config.data))            # WORKDIR/tokenizer.json or tekken.json; nothing for bytes
    config = read_config(workdir)                       # config.json, for those that need not load JAX
    tokenizer.of(own(config, workdir).data)             # that copy; without one, what the configuration says

A path inside the run's directory is written as '{workdir}/hf/tokenizer.json', so that the directory can be moved.
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
    """Copy the tokenizer's file into the run's directory, all or nothing; what another one left there goes.

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
    """Return a run's configuration with its own tokenizer, for all that needs no data.

    Args:
        config: of the run.
        workdir: its directory.
        fingerprint: of the tokenizer, as a checkpoint knows it: bytes have no file.
    """
    copy = _copy(workdir)
    if copy is not None:
        return _with(config, str(copy))
    return _with(config, "byte") if fingerprint == "byte" else config


def found(config: Config, workdir: pathlib.Path) -> Config:
    """Return the configuration to train with: with the run's own tokenizer where the file that it names is away."""
    name, copy = config.data.tokenizer, _copy(workdir)
    if copy is None or name in ("auto", "byte", "tekken") or pathlib.Path(name).exists():
        return config
    return _with(config, str(copy))


def read_config(workdir: str | os.PathLike) -> Config:
    """Read WORKDIR/config.json.

    Raises:
        FileNotFoundError: there is none.
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
    """Return what config.json holds: a tokenizer inside the directory by its place there."""
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
