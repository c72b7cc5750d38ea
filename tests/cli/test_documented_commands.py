"""Every command of README and of every --help: it parses as printed, and (slow) runs in a folder that holds nothing but the repository.

Big sizes are run small, and what a command needs that a user has to bring, such as text or a model directory, is brought.
"""

import contextlib
import io
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
from absl import flags as absl_flags

from fp8jax import __main__ as commands
from fp8jax import config as config_lib
from fp8jax.cli import (
    audit,
    config_files,
    convert,
    data,
    evaluate,
    flags,
    prepare,
    report,
    sample,
    train,
)
from fp8jax.interop.hf_safetensors import TensorFiles, read_json, write_files

ROOT = pathlib.Path(__file__).resolve().parents[2]
LLAMA = ROOT / "tests" / "interop" / "data" / "hf" / "llama"
HELPS = [
    ["train"],
    ["eval"],
    ["audit"],
    ["convert"],
    ["convert", "from-hf"],
    ["convert", "to-hf"],
    ["convert", "logits"],
    ["data"],
    ["data", "show"],
    ["prepare"],
    ["prepare", "inspect"],
    ["report"],
    ["sample"],
]


def of_readme(path="README.md"):
    """Its commands, without comments, in order."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / path).read_text(), re.M | re.S)
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def of_help(words):
    """The examples of a help text."""
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
        commands.main([*words, "--help"])
    found = re.findall(r"^ *(?:examples?:)? *(python .*)$", shown.getvalue(), re.M)
    return [re.sub(r"\s+#.*", "", part).strip() for line in found for part in line.split(" && ")]


def programs(lines):
    """Those of our own programs, as words after `python`."""
    return [
        shlex.split(line)[1:]
        for line in lines
        if line.startswith(("python train.py", "python eval.py", "python -m fp8jax"))
    ]


def parse(words):
    """Reads a command line as the command does, and does nothing."""
    words = (
        words[2:] if words[:2] == ["-m", "fp8jax"] else [words[0].removesuffix(".py"), *words[1:]]
    )
    name, rest = words[0], words[1:]
    if name in ("train", "eval"):
        overrides, rest = flags.split("config", [name, *rest])
        known = {
            flag.name
            for module in (train, evaluate, flags)
            for flag in absl_flags.FLAGS.get_key_flags_for_module(module)
        }
        given = dict(word.removeprefix("--").partition("=")[::2] for word in rest[1:])
        assert set(given) <= known and "workdir" in given or name == "train", (given, known)
        if name == "train":
            config_lib.from_dict(
                config_files.read_config(
                    "config", given["config"] + ":tiny" * (":" not in given["config"]), overrides
                )
            )
    elif name == "audit":
        options, overrides = audit._options(rest)
        for flag in ("config", "compare"):
            if file := getattr(options, flag):
                config_lib.from_dict(config_files.read_config(flag, file, overrides[flag]))
    elif name == "prepare":
        (prepare._inspect_parser() if rest[0] == "inspect" else prepare._parser()).parse_args(
            rest[rest[0] == "inspect" :]
        )
    else:
        {"convert": convert, "data": data, "report": report, "sample": sample}[
            name
        ]._parser().parse_args(rest)


@pytest.mark.parametrize("words", HELPS, ids=" ".join)
def test_every_help_has_an_example_and_its_examples_parse(words):
    found = of_help(words)
    assert found
    for command in programs(found):
        parse(command)


def test_readme_parses():
    found = programs(of_readme())
    assert len(found) > 12
    for command in found:
        parse(command)


def test_what_readme_installs_and_launches_is_there():
    lines = of_readme()
    installed = {word for line in lines for word in line.split() if word.startswith("requirements")}
    assert {
        "requirements.txt",
        "requirements-gpu.txt",
        "requirements-gpu-cuda12.txt",
        "requirements-tpu.txt",
    } <= installed
    for name in [
        *installed,
        *(
            word
            for line in lines
            for word in line.split()
            if word.startswith(("launch/", "benchmarks/"))
        ),
    ]:
        assert (ROOT / name).is_file(), name


def test_pages_link_to_what_is_there():
    for page in (ROOT / "README.md", ROOT / "docs" / "README.md"):
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            assert link.startswith("http") or (page.parent / link).exists(), (page, link)
    listed = (ROOT / "docs" / "README.md").read_text()
    assert all(
        f"]({page.name})" in listed
        for page in (ROOT / "docs").glob("*.md")
        if page.name != "README.md"
    )


SMALL = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 1,
    "model.kv_heads": 1,
    "model.head_dim": 32,
    "model.ffn_width": 32,
    "model.vocab_size": None,
    "data.sequence_length": 64,
    "training.batch_size": 8,
    "training.steps": 3,
    "training.remat": "none",
    "log.report_minutes": 0,
    "evaluation.batches": 1,
    "monitor.every": 2,
}


def small(words):
    """A command as it can be run here in seconds."""
    out = [re.sub(r":(390m|1p5b|8b|70b)$", ":tiny", word) for word in words]
    out = [
        re.sub(r"^--target=.*", "--target=local", re.sub(r"^--step=\d+$", "--step=3", word))
        for word in out
    ]
    out = [
        word
        for word in out
        if not word.startswith(("--config.training.steps", "--config.training.microbatches"))
    ]
    for flag in ("config", "compare"):
        if any(word.startswith(f"--{flag}=") for word in out) and out[0] != "eval.py":
            out += [f"--{flag}.{name}={value}" for name, value in SMALL.items()]
    return out


def llama(folder):
    """A small Llama whose vocabulary has room for the ids of bytes."""
    files, values = TensorFiles(LLAMA), read_json(LLAMA / "config.json") | {"vocab_size": 384}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    arrays = {name: files.read(name) for name in files.entries}
    arrays = {
        name: np.resize(array, (384, 16)) if "embed" in name else array
        for name, array in arrays.items()
    }
    write_files(
        folder,
        {name: (array.shape, lambda array=array: array) for name, array in arrays.items()},
        next(iter(arrays.values())).dtype,
        2**30,
    )


def bring(folder):
    """What a user has: text, a tokenizer, a model directory, token ids."""
    for name, suffix in (("my_text", ".jsonl"), ("crawl", ".jsonl.zst")):
        (folder / name).mkdir()
        lines = "".join(
            f'{{"text": "It is a truth universally acknowledged, number {n}. {"x" * 200}"}}\n'
            for n in range(200)
        ).encode()
        if suffix.endswith("zst"):
            zstandard = pytest.importorskip("zstandard")
            lines = zstandard.compress(lines)
        (folder / name / f"a{suffix}").write_bytes(lines)
    tokenizers = pytest.importorskip("tokenizers")
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    )
    made.pre_tokenizer, made.decoder = (
        tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        tokenizers.decoders.ByteLevel(),
    )
    made.add_special_tokens(["<|end_of_text|>"])
    made.save(str(folder / "tokenizer.json"))
    llama(folder / "Llama-3.2-1B")
    np.save(folder / "ids.npy", np.arange(24).reshape(2, 12))


def checkout(folder):
    """The repository's files in a new folder."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    for name in listed.stdout.split("\0"):
        if (
            name
            and not name.startswith(("tests/", "benchmarks/results", "benchmarks/early_warning/"))
            and (ROOT / name).is_file()
        ):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def run_all(found, folder):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONWARNINGS": "ignore"}
    for words in found:
        if any(word.startswith("--tasks") for word in words):
            continue  # tasks come from a hub
        done = subprocess.run(
            [sys.executable, *small(words)],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, (
            f"{' '.join(words)}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )


@pytest.mark.slow
def test_readme_runs(tmp_path):
    checkout(tmp_path)
    bring(tmp_path)
    run_all(programs(of_readme()), tmp_path)
    assert (tmp_path / "runs" / "mine" / "eval.json").is_file() and (
        tmp_path / "report.html"
    ).is_file()


@pytest.mark.slow
def test_examples_of_help_run(tmp_path):
    """In the order of a user who trains first; what an example of report compares is trained, too."""
    checkout(tmp_path)
    bring(tmp_path)
    found = [command for words in HELPS for command in programs(of_help(words))]
    found.insert(1, ["train.py", "--config=configs/llama3.py:tiny"])
    run_all(
        [list(words) for words in dict.fromkeys(map(tuple, found))], tmp_path
    )  # convert shows what from-hf does
