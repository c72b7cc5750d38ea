"""What tests of preparing share: small parts, and a trained tokenizer."""

import pytest

from fp8jax.data import prepare, sources, tokenizer


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(prepare, "PART_BYTES", (1000, 1 << 30))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """The path of a trained tokenizer."""
    pytest.importorskip("tokenizers")
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    path.write_text(
        tokenizer.train([sources.embedded_documents("held_out")[0][:50_000].decode()], 400)
    )
    return str(path)
