"""Tokenizers that break the library break a process of their own: one line, whatever they do to it."""

import json
import signal

import pytest

from fp8jax.config import ConfigError
from fp8jax.data import tokenizer, trial


@pytest.fixture(scope="module")
def values():
    return json.loads(tokenizer.train(["Sir Walter Elliot of Kellynch Hall"] * 9, 280))


def written(directory, values, **changes):
    path = directory / "tokenizer.json"
    path.write_text(json.dumps(values | changes))
    return str(path)


def split(pattern):
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    words = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [words, byte_level]}


def test_one_that_works_is_read(values, tmp_path):
    path = written(tmp_path, values)
    trial.run(path, ["Anne Elliot", "\0"])
    assert tokenizer.load(path).decode(tokenizer.load(path).encode("Anne")) == "Anne"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wEAAAA="}},
            "ends its process with SIGABRT",
        ),
        (
            {
                "normalizer": {
                    "type": "Replace",
                    "pattern": {"Regex": "a*"},
                    "content": "aa" * 1_000_000,
                }
            },
            "ends its process with SIGABRT",
        ),
        ({"pre_tokenizer": split("((((")}, "end pattern with unmatched parenthesis"),
        ({"pre_tokenizer": split(r"(a+)+(a+)+(a+)+(a+)+$b")}, "retry-limit-in-match over"),
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "PanicException"),
    ],
)
def test_what_breaks_the_library_is_one_line(values, tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        tokenizer.load(written(tmp_path, values, **changes))
    assert "\n" not in str(caught.value) and "tokenizer.json' is not a tokenizer.json: " in str(
        caught.value
    )


def test_what_never_ends_is_ended(values, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "SECONDS", 0.2)
    monkeypatch.setattr(trial, "_CHILD", "import time; time.sleep(60)")
    with pytest.raises(ValueError, match=r"takes more than 0\.2 seconds"):
        trial.run(written(tmp_path, values))


def test_a_signal_is_named(values, tmp_path, monkeypatch):
    monkeypatch.setattr(trial, "_CHILD", f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})")
    with pytest.raises(ValueError, match="ends its process with SIGSEGV"):
        trial.run(written(tmp_path, values))


def test_files_that_are_too_large_or_too_deep_are_not_read(tmp_path, monkeypatch):
    path = tmp_path / "tokenizer.json"
    with path.open("wb") as file:
        file.truncate(3 << 30)
    with pytest.raises(ConfigError, match="is not a tokenizer.json: has more than 268435456 bytes"):
        tokenizer.load(str(path))
    path.write_text(
        '{"normalizer": ' + '{"type": "Sequence", "normalizers": [' * 20000 + "]}" * 20000 + "}"
    )
    with pytest.raises(ConfigError, match="is nested too deeply"):
        tokenizer.load(str(path))
    path.write_text("[1]")
    with pytest.raises(ConfigError, match="is not a JSON object"):
        tokenizer.load(str(path))
