"""Do the work of `python -m fp8jax convert` after convert.py has checked its arguments."""

import argparse
import json
import pathlib
import shutil
import tempfile
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1

from fp8jax.config import Config, ConfigError, DataConfig, TrainingConfig
from fp8jax.data import run_tokenizer, tokenizer
from fp8jax.interop import hf, hf_config, hf_formats, hf_logits, hf_tokenizer
from fp8jax.interop.hf_safetensors import DTYPES, HuggingFaceError, read_json
from fp8jax.models.architectures import ResolvedModel
from fp8jax.models.definition import Definition, Params, define
from fp8jax.monitor.stages import Stages
from fp8jax.training.checkpoint import Checkpoints, save_config
from fp8jax.training.evaluation import as_float32, run_config

KEPT = "hf"  # in a converted run's directory: the source's config.json and tokenizer
# The longest context of a converted run (few train or evaluate with more), and the tokens that a
# batch is kept to.
_LONGEST, _BATCH_TOKENS = 32768, 65536
_UNKNOWN_CONTEXT = 2048  # the context if neither config.json nor transformers gives one
STAGE = Stages()
_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def from_hf(options: argparse.Namespace) -> None:
    """Make a run at step 0: config.json, a checkpoint of the weights alone, and the tokenizer."""
    workdir = options.out.absolute()
    workdir.mkdir(parents=True, exist_ok=True)
    try:
        kept = _keep(options.directory, workdir)
        loaded, note = _tokenizer(kept)
        # Orbax copies what it saves; with the weights in mapped files, its copy is the only one in
        # memory.
        with tempfile.TemporaryDirectory(prefix=".weights-", dir=workdir) as scratch:
            with STAGE(f"reading {options.directory}"):
                found = hf.load(
                    options.directory,
                    _Mapped(pathlib.Path(scratch)),
                    ignore_keys=options.ignore_keys,
                    note=print,
                )
            with (
                STAGE("writing the checkpoint of step 0"),
                Checkpoints(workdir, keep=1) as checkpoints,
            ):
                checkpoints.save(0, {"params": jax.device_put(found.params, _cpu())}, {"step": 0})
        context = _context(kept, found.model_type)
        name = "byte" if loaded is None else str(loaded.file)
        data = DataConfig(
            tokenizer=name, sequence_length=context, allow_normalisation=loaded is not None
        )
        batch_size = max(1, min(TrainingConfig.batch_size, _BATCH_TOKENS // context))
        save_config(
            workdir,
            Config(model=found.model, data=data, training=TrainingConfig(batch_size=batch_size)),
        )
        if loaded is not None:
            run_tokenizer.keep(workdir, loaded)
    except BaseException:
        shutil.rmtree(workdir)
        raise
    count = sum(leaf.size for leaf in jax.tree.leaves(found.params))
    print(
        f"{found.model_type}, {count:,} parameters, context {context:,} tokens, to "
        f"{options.out}; {note}"
    )


def _keep(source: pathlib.Path, workdir: pathlib.Path) -> pathlib.Path:
    """Copy a model directory's config.json and tokenizer into a run's; return where they are."""
    read_json(source / hf.CONFIG)  # raises an error that names the fault
    kept = workdir / KEPT
    kept.mkdir()
    shutil.copyfile(source / hf.CONFIG, kept / hf.CONFIG)
    hf.carry(source, kept)
    return kept


def _context(kept: pathlib.Path, model_type: str) -> int:
    """Return the context of a model directory's model in tokens, at most _LONGEST; print a line if
    that is less.
    """
    found = read_json(kept / hf.CONFIG).get("max_position_embeddings")
    if type(found) is not int or found < 1:
        found = hf_formats.FORMATS[model_type].context or _UNKNOWN_CONTEXT
    if found > _LONGEST:
        print(
            f"context  {found:,} tokens; this run takes {_LONGEST:,}: data.sequence_length in "
            f"its config.json sets another"
        )
    return min(found, _LONGEST)


def to_hf(options: argparse.Namespace) -> None:
    """Write a run's checkpoint as a Hugging Face model directory."""
    config, definition, params, step = _load_run(options.workdir, options.step)
    kept = options.workdir / KEPT
    carried = kept if kept.is_dir() else None
    model_type = _model_type(options.workdir, definition.config)
    used = None if carried else tokenizer.of(config.data)  # may fail, so before any file is written
    context = config.data.sequence_length
    more = {"max_position_embeddings": context, **(hf_tokenizer.token_ids(used) if used else {})}
    with STAGE(f"writing {options.out}"):
        hf.save(
            options.out,
            definition.config,
            definition.vocab_size,
            params,
            model_type,
            DTYPES[_CODES[options.dtype]],
            options.max_shard_size,
            carried,
            more,
        )
    for name, content in (
        hf_tokenizer.files(used, context, definition.vocab_size).items() if used else ()
    ):
        (options.out / name).write_text(
            json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
        )
    print(f"step {step} as {model_type} in {options.dtype}, to {options.out}")


def logits(options: argparse.Namespace) -> None:
    """Write the logits, the loss and, if asked for, the gradients of a model for given tokens."""
    try:
        tokens = np.load(options.tokens, allow_pickle=False)
    except (ValueError, EOFError):
        raise HuggingFaceError(
            f"{options.tokens}: is not a .npy file of integers [batch, length]"
        ) from None
    if not isinstance(tokens, np.ndarray):
        raise HuggingFaceError(
            f"{options.tokens}: is not one .npy array of integers [batch, length]"
        )
    if hf.is_model_directory(options.directory):
        found = hf.load(options.directory, ignore_keys=options.ignore_keys, note=print)
    else:
        _, definition, params, _ = _load_run(options.directory, None)
        model_type = _model_type(options.directory, definition.config) if options.gradients else ""
        found = hf.Loaded(definition.config, definition.vocab_size, params, model_type)
    model, vocab_size, params, model_type = found
    with (
        jax.default_device(_cpu()),
        STAGE("computing logits" + " and gradients" * options.gradients),
    ):
        computed = hf_logits.compute(model, vocab_size, params, tokens, gradients=options.gradients)
    arrays = {"logits": computed["logits"], "loss": computed["loss"]}
    if options.gradients:
        arrays |= hf.by_name(computed["gradients"], model, vocab_size, model_type)
    with options.out.open("wb") as file:
        np.savez(file, **arrays)
    print(
        f"loss {computed['loss']:.6f} over {tokens.shape[0] * (tokens.shape[1] - 1):,} tokens, "
        f"to {options.out}"
    )


def _load_run(workdir: pathlib.Path, step: int | None) -> tuple[Config, Definition, Params, int]:
    """Load a run's parameters on the host; a config with a vocab_size needs no tokenizer for this."""
    config = run_config(workdir)
    definition = define(config.model, config.model.vocab_size or tokenizer.vocab_size(config))
    on_host = jax.sharding.SingleDeviceSharding(_cpu())
    # Orbax would read all of it at once, besides what it has read.
    context = v1.Context()
    context.memory_options.read_concurrent_bytes = 2 * max(
        leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(definition.shapes)
    )
    with Checkpoints(workdir, keep=config.checkpoint.keep) as checkpoints:
        step = checkpoints.chosen(step)
        kept = checkpoints.dtypes(step)

        def wanted(path: Any, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            name = f"params/{jax.tree_util.keystr(path, simple=True, separator='/')}"
            return jax.ShapeDtypeStruct(leaf.shape, kept.get(name, leaf.dtype), sharding=on_host)

        with context, STAGE(f"reading the checkpoint of step {step}"):
            found, _ = checkpoints.restore(
                step,
                {"params": jax.tree_util.tree_map_with_path(wanted, definition.shapes)},
                partial=True,
            )
    if any(name.startswith("opt_state/remainder/") for name in kept):
        print(
            "note     the run keeps 8 more bits of each weight, for training alone: what is "
            "read here are the weights in 16 bits"
        )
    return config, definition, as_float32(found["params"]), step


class _Mapped:
    """An allocator of float32 arrays in files of a directory."""

    def __init__(self, directory: pathlib.Path):
        self.directory, self.count = directory, 0

    def __call__(self, shape: tuple[int, ...]) -> np.ndarray:
        self.count += 1
        return np.memmap(
            self.directory / f"{self.count}.bin", np.float32, "w+", shape=shape or (1,)
        ).reshape(shape)


def _cpu() -> jax.Device:
    """Return the device for the weights: the host, with any accelerator."""
    return jax.local_devices(backend="cpu")[0]


def _tokenizer(kept: pathlib.Path) -> tuple[tokenizer.Tokenizer | None, str]:
    """Return the tokenizer for config.data.tokenizer, None for bytes, and a note on it."""
    path = kept / "tokenizer.json"
    if not path.is_file():
        return (
            None,
            "it has no tokenizer.json, so config.data.tokenizer is 'byte': change that in "
            "config.json before training",
        )
    try:
        loaded = tokenizer.load(str(path), allow_normalisation=True)
    except ConfigError as error:
        return (
            None,
            f"{error}; so config.data.tokenizer is 'byte': change that in config.json before training",
        )
    return loaded, "; ".join(["with its tokenizer", *loaded.notes])


def _model_type(workdir: pathlib.Path, model: ResolvedModel) -> str:
    """Return the model_type that a run came from, or else one that can hold its model."""
    kept = workdir / KEPT
    return (
        read_json(kept / hf.CONFIG)["model_type"]
        if hf.is_model_directory(kept)
        else hf_config.fitting_type(model)
    )
