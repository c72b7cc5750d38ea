"""What a manifest says of a directory: nothing while all is as written, and the first difference in one line."""

import json

import pytest

from fp8jax.training import manifest

FILES = {"a/data": bytes(range(256)) * 40, "b": b"short", "a/empty": b""}


@pytest.fixture
def directory(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    manifest.write(tmp_path, {"step": 20, "held_out_loss": 2.5})
    return tmp_path


def test_all_is_as_written(directory):
    assert manifest.problem(directory) is None
    assert (
        manifest.fact(directory, "step") == 20 and manifest.fact(directory, "held_out_loss") == 2.5
    )
    assert (
        manifest.fact(directory, "other") is None
        and manifest.fact(directory / "none", "step") is None
    )
    assert not list(directory.glob("*.tmp"))


def flip(path, at=1000):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "line"),
    [
        (lambda d: flip(d / "a" / "data"), "a/data is damaged"),
        (lambda d: flip(d / "b", 0), "b is damaged"),
        (lambda d: (d / "b").write_bytes(b"shor"), "b has 4 bytes, not 5"),
        (lambda d: (d / "a" / "empty").unlink(), "a/empty is missing"),
        (lambda d: (d / "more").write_bytes(b""), "more is not in MANIFEST.json"),
        (lambda d: (d / "MANIFEST.json").unlink(), "MANIFEST.json is missing"),
        (lambda d: (d / "MANIFEST.json").write_text("{"), "MANIFEST.json is damaged"),
        (lambda d: (d / "MANIFEST.json").write_text("[]"), "MANIFEST.json is damaged"),
    ],
)
def test_the_first_difference_is_named(directory, damage, line):
    damage(directory)
    assert manifest.problem(directory).startswith(line)


def test_facts_that_were_changed_are_seen(directory):
    path = directory / "MANIFEST.json"
    found = json.loads(path.read_text())
    found["content"]["step"] = 30
    path.write_text(json.dumps(found))
    assert manifest.problem(directory) == "MANIFEST.json is damaged: its digest differs"
