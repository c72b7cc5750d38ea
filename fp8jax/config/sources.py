"""Parse the fields that list sources of data."""

import math
import pathlib
import re

from fp8jax.config.errors import ConfigError


def parse_sources(text: str) -> tuple[tuple[str, float], ...]:
    """Return names and weights, which add up to 1, of `config.data.source`: 'name' or
    'name=weight,name=weight'.

    A path may hold '=' itself (lang=en/tokens): one source without a weight is taken as a name.

    Raises:
        ConfigError: a weight is missing or not above 0, or a name is missing or there twice.
    """
    last = text.rpartition("=")[2]
    if "," not in text and (
        "=" not in text or ("/" in text and _weight(last) is None) or pathlib.Path(text).exists()
    ):
        return ((text, 1.0),)
    found: dict[str, float] = {}
    for pair in text.split(","):
        name, _, weight = (part.strip() for part in pair.rpartition("="))
        value = _weight(weight) or 0.0
        if not name or name in found or not 0.0 < value < math.inf:
            raise ConfigError(
                f"config.data.source: {pair!r} in {text!r} is not a new source with a weight "
                f"above 0, as in 'dirA=0.7,dirB=0.3'"
            )
        found[name] = value
    return tuple((name, value / math.fsum(found.values())) for name, value in found.items())


def parse_held_out(text: str) -> tuple[tuple[str, str], ...]:
    """Return name and source of each part of `config.data.held_out`; none for 'auto' or 'none'.

    A source without a name is called by the last part of its path.

    Raises:
        ConfigError: a part has no source, or a name is there twice.
    """
    if text in ("auto", "none"):
        return ()
    found: dict[str, str] = {}
    for part in text.split(","):
        name, equals, source = (word.strip() for word in part.partition("="))
        if not equals or "/" in name:  # a path may hold '=' itself
            source = part.strip()
            name = re.sub(r"[^\w.-]", "_", pathlib.PurePath(source).name)
        if not source or not re.fullmatch(r"[\w.-]+", name) or name in found:
            raise ConfigError(
                f"config.data.held_out: {part!r} in {text!r} is not a source with a name of its "
                f"own, as in "
                "'wiki=dirA,code=dirB'; or say auto or none"
            )
        found[name] = source
    return tuple(found.items())


def _weight(text: str) -> float | None:
    """Return the number that a text spells; None if it is none."""
    try:
        return float(text)
    except ValueError:
        return None
