"""A process with little memory runs what needs three times as much with one microbatch."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from fp8jax import config as config_lib
from fp8jax.cli.config_files import read_config
from fp8jax.plan import make_plan
from fp8jax.training.estimates import Formula, Option

ROOT = pathlib.Path(__file__).resolve().parents[2]
GIB = 1 << 30
# 32,768 tokens and a vocabulary of 65,536: the logits alone have 8 GiB in float32.
FIELDS = {
    "model.layers": 1,
    "model.width": 32,
    "model.ffn_width": 32,
    "model.heads": 1,
    "model.vocab_size": 65536,
    "training.batch_size": 128,
    "training.steps": 1,
    "evaluation.batches": 1,
    "monitor.every": 0,
}


def words():
    return [f"--config.{name}={value}" for name, value in FIELDS.items()]


def test_the_run_needs_12_gib_with_one_microbatch(monkeypatch):
    import jax

    monkeypatch.chdir(ROOT)
    config = config_lib.from_dict(read_config("config", "configs/bf16_base.py:tiny", words()))
    plan = make_plan(config, jax.devices()[:1])
    assert Formula(plan).temporary_bytes(Option(1, 0, "none")) > 12 * GIB


@pytest.mark.slow
def test_four_gib_of_address_space_are_enough_for_it(tmp_path):
    command = [
        "bash",
        "-c",
        f'ulimit -v {4 * GIB // 1024} && exec "$@"',
        "bash",
        sys.executable,
        "train.py",
        "--config=configs/bf16_base.py:tiny",
        f"--workdir={tmp_path}",
    ]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    done = subprocess.run(
        [*command, *words()],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    training = json.loads((tmp_path / "config.json").read_text())["training"]
    assert training["microbatches"] > 4 and "left of ulimit -v" in done.stdout
