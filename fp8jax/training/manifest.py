"""What a checkpoint must hold, byte for byte: MANIFEST.json in its directory, written when all else is complete.

    write(directory, {"step": 20})
    problem(directory)      # None, or one line: which file is missing, of another size, or damaged

A directory without a manifest is not a checkpoint: whatever wrote it was interrupted, or the file is lost.
"""

import hashlib
import json
import os
import pathlib
from typing import Any

from fp8jax.config import ConfigError, read_json

NAME = "MANIFEST.json"
_CHUNK = 1 << 22


def write(directory: pathlib.Path, facts: dict[str, Any]) -> None:
    """Writes the manifest of all files under a directory, whole or not at all; `facts` are kept with it."""
    files = {path: [os.path.getsize(directory / path), _digest(directory / path)] for path in _files(directory)}
    content = {**facts, "files": files}
    temporary = directory / f"{NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"content": content, "digest": _digest_of(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / NAME)


def fact(directory: pathlib.Path, name: str) -> Any:
    """What the manifest tells of `name`; None where it does not, or is damaged."""
    try:
        return read_json(directory / NAME)["content"][name]
    except (OSError, ConfigError, KeyError, TypeError):
        return None


def sync(directory: pathlib.Path) -> None:
    """Makes names in a directory last through a loss of power."""
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def problem(directory: pathlib.Path) -> str | None:
    """The first difference between a directory and its manifest, in one line; None where there is none. Reads every file."""
    try:
        manifest = read_json(directory / NAME)
        content, digest = manifest["content"], manifest["digest"]
        expected = {path: (size, wanted) for path, (size, wanted) in content["files"].items()}
    except FileNotFoundError:
        return f"{NAME} is missing"
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{NAME} is damaged: {type(error).__name__}"
    if digest != _digest_of(content):
        return f"{NAME} is damaged: its digest differs"
    found = _files(directory)
    for path in sorted(expected.keys() | set(found)):
        if path not in expected:
            return f"{path} is not in {NAME}"
        if path not in found:
            return f"{path} is missing"
        size, wanted = expected[path]
        if (actual := os.path.getsize(directory / path)) != size:
            return f"{path} has {actual} bytes, not {size}"
        if _digest(directory / path) != wanted:
            return f"{path} is damaged: its digest differs"
    return None


def _files(directory: pathlib.Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*")
                  if path.is_file() and path.name not in (NAME, f"{NAME}.tmp"))


def _digest(path: pathlib.Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _digest_of(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
