"""Command lines of train.py and eval.py: absl flags and fields of a configuration; every mistake is one line and exit code 2.

Imports no JAX: a mistake should be known before that is loaded.
"""

import importlib.metadata
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

import fp8jax
from fp8jax import config as config_lib
from fp8jax.cli import fields
from fp8jax.cli.errors import complain, with_underscores
from fp8jax.config import CheckpointError, ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]  # of the repository, where configs/ is
EXAMPLE = "--config=configs/fp8_base.py:tiny"
WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; that of train.py is runs/CONFIG-SIZE where it is not given")
_BOOLEANS = ("true", "t", "1", "false", "f", "0")


def run(argv: Sequence[str], work: Callable[[], int], usage: str) -> int:
    """Parses the flags, runs `work`, returns the exit code; --help prints `usage` and the flags, and does nothing else.

    Errors that are the user's to fix (flags, config, checkpoint) are printed as one line, without a traceback.
    """
    logging.set_verbosity(logging.WARNING)
    if any(word in ("-h", "-help", "--help") for word in argv[1:]):
        known = [flags.FLAGS["workdir"], *flags.FLAGS.get_key_flags_for_module(sys.modules[work.__module__])]
        if argv[0].startswith("fp8jax "):
            usage = usage.replace(f"python {argv[0].split()[1]}.py", f"python -m {argv[0]}")
        print("\n".join([usage.strip(), "", *(f"--{flag.name}: {flag.help}" for flag in known)]))
        return 0
    if "--version" in argv[1:]:
        print(version())
        return 0
    try:
        rest = flags.FLAGS(with_underscores(argv))
    except flags.Error as error:
        return complain(_unknown(error) if isinstance(error, flags.UnrecognizedFlagError) else str(error))
    if len(rest) > 1:
        return complain(f"unknown argument {rest[1]!r}; flags start with --")
    try:
        return work()
    except (ConfigError, CheckpointError) as error:
        return complain(str(error))


def version() -> str:
    """Versions of fp8jax and of what its numbers depend on."""
    return f"fp8jax {fp8jax.__version__}, jax {importlib.metadata.version('jax')}, python {sys.version.split()[0]}"


def split(name: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Takes fields of a configuration out of a command line.

    Args:
        name: of the flag, e.g. `config`.
        argv: the whole command line; --flagfile is read.

    Returns:
        `--NAME.section.field=value` for each field, and the other words.
    """
    overrides, rest, words = [], [], iter(flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False))
    for word in words:
        if not re.match(rf"--?(no)?{name}\.", word):
            rest.append(word)
        elif "=" in word or _is_boolean(word):
            overrides.append(word)
        else:
            overrides.append(f"{word}={next(words, '')}")
    return overrides, rest


def find_config(name: str, file: str) -> tuple[pathlib.Path, str]:
    """The file of a configuration, and its argument.

    Args:
        name: of the flag.
        file: `configs/fp8_base.py:8b`, or `fp8_base:8b` for one of configs/. Paths are of the working directory, else of the repository.

    Raises:
        ConfigError: no such file.
    """
    path, _, argument = file.partition(":")
    names = [path] if "/" in path or path.endswith(".py") else [path, f"configs/{path}.py"]
    for directory in (pathlib.Path(), ROOT):
        for found in names:
            if (directory / found).is_file():
                return directory / found, argument
    known = [found.stem for found in sorted((ROOT / "configs").glob("*.py")) if found.stem not in ("__init__", "common")]
    nearest = config_lib.did_you_mean(pathlib.Path(path).stem, known) if path else ""
    raise ConfigError(f"--{name}={file}: no such file{nearest}; for example --{name}={EXAMPLE.partition('=')[2]}")


def read_config(name: str, file: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """A config file, changed as the command line says, outside of absl's global flags.

    Args:
        name: of the flag, e.g. `config`.
        file: the file and size, as `find_config` takes them.
        overrides: `--NAME.section.field=value`.

    Raises:
        ConfigError: no such file, size or field, or a value of another type.
    """
    path, argument = find_config(name, file)
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))  # configs import configs.common
    overrides = with_underscores(overrides)
    unset = [field for word in overrides if (field := _check_override(name, word))]
    given = [word for word in overrides if not _check_override(name, word)]
    values, argv = flags.FlagValues(), [name, f"--{name}={path}:{argument}" if argument else f"--{name}={path}", *given]
    try:
        found = config_flags.DEFINE_config_file(name, flag_values=values, sys_argv=argv)
        values(argv)
        for section, field in unset:
            found.value[section][field] = None
    except Exception as error:  # whatever a config file raises while it is loaded or changed
        raise ConfigError(_text(error)) from error
    return found.value


def _check_override(name: str, word: str) -> tuple[str, str] | None:
    """Checks a field's name and the form of its value; returns section and field where the value is None."""
    found = re.fullmatch(rf"--?(no)?{name}\.([^=]*)(=.*)?", word, re.S)
    negated, path, value = found.groups() if found else (None, word, None)
    section, _, field = path.partition(".")
    if not field:
        config_lib.check_name(section)
        raise ConfigError(f"config.{section}: is a section; set a field of it, --{name}.{section}.FIELD=VALUE")
    config_lib.check_name(section, field)
    kind, optional, doc = fields.field_of(section, field)
    text = None if value is None else value[1:]
    if text == "None" and optional:
        return section, field
    if not text and kind is not str and not (text is None and kind is bool):
        raise ConfigError(f"config.{section}.{field}: has no value; --{name}.{section}.{field}=VALUE: {doc}")
    if text is not None and (wrong := _wrong(kind, text)):
        raise ConfigError(f"config.{section}.{field}: {text!r} is not {wrong}: {doc}")
    return None


def _wrong(kind: type, text: str) -> str:
    """What a text should be, where it is something else."""
    if kind is bool:
        return "" if text.lower() in _BOOLEANS else "True or False"
    try:
        kind(text)
    except ValueError:
        if kind is float:
            return "a number"
    else:
        return ""
    try:
        number = float(text)
    except ValueError:
        return "a whole number"
    return f"a whole number; write {number:.0f}" if number.is_integer() and abs(number) < 1e18 else "a whole number"


def _is_boolean(word: str) -> bool:
    """Whether a field can be set without a value."""
    section, _, field = word.partition(".")[2].partition(".")
    try:
        return fields.field_of(section, field.replace("-", "_"))[0] is bool
    except ConfigError:
        return True  # told of when it is read


def _unknown(error: flags.UnrecognizedFlagError) -> str:
    """The message for a flag that there is not; names the fields of the configuration that it may mean."""
    value = "".join(str(error.flagvalue).partition("=")[1:])
    if "config" in flags.FLAGS and (meant := config_lib.fields_like(error.flagname)):
        return f"unknown flag --{error.flagname}; a field of the configuration? " + " or ".join(
            f"--config.{section}.{field}{value}" for section, field in meant[:4])
    return f"unknown flag --{error.flagname}" + (config_lib.did_you_mean(error.flagname, list(flags.FLAGS)) or "; --help lists what there is")


def _text(error: Exception) -> str:
    """What to say of an error in flags or in a config file."""
    message = str(error).strip()
    if isinstance(error, ConfigError):
        return message
    if isinstance(error, flags.Error):  # of a ValueError in a config file, absl gives the whole traceback
        flag, raised, _ = message.partition(": Error whilst parsing config file")
        return f"{flag}: {message.splitlines()[-1].removeprefix('ValueError: ')}" if raised else message
    return f"{type(error).__name__} in the config file: {message}"
