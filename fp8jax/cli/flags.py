"""Command lines of train.py and eval.py: absl flags, with every mistake told in one line and exit code 2."""

import pathlib
import re
import sys
from collections.abc import Callable, Sequence

import ml_collections
from absl import flags, logging
from ml_collections import config_flags

from fp8jax.cli.errors import complain
from fp8jax.config import ConfigError, check_name
from fp8jax.training.checkpoint import CheckpointError


def run(argv: Sequence[str], work: Callable[[], int], usage: str) -> int:
    """Parses the flags, runs `work`, returns the exit code; --help prints `usage` and the flags, and does nothing else.

    Errors that are the user's to mend (flags, config, checkpoint) are printed as one line, without a traceback.
    """
    logging.set_verbosity(logging.WARNING)
    if any(word in ("-h", "-help", "--help") for word in argv[1:]):
        known = [flag for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[work.__module__]) if not flag.name.startswith("config.")]
        print("\n".join([usage.strip(), "", *(f"--{flag.name}: {flag.help}" for flag in known)]))
        return 0
    try:
        _check_names("config", argv)
        rest = flags.FLAGS(list(argv))
        if len(rest) > 1:
            return complain(f"unknown argument {rest[1]!r}; flags start with --")
    except Exception as error:  # whatever a config file raises while it is loaded or changed
        return complain(_text(error))
    try:
        return work()
    except (ConfigError, CheckpointError) as error:
        return complain(str(error))


def read_config(name: str, file: str, overrides: Sequence[str] = ()) -> ml_collections.ConfigDict:
    """A config file read outside of absl's global flags.

    Args:
        name: of the flag, e.g. `config`.
        file: the file and size, `configs/fp8_base.py:8b`.
        overrides: `--NAME.section.field=value`.

    Raises:
        ConfigError: no such file, size or field, or a value of another type.
    """
    if not pathlib.Path(file.partition(":")[0]).is_file():
        raise ConfigError(f"--{name}={file}: no such file; for example --{name}=configs/fp8_base.py:8b")
    values, argv = flags.FlagValues(), [name, f"--{name}={file}", *overrides]
    _check_names(name, overrides)
    found = config_flags.DEFINE_config_file(name, flag_values=values, sys_argv=argv)
    try:
        values(argv)
    except Exception as error:  # as in `run`
        raise ConfigError(_text(error)) from error
    return found.value


def _check_names(name: str, argv: Sequence[str]) -> None:
    """Raises ConfigError on the first `--NAME.section.field` that there is not."""
    for word in argv:
        if found := re.match(rf"--?{name}\.(\w+)(?:\.(\w+))?", word):
            check_name(*found.groups())


def _text(error: Exception) -> str:
    """What to tell of an error in flags or in a config file."""
    message = str(error).strip()
    if isinstance(error, ConfigError):
        return message
    if isinstance(error, flags.Error):  # of a ValueError in a config file, absl gives the whole traceback
        flag, raised, _ = message.partition(": Error whilst parsing config file")
        return f"{flag}: {message.splitlines()[-1].removeprefix('ValueError: ')}" if raised else message
    return f"{type(error).__name__} in the config file: {message}"
