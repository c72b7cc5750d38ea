"""Parse the command lines of train.py and eval.py: absl flags and fields of a configuration, with
one-line errors.

The module imports no JAX, because a mistake should be reported before that is loaded; its exit code
is 2.
"""

import re
import sys
from collections.abc import Callable, Sequence

from absl import flags, logging

from fp8jax.cli import fields, words
from fp8jax.cli.config_files import EXAMPLE
from fp8jax.cli.errors import complain, with_underscores
from fp8jax.config import CheckpointError, ConfigError

WORKDIR = flags.DEFINE_string(
    "workdir",
    None,
    "directory of the run; for train.py the default is runs/CONFIG-SIZE",
)
_CONTINUING = ("resume", "restart", "continue", "restore", "load")


def run(argv: Sequence[str], work: Callable[[], int], usage: str) -> int:
    """Parse the flags, run `work` and return the exit code; --help only prints `usage` and the
    flags.

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
            f"unknown flag {name}: the run's own configuration is used, config.json in its "
            f"--workdir; leave it out"
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
    """Set the flags of this command alone, and return the words that are no flags, the program's
    name first.
    """
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


def _is_boolean(word: str) -> bool:
    """Return whether a field can be set without a value."""
    section, _, field = word.partition(".")[2].partition(".")
    try:
        return fields.field_of(section, field.replace("-", "_"))[0] is bool
    except ConfigError:
        return False  # reported when it is read


def _unknown(error: flags.UnrecognizedFlagError, known: Sequence[str]) -> str:
    """Return the message for an unknown flag, with the fields of the configuration that it may
    mean.
    """
    name, takes_config = error.flagname, "config" in known
    if takes_config and name in _CONTINUING:
        return (
            f"unknown flag --{name}: a run is continued by itself from its newest "
            f"checkpoint, where --workdir is its directory"
        )
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
