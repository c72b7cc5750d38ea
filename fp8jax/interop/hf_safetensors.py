"""Read and write tensors in safetensors files, one file or several with an index, one tensor at a
time.

    files = TensorFiles(directory)                     # reads and checks headers only
    files.entries["lm_head.weight"].shape              # (vocab, embed)
    files.read("lm_head.weight")                       # numpy array in the file's dtype

    write_files(directory, {"lm_head.weight": ((96, 32), produce)}, np.float32, max_shard_bytes=5 * 10**9)

A safetensors file is an 8-byte little-endian length, that many bytes of JSON (name → dtype, shape,
byte range), and the bytes. Files are not trusted: a range is read only if it lies inside the file,
an index can name only files beside it, and pickled weights (pytorch_model.bin) are never opened.
bfloat16 is `ml_dtypes.bfloat16`.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from fp8jax import files

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}
# Bytes per element of the other dtypes that a header may name; such tensors are refused when they
# are read.
_OTHER_SIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "I16": 2,
    "U16": 2,
    "I32": 4,
    "U32": 4,
    "F64": 8,
    "I64": 8,
    "U64": 8,
}
_MAX_HEADER = 100_000_000  # the reference implementation's limit
_MAX_VALUES = 1 << 29  # bytes of memory that a header's values may take: 600,000 tensors
_MAX_JSON = 1 << 26  # of config.json and of an index, which has some 100 bytes a tensor


class HuggingFaceError(ValueError):
    """An error for a directory that cannot be converted; one line names the file, key or tensor,
    and the fault.
    """

    def __init__(self, message: str):
        super().__init__(
            "".join(c if c.isprintable() else repr(c)[1:-1] for c in message)
        )  # names in files may hold any characters


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor's place: its file, safetensors' name of its dtype, its shape, its first byte."""

    path: pathlib.Path
    dtype: str
    shape: tuple[int, ...]
    start: int


class TensorFiles:
    """The tensors of a model directory.

    Attributes:
        entries: tensor name → Entry.

    Raises:
        HuggingFaceError: there are no safetensors, or files contradict themselves or each other.
    """

    def __init__(self, directory: pathlib.Path):
        self.entries: dict[str, Entry] = {}
        listed = _index(directory)
        for path in (
            [directory / name for name in sorted(set(listed.values()))]
            if listed
            else [directory / SINGLE]
        ):
            for name, entry in _header(path).items():
                if listed and listed.get(name) != path.name:
                    raise HuggingFaceError(
                        f"{path}: holds {name}, which {INDEX} places in "
                        f"{listed.get(name, 'no file')}"
                    )
                self.entries[name] = entry
        missing = next((name for name in listed if name not in self.entries), None)
        if missing:
            raise HuggingFaceError(
                f"{directory / listed[missing]}: lacks {missing}, which {INDEX} places there"
            )

    def read(self, name: str) -> np.ndarray:
        """Read a tensor from disk, in the file's dtype.

        Raises:
            HuggingFaceError: its dtype is not F32, F16 or BF16.
        """
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise HuggingFaceError(
                f"{entry.path}: {name} has dtype {entry.dtype}; only {', '.join(DTYPES)} are read"
            )
        return np.fromfile(
            entry.path, DTYPES[entry.dtype], math.prod(entry.shape), offset=entry.start
        ).reshape(entry.shape)


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
        HuggingFaceError: the file does not exist or holds no JSON object.
    """
    try:
        return _json_object(path, files.read_bytes(path, _MAX_JSON))
    except OSError as error:
        raise HuggingFaceError(f"{path}: cannot be read: {error.strerror}") from None
    except HuggingFaceError:
        raise
    except ValueError as error:
        raise HuggingFaceError(f"{path}: {error}") from None


def write_files(
    directory: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
    dtype: np.dtype,
    max_shard_bytes: int,
) -> None:
    """Write tensors into as few files as their limit allows, with an index if there are several.

    Args:
        directory: an existing directory.
        tensors: name → shape and a function that makes the array, called once, when its bytes are
            written.
        dtype: dtype of all tensors, one of DTYPES.
        max_shard_bytes: limit for a file's tensors; a larger tensor gets a file of its own.
    """
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, _) in tensors.items()}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    count = len(shards)
    names = (
        [SINGLE]
        if count == 1
        else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    )
    for file_name, shard in zip(names, shards, strict=True):
        _write_file(directory / file_name, {name: tensors[name] for name in shard}, dtype)
    if count > 1:
        where = {
            name: file_name
            for file_name, shard in zip(names, shards, strict=True)
            for name in shard
        }
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": where}
        (directory / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _write_file(
    path: pathlib.Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Callable[[], np.ndarray]]],
    dtype: np.dtype,
) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    code = next(code for code, known in DTYPES.items() if known == dtype)
    start = 0
    for name, (shape, _) in tensors.items():
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, (shape, produce) in tensors.items():
            array = produce()
            if array.shape != shape or array.dtype != dtype:
                raise ValueError(
                    f"{name}: {array.shape} {array.dtype} was produced, {shape} {dtype} announced"
                )
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
            del array  # free it before the next is made


def _index(directory: pathlib.Path) -> dict[str, str]:
    """Return tensor name → file name of a sharded directory; {} if there is no index."""
    path = directory / INDEX
    if not path.exists():
        if not (directory / SINGLE).exists():
            raise HuggingFaceError(
                f"{directory}: neither {SINGLE} nor {INDEX} there; only safetensors are read, "
                f"no pickle"
            )
        return {}
    listed = read_json(path).get("weight_map")
    if (
        not isinstance(listed, dict)
        or not listed
        or not all(isinstance(file, str) for file in listed.values())
    ):
        raise HuggingFaceError(
            f"{path}: weight_map is not an object of tensor names and file names"
        )
    for name, file in listed.items():
        if pathlib.PurePath(file).name != file or "\\" in file or not file.endswith(".safetensors"):
            raise HuggingFaceError(
                f"{path}: {name} is placed in {file!r}, which is not the name of a .safetensors "
                f"file beside it"
            )
    return listed


def _header(path: pathlib.Path) -> dict[str, Entry]:
    """Return the header of a file, checked."""
    try:
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if total < 8 or length > min(_MAX_HEADER, total - 8):
                raise HuggingFaceError(
                    f"{path}: says that its header has {length} bytes; the file has {total}"
                )
            header = _json_object(path, file.read(length))
    except OSError as error:
        raise HuggingFaceError(f"{path}: cannot be read: {error.strerror}") from None
    header.pop("__metadata__", None)
    ranges = {name: _range(path, name, spec) for name, spec in header.items()}
    expected = 0
    for name, (start, stop) in sorted(ranges.items(), key=lambda item: item[1]):
        if start != expected:
            raise HuggingFaceError(
                f"{path}: {name} starts at byte {start} of the data, where {expected} is due"
            )
        expected = stop
    if expected != total - 8 - length:
        raise HuggingFaceError(
            f"{path}: has {total - 8 - length} bytes of data, its header describes {expected}; "
            f"truncated?"
        )
    return {
        name: Entry(path, spec["dtype"], tuple(spec["shape"]), 8 + length + ranges[name][0])
        for name, spec in header.items()
    }


def _range(path: pathlib.Path, name: str, spec: Any) -> tuple[int, int]:
    """Return the first byte and one past the last of a tensor, within the data."""
    try:
        dtype, shape, (start, stop) = spec["dtype"], spec["shape"], spec["data_offsets"]
        size = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_SIZES[dtype]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError):
        raise HuggingFaceError(
            f"{path}: the header's entry of {name} is not understood: {str(spec)[:100]}"
        ) from None
    if not whole or stop - start != math.prod(shape) * size:
        raise HuggingFaceError(
            f"{path}: the header gives {name} shape {shape}, dtype {dtype} and bytes {start} to {stop}"
        )
    return start, stop


def _json_object(path: pathlib.Path, text: bytes) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise HuggingFaceError(f"{path}: {name} stands twice in one object")
            found[name] = value
        return found

    try:
        values = files.parse_json(text, memory=_MAX_VALUES, object_pairs_hook=no_duplicates)
    except HuggingFaceError:
        raise
    except ValueError as error:
        raise HuggingFaceError(f"{path}: is not JSON: {str(error)[:100]}") from None
    if not isinstance(values, dict):
        raise HuggingFaceError(f"{path}: is not a JSON object")
    return values
