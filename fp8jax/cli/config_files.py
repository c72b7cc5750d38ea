"""Find and read files of configurations, with changes, for every command: one-line errors, no flags
of absl and no JAX.
"""

import pathlib
import re
import sys
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from fp8jax import config as config_lib
from fp8jax import files
from fp8jax.cli import fields, words
from fp8jax.cli.errors import with_underscores
from fp8jax.config import Config, ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]  # the repository, with configs/
PRESETS = pathlib.Path(__file__).resolve().parents[1] / "presets"  # the same in an installed fp8jax
EXAMPLE = "--config=configs/fp8_base.py:tiny"
BOOLEANS = ("true", "t", "1", "false", "f", "0")
_LISTED = 12  # configurations that a message names


def find_config(name: str, file: str) -> tuple[pathlib.Path, str]:
    """Return the file of a configuration, and its argument.

    Args:
        name: name of the flag.
        file: `configs/fp8_base.py:8b`, or `fp8_base:8b`. Paths are relative to the working
            directory, or else to the repository; `configs/` and bare names are presets of the
            package, too.

    Raises:
        ConfigError: the file does not exist; or it, or the run that from_run.py takes, is in an
            object store.
    """
    path, _, argument = file.partition(":")
    example = EXAMPLE.replace("--config", f"--{name}")
    found = next((place for place in _places(path) if place.is_file()), None)
    address = file if found is None else argument if found.stem == "from_run" else ""
    if address and (away := files.elsewhere(address)):
        raise ConfigError(f"--{name}={away}")
    if found is None:
        reason = _not_there(path)
        end = "" if reason.endswith("?") else ";"
        raise ConfigError(f"--{name}={file}: {reason}{end} for example {example}")
    if found.suffix != ".py":
        raise ConfigError(
            f"--{name}={file}: is not a configuration, a Python file; for example {example}"
        )
    return found, argument


def _places(path: str) -> list[pathlib.Path]:
    """Return the places of a configuration, of which the first that exists counts."""
    given = pathlib.Path(path)
    names = [path] if _is_path(path) else [path, f"configs/{path}.py"]
    places = [directory / found for directory in (pathlib.Path(), ROOT) for found in names]
    if not _is_path(path) or given.parent == pathlib.Path("configs"):
        places.append(PRESETS / f"{given.stem}.py")
    return places


def _is_path(path: str) -> bool:
    """Return whether a configuration is given by its file, not by a preset's bare name."""
    return "/" in path or path.endswith(".py")


def _not_there(path: str) -> str:
    """Describe the fault in the path of a configuration that is no file, and list the files there
    are.
    """
    here = pathlib.Path(path) if pathlib.Path(path).exists() else ROOT / path
    if path and here.is_dir():
        return f"is a directory, not a configuration{_listed(here, path)}"
    bare = not _is_path(path)
    folder = pathlib.Path(path).parent
    known = {stem: stem if bare else f"configs/{stem}.py" for stem in _stems(PRESETS)}
    if not bare:
        known |= {stem: str(folder / f"{stem}.py") for stem in _stems(here.parent)}
    nearest = words.closest(pathlib.Path(path).stem, known)
    if nearest:
        return f"no such file; did you mean {known[nearest]!r}?"
    return "no such file" + _listed(PRESETS, "configs")


def _listed(directory: pathlib.Path, called: str) -> str:
    names = [f"{called.rstrip('/')}/{stem}.py" for stem in _stems(directory)]
    return (
        f"; there are {', '.join(names[:_LISTED])}{', ...' * (len(names) > _LISTED)}"
        if names
        else ""
    )


def _stems(directory: pathlib.Path) -> list[str]:
    """Return the names of the configurations in a directory."""
    return [
        found.stem
        for found in sorted(directory.glob("*.py"))
        if found.stem not in ("__init__", "common")
    ]


def read_config(name: str, file: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """Read a config file with the command line's changes, without absl's global flags.

    Args:
        name: name of the flag, e.g. `config`.
        file: the file and size, as for `find_config`.
        overrides: `--NAME.section.field=value`.

    Raises:
        ConfigError: the file, size or field does not exist, or a value has another type.
    """
    path, argument = find_config(name, file)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # configs import configs.common
    overrides = with_underscores(overrides)
    unset = [field for word in overrides if (field := _check_override(name, word))]
    given = [word for word in overrides if not _check_override(name, word)]
    values, argv = (
        flags.FlagValues(),
        [name, f"--{name}={path}:{argument}" if argument else f"--{name}={path}", *given],
    )
    try:
        found = config_flags.DEFINE_config_file(name, flag_values=values, sys_argv=argv)
        values(argv)
        for section, field in unset:
            found.value[section][field] = None
    except Exception as error:  # a config file may raise any kind while it is loaded or changed
        raise ConfigError(_text(error)) from error
    return found.value


def _check_override(name: str, word: str) -> tuple[str, str] | None:
    """Check a field's name and the form of its value, and return section and field if the value is
    None.
    """
    found = re.fullmatch(rf"--?(no)?{name}\.([^=]*)(=.*)?", word, re.S)
    negated, path, value = found.groups() if found else (None, word, None)
    section, _, field = path.partition(".")
    if not field:
        config_lib.check_name(section)
        raise ConfigError(
            f"config.{section}: is a section; set a field of it, --{name}.{section}.FIELD=VALUE"
        )
    config_lib.check_name(section, field)
    kind, optional, doc = fields.field_of(section, field)
    if (section, field) == ("training", "fitted"):
        raise ConfigError(
            "config.training.fitted: is what a run has chosen, not to be set; leave it out, and set "
            "config.training.microbatches, loss_chunk or remat"
        )
    text = None if value is None else value[1:]
    if text == "None" and optional:
        return section, field
    if not text and kind is not str and not (text is None and kind is bool):
        raise ConfigError(
            f"config.{section}.{field}: has no value; --{name}.{section}.{field}=VALUE: {doc}"
        )
    if text is not None and (wrong := _wrong(kind, text)):
        raise ConfigError(f"config.{section}.{field}: {wrong}: {doc}")
    return None


def _wrong(kind: type, text: str) -> str:
    """Describe what is wrong with a field's text; '' if nothing is."""
    if kind is bool:
        return "" if text.lower() in BOOLEANS else f"{text!r} is not True or False"
    return "" if kind is str else words.wrong_number(kind, text)


def _text(error: Exception) -> str:
    """Return the message for an error in flags or in a config file."""
    message = str(error).strip()
    if isinstance(error, ConfigError):
        return message
    if isinstance(
        error, flags.Error
    ):  # for a ValueError in a config file, absl gives the whole traceback
        flag, raised, _ = message.partition(": Error whilst parsing config file")
        return (
            f"{flag}: {message.splitlines()[-1].removeprefix('ValueError: ')}"
            if raised
            else message
        )
    return f"{type(error).__name__} in the config file: {message}"


def run_in(workdir: pathlib.Path) -> Config | None:
    """Return the configuration of the run to continue; one that cannot be read is reported later,
    when it is needed.
    """
    try:
        return config_lib.from_dict(config_lib.read_json(workdir / "config.json"))
    except (ConfigError, FileNotFoundError, AttributeError):
        return None
