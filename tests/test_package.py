"""The package: built, installed beside nothing of the checkout, and run from an empty folder; its extras are the requirements files."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXTRAS = ("gpu", "gpu-cuda12", "tpu", "data", "eval", "wandb", "audit", "dev")
SMALL = [
    "--config.model.layers=1",
    "--config.model.width=32",
    "--config.model.ffn_width=64",
    "--config.data.sequence_length=32",
    "--config.training.batch_size=2",
    "--config.training.steps=3",
    "--config.log.report_minutes=0",
    "--config.evaluation.batches=2",
]


def required(name):
    """Lines of a requirements file and of those that it includes, but requirements.txt."""
    for line in (ROOT / name).read_text().splitlines():
        line = line.partition("#")[0].strip()
        if line.startswith("-r "):
            included = line.removeprefix("-r ").strip()
            yield from required(included) if included != "requirements.txt" else ()
        elif line:
            yield line


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_is_its_requirements_file(extra):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert sorted(extras[extra]) == sorted(required(f"requirements-{extra}.txt"))
    assert set(extras) == set(EXTRAS)


def build(kind, source, out):
    """An archive made by the build backend; its path."""
    out.mkdir()
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    return next(out.iterdir())


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """An environment with the wheel in it, made of the sdist; what fp8jax needs comes from this one."""
    root = tmp_path_factory.mktemp("package")
    source = root / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.suffix in (".toml", ".txt", ".md") or path.name == "LICENSE":
            shutil.copy(path, source)
    shutil.copytree(ROOT / "fp8jax", source / "fp8jax")
    with tarfile.open(build("sdist", source, root / "sdist")) as archive:
        archive.extractall(root / "unpacked", filter="data")
    wheel = build("wheel", next((root / "unpacked").iterdir()), root / "wheel")
    venv = root / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    pip = [sys.executable, "-m", "pip", "--python", venv / "bin" / "python", "install"]
    subprocess.run([*pip, "-q", "--no-deps", "--no-index", wheel], check=True)
    site = pathlib.Path(sysconfig.get_path("purelib", "venv", {"base": venv, "platbase": venv}))
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return venv / "bin" / "fp8jax"


def run(installed, folder, *argv):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment["XLA_FLAGS"] += " --xla_force_host_platform_device_count=1"
    return subprocess.run(
        [installed, *argv],
        cwd=folder,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_wheel_trains_and_evaluates_in_an_empty_folder(installed, tmp_path):
    trained = run(installed, tmp_path, "train", "--config=fp8_base:tiny", *SMALL)
    assert trained.returncode == 0, trained.stderr + trained.stdout
    workdir = tmp_path / "runs" / "fp8_base-tiny"
    assert json.loads((workdir / "config.json").read_text())["model"]["width"] == 32
    assert (tmp_path / "runs").is_dir() and len(list(tmp_path.iterdir())) == 1
    evaluated = run(installed, tmp_path, "eval", f"--workdir={workdir}")
    assert evaluated.returncode == 0 and "bits per byte" in evaluated.stdout + evaluated.stderr


def test_the_wheel_has_its_presets_and_names_them(installed, tmp_path):
    wrong = run(installed, tmp_path, "train", "--config=fp8_bass:tiny")
    assert wrong.returncode == 2 and "did you mean 'fp8_base'?" in wrong.stderr
    documented = run(
        installed, tmp_path, "train", "--config=configs/fp8_base.py:tiny", "--config.model.layers=0"
    )
    assert documented.returncode == 2 and "config.model.layers: 0 is below 1" in documented.stderr


def test_every_file_of_the_package_is_in_the_wheel(installed):
    site = next((installed.parents[1] / "lib").glob("python*/site-packages"))
    sources = {
        path.relative_to(ROOT)
        for path in (ROOT / "fp8jax").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {path for path in sources if not (site / path).is_file()} == set()
