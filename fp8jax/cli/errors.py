"""How every command reports a mistake: one line on standard error, exit code 2."""

import argparse
import os
import pathlib
import re
import sys
from collections.abc import Sequence

from fp8jax.config import ConfigError

BAD_USAGE = 2


def complain(message: str) -> int:
    """Prints a message on one line of standard error and returns 2."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    print(f"error: {' '.join(lines)}", file=sys.stderr)
    return BAD_USAGE


class Parser(argparse.ArgumentParser):
    """A parser whose mistakes are one line, as everywhere else; takes no abbreviations, and leaves examples unbroken."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **{"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter, **options})

    def error(self, message: str):
        """Exits with code 2."""
        sys.exit(complain(f"{message}; {self.prog} --help shows an example"))


def local_path(text: str) -> pathlib.Path:
    """A path on a file system; the type of every option that is one.

    Raises:
        argparse.ArgumentTypeError: the address of an object store, which would be taken for a directory of that name.
    """
    path = pathlib.Path(text)
    # 'gs:' anywhere in a path is an address for the library that writes checkpoints.
    found = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?=/|$)", text)
    if scheme := found[0] if found else "gs:" if "gs:" in path.absolute().parts else "":
        raise argparse.ArgumentTypeError(f"{text}: {scheme}// is no file system; give a directory, such as one where the bucket is mounted "
                                         "(gcsfuse, s3fs, blobfuse)")
    if re.match(r"[A-Za-z]:[\\/]", text) and os.name != "nt":
        raise argparse.ArgumentTypeError(f"{text}: is a path of Windows; here a directory is written like /home/me/runs or runs/first")
    return path


def local_directory(flag: str, text: str) -> pathlib.Path:
    """The same for a flag of train.py or eval.py.

    Raises:
        ConfigError: the address of an object store.
    """
    try:
        return local_path(text)
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"--{flag}={error}") from None


def with_underscores(argv: Sequence[str]) -> list[str]:
    """The arguments with --text_field for --text-field: either may be written."""
    return [re.sub(r"^--[^=\s]+", lambda name: "--" + name[0][2:].replace("-", "_"), word) for word in argv]
