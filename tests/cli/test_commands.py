"""train.py and eval.py as a user runs them."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

from fp8jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize(("arguments", "words"), [
    (["--config=configs/fp8_base.py:tiny", "--config.model.kv_heads=3"], ["config.model.kv_heads", "3", "heads=2"]),
    (["--config=configs/fp8_base.py:tiny", "--config.model.widht=3"], ["config.model.widht: unknown field; did you mean 'width'?"]),
    (["--config=configs/fp8_base.py:tiny", "--config.modle.width=3"], ["config.modle: unknown section; did you mean 'model'?"]),
    (["--config=configs/fp8_base.py:tiny", "--config.model.width=wide"], ["width", "wide"]),
    (["--config=configs/fp8_base.py:tiny", "--config.fp8.recipe=fp7"], ["config.fp8.recipe", "fp7", "fp8_dpa"]),
    (["--config=configs/fp8_base.py:tiny", "--config.fp8.head=True"], ["config.fp8.head", "tied_embeddings"]),
    (["--config=configs/fp8_base.py:huge"], ["error: flag --config=configs/fp8_base.py:huge: size 'huge' is not one of tiny, 390m"]),
    (["--config=README.md"], ["SyntaxError in the config file", "README.md, line"]),
    (["--config=configs/missing.py"], ["missing.py"]),
    ([], ["--config"]),
    (["--config=configs/fp8_base.py:tiny", "--wrokdir=x"], ["wrokdir"]),
    (["--config=configs/fp8_base.py:tiny", "--config.data.source=a=0.5,b"], ["as in 'dirA=0.7,dirB=0.3'"]),
])
def test_mistakes_end_with_one_line_and_exit_code_2(arguments, words):
    result = run("train.py", *arguments)
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert all(word in lines[0] for word in words), lines[0]


def test_eval_without_a_run_is_one_line(tmp_path):
    result = run("eval.py", f"--workdir={tmp_path}")
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and "config.json" in result.stderr


def test_train_then_evaluate(tmp_path):
    micro = ["--config.model.layers=1", "--config.model.width=32", "--config.model.heads=1", "--config.model.head_dim=32",
             "--config.model.ffn_width=32", "--config.data.sequence_length=128", "--config.training.steps=3",
             "--config.optimizer.warmup_steps=1", "--config.evaluation.batches=1"]
    result = run("train.py", "--config=configs/fp8_base.py", f"--workdir={tmp_path}", *micro)
    assert result.returncode == 0, result.stderr
    assert "size     tiny" in result.stdout.splitlines()[0] and "100% of the block's GEMM FLOPs in FP8, emulated" in result.stdout
    result = run("eval.py", f"--workdir={tmp_path}", "--step=3")
    assert result.returncode == 0 and "bits per byte" in result.stdout


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_shows_examples_flags_and_every_field(script):
    result = run(script, "--help")
    assert result.returncode == 0 and f"    python {script} --" in result.stdout and "--workdir: " in result.stdout
    if script == "train.py":
        for section in dataclasses.fields(config_lib.Config):
            for field in dataclasses.fields(section.type):
                assert f"--config.{section.name}.{field.name}=" in result.stdout
