"""Explain words on a command line that are not understood, the same for every command.

    unknown_flag("--temprature=1", ["tokens", "temperature"])
    # "unknown flag --temprature; did you mean --temperature=1?"
    wrong_number(int, "10k")
    # "'10k' is not a whole number; write 10000"

The module imports no JAX.
"""

import decimal
import difflib
import functools
import importlib.metadata
import re
import sys
from collections.abc import Iterable

import fp8jax
from fp8jax import config as config_lib

_THOUSANDS = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9, "t": 10**12}
_SHOWN = 4  # fields that a word may mean


def version() -> str:
    """Return the versions of fp8jax and of what its numbers depend on."""
    jax_version = importlib.metadata.version("jax")
    return f"fp8jax {fp8jax.__version__}, jax {jax_version}, python {sys.version.split()[0]}"


@functools.cache
def warn_of_untested_jax() -> None:
    """Say on standard error, once a process, that fp8jax was not tested with the JAX that is
    installed.
    """
    line = fp8jax.untested_jax(importlib.metadata.version("jax"))
    if line:
        print(line, file=sys.stderr)


def unknown_flag(word: str, known: Iterable[str], *, fields: bool = False) -> str:
    """Return the message for a flag that a command does not have, with the nearest one that it has.

    Args:
        word: the word as written, --NAME or --NAME=VALUE.
        known: names of the existing flags, without dashes.
        fields: whether the command accepts --config.section.field=VALUE.
    """
    name, equals, value = word.lstrip("-").partition("=")
    begun, plain = f"unknown flag --{name}", _plain(name)
    meant = same_fields(plain) if fields else []
    nearest = closest(plain, known)
    if fields and not meant and not nearest:
        meant = _near_fields(plain)
    if meant:
        told = " or ".join(f"--config.{field}{equals}{value}" for field in meant)
        return f"{begun}; a field of the configuration? {told}"
    if nearest:
        return f"{begun}; did you mean --{nearest}{equals}{value}?"
    return f"{begun}; --help lists what there is"


def closest(name: str, known: Iterable[str]) -> str | None:
    """Return the nearest of some names, None if none is near."""
    plain = {_plain(one): one for one in known}
    found = difflib.get_close_matches(_plain(name)[:200], list(plain), n=1)
    return plain[found[0]] if found else None


def same_fields(name: str) -> list[str]:
    """Return fields, like training.steps, that have this name, with or without their section."""
    found = config_lib.fields_like(_plain(name).removeprefix("config."))
    return [".".join(field) for field in found[:_SHOWN]]


def _near_fields(name: str) -> list[str]:
    every = [
        (section, field)
        for section, values in config_lib.to_dict(config_lib.Config()).items()
        for field in values
    ]
    names = {field for _, field in every} | {".".join(field) for field in every}
    nearest = closest(name.removeprefix("config."), sorted(names))
    return same_fields(nearest) if nearest else []


def wrong_number(kind: type, text: str) -> str:
    """Return what is wrong with a text that should be an int or a float; '' for nothing."""
    try:
        kind(text)
    except ValueError:
        begun = f"{text!r} is not {'a number' if kind is float else 'a whole number'}"
        number = _meant(text)
        if number is None or (kind is int and number % 1):
            return begun
        return f"{begun}; write {number:f}" if number % 1 else f"{begun}; write {number:.0f}"
    return ""


def _meant(text: str) -> decimal.Decimal | None:
    """Return the number that 1e3, 10k or 1,000 stands for, if it is small enough to write out;
    otherwise None.
    """
    digits = text.strip().lower()
    unit = digits[-1:] if digits[-1:] in _THOUSANDS else ""
    digits = digits.removesuffix(unit).strip()
    if re.fullmatch(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?", digits):
        digits = digits.replace(",", "")
    try:
        number = decimal.Decimal(digits) * _THOUSANDS.get(unit, 1)
    except decimal.DecimalException:
        return None
    written_out = number.is_finite() and (not number or -18 < number.adjusted() < 18)
    return number if written_out else None


def _plain(name: str) -> str:
    return name.lower().replace("-", "_")
