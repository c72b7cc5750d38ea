"""Read JSON of untrusted files in bounded memory.

    values = read_json(path)                      # at most 64 MiB of text, and 256 MiB of values
    values = parse_json(line, memory=1 << 28)     # from bytes or text in memory

Values take more memory than their text: 57 MB of `[]` are 1.6 GB of lists. Their memory is counted
before they are made.
"""

import json
import math
import os
import pathlib
import re
from typing import Any

JSON_BYTES, JSON_MEMORY = 1 << 26, 1 << 28
# Bytes of an object with members, of a list, and of a value with its slot, in CPython.
_OBJECT, _LIST, _VALUE = 232, 64, 64
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


def elsewhere(name: str) -> str:
    """Return the error for an address, such as gs://bucket/tokens, that is given as a path; '' for
    a path.
    """
    if re.match(r"[A-Za-z]:[\\/]", name) and os.name != "nt":
        return (
            f"{name}: is a path of Windows; here a directory is written like /data/runs or "
            f"runs/first"
        )
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]+:(?=/|$)", name)
    # 'gs:' anywhere in a path is an address for the library that writes checkpoints.
    found = scheme[0] if scheme else "gs:" if "gs:" in pathlib.Path(name).absolute().parts else ""
    if not found:
        return ""
    return (
        f"{name}: {found}// is no file system; give a directory, such as one where the bucket "
        f"is mounted "
        "(gcsfuse, s3fs, blobfuse)"
    )


class TooManyValuesError(ValueError):
    """An error for JSON whose values would take more memory than allowed."""


def read_bytes(path: pathlib.Path, most: int) -> bytes:
    """Return all bytes of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than `most`; it is not read then.
    """
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"has more than {most} bytes")
    return content


def read_json(path: pathlib.Path, most: int = JSON_BYTES, memory: int = JSON_MEMORY) -> Any:
    """Return the JSON of a file.

    Raises:
        OSError: it cannot be read.
        ValueError: it has more than `most` bytes, or `parse_json` refuses it; the message is one
            line, without the path.
    """
    return parse_json(read_bytes(path, most), memory=memory)


def parse_json(content: bytes | str, *, memory: int = JSON_MEMORY, **options: Any) -> Any:
    """Return the value of a JSON text.

    Args:
        content: UTF-8 bytes, or text.
        memory: bytes that its values may take besides their text, in CPython.
        options: options of json.loads.

    Raises:
        ValueError: it is not JSON, is nested too deeply, or has too many values; the message is one
            line.
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
    """Return a value for strict JSON, with "nan", "inf" and "-inf" in place of numbers that are not
    finite.
    """
    if isinstance(value, dict):
        return {name: strict(item) for name, item in value.items()}
    if isinstance(value, list):
        return [strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _memory(raw: bytes) -> int:
    """Return the most bytes that the values of a JSON text take, without their strings."""
    return _OBJECT * raw.count(b"{") + _LIST * raw.count(b"[") + _VALUE * raw.count(b",")
