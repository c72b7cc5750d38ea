"""Made-up input: only the documented errors, in one line, without a hang and without much memory. Over 40,000 cases."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8jax import config as config_lib
from fp8jax.cli import config_files
from fp8jax.config import ConfigError
from fp8jax.monitor import report
from fp8jax.monitor.writers import MetricsError, read_metrics
from fp8jax.numerics import recipes
from fp8jax.training import manifest
from fp8jax.training.checkpoint import load_config
from tests.reliability.fuzzing import JSON, MANY, NAMES, altered, damaged, one_line

pytestmark = pytest.mark.usefixtures("little_memory")


@pytest.mark.slow
@MANY
@given(st.dictionaries(NAMES | st.text(max_size=5), JSON, max_size=4))
def test_configs(values):
    try:
        built = config_lib.from_dict(values)
    except ConfigError as error:
        one_line(error)
        return
    numbers = [
        value
        for section in config_lib.to_dict(built).values()
        for value in section.values()
        if isinstance(value, float)
    ]
    assert all(map(math.isfinite, numbers))
    assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(built)))) == built


PARTS = st.sampled_from(
    [*recipes.ROLES, "@", "-", "=", ",", "0", "3", "9", "bf16", "current", " ", "x", "²"]
)


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
@given(
    st.binary(max_size=60)
    | st.text(max_size=40).map(str.encode)
    | JSON.map(lambda v: (json.dumps(v) + "\n").encode())
)
def test_logs(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    try:
        read_metrics(path)
    except MetricsError as error:
        one_line(error)


@pytest.mark.slow
@MANY
@given(
    st.binary(max_size=60)
    | (JSON | JSON.map(lambda v: {"content": v, "digest": v})).map(lambda v: json.dumps(v).encode())
)
def test_manifests(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp() / "fuzz_checkpoint"
    directory.mkdir(exist_ok=True)
    (directory / manifest.NAME).write_bytes(content)
    found = manifest.problem(directory)
    assert found is not None
    one_line(found)


FIELDS = st.sampled_from(
    [
        f"{section}.{name}"
        for section, fields in config_lib.to_dict(config_lib.Config()).items()
        for name in fields
    ]
)
TEXTS = st.text(max_size=9) | st.sampled_from(
    [
        "",
        "-1",
        "0",
        "1",
        "1e400",
        "nan",
        "None",
        "True",
        "[]",
        "{}",
        "a\nb",
        "../..",
        "x=1,y",
        "bf16",
        "9" * 400,
    ]
)


@pytest.mark.slow
@MANY
@given(
    st.lists(st.tuples(FIELDS | st.text(max_size=12), TEXTS), min_size=1, max_size=4),
    st.sampled_from(["tiny", "8b", "", "huge", "tiny:x"]),
)
def test_config_flags(pairs, size):
    """As on the command line: a config file, and --config.section.field=value."""
    try:
        values = config_files.read_config(
            "config",
            f"configs/fp8_base.py:{size}",
            [f"--config.{name}={value}" for name, value in pairs],
        )
        config_lib.from_dict(values)
    except ConfigError as error:
        one_line(error)


@pytest.mark.slow
@MANY
@given(st.data())
def test_configs_of_a_run(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz_run" / "config.json"
    path.parent.mkdir(exist_ok=True)
    values = config_lib.to_dict(config_lib.Config())
    path.write_bytes(
        data.draw(
            st.sampled_from(
                [altered, lambda data, values: damaged(data, json.dumps(values).encode())]
            )
        )(data, values)
    )
    try:
        load_config(path.parent)
    except ConfigError as error:
        one_line(error)
        assert str(path) in str(error)


@pytest.mark.slow
@MANY
@given(st.data())
def test_reports(tmp_path_factory, data):
    """A log and what lies beside it, altered: the page is made."""
    directory = tmp_path_factory.getbasetemp() / "fuzz_report"
    directory.mkdir(exist_ok=True)
    (directory / "report.npz").unlink(missing_ok=True)
    line = {
        "step": 10,
        "loss": 2.0,
        "step_seconds": 0.5,
        "held_out/loss": 3.0,
        "kurtosis/qkv_layers": [3.0, 4.0],
        "snr/q_layer001": 2,
    }
    event = {"step": 4, "kind": "early_warning", "level": "warn", "tensor": "qkv", "layer": 1}
    whole = {
        "metrics.jsonl": line,
        "events.jsonl": event,
        "eval.json": {"loss": 2.0, "bits_per_byte": 1.0},
        "run.json": {"fp8_share": 0.5},
        "config.json": config_lib.to_dict(config_lib.Config()),
    }
    for name, values in whole.items():
        content = data.draw(
            st.sampled_from(
                [
                    json.dumps(values).encode(),
                    altered(data, values),
                    damaged(data, json.dumps(values).encode()),
                ]
            )
        )
        (directory / name).write_bytes(content + b"\n" + json.dumps(values).encode() + b"\n")
    told = []
    for _ in range(2):
        page = report.write_report(
            [directory], directory / "report.html", remember=True, note=told.append
        )
        assert page.stat().st_size < 1e6
    for problem in told:
        one_line(problem)
