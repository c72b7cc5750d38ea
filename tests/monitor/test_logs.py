"""Logs as files: values of layers in arrays, old lines and new ones, and reading from the end of a long log."""

import json
import math
import os
import time
import tracemalloc

import numpy as np
import pytest

from fp8jax.config import WarningConfig
from fp8jax.monitor import gathered, layered, log_series, logs, report_data
from fp8jax.monitor.early_warning import EarlyWarning
from fp8jax.monitor.logs import MetricsError, cut, read_metrics, records, tail
from fp8jax.monitor.warning_actions import Reaction
from fp8jax.monitor.writers import MetricsWriter, Silent
from tests.monitor.made_up_logs import STANDS, bent, growing, log

TENSORS = [
    f"{statistic}/{tensor}"
    for statistic in ("kurtosis", "rms", "amax", "snr", "overflow", "entropy")
    for tensor in ("qkv", "q", "k", "mlp_down.x", "mlp_down.w", "attention_out.g")
]


@pytest.mark.parametrize(
    "values",
    [
        {
            "step": 3,
            "loss": 2.5,
            "kurtosis/qkv_avg": 3.2,
            "kurtosis/qkv_layer000": 3.1,
            "kurtosis/qkv_layer001": 3.3,
            "tokens": 7,
        },
        {
            "step": 3,
            "a_layer001": 1.0,
            "a_layer003": math.inf,
            "b_layer000": 0.0,
        },  # layers that have no value have no name either
        {
            "step": 3,
            "a_layer000": 1.0,
            "a_layers": [1.0],
            "a_layer1": 2.0,
            "a_layer0001": 3.0,
            "_layer000": 4.0,
        },
        {"step": 3, **{f"a_layer{layer:03d}": float(layer) for layer in range(1200)}},
    ],
)
def test_names_come_back_from_arrays(values):
    packed = layered.pack(values)
    assert sum(name.endswith(("_layer001", "_layer003")) for name in packed) == 0
    assert (
        dict(layered.unpack(packed)).items()
        >= {k: v for k, v in values.items() if k != "a_layers"}.items()
    )
    assert (
        list(layered.pack(layered.unpack(packed)).items()) == list(packed.items())
        or "a_layers" in values
    )


def test_statistics_are_logged_in_six_digits_and_scales_exactly():
    values = {
        "kurtosis/qkv_layer000": math.pi,
        "scale/qkv.x_layer000": 2.0**-13,
        "snr/qkv.x_avg": math.inf,
        "rms/q_avg": math.nan,
    }
    found = layered.rounded(values)
    assert found["kurtosis/qkv_layer000"] == 3.14159 and found["scale/qkv.x_layer000"] == 2.0**-13
    assert found["snr/qkv.x_avg"] == math.inf and math.isnan(found["rms/q_avg"])


def entry(step, layers, seed=None):
    random = np.random.default_rng(step if seed is None else seed)
    out = {"loss": 2.0 + 1 / step, "tokens": step * 100, "step_seconds": 0.5}
    for name in TENSORS:
        values = random.lognormal(size=layers)
        out |= {f"{name}_avg": float(values.mean())}
        out |= {f"{name}_layer{layer:03d}": float(value) for layer, value in enumerate(values)}
    return layered.rounded(out)


def test_a_line_has_a_fifth_of_what_it_had(tmp_path):
    values = entry(1, 80)
    with MetricsWriter(tmp_path) as writer:
        writer.write(1, values | {"amax/qkv_layer005": math.nan, "amax/q_layer007": -math.inf})
    line = (tmp_path / "metrics.jsonl").read_text()
    old = {
        name: value if name.startswith("tokens") else value * (1 + 1e-9)
        for name, value in values.items()
    }  # all their digits
    assert len(line) < len(json.dumps(old)) / 4
    assert json.loads(line, parse_constant=pytest.fail)["amax/qkv_layers"][5] == "nan"
    (read,) = read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read.pop("amax/qkv_layer005")) and read.pop("amax/q_layer007") == -math.inf
    assert read.items() <= ({"step": 1} | values).items() and len(read) == len(values) - 1


def write(path, steps, layers, packed, every=1):
    """A log as this version and as earlier ones wrote it."""
    with path.open("a") as file:
        for step in steps:
            values = {
                "step": step,
                **(
                    entry(step, layers, seed=step % 7)
                    if step % every == 0
                    else {"loss": 2.0 + 1 / step}
                ),
            }
            file.write(json.dumps(layered.pack(values) if packed else values) + "\n")


@pytest.mark.parametrize("packed", [False, True])
def test_a_tail_is_the_end_of_the_log(tmp_path, monkeypatch, packed):
    monkeypatch.setattr(logs, "_BLOCK", 1000)
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 61), 3, packed, every=5)
    whole = read_metrics(path)
    assert [record["step"] for record in whole] == list(range(1, 61)) and whole == list(
        records(path)
    )
    assert list(tail(path, entries=7)) == whole[-7:]
    assert list(tail(path, entries=7, last_step=50)) == whole[43:50]
    assert (
        list(tail(path, entries=7, statistics=3, last_step=50)) == whole[39:50]
    )  # steps 40, 45, 50
    assert list(tail(path, entries=1000)) == whole == list(tail(path, entries=1, statistics=13))
    assert list(tail(path, entries=3, last_step=0)) == []
    with path.open("a") as file:
        file.write('{"step": 61, "lo')
    assert list(tail(path, entries=2)) == whole[-2:]
    with path.open("a") as file:
        file.write("\n")
    with pytest.raises(MetricsError, match="line 61"):
        list(tail(path, entries=2))


@pytest.mark.parametrize(
    "line",
    ['{"step": ' + "9" * 5000 + "}", "{" * 100_000, '{"step": 1.5}', '{"step": -1', "\0" * 50],
)
def test_what_is_no_line_is_named_from_the_end_too(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n')
    for read in (lambda: list(tail(path, entries=5)), lambda: cut(path, 3)):
        with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 2: not a JSON object"):
            read()


@pytest.mark.parametrize("last", [0, 1, 29, 30, 59, 60, 99])
def test_what_follows_a_checkpoint_is_cut_off_in_place(tmp_path, monkeypatch, last):
    monkeypatch.setattr(logs, "_BLOCK", 100)
    path = tmp_path / "metrics.jsonl"
    write(path, range(1, 61), 1, True, every=4)
    kept = b"".join(path.read_bytes().splitlines(keepends=True)[:last])
    with path.open("ab") as file:
        file.write(b'{"step": 61, "l')
    inode = path.stat().st_ino
    cut(path, last)
    assert path.read_bytes() == kept and path.stat().st_ino == inode
    cut(path, last)
    assert path.read_bytes() == kept


@pytest.fixture(scope="module", params=[False, True], ids=["old", "new"])
def long_log(request, tmp_path_factory):
    """5 MB of statistics of 8 layers."""
    workdir = tmp_path_factory.mktemp("long")
    made = workdir / "part"
    write(made, range(1, 8), 8, request.param)
    lines = [line.partition(",")[2] for line in made.read_text().splitlines()]
    step = 0
    with (workdir / "metrics.jsonl").open("w") as file:
        while file.tell() < 5e6:
            step += 10
            file.write(f'{{"step": {step},{lines[step // 10 % 7]}\n')
    return workdir, step


def peak(work):
    """(What it returns, MB of memory at most.)"""
    tracemalloc.start()
    try:
        return work(), tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def test_a_resume_reads_the_end_of_a_long_log_alone(long_log):
    workdir, last = long_log
    path, before = workdir / "metrics.jsonl", os.stat(workdir / "metrics.jsonl").st_size
    read = []

    def resume():
        MetricsWriter(workdir, last - 20).close()
        watch = EarlyWarning.observe
        try:
            EarlyWarning.observe = lambda self, entry: read.append(entry["step"])
            return Reaction(WarningConfig(), workdir, last - 20, "")
        finally:
            EarlyWarning.observe = watch

    _, memory = peak(resume)
    assert read == list(range(last - 20 - 10 * (len(read) - 1), last - 19, 10)) and len(read) == 152
    assert memory < 5 and before - 60_000 < path.stat().st_size < before


def test_a_report_of_a_long_log_takes_memory_that_does_not_grow_with_it(long_log, tmp_path):
    workdir, _ = long_log
    short, memory_of_short = peak(lambda: report_data.read_run(workdir, cells=10**6))
    text = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    step = json.loads(text[-1])["step"]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for again in range(2):
            file.writelines(
                f'{{"step": {again * step + 10 * number},{line.partition(",")[2]}'
                for number, line in enumerate(text, 1)
            )
    del text
    long, memory = peak(lambda: report_data.read_run(tmp_path, cells=10**6))
    assert memory < 1.2 * memory_of_short + 1
    assert long["series"]["loss"]["to"][-1] == 2 * short["series"]["loss"]["to"][-1]
    assert long["seconds"] == pytest.approx(2 * short["seconds"])
    assert set(long["maps"]["kurtosis"]) == {
        name.partition("/")[2] for name in TENSORS if name.startswith("kurtosis")
    }


def test_a_report_that_is_kept_up_to_date_reads_what_is_new(tmp_path, monkeypatch):
    """And shows what one that reads everything shows, also where the log was cut off meanwhile."""
    path, read = tmp_path / "metrics.jsonl", []
    whole_lines = gathered.ended_lines

    def counted(path, *more):
        for end, record in whole_lines(path, *more):
            read.append(record["step"])
            yield end, record

    monkeypatch.setattr(log_series, "FINE_MAP", 8)
    monkeypatch.setattr(log_series, "FINE", 16)
    monkeypatch.setattr(gathered, "ended_lines", counted)
    for first, last in ((1, 40), (41, 41), (42, 110)):
        write(path, range(first, last + 1), 3, True, every=2)
        read.clear()
        kept = report_data.read_run(tmp_path, cells=10**6, remember=True)
        assert read == list(range(first, last + 1))
        assert kept == report_data.read_run(tmp_path, cells=10**6)
    with path.open("a") as file:
        file.write('{"step": 111, "loss": 1.0}')  # its newline comes later
    assert report_data.read_run(tmp_path, cells=10**6, remember=True) == kept
    with path.open("a") as file:
        file.write("\n")
    assert (
        report_data.read_run(tmp_path, cells=10**6, remember=True)["series"]["loss"]["to"][-1]
        == 111
    )
    cut(path, 90)
    write(path, range(91, 100), 2, True)
    read.clear()
    assert report_data.read_run(tmp_path, cells=10**6, remember=True) == report_data.read_run(
        tmp_path, cells=10**6
    )
    assert read == 2 * list(range(1, 100))
    (tmp_path / "report.npz").write_bytes(b"PK damaged")
    assert (
        report_data.read_run(tmp_path, cells=10**6, remember=True)["series"]["loss"]["to"][-1] == 99
    )


def test_buckets_of_a_long_series_hold_what_the_steps_between_held():
    """Far more entries than buckets are kept for: each result lies within what its steps had, and nothing is lost."""
    random = np.random.default_rng(0)
    count, layers = 11_417, 3
    values = random.normal(size=(count, layers)).cumsum(0)
    values[[5, 9_000], 1] = np.nan
    line, table = log_series.Line(), log_series.Table()
    for step, row in enumerate(values, 1):
        line.add(step, row[1])
        table.add(step, np.arange(layers), row)
    found = line.reduced(600)
    assert (
        500 <= len(found["to"]) <= 600
        and found["from"][0] == 1
        and found["to"][-1] == count
        and sum(found["bad"]) == 2
    )
    assert found["from"][1:] == [step + 1 for step in found["to"][:-1]]
    for first, last, low, high, end in zip(
        *(found[name] for name in ("from", "to", "min", "max", "last")), strict=True
    ):
        some = values[first - 1 : last, 1]
        known = some[np.isfinite(some)]
        assert (low, high, end) == pytest.approx(
            (known.min(), known.max(), known[-1]), rel=1e-5, abs=1e-5
        )
    whole = table.reduced(240, smallest=False)
    assert 200 <= len(whole["to"]) <= 240 and whole["to"][-1] == count
    assert whole["from"][1:] == [step + 1 for step in whole["to"][:-1]]
    assert (whole["low"], whole["high"]) == pytest.approx(
        (max(whole["low"], np.nanmin(values)), np.nanmax(values))
    )


@pytest.mark.parametrize(
    "series",
    [
        {"q": growing(3)} | STANDS,
        {"loss": bent(450)} | {"q": growing(1, 2, 3)},
        {"grad_norm": lambda step: 9.0 if step % 250 == 7 else 0.8},
        {"snr": lambda step, layer: max(31.5 - step / 60, 2.0)} | STANDS,
    ],
)
def test_a_continued_run_warns_as_one_that_was_never_stopped(tmp_path, series):
    """Replaying the end of a log is enough, wherever the run was stopped."""
    with MetricsWriter(tmp_path) as writer:
        for values in log(steps=600, **series):
            writer.write(values.pop("step"), layered.rounded(values))
    entries, never = (
        read_metrics(tmp_path / "metrics.jsonl"),
        Reaction(WarningConfig(), tmp_path, 0, ""),
    )
    said = {
        entry["step"]: [alarm.text() for alarm in never._watch.observe(entry)] for entry in entries
    }
    for stop in (501, 555, 590):
        continued = Reaction(WarningConfig(), tmp_path, stop, "")
        assert {
            entry["step"]: [alarm.text() for alarm in continued._watch.observe(entry)]
            for entry in entries[stop:]
        } == {step: lines for step, lines in said.items() if step > stop}


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_a_gigabyte(tmp_path, packed):
    """A resume takes seconds and less than 100 MB, a report less than 100 MB."""
    write(tmp_path / "part", range(1, 8), 80, packed)
    lines = [line.partition(",")[2] for line in (tmp_path / "part").read_text().splitlines()]
    step, path = 0, tmp_path / "metrics.jsonl"
    with path.open("w") as file:
        while file.tell() < 1e9:
            step += 10
            file.write(f'{{"step": {step},{lines[step // 10 % 7]}\n')
    began = time.monotonic()
    _, memory = peak(
        lambda: (
            MetricsWriter(tmp_path, step - 1000).close(),
            Reaction(WarningConfig(), tmp_path, step - 1000, ""),
        )
    )
    assert memory < 100 and time.monotonic() - began < 60
    run, memory = peak(lambda: report_data.read_run(tmp_path, cells=10**6))
    assert memory < 100 and run["series"]["loss"]["to"][-1] == step - 1000
    path.unlink()


def test_the_other_processes_write_nothing():
    with Silent() as silent:
        silent.write(1, {})
