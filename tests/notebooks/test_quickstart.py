"""The quickstart notebook, run from top to bottom as a reader would."""

import pathlib
import re

import nbclient
import nbformat
import pytest

from fp8jax.monitor.writers import read_metrics

NOTEBOOK = pathlib.Path(__file__).parents[2] / "notebooks" / "quickstart.ipynb"


@pytest.mark.filterwarnings("default")
def test_quickstart_runs(tmp_path, monkeypatch):
    """Three runs, a plot, the report, two evaluations, a sample; fewer steps than a reader's."""
    for name, value in {"FP8JAX_STEPS": "12", "FP8JAX_RUNS": str(tmp_path), "FP8JAX_INSTALLED": "1", "XLA_FLAGS": ""}.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    for name in ("fog-fp8", "fog-bf16", "llama3-hot"):
        entries = read_metrics(tmp_path / name / "metrics.jsonl")
        assert entries[-1]["step"] == 12 and any("kurtosis/qkv_avg" in entry for entry in entries)
    text = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
    assert len(re.findall(r"bits per byte", text)) >= 2 and "Anne Elliot" in text
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in data for data in outputs) and any("iframe" in data.get("text/html", "") for data in outputs)
    assert (tmp_path / "report.html").stat().st_size > 50_000


def test_quickstart_is_kept_without_outputs():
    """Outputs would be stale and large."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in notebook.cells if cell.cell_type == "code")
    assert notebook.cells[0].cell_type == "markdown" and notebook.nbformat == 4
