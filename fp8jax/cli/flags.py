"""Parse the command lines of train.py and eval.py: absl flags and fields of a configuration, with one-line errors.

The module imports no JAX, because a mistake should be reported before that is loaded; its exit code
is 2.
"""

import pathlib
import re
import sys
from collections.abc import Callable, Sequence

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from fp8jax import config as config_lib
from fp8jax.cli import fields, words
from fp8jax.cli.errors import complain, with_underscores
from fp8jax.config import CheckpointError, ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]  # the repository, with configs/
PRESETS = pathlib.Path(__file__).resolve().parents[1] / "presets"  # the same in an installed fp8jax
EXAMPLE = "--config=configs/fp8_base.py:tiny"
WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "directory of the run; for train.py the default is runs/CONFIG-SIZE",
)
_CONTINUING = ("resume", "restart", "continue", "restore", "load")
_LISTED = 12  # configurations that a message names
_BOOLEANS = ("true", "t", "1", "false", "f", "0")


def run(argv: Sequence[str], work: Callable[[], int], usage: str) -> int:
    """Parse the flags, run `work` and return the exit code; --help only prints `usage` and the flags.

    Errors that the user can fix (flags, config, checkpoint) are printed as one line, without a
    traceback.
    """
    words.warn_of_untested_jax()
    logging.set_verbosity(logging.WARNING)
    known = [
        flags.FLAGS["workdir"],
        *flags.FLAGS.get_key_flags_for_module(sys.modules[work.__module__]),
    ]
    names = [flag.name for flag in known]
    if any(word in ("-h", "-help", "--help") for word in argv[1:]):
        if argv[0].startswith("fp8jax "):
            usage = usage.replace(f"python {argv[0].split()[1]}.py", f"python -m {argv[0]}")
        print("\n".join([usage.strip(), "", *(f"--{flag.name}: {flag.help}" for flag in known)]))
        return 0
    if "--version" in argv[1:]:
        print(words.version())
        return 0
    fields_given = [word for word in argv[1:] if re.match(r"--?(no)?config([.=]|$)", word)]
    if fields_given and "config" not in names:
        name = fields_given[0].partition("=")[0]
        return complain(
            f"unknown flag {name}: the run's own configuration is used, config.json in its --workdir; leave it out"
        )
    try:
        rest = _parse(known, with_underscores(argv))
    except flags.UnrecognizedFlagError as error:
        return complain(_unknown(error, names))
    except flags.Error as error:
        return complain(_bad_value(str(error)))
    if len(rest) > 1:
        return complain(_unexpected(rest[1], names))
    try:
        return work()
    except (ConfigError, CheckpointError) as error:
        return complain(str(error))


def _parse(known: Sequence[flags.Flag], argv: Sequence[str]) -> list[str]:
    """Set the flags of this command alone, and return the words that are no flags, the program's name first."""
    own = flags.FlagValues()
    for flag in known:
        own[flag.name] = flag
    rest = own(argv)
    flags.FLAGS.mark_as_parsed()
    return rest


def split(name: str, argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Take fields of a configuration out of a command line.

    Args:
        name: name of the flag, e.g. `config`.
        argv: the whole command line; --flagfile is read.

    Returns:
        `--NAME.section.field=value` for each field, and the other words.
    """
    overrides, rest, rest_of = (
        [],
        [],
        iter(flags.FLAGS.read_flags_from_files(list(argv), force_gnu=False)),
    )
    for word in rest_of:
        if not re.match(rf"--?(no)?{name}\.", word):
            rest.append(word)
        elif "=" in word or _is_boolean(word):
            overrides.append(word)
        else:
            overrides.append(f"{word}={next(rest_of, '')}")
    return overrides, rest


def find_config(name: str, file: str) -> tuple[pathlib.Path, str]:
    """Return the file of a configuration, and its argument.

    Args:
        name: name of the flag.
        file: `configs/fp8_base.py:8b`, or `fp8_base:8b`. Paths are relative to the working
            directory, or else to the repository; `configs/` and bare names are presets of the
            package, too.

    Raises:
        ConfigError: the file does not exist.
    """
    path, _, argument = file.partition(":")
    example = EXAMPLE.replace("--config", f"--{name}")
    found = next((place for place in _places(path) if place.is_file()), None)
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
    """Describe the fault in the path of a configuration that is no file, and list the files there are."""
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
    """Check a field's name and the form of its value, and return section and field if the value is None."""
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
        return "" if text.lower() in _BOOLEANS else f"{text!r} is not True or False"
    return "" if kind is str else words.wrong_number(kind, text)


def _is_boolean(word: str) -> bool:
    """Return whether a field can be set without a value."""
    section, _, field = word.partition(".")[2].partition(".")
    try:
        return fields.field_of(section, field.replace("-", "_"))[0] is bool
    except ConfigError:
        return False  # reported when it is read


def _unknown(error: flags.UnrecognizedFlagError, known: Sequence[str]) -> str:
    """Return the message for an unknown flag, with the fields of the configuration that it may mean."""
    name, takes_config = error.flagname, "config" in known
    if takes_config and name in _CONTINUING:
        return f"unknown flag --{name}: a run is continued by itself from its newest checkpoint, where --workdir is its directory"
    value = "".join(str(error.flagvalue).partition("=")[1:])
    return words.unknown_flag(f"--{name}{value}", [*known, "help", "version"], fields=takes_config)


def _unexpected(word: str, known: Sequence[str]) -> str:
    """Return the message for a word that is no flag."""
    name, equals, _ = word.partition("=")
    begun = f"unknown argument {word!r}"
    if equals and name.replace("-", "_") in known:
        return f"{begun}; say --{word}"
    if "config" in known and re.search(r"\.py(:|$)", word):
        return f"{begun}; say --config={word}"
    if "config" in known and equals and (meant := words.same_fields(name)):
        return f"{begun}; say " + " or ".join(
            f"--config.{field}={word.partition('=')[2]}" for field in meant
        )
    return f"{begun}; flags start with --, and values go after '='"


def _bad_value(message: str) -> str:
    """Return absl's message on the value of a flag, with what to write instead."""
    if message == "Missing value for flag --config":
        return f"--config: has no value; for example {EXAMPLE}"
    if found := re.match(r"flag --(\w+)=(.*): invalid literal for int", message, re.S):
        name, text = found.groups()
        return f"--{name}: {words.wrong_number(int, text)}: {flags.FLAGS[name].help}"
    return message


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
