"""The tested range of JAX is one line, said where it does not hold, and the one in requirements.txt."""

import importlib.metadata
import pathlib
import re
import subprocess
import sys

import pytest

import fp8jax

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("version", "tested"),
    [
        ("0.10.2", True),
        ("0.11.0", True),
        ("0.12.9", True),
        ("0.10.1", False),
        ("0.9.2", False),
        ("0.13.0", False),
        ("1.0", False),
        ("0.11.0.dev20260901", True),
    ],
)
def test_range(version, tested):
    line = fp8jax.untested_jax(version)
    assert (line is None) == tested
    assert tested or (version in line and "0.10.2" in line and "\n" not in line)


def test_requirements_say_the_same():
    least, below = (".".join(map(str, numbers)) for numbers in fp8jax.JAX_VERSIONS)
    for file in (
        "requirements.txt",
        "requirements-gpu.txt",
        "requirements-gpu-cuda12.txt",
        "requirements-tpu.txt",
    ):
        for found in re.findall(r"^jax(?:\[\w+\])?(.*)$", (ROOT / file).read_text(), re.M):
            assert found == f">={least},<{below}", file


def test_commands_say_it_and_an_import_does_not():
    code = "import importlib.metadata as m; real = m.version; m.version = lambda n: '0.9.1' if n == 'jax' else real(n); import fp8jax"
    run = "; from fp8jax import __main__ as command; command.main(['--version'])"
    error = {}
    for name, text in (("import", code), ("command", code + run)):
        error[name] = subprocess.run(
            [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, check=True
        ).stderr
    assert error["import"] == ""
    assert error["command"].count("\n") == 1 and "0.9.1" in error["command"]
    assert fp8jax.untested_jax(importlib.metadata.version("jax")) is None
