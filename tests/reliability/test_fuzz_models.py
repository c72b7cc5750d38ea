"""Model directories and tokenizers by anyone: read, or refused in one line, in bounded memory."""

import json
import math
import pathlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fp8jax.config import ConfigError
from fp8jax.data import tokenizer
from fp8jax.interop import hf_config
from fp8jax.interop.hf_safetensors import HuggingFaceError, TensorFiles
from tests.reliability.fuzzing import CASES, MANY, WILD, altered, damaged, one_line

pytestmark = pytest.mark.usefixtures("little_memory")


HEADER = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "__metadata__": {"format": "pt"},
}
MODEL = {
    "model_type": "llama",
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_theta": 1e4,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


@pytest.mark.slow
@MANY
@given(st.data(), st.booleans())
def test_safetensors(tmp_path_factory, data, whole):
    """Headers that were altered, and whole files that were damaged; then every tensor is read."""
    directory = tmp_path_factory.getbasetemp() / "fuzz_safetensors"
    directory.mkdir(exist_ok=True)
    text = json.dumps(HEADER).encode() if whole else altered(data, HEADER)
    content = len(text).to_bytes(8, "little") + text + bytes(32)
    (directory / "model.safetensors").write_bytes(damaged(data, content) if whole else content)
    try:
        files = TensorFiles(pathlib.Path(directory))
        for name, entry in files.entries.items():
            assert math.prod(entry.shape) <= 32
            files.read(name)
    except HuggingFaceError as error:
        one_line(error)


@pytest.mark.slow
@MANY
@given(st.data())
def test_safetensors_indexes(tmp_path_factory, data):
    """What an index may name is beside it."""
    directory = tmp_path_factory.getbasetemp() / "fuzz_index"
    directory.mkdir(exist_ok=True)
    files = (
        st.sampled_from(
            [
                "model-1.safetensors",
                "../model.safetensors",
                "/etc/passwd",
                "a\\b.safetensors",
                "",
                ".",
                "x.bin",
            ]
        )
        | WILD
    )
    index = {
        "metadata": {"total_size": 32},
        "weight_map": {"a": data.draw(files), "b": data.draw(files)},
    }
    (directory / "model.safetensors.index.json").write_bytes(
        altered(data, index) if data.draw(st.booleans()) else json.dumps(index).encode()
    )
    with pytest.raises(HuggingFaceError) as caught:
        TensorFiles(directory)
    one_line(caught.value)
    assert "root:" not in str(caught.value)


@pytest.mark.slow
@MANY
@given(st.data())
def test_model_configs(data):
    try:
        model, _ = hf_config.from_config(json.loads(altered(data, MODEL)))
    except HuggingFaceError as error:
        one_line(error)
        return
    assert (
        model.layers <= 10_000 and model.vocab_size <= 1 << 24
    )  # what is made for each of them stays small


@pytest.fixture(scope="module")
def tokenizer_file():
    return tokenizer.train(
        ["Sir Walter Elliot of Kellynch Hall in Somersetshire was a man who for his own amusement"]
        * 9,
        300,
    )


@pytest.mark.slow
@settings(MANY, max_examples=CASES // 3)
@given(st.data())
def test_tokenizer_files(tokenizer_file, tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz_tokenizer.json"
    values = json.loads(tokenizer_file)
    tekken = {
        "config": {"pattern": ".", "default_vocab_size": 258, "default_num_special_tokens": 2},
        "vocab": [{"token_bytes": "QQ=="}, {"token_bytes": "Qg=="}] * 128,
    }
    kind = data.draw(st.sampled_from(["altered", "damaged", "tekken"]))
    path.write_bytes(
        damaged(data, tokenizer_file.encode())
        if kind == "damaged"
        else altered(data, values if kind == "altered" else tekken)
    )
    tokenizer.load.cache_clear()
    try:
        loaded = tokenizer.load(str(path))
        assert loaded.vocab_size <= 1 << 24 and len(loaded.token_bytes) >= loaded.vocab_size
    except ConfigError as error:
        one_line(error)
