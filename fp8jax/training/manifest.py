"""Write and check MANIFEST.json, which lists a checkpoint's files byte for byte, and is written
last.

    write(directory, {"step": 20})
    problem(directory)      # None, or one line: which file is missing, of another size, or damaged

A directory without a manifest is not a checkpoint: its save was interrupted, or the file is lost.

Digests find damage, not forgery: XXH3 of 128 bits is ten times as fast as BLAKE2. Files are read in
chunks by several threads, and a file's digest is that of its chunks' digests, so one large file
takes no longer than many small ones. Manifests of earlier versions, BLAKE2 of whole files, are
still read.
"""

import concurrent.futures
import hashlib
import json
import os
import pathlib
from collections.abc import Iterable
from typing import Any

import xxhash

from fp8jax.config import CheckpointError, ConfigError, read_json

NAME = "MANIFEST.json"
HASH = "xxh3_128"  # content without "hash" has BLAKE2 digests
_CHUNK, _PIECE = 1 << 26, 1 << 22  # bytes per digest, and per read
THREADS = min(16, os.cpu_count() or 1)


def write(directory: pathlib.Path, facts: dict[str, Any]) -> None:
    """Write the manifest of all files under a directory atomically, with `facts` in it."""
    paths = _files(directory)
    digests = _digests(directory, paths)
    files = {path: [os.path.getsize(directory / path), digests[path]] for path in paths}
    content = {**facts, "hash": HASH, "files": files}
    temporary = directory / f"{NAME}.tmp"
    with temporary.open("w", encoding="utf-8") as file:
        json.dump({"content": content, "digest": _digest_of(content)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, directory / NAME)


def fact(directory: pathlib.Path, name: str) -> Any:
    """Return the manifest's fact `name`; None if it has none, or is damaged."""
    try:
        return read_json(directory / NAME)["content"][name]
    except (OSError, ConfigError, KeyError, TypeError):
        return None


def steps(directory: pathlib.Path) -> list[int]:
    """Return the steps of all complete checkpoints in a directory, ascending."""
    if not directory.is_dir():
        return []
    found = (
        path for path in directory.iterdir() if path.name.isdecimal() and (path / NAME).exists()
    )
    return sorted(int(path.name) for path in found)


def chosen(directory: pathlib.Path, step: int | None) -> int:
    """Return a step that has a complete checkpoint in a run's directory of them; the newest for
    None.

    Raises:
        CheckpointError: there is none, or none of this step; the message lists the existing ones.
    """
    there = steps(directory)
    if step in there or (step is None and there):
        return there[-1] if step is None else step
    raise missing(directory, step, there)


def missing(directory: pathlib.Path, step: int | None, there: list[int]) -> CheckpointError:
    """Return the error for a step, or for None, if no such checkpoint exists."""
    told = (
        f"there are steps {', '.join(map(str, there))}"
        if there
        else "no complete checkpoint there yet"
    )
    return CheckpointError(
        f"{directory.parent}: "
        + (told if step is None else f"no checkpoint of step {step}; {told}")
    )


def sync(directory: pathlib.Path) -> None:
    """Make names in a directory last through a loss of power."""
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def problem(directory: pathlib.Path, share: tuple[int, int] = (0, 1)) -> str | None:
    """Return the first difference between a directory and its manifest, in one line; None if there
    is none.

    Args:
        directory: directory of the checkpoint.
        share: (i, n) reads only the contents of files i, i + n, ..., so that processes share the
            work. Names and sizes are always compared.
    """
    try:
        manifest = read_json(directory / NAME)
        content, digest = manifest["content"], manifest["digest"]
        digests = {None: _old_digests, HASH: _digests}[content.get("hash")]
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
        size, actual = expected[path][0], os.path.getsize(directory / path)
        if actual != size:
            return f"{path} has {actual} bytes, not {size}"
    mine = found[share[0] :: share[1]]
    try:
        digests_now = digests(directory, mine)
    except OSError as error:
        return f"{error.filename or directory} cannot be read: {error.strerror}"
    changed = (path for path in mine if digests_now[path] != expected[path][1])
    return next((f"{path} is damaged: its digest differs" for path in changed), None)


def _files(directory: pathlib.Path) -> list[str]:
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and path.name not in (NAME, f"{NAME}.tmp")
    )


def _digests(directory: pathlib.Path, paths: Iterable[str]) -> dict[str, str]:
    """Return each file's digest, over the digests of its chunks, computed by THREADS threads."""
    with concurrent.futures.ThreadPoolExecutor(THREADS, "digest") as threads:
        futures = {
            path: [
                threads.submit(_hashed, xxhash.xxh3_128(), directory / path, start, _CHUNK)
                for start in range(0, os.path.getsize(directory / path), _CHUNK)
            ]
            for path in paths
        }
        chunks = {
            path: b"".join(future.result() for future in found) for path, found in futures.items()
        }
    return {path: xxhash.xxh3_128_hexdigest(found) for path, found in chunks.items()}


def _old_digests(directory: pathlib.Path, paths: Iterable[str]) -> dict[str, str]:
    """Return digests as earlier versions computed them."""

    def digest(path: str) -> bytes:
        return _hashed(
            hashlib.blake2b(digest_size=16), directory / path, 0, os.path.getsize(directory / path)
        )

    paths = list(paths)
    with concurrent.futures.ThreadPoolExecutor(THREADS, "digest") as threads:
        return {
            path: found.hex() for path, found in zip(paths, threads.map(digest, paths), strict=True)
        }


def _hashed(digest: Any, path: pathlib.Path, start: int, count: int) -> bytes:
    """Return the digest of at most `count` bytes of a file from `start` on."""
    buffer = memoryview(bytearray(min(_PIECE, count)))
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        while count > 0 and (size := file.readinto(buffer[:count])):
            digest.update(buffer[:size])
            count -= size
    return digest.digest()


def _digest_of(content: Any) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
