"""Continuing under another configuration: what is refused, what is told, what is calibrated."""

import shutil

import jax
import numpy as np
import pytest

from fp8jax.config import ConfigError
from fp8jax.data import fingerprints, shards, tokenizer
from fp8jax.monitor.writers import read_metrics
from fp8jax.training import loop, manifest
from fp8jax.training.checkpoint import Checkpoints, load_config, save_config
from fp8jax.training.resume import check_continues, resume
from tests.helpers.runs import EIGHT, MICRO, micro, program_of, train

SHORT = {"evaluation": {"every": 0, "batches": 1}, "monitor": {"every": 0}}


def test_all_differences_that_matter_are_named(tmp_path):
    save_config(tmp_path, micro())
    other = micro(
        model=MICRO["model"] | {"layers": 3},
        training={"seed": 5, "steps": 20},
        data={"packing": "best_fit", "sequence_length": 32},
    )
    with pytest.raises(ConfigError) as caught:
        check_continues(other, tmp_path)
    message = str(caught.value)
    assert (
        all(
            f"config.{name}: " in message
            for name in ("model.layers", "training.seed", "data.packing")
        )
        and "\n" not in message
    )
    assert (
        "--allow_config_change=model.layers,data.packing,training.seed" in message
        and "steps" not in message
    )
    told = []
    check_continues(other, tmp_path, ["model.layers", "data.packing", "training.seed"], told.append)
    assert (
        "config.training.steps is 20, was 8" in told and "config.model.layers is 3, was 2" in told
    )


def test_a_field_that_there_is_not_cannot_be_allowed(tmp_path):
    with pytest.raises(
        ConfigError,
        match="--allow_config_change=data.sauce: no such field; did you mean 'data.source'",
    ):
        check_continues(micro(), tmp_path, ["data.sauce"])


@pytest.mark.slow
def test_another_tokenizer_in_the_same_file_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.train(["Sir Walter Elliot of Kellynch Hall"] * 9, 280))
    config = micro(
        data={"tokenizer": str(path), "sequence_length": 32},
        training={"steps": 2},
        model=MICRO["model"] | {"vocab_size": 384},
        **SHORT,
    )
    assert train(config, tmp_path / "run") == 0
    path.write_text(tokenizer.train(["in Somersetshire was a man who"] * 9, 280))
    tokenizer.load.cache_clear()
    with pytest.raises(
        ConfigError,
        match="config.data.tokenizer: is sha256:.*trained with sha256:.*allow_config_change=data.tokenizer",
    ):
        check_continues(config, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "then"), [({"fsdp": 1}, EIGHT), (EIGHT, {"fsdp": 1})], ids=["1 to 8", "8 to 1"]
)
def test_another_number_of_devices(tmp_path, first, then):
    """All arrays come back bit for bit on the other mesh, and training goes on."""
    assert train(micro(mesh=first, training={"steps": 3}, **SHORT), tmp_path) == 0
    before, after = (
        resume(program_of(micro(mesh=mesh)), Checkpoints(tmp_path), print).state
        for mesh in (first, then)
    )
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert train(micro(mesh=then, training={"steps": 5}, **SHORT), tmp_path) == 0


@pytest.mark.slow
def test_bf16_to_fp8_and_back(tmp_path, capsys):
    for steps, recipe in ((2, "bf16"), (4, "fp8_dpa"), (6, "bf16"), (8, "fp8")):
        assert (
            train(micro(fp8={"recipe": recipe}, training={"steps": steps}, **SHORT), tmp_path) == 0
        )
        told = capsys.readouterr().out
        assert ("scales calibrated on the batch of step" in told) == (recipe != "bf16")
        assert steps == 2 or f"config.fp8.recipe is '{recipe}', was" in told
    events = read_metrics(tmp_path / "events.jsonl")
    assert [event["step"] for event in events if event["kind"] == "calibrated"] == [2, 6]
    assert load_config(tmp_path).fp8.recipe == "fp8" and loop.FINISHED == 0


@pytest.fixture
def a_run(tmp_path):
    """A run of prepared data that has a checkpoint, and what makes the data anew."""

    def prepare(texts, held_out=("of Kellynch Hall",)):
        shutil.rmtree(tmp_path / "tokens", ignore_errors=True)
        byte = tokenizer.load("byte")
        documents = {"train": map(byte.encode, texts), "held_out": map(byte.encode, held_out)}
        shards.write_shards(tmp_path / "tokens", byte, documents)

    prepare(["Sir Walter Elliot"])
    config = micro(data={"source": str(tmp_path / "tokens")})
    save_config(tmp_path / "run", config)
    directory = tmp_path / "run" / "checkpoints" / "1"
    directory.mkdir(parents=True)
    manifest.write(directory, {"tokenizer": "byte", "data": fingerprints.of(config.data)})
    return config, tmp_path / "run", prepare


def test_data_prepared_anew_is_refused(a_run):
    config, workdir, prepare = a_run
    prepare(["Sir Walter Elliot"])
    check_continues(config, workdir)
    prepare(["Sir Walter Elliot"] * 3)
    with pytest.raises(
        ConfigError,
        match=r"config.data.source: \S+/tokens holds other data than the run .*--allow_config_change=data.source",
    ):
        check_continues(config, workdir)
    check_continues(config, workdir, ["data.source"])


def test_other_held_out_text_is_told(a_run):
    config, workdir, prepare = a_run
    prepare(["Sir Walter Elliot"], ["was a man who"])
    told = []
    check_continues(config, workdir, tell=told.append)
    assert [line.partition(" is another")[0] for line in told] == [
        f"held-out text of {config.data.source}"
    ]


def test_data_that_has_moved_is_the_same_data(a_run):
    config, workdir, prepare = a_run
    moved = workdir.parent / "moved"
    (workdir.parent / "tokens").rename(moved)
    now, told = micro(data={"source": str(moved), "tokenizer": "byte"}), []
    check_continues(now, workdir, tell=told.append)
    assert [line.rpartition(", ")[2] for line in told] == ["the same by content"] * 2
    prepare(["another"])
    with pytest.raises(ConfigError, match="config.data.source: .*, but the run in"):
        check_continues(micro(data={"source": f"{moved}=1,{config.data.source}=1"}), workdir)


def test_a_run_writes_what_its_data_was(tmp_path, monkeypatch):
    facts = {}

    class StopError(Exception):
        pass

    def stop(*arguments, **options):
        facts.update(options["facts"])
        raise StopError

    monkeypatch.setattr(loop, "Checkpoints", stop)
    with pytest.raises(StopError):
        train(micro(), tmp_path)
    assert facts["data"] == fingerprints.of(micro().data) and facts["tokenizer"] == "byte"
