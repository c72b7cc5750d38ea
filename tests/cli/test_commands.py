"""train.py and eval.py as a user runs them."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import pytest

from fp8jax import __main__ as commands
from fp8jax import config as config_lib
from fp8jax.cli import config_files, flags

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run(*arguments):
    environment = os.environ | {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--config=configs/fp8_base.py:tiny", "--config.model.kv_heads=3"],
            ["config.model.kv_heads", "3", "heads=2"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.model.widht=3"],
            ["config.model.widht: unknown field; did you mean 'width'?"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.modle.width=3"],
            ["config.modle: unknown section; did you mean 'model'?"],
        ),
        (["--config=configs/fp8_base.py:tiny", "--config.model.width=wide"], ["width", "wide"]),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.fp8.recipe=fp7"],
            ["config.fp8.recipe", "fp7", "fp8_dpa"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.fp8.head=True"],
            ["config.fp8.head", "tied_embeddings"],
        ),
        (
            ["--config=configs/fp8_base.py:huge"],
            ["error: flag --config=configs/fp8_base.py:huge: size 'huge' is not one of tiny, 390m"],
        ),
        (
            ["--config=README.md"],
            ["README.md: is not a configuration", "--config=configs/fp8_base.py:tiny"],
        ),
        (["--config=configs/missing.py"], ["missing.py"]),
        ([], ["--config"]),
        (["--config=configs/fp8_base.py:tiny", "--wrokdir=x"], ["wrokdir"]),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.data.source=a=0.5,b"],
            ["as in 'dirA=0.7,dirB=0.3'"],
        ),
        ([], ["--config: is missing", "--config=configs/fp8_base.py:tiny"]),
        (["--config.training.steps=3"], ["--config: is missing"]),
        (["--config=fp8_bas:tiny"], ["did you mean 'fp8_base'"]),
        (
            ["--config=configs/fp8_base.py:tiny", "--steps=10"],
            ["unknown flag --steps", "--config.training.steps=10"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--lr=1e-3"],
            ["unknown flag --lr", "--config.optimizer.learning_rate=1e-3"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.optimizer.lr=1e-3"],
            ["did you mean config.optimizer.learning_rate?"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.optimizer.steps=3"],
            ["did you mean config.training.steps"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.training.steps=1e3"],
            ["config.training.steps: '1e3'", "write 1000"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.training.steps"],
            ["config.training.steps: has no value"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.training.steps=None"],
            ["config.training.steps: 'None' is not a whole number"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.training=3"],
            ["config.training: is a section"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.preset.training.steps=3"],
            ["config.preset: unknown section"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--config.model.tied_embeddings=maybe"],
            ["'maybe' is not True or False"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--workdir=gs://bucket/run"],
            ["--workdir=gs://bucket/run", "gcsfuse"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--workdir=s3://bucket/run"],
            ["--workdir=s3://bucket/run"],
        ),
        (
            [
                "--config=configs/fp8_base.py:tiny",
                "--config.optimizer.warmup_steps=40",
                "--config.training.steps=30",
            ],
            ["warmup_steps: 40", "30"],
        ),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(arguments, words):
    """Within two seconds, of a process that has not loaded JAX."""
    result = run("-X", "importtime", "train.py", *arguments)
    told, result.stderr = (
        result.stderr,
        "".join(
            line for line in result.stderr.splitlines(True) if not line.startswith("import time:")
        ),
    )
    assert not [line for line in told.splitlines() if line.endswith(("| jax", " jax._src"))]
    assert result.returncode == 2, result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    assert all(word in lines[0] for word in words), lines[0]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (
            ["train", "--help"],
            0,
            [
                "python -m fp8jax train --config=configs/fp8_base.py:tiny",
                "--config.training.steps=",
            ],
        ),
        (["eval", "--help"], 0, ["python -m fp8jax eval --workdir=runs/fp8_base-tiny"]),
        (["help"], 0, ["train", "eval", "prepare"]),
        (["help", "train"], 0, ["python -m fp8jax train"]),
        ([], 0, ["train", "eval"]),
        (["--version"], 0, ["fp8jax 0.", "jax 0."]),
        (["train", "--version"], 0, ["fp8jax 0."]),
        (["trian"], 2, ["unknown command 'trian'", "did you mean 'train'"]),
        (["train"], 2, ["--config: is missing"]),
        (["eval"], 2, ["--workdir: is missing"]),
        (["eval", "--workdir=gs://bucket/run"], 2, ["gs://bucket/run"]),
        (["sample", "--workdir=gs://bucket/run", "--prompt=x"], 2, ["gs://bucket/run"]),
        (["sample", "--prompt=x"], 2, ["--workdir", "--help shows an example"]),
        (["report", "--out=gs://bucket/x.html", "runs"], 2, ["gs://bucket/x.html"]),
    ],
)
def test_commands(arguments, code, words):
    result = run("-m", "fp8jax", *arguments)
    assert result.returncode == code, result.stderr
    assert all(word in (result.stderr if code else result.stdout) for word in words), result
    assert not code or (result.stderr.count("\n") == 1 and result.stderr.startswith("error: "))


@pytest.mark.parametrize(
    "words",
    [
        ["--config.training.steps=7", "--config.mesh.data=-1"],
        ["--config.training.steps", "7", "--config.mesh.data", "-1"],
        [
            "--config.training.steps=9",
            "--config.training.steps=7",
            "--config.mesh.data=-1",
            "--config.data.sequence-length=256",
        ],
    ],
)
def test_fields_as_they_may_be_written(words, monkeypatch):
    """Before or after --config, with = or without, dashes or underscores, None for what is left open."""
    words = [
        *words,
        "--config.model.head_dim=None",
        "--config.optimizer.warmup_steps=3",
        "--config.optimizer.warmup_steps=None",
    ]
    overrides, rest = flags.split("config", ["train.py", *words, "--workdir=x"])
    config = config_lib.from_dict(config_files.read_config("config", "fp8_base:tiny", overrides))
    assert rest == ["train.py", "--workdir=x"]
    assert (config.training.steps, config.mesh.data, config.mesh.fsdp, config.model.head_dim) == (
        7,
        -1,
        1,
        None,
    )
    assert (config.optimizer.warmup_steps, config.data.sequence_length) == (1, 256)


TINY = "--config=configs/fp8_base.py:tiny"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("train --step=10", "--config.training.steps=10"),
        ("train --resume", "continued by itself"),
        ("train --Config.training.steps=3", "--config.training.steps=3"),
        ("train --trainng.steps=3", "--config.training.steps=3"),
        (f"train {TINY} --config.optimizer.lr 3", "did you mean config.optimizer.learning_rate?"),
        (f"train {TINY} 3", "values go after '='"),
        ("train configs/fp8_base.py:tiny", "say --config=configs/fp8_base.py:tiny"),
        ("train steps=1e3", "say --config.training.steps=1e3"),
        ("train workdir=x", "say --workdir=x"),
        (f"train {TINY} --config.training.steps=10k", "'10k' is not a whole number; write 10000:"),
        (f"train {TINY} --config.training.steps=1,000", "write 1000:"),
        (
            f"train {TINY} --config.optimizer.learning_rate=1,5",
            "'1,5' is not a number: peak learning rate",
        ),
        ("train --config", "--config: has no value; for example --config=configs/fp8_base.py:tiny"),
        ("train --config=configs/nope.py:tiny", "did you mean 'configs/op.py'?"),
        ("train --config=confgs/llama.py", "did you mean 'configs/llama3.py'?"),
        (
            "train --config=configs/",
            "is a directory, not a configuration; there are configs/bf16_base.py, ",
        ),
        ("train --config=zzz", "no such file; there are configs/bf16_base.py, "),
        ("train --num_processes=x", "--num_processes: 'x' is not a whole number"),
        ("train --vesion", "did you mean --version?"),
        ("eval --step=10k", "--step: '10k' is not a whole number; write 10000"),
        ("eval --config=configs/fp8_base.py:tiny", "the run's own configuration is used"),
        ("eval --config.mesh.fsdp=3", "the run's own configuration is used"),
        ("sample --temprature=1", "did you mean --temperature=1?"),
        ("sample --tokens=1k", "--tokens: '1k' is not a whole number; write 1000"),
        ("audit --rehears", "did you mean --rehearse?"),
        ("audit --steps=3", "--config.training.steps=3"),
        ("prepare --textfield=x", "did you mean --text_field=x?"),
        ("convert to_hf", "did you mean 'to-hf'?"),
        ("convert to-hf --dtype=bfloat", "did you mean 'bfloat16'?"),
        ("data shwo", "did you mean 'show'?"),
        ("data --stp", "unknown flag --stp"),
        ("report --ot=x", "did you mean --out=x?"),
        ("--vesion", "did you mean '--version'?"),
    ],
)
def test_misspelt_words_are_answered_with_the_right_ones(command, said, capsys, monkeypatch):
    assert refuse(command.split(), monkeypatch) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: ") and said in told, told


def refuse(arguments, monkeypatch):
    """The exit code of a command in this process, with flags as in a new one."""
    monkeypatch.chdir(ROOT)
    for name in flags.flags.FLAGS:
        flags.flags.FLAGS[name].unparse()
    try:
        return commands.main(arguments)
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("command", ["audit", "sample", "convert", "prepare", "report", "data"])
def test_every_command_has_a_version(command, capsys):
    with pytest.raises(SystemExit) as ended:
        commands.main([command, "--version"])
    assert ended.value.code == 0 and capsys.readouterr().out.startswith("fp8jax 0.")


def test_a_colon_without_a_size_is_no_size(capsys, monkeypatch):
    assert (
        refuse(["train", "--config=configs/fp8_base.py:", "--config.model.kv_heads=3"], monkeypatch)
        == 2
    )
    assert "config.model.kv_heads" in capsys.readouterr().err


def test_our_own_advice_is_taken():
    words = [
        "--config.model.vocab_size=None",
        "--noconfig.model.tied_embeddings",
        "--config.model.qk_regulariser=None",
    ]
    config = config_lib.from_dict(config_files.read_config("config", "fp8_base:390m", words))
    assert (
        config.model.vocab_size is None
        and config.model.qk_regulariser is None
        and not config.model.tied_embeddings
    )


def test_a_mesh_of_more_devices_than_there_are(tmp_path):
    result = run(
        "train.py",
        "--config=configs/fp8_base.py:tiny",
        f"--workdir={tmp_path}",
        "--config.mesh.fsdp=8",
    )
    assert (
        result.returncode == 2
        and "XLA_FLAGS=--xla_force_host_platform_device_count=8" in result.stderr
        and result.stderr.count("\n") == 1
    )


def test_eval_without_a_run_is_one_line(tmp_path):
    result = run("eval.py", f"--workdir={tmp_path}")
    assert (
        result.returncode == 2 and result.stderr.count("\n") == 1 and "config.json" in result.stderr
    )


def test_train_then_evaluate(tmp_path):
    micro = [
        "--config.model.layers=1",
        "--config.model.width=32",
        "--config.model.heads=1",
        "--config.model.head_dim=32",
        "--config.model.ffn_width=32",
        "--config.data.sequence_length=128",
        "--config.training.steps=3",
        "--config.optimizer.warmup_steps=1",
        "--config.evaluation.batches=1",
    ]
    result = run("train.py", "--config=configs/fp8_base.py", f"--workdir={tmp_path}", *micro)
    assert result.returncode == 0, result.stderr
    assert (
        "size     tiny" in result.stdout.splitlines()[0]
        and "100% of the block's GEMM FLOPs in FP8, emulated" in result.stdout
    )
    result = run("eval.py", f"--workdir={tmp_path}", "--step=7")
    assert (
        result.returncode == 2
        and "no checkpoint of step 7; there are steps 2, 3" in result.stderr
        and result.stderr.count("\n") == 1
    )
    result = run("eval.py", f"--workdir={tmp_path}", "--step=3")
    assert result.returncode == 0 and "bits per byte" in result.stdout


@pytest.mark.parametrize("script", ["train.py", "eval.py"])
def test_help_shows_examples_flags_and_every_field(script):
    result = run(script, "--help")
    assert (
        result.returncode == 0
        and f"    python {script} --" in result.stdout
        and "--workdir: " in result.stdout
    )
    if script == "train.py":
        for section in dataclasses.fields(config_lib.Config):
            for field in dataclasses.fields(section.type):
                assert f"--config.{section.name}.{field.name}=" in result.stdout
