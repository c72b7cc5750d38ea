"""Read values of an untrusted Hugging Face config.json: of the right type and finite, or an error
names the key.
"""

from collections.abc import Mapping
from typing import Any

from fp8jax.interop.hf_safetensors import HuggingFaceError


def number(values: Mapping[str, Any], key: str, kind: type = float) -> Any:
    """Return the finite number of a key; an int is at least 1.

    Raises:
        HuggingFaceError: the value is not one.
    """
    value = values[key]
    if type(value) is not kind and not (kind is float and type(value) is int):
        raise HuggingFaceError(f"config.json: {key}: {repr(value)[:60]} is not {kind.__name__}")
    if kind is int and value < 1:
        raise HuggingFaceError(f"config.json: {key}: {value} is below 1")
    if abs(value) > 1e300 or value != value:
        raise HuggingFaceError(f"config.json: {key}: {str(value)[:20]} is not a finite number")
    return kind(value)


def boolean(values: Mapping[str, Any], key: str) -> bool:
    """Return the truth value of a key.

    Raises:
        HuggingFaceError: the value is not one.
    """
    if type(values[key]) is not bool:
        raise HuggingFaceError(f"config.json: {key}: {values[key]!r} is not true or false")
    return values[key]
