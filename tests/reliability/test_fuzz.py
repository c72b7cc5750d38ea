"""Made-up input: only the documented errors, in one line."""

import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8jax import config as config_lib
from fp8jax.config import ConfigError
from fp8jax.monitor.writers import MetricsError, read_metrics
from fp8jax.numerics import recipes
from fp8jax.training import manifest

MANY = settings(max_examples=3000, deadline=None, suppress_health_check=list(HealthCheck))
NAMES = st.sampled_from(sorted({name for section in config_lib.to_dict(config_lib.Config()).items()
                                for name in (section[0], *section[1])}))
JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
                    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=4), max_leaves=12)


def one_line(error):
    assert str(error) and "\n" not in str(error) and len(str(error)) < 3000


@pytest.mark.slow
@MANY
@given(st.dictionaries(NAMES | st.text(max_size=5), JSON, max_size=4))
def test_configs(values):
    try:
        built = config_lib.from_dict(values)
    except ConfigError as error:
        one_line(error)
        return
    numbers = [value for section in config_lib.to_dict(built).values() for value in section.values() if isinstance(value, float)]
    assert all(map(math.isfinite, numbers))
    assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(built)))) == built


PARTS = st.sampled_from([*recipes.ROLES, "@", "-", "=", ",", "0", "3", "9", "bf16", "current", " ", "x", "²"])


@pytest.mark.slow
@MANY
@given(st.lists(PARTS, max_size=8).map("".join))
def test_overrides(text):
    try:
        found = recipes.parse_overrides(text, layers=4)
    except ValueError as error:
        one_line(error)
        return
    assert all(0 <= override.first <= override.last < 4 for override in found)


@pytest.mark.slow
@MANY
@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode) | JSON.map(lambda v: (json.dumps(v) + "\n").encode()))
def test_logs(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    try:
        read_metrics(path)
    except MetricsError as error:
        one_line(error)


@pytest.mark.slow
@MANY
@given(st.binary(max_size=60) | (JSON | JSON.map(lambda v: {"content": v, "digest": v})).map(lambda v: json.dumps(v).encode()))
def test_manifests(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp() / "fuzz_checkpoint"
    directory.mkdir(exist_ok=True)
    (directory / manifest.NAME).write_bytes(content)
    found = manifest.problem(directory)
    assert found is not None
    one_line(found)
