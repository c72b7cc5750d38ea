"""The page of all fields: it is what the code says, and a page that is not is found."""

import importlib.util
import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location(
    "config_reference", ROOT / "tools" / "config_reference.py"
)
config_reference = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(config_reference)


def check(monkeypatch, page):
    monkeypatch.setattr(config_reference, "PAGE", page)
    monkeypatch.setattr(sys, "argv", ["config_reference.py", "--check"])
    return config_reference.main()


def test_this_checkout_passes(monkeypatch):
    assert check(monkeypatch, config_reference.PAGE) == 0


def test_a_field_that_has_changed_is_found(monkeypatch, tmp_path):
    text = config_reference.PAGE.read_text()
    assert text.count("| `kv_heads` | `1` |") == 1
    (tmp_path / "page.md").write_text(text.replace("| `kv_heads` | `1` |", "| `kv_heads` | `2` |"))
    assert check(monkeypatch, tmp_path / "page.md") == 1


def test_a_page_that_is_not_there_is_found(monkeypatch, tmp_path):
    assert check(monkeypatch, tmp_path / "page.md") == 1
