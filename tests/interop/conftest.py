"""A model that the tests of interop share."""

import pathlib
import shutil

import pytest

from fp8jax.interop.inference import Inference
from fp8jax.plan import LoadedModel
from tests.interop.hf_directories import DATA

from .micro_model import load


@pytest.fixture(scope="session")
def model() -> LoadedModel:
    return load()


@pytest.fixture(scope="session")
def inference(model) -> Inference:
    return Inference(model)


@pytest.fixture
def directory(tmp_path):
    """A llama directory that a test may spoil."""
    return pathlib.Path(shutil.copytree(DATA / "llama", tmp_path / "llama"))
