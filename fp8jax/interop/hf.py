"""Load and save model directories of Hugging Face transformers: the model types of
hf_formats.FORMATS.

    found = load(directory)                            # found.model, found.params (float32 numpy), found.model_type
    save(out, model, vocab_size, params, "llama", np.dtype("float32"), max_shard_bytes=5 * 10**9)

Weights are only moved: float32 in gives the same bits out, and so does bfloat16 through the float32
parameters. Tensors are read and written one at a time; besides the parameters at most one is in
memory. What is not understood (a key of config.json, a tensor's name or shape) is an error that
names it. docs/convert.md lists the keys and tensors.
"""

import dataclasses
import difflib
import json
import pathlib
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from fp8jax.config import ModelConfig
from fp8jax.interop import hf_config, hf_formats, hf_tensors
from fp8jax.interop.hf_safetensors import (
    DTYPES,
    HuggingFaceError,
    TensorFiles,
    read_json,
    write_files,
)
from fp8jax.models import architectures
from fp8jax.models.definition import Params, define

CONFIG, HEAD, EMBEDDING = "config.json", "lm_head.weight", "model.embed_tokens.weight"
# These files are copied unchanged; they hold neither weights nor code.
CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
)
_LARGEST_CARRIED = 1 << 28
# A key with one of these defaults of transformers has no effect; other values are copied from
# directory to directory.
_OURS = (
    "architectures",
    "model_type",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "initializer_range",
    "auto_map",
    "_name_or_path",
)


class Loaded(NamedTuple):
    """The content of a directory: resolved model config, vocabulary, float32 numpy parameters,
    model_type.
    """

    model: ModelConfig
    vocab_size: int
    params: Params
    model_type: str


def is_model_directory(directory: pathlib.Path) -> bool:
    """Return whether a directory's config.json is one of transformers' (a run's has no model_type)."""
    path = directory / CONFIG
    return path.exists() and "model_type" in read_json(path)


def load(
    directory: pathlib.Path,
    allocate: Callable[[tuple[int, ...]], np.ndarray] | None = None,
    *,
    ignore_keys: Collection[str] = (),
    note: Callable[[str], None] = lambda line: None,
) -> Loaded:
    """Read a directory.

    Args:
        directory: a directory with config.json and safetensors files.
        allocate: makes an uninitialised float32 array of a shape; None allocates in memory.
        ignore_keys: keys of config.json to ignore, with any value.
        note: receives a line on what was ignored.

    Raises:
        HuggingFaceError: something is not understood, missing, damaged or of the wrong shape.
    """
    model, model_type = hf_config.from_config(read_json(directory / CONFIG), ignore_keys, note)
    vocab_size = model.vocab_size
    assert vocab_size is not None
    files = TensorFiles(directory)
    model = _with_gains(model, files)
    definition = define(model, vocab_size)
    slots = list(hf_tensors.slots(definition.config, vocab_size, model_type))
    constants = list(hf_tensors.constants(definition.config, model_type))
    _check_names(files, slots, constants, tied=model.tied_embeddings)
    allocate = allocate or (lambda shape: np.empty(shape, np.float32))
    params = jax.tree.map(lambda leaf: allocate(leaf.shape), definition.shapes)
    for slot in slots:
        view = slot.view(params)
        view[...] = files.read(slot.name).reshape(view.shape)
        if not np.isfinite(view).all():
            raise HuggingFaceError(
                f"{files.entries[slot.name].path}: {slot.name} holds NaN or infinity; nothing "
                f"can be computed with it"
            )
    for constant in constants:
        _check_constant(files, constant, note)
    if (
        model.tied_embeddings
        and HEAD in files.entries
        and (files.read(HEAD) != files.read(EMBEDDING)).any()
    ):
        raise HuggingFaceError(f"{HEAD}: differs from {EMBEDDING}, but tie_word_embeddings is true")
    return Loaded(model, vocab_size, params, model_type)


def save(
    directory: pathlib.Path,
    model: ModelConfig,
    vocab_size: int,
    params: Params,
    model_type: str,
    dtype: np.dtype,
    max_shard_bytes: int,
    carried: pathlib.Path | None = None,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Write a directory that transformers loads; config.json comes last, so that a directory with
    one is complete.

    Args:
        directory: created if missing; must be empty.
        model: any model config that the format can hold.
        vocab_size: rows of the embedding.
        params: numpy arrays, or jax arrays that are addressable here.
        model_type: one of hf_formats.FORMATS.
        dtype: dtype of the tensors, one of hf_safetensors.DTYPES' values.
        max_shard_bytes: size of the largest file.
        carried: a directory with tokenizer files, and the config.json whose keys without influence
            are kept.
        more: keys of config.json without influence on the numbers; those of `carried` take
            precedence.

    Raises:
        HuggingFaceError: the format cannot hold the model; the directory is not empty; a weight
            overflows the dtype.
    """
    model = architectures.resolve(model, vocab_size)
    values = dict(more or {}) | hf_config.to_config(model, vocab_size, model_type)
    if directory.exists() and any(directory.iterdir()):
        raise HuggingFaceError(f"{directory}: is not empty; choose another --out")
    directory.mkdir(parents=True, exist_ok=True)
    params = jax.tree.map(np.asarray, params)
    tensors: dict[str, Any] = {
        slot.name: (slot.shape, lambda slot=slot: _cast(slot, params, dtype))
        for slot in hf_tensors.slots(model, vocab_size, model_type)
    }
    tensors |= {
        c.name: (c.shape, lambda c=c: np.full(c.shape, c.value, dtype))
        for c in hf_tensors.constants(model, model_type)
    }
    write_files(directory, tensors, dtype, max_shard_bytes)
    if carried is not None:
        carry(carried, directory)
        if is_model_directory(carried):
            kept = read_json(carried / CONFIG)
            values |= {
                k: v for k, v in kept.items() if k in hf_formats.NO_INFLUENCE and k not in _OURS
            }
    values["torch_dtype"] = dtype.name
    (directory / CONFIG).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n")


def _cast(slot: hf_tensors.Slot, params: Params, dtype: np.dtype) -> np.ndarray:
    """Return a tensor as a file holds it."""
    view = slot.view(params)
    cast = np.empty(slot.shape, dtype)
    with np.errstate(over="ignore"):
        cast.reshape(view.shape)[...] = view
    if not np.isfinite(cast).all():
        raise HuggingFaceError(f"{slot.name}: holds values that are not finite in {dtype}")
    return cast


def carry(source: pathlib.Path, target: pathlib.Path) -> list[str]:
    """Copy tokenizer and generation files, and return their names.

    Raises:
        HuggingFaceError: a file is larger than any tokenizer.
    """
    found = [name for name in CARRIED if (source / name).is_file()]
    for name in found:
        size = (source / name).stat().st_size
        if size > _LARGEST_CARRIED:
            raise HuggingFaceError(
                f"{source / name}: has {size:,} bytes, more than the {_LARGEST_CARRIED:,} that "
                f"are copied"
            )
        shutil.copyfile(source / name, target / name)
    return found


def by_name(
    params: Params, model: ModelConfig, vocab_size: int, model_type: str
) -> dict[str, np.ndarray]:
    """Return arrays like the parameters (such as gradients) by tensor name, in Hugging Face's
    shapes, without frozen ones.
    """
    params = jax.tree.map(np.asarray, params)
    kept = (
        ("q_norm.weight", "k_norm.weight")
        if model.qk_regulariser in hf_formats.KEPT.values()
        else ()
    )
    return {
        slot.name: slot.view(params).reshape(slot.shape)
        for slot in hf_tensors.slots(model, vocab_size, model_type)
        if not slot.name.endswith(kept)
    }


def _check_names(
    files: TensorFiles,
    slots: list[hf_tensors.Slot],
    constants: list[hf_tensors.Constant],
    *,
    tied: bool,
) -> None:
    """Check that every needed tensor is there in its shape, and no others.

    Raises:
        HuggingFaceError: a tensor is missing, unknown, or of another shape or dtype.
    """
    needed = {slot.name: slot.shape for slot in slots}
    expected = needed | {constant.name: constant.shape for constant in constants}
    if tied:
        expected[HEAD] = expected[EMBEDDING]
    for name, entry in files.entries.items():
        if name in expected and entry.shape != expected[name]:
            raise HuggingFaceError(
                f"{entry.path}: {name} has shape {list(entry.shape)}; config.json makes it "
                f"{list(expected[name])}"
            )
        if name in expected and entry.dtype not in DTYPES:
            raise HuggingFaceError(
                f"{entry.path}: {name} has dtype {entry.dtype}; only {', '.join(DTYPES)} are read"
            )
    known = files.entries.keys()
    _raise_first(
        (
            name
            for name in known
            if name not in expected and not name.endswith(hf_tensors.DERIVED_SUFFIXES)
        ),
        "is not a tensor of this model",
        expected,
    )
    _raise_first(
        (name for name in needed if name not in known), "missing from the safetensors files", known
    )


def _raise_first(names: Iterable[str], what: str, known: Iterable[str]) -> None:
    name = next(iter(names), None)
    if name is not None:
        close = difflib.get_close_matches(name, list(known), n=1)
        raise HuggingFaceError(f"{name}: {what}{f'; nearest: {close[0]}' if close else ''}")


def _with_gains(model: ModelConfig, files: TensorFiles) -> ModelConfig:
    """Return a model that keeps frozen gains of queries and keys, if they are not 1 as FOG's are."""
    kind = model.qk_regulariser
    if kind not in hf_formats.KEPT:
        return model
    names = [
        name
        for name in files.entries
        if name.endswith(("self_attn.q_norm.weight", "self_attn.k_norm.weight"))
    ]
    shape = (model.head_dim,)
    sound = [
        name
        for name in names
        if files.entries[name].shape == shape and files.entries[name].dtype in DTYPES
    ]
    if all((files.read(name) == 1).all() for name in sound):
        return model
    return dataclasses.replace(model, qk_regulariser=hf_formats.KEPT[kind])


def _check_constant(
    files: TensorFiles, constant: hf_tensors.Constant, note: Callable[[str], None]
) -> None:
    if constant.name not in files.entries:
        return
    tensor, value = files.read(constant.name), np.full(constant.shape, constant.value, np.float32)
    # Files in float32 may hold xIELU's eps as rounded to bfloat16.
    same = any(
        (tensor == value.astype(once).astype(tensor.dtype)).all()
        for once in (tensor.dtype, DTYPES["BF16"])
    )
    if not same and constant.unused:
        note(f"{constant.name}: passed over, the model has no such norm (final_layernorm is false)")
    elif not same:
        raise HuggingFaceError(
            f"{constant.name}: is not {constant.value} throughout, as config.json makes it"
        )
