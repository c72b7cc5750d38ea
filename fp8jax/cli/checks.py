"""Check what can be checked before JAX is loaded: directories, output files, runs and checkpoints,
sources of data.

Every check raises ConfigError, one line that names the flag, its value and what to write instead.
"""

import os
import pathlib
from collections.abc import Sequence

from fp8jax.config import CheckpointError, Config, ConfigError, DataConfig, did_you_mean, to_dict
from fp8jax.training import fixed_fields, manifest


def directory(flag: str, path: pathlib.Path) -> None:
    """Check that a directory exists or can be made, and can be written to."""
    there = _nearest(flag, path)
    if not there.is_dir():
        raise ConfigError(f"{flag}={path}: {there} is a file; give a directory")
    _check_writable(flag, path, there)


def empty_directory(flag: str, path: pathlib.Path) -> None:
    """Check that a directory can be made and written to, and is empty."""
    directory(flag, path)
    if path.exists() and any(path.iterdir()):
        raise ConfigError(f"{flag}={path}: is not empty; choose another {flag}")


def new_file(flag: str, path: pathlib.Path) -> None:
    """Check that a file can be written; it may exist."""
    if path.is_dir():
        raise ConfigError(f"{flag}={path}: is a directory; give a file, such as {path / 'NAME'}")
    there = _nearest(flag, path.parent)
    if there.exists() and not there.is_dir():
        raise ConfigError(f"{flag}={path}: {there} is a file, not a directory; choose another path")
    if there != path.parent:
        raise ConfigError(
            f"{flag}={path}: no directory {path.parent}; make it, or choose another path"
        )
    _check_writable(flag, path, path if path.exists() else there)


def run(workdir: pathlib.Path, flag: str = "--workdir") -> None:
    """Check that there is a run in a directory."""
    if not (workdir / "config.json").is_file():
        there = "no such directory" if not workdir.exists() else "no config.json there"
        raise ConfigError(
            f"{flag}={workdir}: {there}; give the directory of a run, which has config.json"
        )


def checkpoint(workdir: pathlib.Path, step: int | None) -> None:
    """Check that a run has a checkpoint of a step, or for None any checkpoint."""
    try:
        manifest.chosen(workdir / "checkpoints", step)
    except CheckpointError as error:
        raise ConfigError(f"--step={step}: {error}" if step is not None else str(error)) from None


def data(config: Config, workdir: pathlib.Path) -> None:
    """Check that the sources of a run's data and its tokenizer are there, without reading tokens."""
    from fp8jax.data import (
        run_tokenizer,
        sources,
        tokenizer,
    )  # loads NumPy, which most mistakes need not wait for

    config = run_tokenizer.found(config, workdir)
    sources.check(config.data)
    tokenizer.of(config.data)


def held_out(text: str) -> None:
    """Check that the text of eval.py's --held_out is there."""
    from fp8jax.data import sources

    try:
        sources.check(DataConfig(held_out=text))
    except ConfigError as error:
        raise ConfigError(str(error).replace("config.data.held_out: ", "--held_out: ", 1)) from None


def allowed_changes(allowed: Sequence[str]) -> None:
    """Refuse fields of --allow_config_change that may change without it, or that do not exist."""
    known = {
        f"{section}.{name}" for section, values in to_dict(Config()).items() for name in values
    }
    for name in allowed:
        if fixed_fields.is_fixed(*name.partition(".")[::2]) and name in known:
            continue
        reason = (
            "may change without it"
            if name in known
            else f"no such field{did_you_mean(name, known).rstrip('?')}"
        )
        raise ConfigError(
            f"--allow_config_change={name}: {reason}; it takes {fixed_fields.described()}"
        )


def _nearest(flag: str, path: pathlib.Path) -> pathlib.Path:
    """Return the path, or the nearest above it that exists."""
    try:
        return next(found for found in (path, *path.parents, pathlib.Path()) if found.exists())
    except OSError as error:
        raise ConfigError(
            f"{flag}={path}: cannot be used: {error.strerror}; choose another"
        ) from None


def _check_writable(flag: str, path: pathlib.Path, there: pathlib.Path) -> None:
    if not os.access(there, os.W_OK):
        raise ConfigError(f"{flag}={path}: {there} cannot be written to; choose another")
