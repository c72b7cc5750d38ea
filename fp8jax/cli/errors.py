"""Report a mistake, for every command: one line on standard error, exit code 2."""

import argparse
import pathlib
import re
import sys
from collections.abc import Callable, Sequence

from fp8jax import files
from fp8jax.cli import words
from fp8jax.config import ConfigError, did_you_mean
from fp8jax.exit_codes import BAD_USAGE, FINISHED, STOPPED


def complain(message: str) -> int:
    """Print a message on one line of standard error, and return 2."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    print(f"error: {' '.join(lines)}", file=sys.stderr)
    return BAD_USAGE


def run_command(work: Callable[[], int | None], stopped: str | None = None) -> int:
    """Run the work of a command; return its exit code.

    Mistakes that are the user's to fix are ValueErrors (ConfigError, CheckpointError, MetricsError,
    TargetError and HuggingFaceError are) or the system's, and become one line.

    Args:
        work: returns an exit code; None if it finished.
        stopped: what to print on standard error where the user interrupts.
    """
    try:
        return work() or FINISHED
    except BrokenPipeError:  # `| head` has seen enough
        sys.stderr.close()
        return FINISHED
    except ValueError as error:
        return complain(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return complain(f"{where}{error.strerror or error}")
    except KeyboardInterrupt:
        if stopped is not None:
            print(stopped, file=sys.stderr)
        return STOPPED


class Parser(argparse.ArgumentParser):
    """A parser with errors of one line, without abbreviations, that does not wrap examples."""

    fields = False  # whether --config.section.field=VALUE is accepted

    def __init__(self, *arguments, **options):
        super().__init__(
            *arguments,
            **{
                "allow_abbrev": False,
                "formatter_class": argparse.RawDescriptionHelpFormatter,
                **options,
            },
        )
        self.add_argument("--version", action="version", version=words.version())

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, but report an unknown flag before a missing one."""
        given = sys.argv[1:] if args is None else list(args)
        for word in given:
            if word == "--" or (self._subparsers and not word.startswith("-")):
                break  # text, or words for a command's own parser
            if (
                word.startswith("--")
                and " " not in word
                and word.partition("=")[0] not in self._option_string_actions
            ):
                self.error(self._unknown(word))
        return super().parse_known_args(given, namespace)

    def error(self, message: str):
        """Report the message and exit with code 2."""
        sys.exit(complain(self.explain(message)))

    def explain(self, message: str) -> str:
        """Return a message of argparse in the words of every other command."""
        message = message.removeprefix("argument ")
        if message.startswith("unrecognized arguments: "):
            message = self._unknown(message.partition(": ")[2].split()[0])
        if found := re.fullmatch(r"(\S+): invalid (int|float) value: '(.*)'", message, re.S):
            flag, kind, text = found.groups()
            message = f"{flag}: {words.wrong_number(int if kind == 'int' else float, text)}"
        return (
            f"{message}{'' if message.endswith('?') else ';'} {self.prog} --help shows an example"
        )

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            return f"unknown argument {word!r}"
        return words.unknown_flag(
            word,
            [name.lstrip("-") for name in self._option_string_actions if name.startswith("--")],
            fields=self.fields,
        )

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            known = ", ".join(map(str, action.choices))
            nearest = did_you_mean(str(value), list(action.choices))
            raise argparse.ArgumentError(action, f"{value!r} is not one of {known}{nearest}")


def local_path(text: str) -> pathlib.Path:
    """Return a path on a file system; the type of every option that is a path.

    Raises:
        argparse.ArgumentTypeError: it is the address of an object store, which would be taken for a
            directory of that name.
    """
    if away := files.elsewhere(text):
        raise argparse.ArgumentTypeError(away)
    return pathlib.Path(text)


def local_directory(flag: str, text: str) -> pathlib.Path:
    """Return a path on a file system for a flag of train.py or eval.py.

    Raises:
        ConfigError: it is the address of an object store.
    """
    try:
        return local_path(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--{flag}={error}") from None


def with_underscores(argv: Sequence[str]) -> list[str]:
    """Return the arguments with --text_field for --text-field, since either may be written."""
    return [
        re.sub(r"^--[^=\s]+", lambda name: "--" + name[0][2:].replace("-", "_"), word)
        for word in argv
    ]
