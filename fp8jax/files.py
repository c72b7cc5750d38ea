"""JSON of files that anyone may have written: never more memory than its reader allows.

    values = read_json(path)                      # at most 64 MiB of text, and 256 MiB of values
    values = parse_json(line, memory=1 << 28)     # of bytes or text that are there already

Values take more memory than their text: 57 MB of `[]` are 1.6 GB of lists. What they would take is counted before they are made.
"""

import json
import math
import os
import pathlib
import re
from collections.abc import Callable
from typing import Any

JSON_BYTES, JSON_MEMORY = 1 << 26, 1 << 28
# Bytes of an object with members, of a list, and of a value with its place, in CPython.
_OBJECT, _LIST, _VALUE = 232, 64, 64
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def elsewhere(name: str) -> str:
    """Return what to say of an address, such as gs://bucket/tokens, that was given for a path; '' for a path."""
    if re.match(r"[A-Za-z]:[\\/]", name) and os.name != "nt":
        return f"{name}: is a path of Windows; here a directory is written like /data/runs or runs/first"
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?=/|$)", name)
    # 'gs:' anywhere in a path is an address for the library that writes checkpoints.
    found = scheme[0] if scheme else "gs:" if "gs:" in pathlib.Path(name).absolute().parts else ""
    if not found:
        return ""
    return (
        f"{name}: {found}// is no file system; give a directory, such as one where the bucket is mounted "
        "(gcsfuse, s3fs, blobfuse)"
    )


class TooManyValuesError(ValueError):
    """JSON whose values would take more memory than they may."""


def read_bytes(path: pathlib.Path, most: int) -> bytes:
    """All bytes of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than `most`, which are not read then.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"has more than {most} bytes")
    return content


def read_json(path: pathlib.Path, most: int = JSON_BYTES, memory: int = JSON_MEMORY) -> Any:
    """The JSON of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than `most` bytes, or as `parse_json`; the message is one line, without the path.
    """
    return parse_json(read_bytes(path, most), memory=memory)


def parse_json(
    content: bytes | str, *, memory: int = JSON_MEMORY, **options: Callable[..., Any]
) -> Any:
    """The value of a JSON text.

    Args:
        content: UTF-8, or text.
        memory: bytes that its values may take beside their text, as CPython keeps them.
        options: of json.loads.

    Raises:
        ValueError: it is not JSON, nested too deeply, or of too many values; the message is one line.
    """
    if len(content) * _OBJECT > memory:
        raw = content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
        if _memory(raw) > memory and _memory(_STRING.sub(b"", raw)) > memory:
            raise TooManyValuesError(
                f"holds more values than {memory >> 20} MiB of memory have room for"
            )
        del raw
    try:
        return json.loads(
            content.decode("utf-8") if isinstance(content, bytes) else content, **options
        )
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 at byte {error.start}") from None


def strict(value: Any) -> Any:
    """The same as strict JSON has it, without numbers that are not finite: "nan", "inf" and "-inf" instead."""
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _memory(raw: bytes) -> int:
    """Bytes that the values of a JSON text take at most, but for their strings."""
    return _OBJECT * raw.count(b"{") + _LIST * raw.count(b"[") + _VALUE * raw.count(b",")
