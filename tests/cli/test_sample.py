"""`python -m fp8jax sample` on a run of one step."""

import jax
import pytest

from fp8jax import __main__ as commands
from fp8jax import config as config_lib
from fp8jax.interop.generation import generate
from fp8jax.interop.inference import Inference
from fp8jax.training import loop
from fp8jax.training.evaluation import load_run

CONFIG = {
    "model": {
        "layers": 1,
        "width": 32,
        "ffn_width": 32,
        "heads": 2,
        "kv_heads": 1,
        "head_dim": 16,
        "architecture": "llama3",
    },
    "fp8": {"recipe": "bf16"},
    "data": {"sequence_length": 64},
    "optimizer": {"warmup_steps": 1},
    "mesh": {"fsdp": 1},
    "training": {"steps": 1, "batch_size": 2},
    "evaluation": {"batches": 1},
    "monitor": {"every": 0},
    "log": {"report_minutes": 0},
}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    assert loop.train(config_lib.from_dict(CONFIG), path, jax.devices()[:1]) == 0
    return path


def sample(workdir, *arguments):
    return commands.main(["sample", f"--workdir={workdir}", *arguments])


def test_prints_the_prompt_and_its_continuation(workdir, capsys):
    assert sample(workdir, "--prompt=Anne", "--tokens=20", "--temperature=0.9", "--seed=5") == 0
    inference = Inference(load_run(workdir, devices=jax.devices()[:1])[0])
    (text,) = generate(inference, ["Anne"], tokens=20, temperature=0.9, seed=5)
    assert capsys.readouterr().out == f"Anne{text}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt=Anne", "--top_p=2"], ["top_p", "2.0"]),
        (["--prompt=" + "x" * 64], ["prompt", "65", "64"]),
        (["--prompt=Anne", "--step=7"], ["checkpoint", "7"]),
    ],
)
def test_mistakes_are_one_line(workdir, capsys, arguments, words):
    assert sample(workdir, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words)


def test_no_run_is_one_line(tmp_path, capsys):
    assert sample(tmp_path, "--prompt=Anne") == 2
    assert "config.json" in capsys.readouterr().err
