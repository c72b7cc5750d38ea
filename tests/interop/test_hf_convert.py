"""`python -m fp8jax convert`: a model directory becomes a run that trains on, and a run becomes a model directory."""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest

from configs import from_run
from fp8jax import config as config_lib
from fp8jax.__main__ import main
from fp8jax.data import shards, tokenizer
from fp8jax.interop import hf
from fp8jax.interop.hf_safetensors import TensorFiles
from fp8jax.interop.inference import Inference
from fp8jax.training import loop
from fp8jax.training.checkpoint import Checkpoints
from fp8jax.training.evaluation import Evaluator, load_run, run_config
from tests.helpers.runs import micro, save_untrained

from . import fog_reference

DATA = pathlib.Path(__file__).parent / "data" / "hf"
CARRIED = {
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "generation_config.json": '{"eos_token_id": 2}',
}


def convert(*arguments):
    return main(["convert", *map(str, arguments)])


@pytest.fixture
def source(tmp_path):
    """A FOG-max directory with enough rows for the byte tokenizer, and small files beside it."""
    keys = (
        fog_reference.BASE
        | fog_reference.VARIANTS["fog_max"]
        | {"eos_token_id": 2, "max_position_embeddings": 512}
    )
    tensors = fog_reference.random_tensors(keys)
    rows = np.random.default_rng(5).normal(0, 0.02, (257, fog_reference.WIDTH)).astype(np.float32)
    tensors |= {"model.embed_tokens.weight": rows, "lm_head.weight": rows[::-1].copy()}
    fog_reference.write_directory(tmp_path / "source", keys | {"vocab_size": 257}, tensors)
    for name, text in (CARRIED | {"evil.py": "boom", "pytorch_model.bin": "pickle"}).items():
        (tmp_path / "source" / name).write_text(text)
    return tmp_path / "source"


def test_a_converted_model_is_evaluated_trained_and_exported(source, tmp_path, capsys):
    run = tmp_path / "run"
    assert convert("from-hf", source, "--out", run) == 0
    assert "fog, " in capsys.readouterr().out
    config = from_run.get_config(str(run))
    config.training.update(steps=3, batch_size=8)
    config.data.sequence_length = 32
    config.optimizer.update(warmup_steps=1, learning_rate=1e-2)
    config.evaluation.batches, config.log.report_minutes = 2, 0
    config = config_lib.from_dict(config)
    model, step = load_run(run)
    before = Evaluator(model.plan.change(config))(model.params)
    allowed = ["training.batch_size", "data.sequence_length"]
    assert step == 0 and loop.train(config, run, allow_config_change=allowed) == 0
    events = [json.loads(line)["kind"] for line in (run / "events.jsonl").read_text().splitlines()]
    assert events[0] == "calibrated" and events[-1] == "finished" and "bad_step" not in events
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 3 and last["held_out/loss"] < before["loss"] - 0.01

    assert convert("to-hf", "--workdir", run, "--out", tmp_path / "trained") == 0
    old, new = TensorFiles(source), TensorFiles(tmp_path / "trained")
    assert old.entries.keys() == new.entries.keys()
    frozen = [name for name in old.entries if (old.read(name) == new.read(name)).all()]
    assert len(frozen) == 5 and all(
        name.endswith(("q_norm.weight", "k_norm.weight", "model.norm.weight")) for name in frozen
    )
    written = {path.name for path in (tmp_path / "trained").iterdir()}
    assert written == {"config.json", "model.safetensors", *CARRIED}
    values = json.loads((tmp_path / "trained" / "config.json").read_text())
    assert (
        values["eos_token_id"] == 2
        and values["max_position_embeddings"] == 512
        and values["model_type"] == "fog"
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_there_and_back_every_tensor_is_the_same(dtype, tmp_path):
    found = hf.load(DATA / "apertus")
    hf.save(
        tmp_path / "source",
        found.model,
        found.vocab_size,
        found.params,
        "apertus",
        np.dtype(dtype),
        4000,
    )
    assert convert("from-hf", tmp_path / "source", "--out", tmp_path / "run") == 0
    assert not list((tmp_path / "run").glob(".weights-*"))
    assert (
        convert(
            "to-hf",
            "--workdir",
            tmp_path / "run",
            "--out",
            tmp_path / "out",
            "--dtype",
            dtype,
            "--max_shard_size",
            "4KB",
        )
        == 0
    )
    before, after = TensorFiles(tmp_path / "source"), TensorFiles(tmp_path / "out")
    assert (
        before.entries.keys() == after.entries.keys()
        and len(list((tmp_path / "out").glob("*.safetensors"))) > 2
    )
    for name in before.entries:
        a, b = before.read(name), after.read(name)
        assert a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes(), name


def test_logits_of_a_directory_and_of_its_run_are_the_same_numbers(tmp_path):
    np.save(tmp_path / "tokens.npy", np.load(DATA / "olmo2" / "expected.npz")["tokens"])
    assert convert("from-hf", DATA / "olmo2", "--out", tmp_path / "run") == 0
    for directory, out in ((DATA / "olmo2", "a.npz"), (tmp_path / "run", "b.npz")):
        assert (
            convert(
                "logits",
                directory,
                "--tokens",
                tmp_path / "tokens.npy",
                "--out",
                tmp_path / out,
                "--gradients",
            )
            == 0
        )
    a, b, expected = (
        np.load(path)
        for path in (tmp_path / "a.npz", tmp_path / "b.npz", DATA / "olmo2" / "expected.npz")
    )
    assert set(a.files) == set(b.files) == set(expected.files) - {"tokens"}
    assert (
        a["logits"].dtype == np.float32
        and a["logits"].shape == (2, 12, 32)
        and a["loss"].shape == ()
    )
    for name in a.files:
        np.testing.assert_array_equal(a[name], b[name])


def test_a_tokenizer_is_carried_and_used(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            vocab={c: i for i, c in enumerate(sorted(byte_level.alphabet()))}, merges=[]
        )
    )
    made.pre_tokenizer, made.decoder = (
        byte_level(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    made.add_special_tokens(["<|end_of_text|>"])
    source = pathlib.Path(shutil.copytree(DATA / "llama", tmp_path / "source"))
    made.save(str(source / "tokenizer.json"))
    assert convert("from-hf", source, "--out", tmp_path / "run") == 0
    name = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["tokenizer"]
    assert name == "{workdir}/hf/tokenizer.json"
    shutil.rmtree(source.rename(tmp_path / "gone"))
    run = (tmp_path / "run").rename(tmp_path / "moved")
    source = run / "hf"
    assert from_run.get_config(str(run)).data.tokenizer == str(source / "tokenizer.json")
    used = tokenizer.of(run_config(run).data)
    assert (
        used.encode("é").tolist() == [made.token_to_id(c) for c in "Ã©"]
        and used.end_of_document == 256
    )
    assert convert("to-hf", "--workdir", run, "--out", tmp_path / "out") == 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (
        source / "tokenizer.json"
    ).read_bytes()


def test_a_sparse_tokenizer_of_gigabytes_is_not_copied(tmp_path, capsys):
    source = pathlib.Path(shutil.copytree(DATA / "llama", tmp_path / "source"))
    with (source / "tokenizer.json").open("wb") as file:
        file.truncate(3 << 30)
    assert convert("from-hf", source, "--out", tmp_path / "run") == 2
    assert (
        "tokenizer.json: has 3,221,225,472 bytes, more than the 268,435,456 that are copied"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("kind", "found", "context", "batch"),
    [
        ("llama", 512, 512, 16),
        ("llama", 8192, 8192, 8),
        ("llama", 131072, 32768, 2),
        ("llama", None, 2048, 16),
        ("qwen3", None, 32768, 2),
        ("apertus", None, 32768, 2),
    ],
)  # None: as transformers' configs have it, 65,536 for Apertus
def test_a_run_has_the_context_of_its_source(tmp_path, capsys, kind, found, context, batch):
    source = pathlib.Path(shutil.copytree(DATA / kind, tmp_path / "source"))
    values = json.loads((source / "config.json").read_text()) | {"max_position_embeddings": found}
    (source / "config.json").write_text(
        json.dumps({key: value for key, value in values.items() if value is not None})
    )
    assert convert("from-hf", source, "--out", tmp_path / "run") == 0
    said = capsys.readouterr().out
    config = run_config(tmp_path / "run")
    assert (config.data.sequence_length, config.training.batch_size) == (context, batch)
    assert f"context {context:,} tokens" in said
    longer = found or {"apertus": 65536}.get(kind, context)
    assert (f"context  {longer:,} tokens; this run takes 32,768: data.sequence_length" in said) == (
        longer > 32768
    )


def test_a_run_whose_data_is_away_is_exported_and_sampled(tmp_path):
    data = {"train": ["Sir Walter Elliot"] * 9, "held_out": ["of Kellynch Hall"]}
    byte = tokenizer.load("byte")
    shards.write_shards(
        tmp_path / "tokens", byte, {split: map(byte.encode, texts) for split, texts in data.items()}
    )
    _, state = save_untrained(micro(data={"source": str(tmp_path / "tokens")}), tmp_path / "run")
    with Checkpoints(
        tmp_path / "run", facts={"tokenizer": "byte"}
    ) as checkpoints:  # as a run writes it
        checkpoints.save(2, dict(state.items()), {"step": 2})
    shutil.rmtree(tmp_path / "tokens")
    assert convert("to-hf", "--workdir", tmp_path / "run", "--out", tmp_path / "out") == 0
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    assert values["eos_token_id"] == 256 and values["max_position_embeddings"] == 32
    inference = Inference(
        load_run(tmp_path / "run", devices=jax.devices()[:1])[0]
    )  # what sample and eval --tasks begin with
    assert inference.tokenizer.fingerprint == "byte" and inference.context == 32


def test_mistakes_are_one_line_and_leave_nothing_behind(tmp_path, capsys):
    def fails(words, *arguments):
        assert convert(*arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, error

    (tmp_path / "tokens.npy").write_bytes(b"nothing")
    fails("nowhere: no such directory", "from-hf", tmp_path / "nowhere", "--out", tmp_path / "run")
    fails("config.json: cannot be read", "from-hf", tmp_path, "--out", tmp_path / "run")
    spoilt = pathlib.Path(shutil.copytree(DATA / "llama", tmp_path / "spoilt"))
    (spoilt / "model.safetensors").unlink()
    fails("only safetensors are read", "from-hf", spoilt, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    fails("choose another --out", "from-hf", DATA / "llama", "--out", spoilt)
    assert convert("from-hf", DATA / "llama", "--out", tmp_path / "run") == 0
    fails(
        "no checkpoint of step 7",
        "to-hf",
        "--workdir",
        tmp_path / "run",
        "--step",
        7,
        "--out",
        tmp_path / "out",
    )
    fails("no config.json there", "to-hf", "--workdir", tmp_path, "--out", tmp_path / "out")
    fails(
        "tokens.npy: is not",
        "logits",
        DATA / "llama",
        "--tokens",
        tmp_path / "tokens.npy",
        "--out",
        tmp_path / "found.npz",
    )
    assert not (tmp_path / "found.npz").exists()
    with pytest.raises(SystemExit) as exit_code:
        convert("to-hf", "--workdir", spoilt, "--out", tmp_path / "out", "--max_shard_size", "five")
    assert exit_code.value.code == 2 and "'five' is not a size" in capsys.readouterr().err


@pytest.mark.parametrize(
    "optimizer",
    [{"master_dtype": "bfloat16"}, {"master_dtype": "float16", "master_rounding": "compensated"}],
)
def test_weights_of_sixteen_bits_are_exported(optimizer, tmp_path, capsys):
    _, state = save_untrained(micro(optimizer=optimizer), tmp_path / "run")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(state.params)} == {
        optimizer["master_dtype"],
        "float32",
    }
    assert convert("to-hf", "--workdir", tmp_path / "run", "--out", tmp_path / "out") == 0
    assert ("8 more bits" in capsys.readouterr().out) == ("master_rounding" in optimizer)
    exported = hf.load(tmp_path / "out").params
    for kept, found in zip(jax.tree.leaves(state.params), jax.tree.leaves(exported), strict=True):
        np.testing.assert_array_equal(np.asarray(kept, np.float32), found)
    np.save(tmp_path / "tokens.npy", np.arange(24).reshape(2, 12))
    for directory in ("run", "out"):
        assert (
            convert(
                "logits",
                tmp_path / directory,
                "--tokens",
                tmp_path / "tokens.npy",
                "--out",
                tmp_path / f"{directory}.npz",
            )
            == 0
        )
    np.testing.assert_array_equal(
        np.load(tmp_path / "run.npz")["logits"], np.load(tmp_path / "out.npz")["logits"]
    )
