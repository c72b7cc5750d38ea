"""Preparing by several workers, interrupted, killed, continued; directories that are finished; very many parts."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from fp8jax import config as configs
from fp8jax.data import documents, part_workers, prepare, shards
from tests.data.raw_text import TEXTS, files, lines


def test_workers_and_interruptions_do_not_change_a_byte(tmp_path, small_parts, bpe, monkeypatch):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS * 3))
    arguments = dict(tokenizer=bpe, validation_fraction=0.1)
    prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "one", **arguments)
    # The parts' size is patched in this process alone, and this process cuts the parts.
    prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "two", workers=2, **arguments)
    assert files(tmp_path / "one") == files(tmp_path / "two") and len(files(tmp_path / "one")) > 20

    made, original = [], part_workers.make

    def interrupted(job, number, part, progress):
        if len(made) == 5:
            (job.directory / f"train_{number:05d}.bin.123.partial").write_bytes(b"half")
            raise KeyboardInterrupt
        made.append(number)
        original(job, number, part, progress)

    monkeypatch.setattr(part_workers, "make", interrupted)
    for _ in range(2):
        made.clear()
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "three", **arguments)
        assert not (tmp_path / "three" / "index.json").exists()
    assert made[0] == 5
    with pytest.raises(
        configs.ConfigError, match="unfinished preparation of other inputs or options"
    ):
        prepare.prepare(
            [tmp_path / "a.jsonl"], tmp_path / "three", tokenizer=bpe, validation_fraction=0.2
        )
    monkeypatch.setattr(part_workers, "make", original)
    (tmp_path / "three" / "train_00003.bin").write_bytes(b"torn")
    prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "three", **arguments)
    assert files(tmp_path / "one") == files(tmp_path / "three")


def test_workers_tell_bad_lines_too(tmp_path, small_parts):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS * 2) + b"{}\n" + lines(TEXTS))
    with pytest.raises(
        configs.ConfigError,
        match=r"a\.jsonl: line 131 is not a JSON object with a string field 'text'",
    ):
        prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "out", workers=2)


def test_a_finished_directory_is_left_alone(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines(TEXTS))
    first = prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "out")
    before = files(tmp_path / "out")
    assert (
        prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "out") == first
        and files(tmp_path / "out") == before
    )
    with pytest.raises(
        configs.ConfigError, match="already holds index.json of other inputs or options"
    ):
        prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "out", validation_fraction=0.5)


def test_kill_in_the_middle_and_run_again(tmp_path):
    rows = lines([f"{n} " + "Anne Elliot " * 500 for n in range(6000)])
    (tmp_path / "a.jsonl").write_bytes(rows)  # 36 MB: three parts
    arguments = [
        sys.executable,
        "-m",
        "fp8jax",
        "prepare",
        "--input",
        str(tmp_path / "a.jsonl"),
        "--workers",
        "2",
    ]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    killed = subprocess.Popen(
        [*arguments, "--out", str(tmp_path / "killed")], env=environment, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob("*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "killed" / "index.json").exists()
    prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "whole")
    prepare.prepare([tmp_path / "a.jsonl"], tmp_path / "killed")
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_the_index_does_not_grow_with_the_input_files(tmp_path):
    sizes = []
    for count in (10, 200):
        folder = tmp_path / f"in{count}"
        folder.mkdir()
        for number in range(count):
            (folder / f"{number:04d}.jsonl").write_bytes(lines([f"text {number}", "more"]))
        prepare.prepare([folder], tmp_path / f"out{count}")
        sizes.append((tmp_path / f"out{count}" / "index.json").stat().st_size)
        listed = [
            json.loads(line)
            for line in (tmp_path / f"out{count}" / "sources.jsonl").read_text().splitlines()
        ]
        assert len(listed) == shards.read_index(tmp_path / f"out{count}")["source_files"] == count
        assert [entry["documents"] for entry in listed] == [2] * count
    assert sizes[1] < sizes[0] + 100


def test_a_petabyte_has_no_more_parts_than_a_process_may_map(monkeypatch):
    def pieces(path, part_bytes):
        return [
            documents.Piece(path, number, number + 1, part_bytes)
            for number in range(-(-(1 << 50) // part_bytes))
        ]

    monkeypatch.setattr(documents, "stat", lambda path: (1 << 50, 0))
    monkeypatch.setattr(documents, "pieces", pieces)
    assert 8000 < len(prepare.cut_into_parts(["a.jsonl"], 0.0)) <= 1 << 14


def test_an_input_changed_in_place_is_not_passed_over(tmp_path):
    text = tmp_path / "a.jsonl"
    text.write_bytes(lines(["one", "two", "three"]))
    prepare.prepare([text], tmp_path / "out", validation_fraction=0.4)
    os.utime(text, ns=(1, 1))
    prepare.prepare([text], tmp_path / "out", validation_fraction=0.4)  # touched alone
    text.write_bytes(lines(["one", "owt", "three"]))
    with pytest.raises(configs.ConfigError, match="a.jsonl: has changed since .*out was prepared"):
        prepare.prepare([text], tmp_path / "out", validation_fraction=0.4)
