"""A model that the tests of interop share."""

import pytest

from fp8jax.interop.inference import Inference
from fp8jax.models.definition import LoadedModel

from .micro_model import load


@pytest.fixture(scope="session")
def model() -> LoadedModel:
    return load()


@pytest.fixture(scope="session")
def inference(model) -> Inference:
    return Inference(model)
