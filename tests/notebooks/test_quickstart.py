"""The quickstart notebook, run from top to bottom as a reader would."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import nbclient
import nbformat
import pytest

from fp8jax.monitor.logs import read_metrics

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "quickstart.ipynb"
BOUNDS = ">=0.10.2,<0.13"


@pytest.fixture(scope="module")
def runtime():
    spec = importlib.util.spec_from_file_location(
        "setup_runtime", ROOT / "notebooks" / "setup_runtime.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cuda(family, version, **more):
    return {
        "jax": version,
        "jaxlib": version,
        f"jax-{family}-plugin": version,
        f"jax-{family}-pjrt": version,
        **more,
    }


@pytest.mark.parametrize(
    ("kind", "there", "driver", "extra", "kept"),
    [
        ("cpu", {}, None, [], False),
        ("cpu", {"jax": "0.11.0", "jaxlib": "0.11.0"}, None, [], True),
        (
            "cpu",
            cuda("cuda12", "0.7.2"),
            None,
            ["jax-cuda12-plugin" + BOUNDS, "jax-cuda12-pjrt" + BOUNDS],
            False,
        ),  # must not stay behind
        ("gpu", cuda("cuda12", "0.11.2"), 550, [], True),
        (
            "gpu",
            cuda("cuda12", "0.7.2"),
            580,
            [f"jax[cuda12]{BOUNDS}"],
            False,
        ),  # never two families side by side
        ("gpu", cuda("cuda13", "0.13.0"), 580, [f"jax[cuda13]{BOUNDS}"], False),
        (
            "gpu",
            {"jax": "0.11.0", "jaxlib": "0.11.0"},
            550,
            [f"jax[cuda12]{BOUNDS}"],
            False,
        ),  # JAX without a plugin sees no GPU
        ("gpu", {}, 580, [f"jax[cuda13]{BOUNDS}"], False),
        ("gpu", {}, None, [f"jax[cuda13]{BOUNDS}"], False),
        ("tpu", {"jax": "0.12.0", "jaxlib": "0.12.0", "libtpu": "0.0.40"}, None, [], True),
        (
            "tpu",
            {"jax": "0.10.1", "jaxlib": "0.10.1", "libtpu": "0.0.20"},
            None,
            [f"jax[tpu]{BOUNDS}"],
            False,
        ),
    ],
)
def test_a_plugin_that_is_there_stays_or_is_replaced_with_jax(
    runtime, kind, there, driver, extra, kept
):
    wanted, constraints = runtime.pip_arguments(kind, there, BOUNDS, driver)
    assert wanted == ["-r", str(ROOT / "requirements.txt"), *extra]
    assert constraints == (
        [f"{name}=={version}" for name, version in there.items()] if kept else []
    )


def test_set_up_says_what_it_does(runtime):
    assert re.fullmatch(r">=[\d.]+,<[\d.]+", runtime.jax_bounds())
    command = [sys.executable, str(ROOT / "notebooks" / "setup_runtime.py"), "--dry_run"]
    found = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}
    )
    assert found.returncode == 0, found.stderr
    assert (
        found.stdout.startswith("device: cpu; installed: jax ")
        and "pip install -q -r " in found.stdout
    )


def first_cell():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    return next(cell.source for cell in notebook.cells if cell.cell_type == "code")


def test_the_address_is_one_constant_at_the_top():
    assert first_cell().splitlines()[0].startswith('REPOSITORY = ""')
    assert (
        sum("REPOSITORY =" in cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
        == 1
    )


@pytest.mark.parametrize("how", ["nothing", "upload", "clone"])
def test_a_fresh_runtime_gets_fp8jax(tmp_path, how):
    """From an archive, from a repository; with neither, a line says how."""
    copy = tmp_path / "made" / "fp8jax"
    copy.mkdir(parents=True)
    (copy / "train.py").touch()
    shutil.copytree(ROOT / "notebooks", copy / "notebooks")
    fresh, address = tmp_path / "content", ""
    fresh.mkdir()
    if how == "upload":
        shutil.make_archive(str(fresh / "fp8jax-main"), "zip", copy.parent)
    if how == "clone":
        address = str(copy)
        for arguments in (
            ["init", "-q"],
            ["add", "."],
            ["-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "all"],
        ):
            subprocess.run(["git", *arguments], cwd=copy, check=True)
    environment = os.environ | {
        "FP8JAX_INSTALLED": "1",
        "JAX_PLATFORMS": "cpu",
        "FP8JAX_REPOSITORY": address,
    }
    found = subprocess.run(
        [sys.executable, "-c", first_cell()],
        cwd=fresh,
        env=environment,
        capture_output=True,
        text=True,
    )
    if how == "nothing":
        assert (
            found.returncode == 1
            and found.stderr.startswith("fp8jax is not here. Put the address")
            and found.stderr.count("\n") == 1
        )
        return
    where = fresh / ("uploaded/fp8jax" if how == "upload" else "fp8jax")
    assert (
        found.returncode == 0
        and f"fp8jax in {where}; 60 steps on a CPU; runs go to {fresh}" in found.stdout
    ), found.stderr


@pytest.mark.filterwarnings("default")
def test_quickstart_runs(tmp_path, monkeypatch):
    """Three runs, a plot, the report, two evaluations, a sample; fewer steps than a reader's."""
    # A notebook's front end sets FORCE_COLOR.
    variables = {
        "FP8JAX_STEPS": "12",
        "FP8JAX_RUNS": str(tmp_path),
        "FP8JAX_INSTALLED": "1",
        "XLA_FLAGS": "",
        "FORCE_COLOR": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(
        notebook, timeout=1200, resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    for name in ("fog-fp8", "fog-bf16", "llama3-fp8"):
        entries = read_metrics(tmp_path / name / "metrics.jsonl")
        assert entries[-1]["step"] == 12 and any("kurtosis/qkv_avg" in entry for entry in entries)
    text = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert len(re.findall(r"bits per byte", text)) >= 2 and "Anne Elliot" in text
    assert "\x1b" not in text and re.search(r"^step 12/12  loss ", text, re.MULTILINE)
    outputs = [
        output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])
    ]
    assert any("image/png" in data for data in outputs) and any(
        "iframe" in data.get("text/html", "") for data in outputs
    )
    assert (tmp_path / "report.html").stat().st_size > 50_000


def test_quickstart_is_kept_without_outputs():
    """Outputs would be stale and large."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(
        not cell.get("outputs") and cell.get("execution_count") is None
        for cell in notebook.cells
        if cell.cell_type == "code"
    )
    assert notebook.cells[0].cell_type == "markdown" and notebook.nbformat == 4
