"""Every kind of damage to every file of the newest checkpoint is seen, and the run goes on from the one before."""

import hashlib
import json
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.training import manifest
from fp8jax.training.checkpoint import CheckpointError, Checkpoints
from tests.helpers.runs import logged, micro, saved, train


def state(step):
    return {
        "params": {"w": jnp.arange(100.0) + step, "b": jnp.ones(3, jnp.bfloat16)},
        "counters": {"step": jnp.int32(step)},
    }


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("template")
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, state(step), {"step": step})
    return workdir


def truncate(path: pathlib.Path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: pathlib.Path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def every_file(directory):
    return sorted(path.relative_to(directory) for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize(
    "damage",
    [truncate, flip, pathlib.Path.unlink, lambda path: path.with_name("more").touch()],
    ids=["truncated", "flipped", "deleted", "added"],
)
def test_every_damage_is_seen(template, tmp_path, damage):
    newest = template / "checkpoints" / "20"
    files = every_file(newest)
    assert len(files) >= 4
    for number, file in enumerate(files):
        workdir = tmp_path / str(number)
        shutil.copytree(template, workdir)
        target = workdir / "checkpoints" / "20" / file
        empty = target.stat().st_size == 0
        if damage in (truncate, flip) and empty:
            continue
        damage(target)
        checkpoints = Checkpoints(workdir)
        found, passed = checkpoints.newest()
        assert found == 10 and list(passed) == [20] and "\n" not in passed[20], file
        if damage is not pathlib.Path.unlink or file.name != manifest.NAME:
            with pytest.raises(CheckpointError, match="cannot be trusted"):
                checkpoints.restore(20, {})


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A directory of files of no, one, several and many chunks, of 4 KiB here, with its manifest."""
    monkeypatch.setattr(manifest, "_CHUNK", 4096)
    monkeypatch.setattr(manifest, "_PIECE", 1000)
    for number, size in enumerate((0, 1, 4096, 4097, 50_000)):
        (tmp_path / f"file{number}").write_bytes(np.random.default_rng(number).bytes(size))
    manifest.write(tmp_path, {"step": 3})
    return tmp_path


def test_damage_is_seen_in_every_chunk_of_a_file(files):
    assert manifest.problem(files) is None and manifest.fact(files, "step") == 3
    path = files / "file4"
    content = path.read_bytes()
    for position in range(0, len(content), 997):
        path.write_bytes(
            content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        )
        assert manifest.problem(files) == "file4 is damaged: its digest differs", position
    path.write_bytes(content[4096:8192] + content[:4096] + content[8192:])
    assert (
        manifest.problem(files) == "file4 is damaged: its digest differs"
    )  # chunks in another order


def test_processes_share_the_reading_and_miss_nothing(files):
    for number in range(1, 5):
        path = files / f"file{number}"
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found = [manifest.problem(files, (process, 3)) for process in range(3)]
        assert [reason for reason in found if reason] == [
            f"file{number} is damaged: its digest differs"
        ]
        path.write_bytes(content)


def test_checkpoints_of_earlier_versions_are_still_checked(files):
    """Their manifests name no hash: BLAKE2 of whole files."""
    content = {
        "step": 3,
        "files": {
            path.name: [
                path.stat().st_size,
                hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest(),
            ]
            for path in files.iterdir()
            if path.name != manifest.NAME
        },
    }
    digest = hashlib.blake2b(
        json.dumps(content, sort_keys=True).encode(), digest_size=16
    ).hexdigest()
    (files / manifest.NAME).write_text(json.dumps({"content": content, "digest": digest}))
    assert manifest.problem(files) is None
    flip(files / "file4")
    assert manifest.problem(files) == "file4 is damaged: its digest differs"


def test_a_flip_anywhere_in_the_manifest_is_seen(template, tmp_path):
    shutil.copytree(template, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "20" / manifest.NAME
    content = path.read_bytes()
    for position in range(0, len(content), 7):
        changed = bytearray(content)
        changed[position] ^= 4
        path.write_bytes(changed)
        try:
            same = json.loads(changed) == json.loads(content)  # a change of white space is none
        except ValueError:
            same = False
        assert (manifest.problem(path.parent) is None) == same, position


def test_the_run_continues_from_the_checkpoint_before(tmp_path, capsys):
    """And ends as if nothing had happened; the damaged one is kept under another name."""
    config = micro(training={"steps": 6}, checkpoint={"every": 2, "keep": 3})
    assert train(config, tmp_path / "whole") == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    for path in (tmp_path / "damaged" / "checkpoints" / "6").rglob("d/*"):
        flip(path)
    assert train(config, tmp_path / "damaged") == 0
    assert "checkpoint of step 6 passed over" in capsys.readouterr().out
    assert (tmp_path / "damaged" / "checkpoints" / "damaged-6").is_dir()
    assert (tmp_path / "damaged" / "checkpoints" / "6" / manifest.NAME).exists()
    whole, damaged = (saved(config, tmp_path / name)[0] for name in ("whole", "damaged"))
    for name, array in whole.items():
        assert array.tobytes() == damaged[name].tobytes(), name
    assert logged(tmp_path / "whole")[-1] == logged(tmp_path / "damaged")[-1]


def test_nothing_but_damage_is_refused(template, tmp_path):
    """Training from scratch in its place would be lost work that nobody asked for."""
    config = micro(training={"steps": 2})
    assert train(config, tmp_path) == 0
    for path in (tmp_path / "checkpoints").rglob("d/*"):
        truncate(path)
    with pytest.raises(CheckpointError, match="no checkpoint is undamaged .*--workdir"):
        train(config, tmp_path)


def test_kept_for_good(tmp_path):
    with Checkpoints(tmp_path, keep=2, keep_every=20) as checkpoints:
        for step in range(10, 80, 10):
            checkpoints.save(step, state(step), {})
        checkpoints.wait()
        assert checkpoints.steps() == [20, 40, 60, 70]
        assert checkpoints.newest() == (70, {})


def test_the_best_is_kept(tmp_path):
    """By held-out loss, also over a restart; a loss that is none counts for nothing, nor does a checkpoint without one."""
    losses = {10: 3.0, 20: 2.5, 30: float("nan"), 40: None, 50: 2.7, 60: 2.9}
    for step, loss in losses.items():
        with Checkpoints(tmp_path, keep=1, keep_best=1) as checkpoints:
            checkpoints.save(step, state(step), {}, held_out_loss=loss)
    assert Checkpoints(tmp_path).steps() == [20, 60]
    assert manifest.fact(tmp_path / "checkpoints" / "20", "held_out_loss") == 2.5
