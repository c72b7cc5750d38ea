"""JSON from strangers: memory is bounded by what its values take, not by its bytes."""

import json
import resource
import subprocess
import sys

import pytest

from fp8jax import files
from fp8jax.config import ConfigError, read_json
from fp8jax.interop.hf_safetensors import HuggingFaceError, TensorFiles
from fp8jax.monitor.logs import MetricsError, read_metrics, tail


@pytest.mark.parametrize(
    "text",
    [
        "[" + "[]," * 19_000_000 + "[]]",
        '{"a": [' + "{}," * 5_000_000 + "0]}",
        "[" + "1," * 20_000_000 + "1]",
    ],
    ids=["lists", "objects", "numbers"],
)
def test_values_that_take_much_more_than_their_text_are_refused(text):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        files.TooManyValuesError, match="holds more values than 256 MiB of memory have room for"
    ):
        files.parse_json(text.encode())
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_text_may_hold_what_looks_like_values():
    text = "[{," * 4_000_000 + '\\"'
    assert files.parse_json(json.dumps({"text": text})) == {"text": text}


def test_the_bound_is_above_what_values_take():
    """In another process, whose memory is its own: lists, objects with a member, numbers."""
    for text, count in (("[]", 300_000), ('{"a":0.5}', 300_000), ("0.5", 1_000_000)):
        child = (
            "import json, resource, sys\ntext = '[' + ','.join([sys.argv[1]] * int(sys.argv[2])) + ']'\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nfound = json.loads(text)\n"
            "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)"
        )
        taken = int(
            subprocess.run(
                [sys.executable, "-I", "-c", child, text, str(count)],
                capture_output=True,
                check=True,
            ).stdout
        )
        assert taken <= files._memory(f"[{','.join([text] * count)}]".encode())


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"a":' * 100_000, "is nested too deeply"),
        (b'"\xff"', "is not UTF-8 at byte 1"),
        (b"{", "Expecting"),
        (b"", "Expecting value"),
    ],
)
def test_other_mistakes_are_one_line(content, words):
    with pytest.raises(ValueError, match=words) as caught:
        files.parse_json(content)
    assert "\n" not in str(caught.value)


def sparse(path, size=3 << 30):
    with path.open("wb") as file:
        file.truncate(size)
    return path


def test_sparse_files_of_gigabytes_are_not_read_whole(tmp_path):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(
        ConfigError, match=r"config.json: cannot be read as JSON: has more than 67108864 bytes"
    ):
        read_json(sparse(tmp_path / "config.json"))
    sparse(tmp_path / "model.safetensors.index.json")
    with pytest.raises(HuggingFaceError, match="index.json: has more than 67108864 bytes"):
        TensorFiles(tmp_path)
    for read in (read_metrics, lambda path: list(tail(path, entries=3))):
        with pytest.raises(MetricsError, match="line 1: not a JSON object"):
            read(sparse(tmp_path / "metrics.jsonl", 200 << 20))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600_000


def test_a_header_of_lists_is_refused(tmp_path):
    text = b'{"a":[' + b"[]," * 19_000_000 + b"0]}"
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(HuggingFaceError, match="holds more values than 512 MiB"):
        TensorFiles(tmp_path)
