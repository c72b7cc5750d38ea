"""A run's own copy of its tokenizer: found wherever the run lies, when what it was trained with is away."""

import dataclasses
import json
import shutil

import pytest

from fp8jax import config as configs
from fp8jax.data import run_tokenizer, tokenizer
from fp8jax.training import manifest
from fp8jax.training.checkpoint import CheckpointError, load_config, save_config
from fp8jax.training.evaluation import run_config


@pytest.fixture
def bpe(tmp_path):
    path = tmp_path / "bpe.json"
    path.write_text(tokenizer.train(["Sir Walter Elliot of Kellynch Hall"] * 9, 280))
    return path


@pytest.fixture
def workdir(tmp_path):
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def config_with(name):
    return configs.from_dict({"data": {"tokenizer": str(name)}})


def test_everything_but_training_takes_the_copy(bpe, workdir):
    config = config_with(bpe)
    save_config(workdir, config)
    loaded = tokenizer.of(config.data)
    run_tokenizer.keep(workdir, loaded)
    assert {path.name for path in workdir.iterdir()} == {"config.json", "tokenizer.json"}
    bpe.unlink()
    moved = workdir.rename(workdir.parent / "moved")
    tokenizer.load.cache_clear()
    assert tokenizer.of(run_config(moved).data).fingerprint == loaded.fingerprint
    with pytest.raises(
        configs.ConfigError, match=r"'\S+bpe.json' no such file; it is the path of a tokenizer.json"
    ):
        tokenizer.of(load_config(moved).data)


def test_training_takes_the_copy_where_the_file_is_away(bpe, workdir):
    config = config_with(bpe)
    run_tokenizer.keep(workdir, tokenizer.of(config.data))
    assert run_tokenizer.found(config, workdir) == config
    bpe.unlink()
    assert run_tokenizer.found(config, workdir).data.tokenizer == str(workdir / "tokenizer.json")
    for name in ("auto", "byte", "tekken"):
        assert run_tokenizer.found(config_with(name), workdir) == config_with(name)


def test_bytes_without_their_data(workdir):
    config = configs.from_dict({"data": {"source": str(workdir / "away")}})
    save_config(workdir, config)
    checkpoint = workdir / "checkpoints" / "3"
    checkpoint.mkdir(parents=True)
    manifest.write(checkpoint, {"tokenizer": "byte"})
    assert tokenizer.of(run_config(workdir).data).fingerprint == "byte"


def test_a_changed_tokenizer_replaces_the_copy(bpe, workdir):
    run_tokenizer.keep(workdir, tokenizer.load(str(bpe)))
    run_tokenizer.keep(workdir, tokenizer.load("byte"))
    assert not list(workdir.iterdir())


def test_a_path_inside_the_run_moves_with_it(workdir):
    name = workdir / "hf" / "tokenizer.json"
    save_config(workdir, config_with(name))
    assert (
        json.loads((workdir / "config.json").read_text())["data"]["tokenizer"]
        == "{workdir}/hf/tokenizer.json"
    )
    moved = shutil.move(workdir, workdir.parent / "moved")
    config = load_config(moved)
    assert config == dataclasses.replace(
        config, data=config_with(moved / "hf" / "tokenizer.json").data
    )


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match=r"config.json: no such file; --workdir"):
        run_config(tmp_path)
