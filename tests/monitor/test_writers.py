"""Logs: strict JSON, exact continuation after a crash, files that TensorBoard reads."""

import json
import math

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator

from fp8jax.monitor import writers


def log(workdir, steps, start_step=0):
    with writers.MetricsWriter(workdir, start_step) as writer:
        for step in steps:
            writer.write(step, {"loss": 1 / step, "tokens": 100 * step})


def scalars(workdir, name):
    board = event_accumulator.EventAccumulator(str(workdir / "tensorboard"))
    board.Reload()
    return [(event.step, event.value) for event in board.Scalars(name)]


def test_lines_are_strict_json_with_step_first_and_on_disk_at_once(tmp_path):
    values = {
        "a": math.nan,
        "b": math.inf,
        "c": -math.inf,
        "d": 3,
        "e": jnp.float32(0.5),
        "f": np.int32(7),
    }
    with writers.MetricsWriter(tmp_path) as writer:
        writer.write(10, values)
        text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 10, "a": "nan", "b": "inf", "c": "-inf", "d": 3, "e": 0.5, "f": 7}\n'
    (record,) = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf
    assert type(record["d"]) is int and record["e"] == 0.5


def test_floats_come_back_bit_equal(tmp_path):
    value = float(np.float32(1) / 3)
    with writers.MetricsWriter(tmp_path) as writer:
        writer.write(1, {"loss": value, "tiny": 5e-324})
    assert writers.read_metrics(tmp_path / "metrics.jsonl") == [
        {"step": 1, "loss": value, "tiny": 5e-324}
    ]


def test_continued_log_equals_uninterrupted_one(tmp_path):
    log(tmp_path / "whole", [10, 20, 30, 40])
    log(tmp_path / "parts", [10, 20, 30])  # killed after 30, its last checkpoint at 20
    log(tmp_path / "parts", [30, 40], start_step=20)
    assert (tmp_path / "parts/metrics.jsonl").read_bytes() == (
        tmp_path / "whole/metrics.jsonl"
    ).read_bytes()
    assert [step for step, _ in scalars(tmp_path / "parts", "loss")] == [10, 20, 30, 40]
    assert sorted(path.name for path in (tmp_path / "parts").glob("*.tmp")) == []


def test_new_start_in_a_used_directory_drops_old_lines(tmp_path):
    log(tmp_path, [10, 20])  # killed before its first checkpoint
    log(tmp_path, [10])
    assert [record["step"] for record in writers.read_metrics(tmp_path / "metrics.jsonl")] == [10]


@pytest.mark.parametrize("torn", ['{"step": 30, "lo', "\0\0\0", "{"])
def test_torn_last_line_is_skipped_and_dropped(tmp_path, torn):
    log(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    with path.open("a") as file:
        file.write(torn)
    assert [record["step"] for record in writers.read_metrics(path)] == [10, 20]
    log(tmp_path, [30], start_step=20)
    assert [record["step"] for record in writers.read_metrics(path)] == [10, 20, 30]


def test_last_line_that_lacks_only_its_newline_is_kept(tmp_path):
    log(tmp_path, [10, 20])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().rstrip("\n"))
    log(tmp_path, [30], start_step=20)
    assert [record["step"] for record in writers.read_metrics(path)] == [10, 20, 30]


@pytest.mark.parametrize("bad", ["oops", "[1]", '{"loss": 1.0}', '{"step": "3"}', ""])
def test_bad_line_is_named(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{bad}\n{{"step": 3}}\n')
    with pytest.raises(writers.MetricsError, match=r"metrics\.jsonl, line 2: ") as error:
        writers.read_metrics(path)
    assert "\n" not in str(error.value)
    with pytest.raises(writers.MetricsError, match="line 2"):
        writers.MetricsWriter(tmp_path, 3)


def test_missing_log_is_named(tmp_path):
    with pytest.raises(writers.MetricsError, match=r"metrics\.jsonl: no such file"):
        writers.read_metrics(tmp_path / "metrics.jsonl")


def test_events_stay_when_a_run_continues(tmp_path):
    with writers.MetricsWriter(tmp_path) as writer:
        writer.event("early_warning", 30, tensor="qkv", layer=3, kurtosis=math.inf, layers=[1, 2])
    with (tmp_path / "events.jsonl").open("a") as file:
        file.write('{"step": 31, "ki')
    with writers.MetricsWriter(tmp_path, start_step=20) as writer:
        writer.event("restart", 20)
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert lines[0] == {
        "step": 30,
        "kind": "early_warning",
        "tensor": "qkv",
        "layer": 3,
        "kurtosis": "inf",
        "layers": [1, 2],
    }
    assert lines[1:] == [{"step": 20, "kind": "restart"}]
    assert writers.read_metrics(tmp_path / "events.jsonl")[0]["kurtosis"] == math.inf


def test_tensorboard_reads_the_values(tmp_path, capfd):
    with writers.MetricsWriter(tmp_path) as writer:
        writer.write(10, {"kurtosis/qkv_avg": 3.5, "fp8/saturated_fraction": math.nan})
        writer.write(20, {"kurtosis/qkv_avg": 4.5})
    assert scalars(tmp_path, "kurtosis/qkv_avg") == [(10, 3.5), (20, 4.5)]
    ((step, value),) = scalars(tmp_path, "fp8/saturated_fraction")
    assert step == 10 and math.isnan(value)
    assert "NaN" not in capfd.readouterr().err
