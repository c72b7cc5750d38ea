"""What every command refuses before JAX is loaded."""

import importlib.machinery
import json
import pathlib
import subprocess
import sys
import types

import pytest

from fp8jax import __main__ as commands
from fp8jax import config as config_lib
from fp8jax.cli import checks, flags
from fp8jax.config import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = "train --config=configs/fp8_base.py:tiny"

AUDIT = "audit --config=configs/fp8_base.py:tiny"


@pytest.fixture
def workdir(tmp_path):
    """A directory that looks like that of a run with a checkpoint of step 3, which nothing could restore."""
    step = tmp_path / "run" / "checkpoints" / "3"
    step.mkdir(parents=True)
    (step / "MANIFEST.json").write_text("{}")
    (tmp_path / "run" / "config.json").write_text(
        json.dumps(config_lib.to_dict(config_lib.Config()))
    )
    return tmp_path / "run"


def refuse(command, monkeypatch, capsys):
    """The one line with which a command ends; loading JAX fails."""
    monkeypatch.chdir(ROOT)
    for name in ("jax", "orbax.checkpoint"):
        monkeypatch.setitem(sys.modules, name, None)
    for name in flags.flags.FLAGS:
        flags.flags.FLAGS[name].unparse()
    for name in [
        name
        for name in sys.modules
        if name.startswith(("fp8jax.training.loop", "fp8jax.training.evaluation"))
    ]:
        monkeypatch.delitem(sys.modules, name)
    try:
        code = commands.main(command.split())
    except SystemExit as ended:
        code = ended.code
    captured = capsys.readouterr()
    assert code == 2 and captured.err.count("\n") == 1 and captured.err.startswith("error: "), (
        captured
    )
    assert "loading JAX" not in captured.out + captured.err
    return captured.err


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            f"{TINY} --config.data.source=/nope",
            "config.data.source: /nope/index.json: no such file",
        ),
        (
            f"{TINY} --config.data.source=embedded=0.5,/nope=0.5",
            "config.data.source: /nope/index.json: no such file",
        ),
        (
            f"{TINY} --config.data.held_out=wiki=/nope",
            "config.data.held_out: /nope/index.json: no such file",
        ),
        (
            f"{TINY} --config.data.source=gs://b/t",
            "config.data.source: gs://b/t: gs:// is no file system; give a directory",
        ),
        (f"{TINY} --config.data.source=hf:x/y", "python -m fp8jax prepare --input hf:x/y"),
        (
            f"{TINY} --config.data.tokenizer=gs://b/t.json",
            "config.data.tokenizer: gs://b/t.json: gs:// is no file system",
        ),
        ("train --config=gs://b/c.py:tiny", "--config=gs://b/c.py:tiny: gs:// is no file system"),
        ("train --config=from_run:s3://b/r", "--config=s3://b/r: s3:// is no file system"),
        (f"{TINY} --config.data.tokenizer=/nope.json", "config.data.tokenizer: '/nope.json'"),
        (
            f"{TINY} --workdir=README.md",
            "--workdir=README.md: README.md is a file; give a directory",
        ),
        (
            f"{TINY} --workdir=README.md/x",
            "--workdir=README.md/x: README.md is a file; give a directory",
        ),
        (
            f"{TINY} --allow_config_change=nope",
            "--allow_config_change=nope: no such field; it takes data.sequence_length, data.source,",
        ),
        (
            f"{TINY} --allow_config_change=data.source,model.wdith",
            "model.wdith: no such field; did you mean 'model.width'",
        ),
        (
            f"{TINY} --allow_config_change=training.steps",
            "--allow_config_change=training.steps: may change without it; it takes ",
        ),
        (
            f"{TINY} --config.training.fitted=x",
            "config.training.fitted: is what a run has chosen, not to be set",
        ),
        (
            "eval --workdir=RUN --step=7",
            "--step=7: RUN: no checkpoint of step 7; there are steps 3",
        ),
        ("eval --workdir=/nope", "--workdir=/nope: no such directory"),
        ("eval --workdir=RUN --held_out=/nope", "--held_out: /nope/index.json: no such file"),
        ("eval --workdir=RUN --held_out=s3://b/t", "--held_out: s3://b/t: s3:// is no file system"),
        ("sample --workdir=/nope --prompt=x", "--workdir=/nope: no such directory"),
        ("sample --workdir=RUN --prompt=x --step=7", "no checkpoint of step 7; there are steps 3"),
        ("sample --workdir=RUN --prompt=x --tokens=0", "--tokens=0: is below 1"),
        (
            "sample --workdir=RUN --prompt=x --temperature=-1",
            "--temperature=-1.0: is not a number of at least 0",
        ),
        (
            "sample --workdir=RUN --prompt=x --temperature=nan",
            "--temperature=nan: is not a number of at least 0",
        ),
        ("sample --workdir=RUN --prompt=x --top_p=2", "--top_p=2.0: is not above 0"),
        ("sample --workdir=RUN --prompt=x --seed=-1", "--seed=-1: is not from 0"),
        (
            "convert to-hf --workdir=RUN --out README.md",
            "--out=README.md: README.md is a file; give a directory",
        ),
        (
            "convert to-hf --workdir=RUN --out fp8jax",
            "--out=fp8jax: is not empty; choose another --out",
        ),
        ("convert to-hf --workdir=RUN --out /tmp/nope/x --step=7", "no checkpoint of step 7"),
        ("convert to-hf --workdir=/nope --out /tmp/nope/x", "--workdir=/nope: no such directory"),
        ("convert from-hf RUN --out README.md/x", "--out=README.md/x: README.md is a file"),
        ("convert logits RUN --tokens=/nope.npy --out=x.npz", "--tokens=/nope.npy: no such file"),
        (
            "convert logits RUN --tokens=README.md --out=/nope/x.npz",
            "--out=/nope/x.npz: no directory /nope",
        ),
        (
            "convert logits RUN --tokens=README.md --out=RUN",
            "--out=RUN: is a directory; give a file",
        ),
        ("report RUN --out=/nope/x.html", "--out=/nope/x.html: no directory /nope"),
        ("report RUN --out=RUN", "--out=RUN: is a directory; give a file"),
        (
            "audit",
            "the following arguments are required: --config, --target; python -m fp8jax audit --help shows an example",
        ),
        (
            f"{AUDIT} --target=loca",
            "--target=loca: unknown; did you mean 'local'? For example h100:8, ",
        ),
        (f"{AUDIT} --target=z100:8", "--target=z100:8: unknown"),
        (f"{AUDIT} --target=local --json=/nope/x.json", "--json=/nope/x.json: no directory /nope"),
        (f"{AUDIT} --target=local --json=RUN", "--json=RUN: is a directory; give a file"),
        (f"{AUDIT} --target=local --json=s3://b/x.json", "s3://b/x.json"),
        (
            f"{AUDIT} --target=local --config.model.kv_heads=3",
            "config.model.kv_heads: 3 does not divide",
        ),
        (
            f"{AUDIT} --target=local --config.optimizer.lr 3",
            "did you mean config.optimizer.learning_rate?",
        ),
        (f"{AUDIT} --target=local --compare=nope", "--compare=nope: no such file"),
        (
            f"{AUDIT} --target=local --compare.model.width=64",
            "--compare.model.width=64: needs --compare=FILE:SIZE",
        ),
        (f"{AUDIT} --target=local --fit --memory", "--memory: not allowed with argument --fit"),
        (f"{AUDIT} --target=local --fit --compare=llama3:tiny", "leave out --compare"),
        (
            "prepare --input README.md --out README.md",
            "--out=README.md: README.md is a file; give a directory",
        ),
        ("prepare --input s3://x/y --out RUN", "--input=s3://x/y: s3:// is no file system"),
        (
            "prepare --input README.md --out RUN --tokenizer az://b/t.json",
            "config.data.tokenizer: az://b/t.json: az:// is no file system",
        ),
    ],
)
def test_one_line_before_jax(command, said, workdir, monkeypatch, capsys):
    assert said.replace("RUN", str(workdir)) in refuse(
        command.replace("RUN", str(workdir)), monkeypatch, capsys
    )


def test_a_task_dir_in_a_bucket_is_refused(workdir, monkeypatch, capsys):
    harness = types.ModuleType("lm_eval")
    harness.__spec__ = importlib.machinery.ModuleSpec("lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval", harness)  # need not be installed
    command = f"eval --workdir={workdir} --tasks=own --task_dir=gs://b/t"
    said = refuse(command, monkeypatch, capsys)
    assert "--task_dir=gs://b/t: gs:// is no file system" in said


def test_nothing_but_commands_loads_jax():
    """In a new process: modules of this one have loaded it."""
    code = "import sys; from fp8jax.cli import audit, convert, data, prepare, report, sample, train, evaluate; print('jax' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.stdout == "False\n", done.stderr


def test_paths_that_can_be_written(tmp_path):
    checks.directory("--workdir", tmp_path)
    checks.directory("--workdir", tmp_path / "a" / "b")
    checks.empty_directory("--out", tmp_path / "a")
    checks.new_file("--out", tmp_path / "x.html")
    checks.new_file("--out", pathlib.Path("x.html"))


def test_paths_that_cannot_be_looked_at():
    with pytest.raises(ConfigError, match="cannot be used: File name too long"):
        checks.directory("--workdir", pathlib.Path("x" * 300))
