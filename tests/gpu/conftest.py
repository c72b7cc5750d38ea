"""Figures of the GPU checks: printed, and with `--figures=FILE` written as JSON."""

import json
import pathlib

import jax
import pytest


def pytest_addoption(parser):
    parser.addoption("--figures", help="write what the GPU checks measured to this JSON file")


@pytest.fixture(scope="session")
def figures(request):
    """A list to which checks append rows."""
    rows = []
    yield rows
    for row in rows:
        print(
            "  ".join(
                f"{key} {value:.3g}" if isinstance(value, float) else str(value)
                for key, value in row.items()
            )
        )
    path = request.config.getoption("--figures")
    if path:
        record = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "rows": rows}
        pathlib.Path(path).write_text(json.dumps(record, indent=1) + "\n")
