"""Made-up input: only the documented errors, in one line, without a hang and without much memory. Over 40,000 cases."""

import bz2
import contextlib
import datetime
import gzip
import io
import json
import lzma
import math
import os
import pathlib
import resource
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fp8jax import config as config_lib
from fp8jax.cli import flags, prepare
from fp8jax.config import ConfigError
from fp8jax.data import documents, megatron, pipeline, shards, token_records, tokenizer
from fp8jax.data import tables as table_reader
from fp8jax.interop import hf_config
from fp8jax.interop.hf_safetensors import HuggingFaceError, TensorFiles
from fp8jax.monitor import report
from fp8jax.monitor.writers import MetricsError, read_metrics
from fp8jax.numerics import recipes
from fp8jax.training import manifest
from fp8jax.training.checkpoint import load_config
from tests.helpers.megatron import write as write_megatron

# Ten seconds a case are a hang.
CASES = int(os.environ.get("FP8JAX_FUZZ_CASES", "3000"))
MANY = settings(
    max_examples=CASES,
    deadline=datetime.timedelta(seconds=10),
    suppress_health_check=list(HealthCheck),
)
NAMES = st.sampled_from(
    sorted(
        {
            name
            for section in config_lib.to_dict(config_lib.Config()).items()
            for name in (section[0], *section[1])
        }
    )
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(NAMES | st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=12,
)


# Numbers that break what trusts them.
WILD = st.sampled_from(
    [
        -1,
        0,
        1,
        2**31,
        2**63,
        2**64,
        10**30,
        10**400,
        -(10**400),
        1e308,
        math.inf,
        math.nan,
        True,
        None,
        "",
        "1",
        [],
        {},
    ]
)


def one_line(error):
    assert str(error) and "\n" not in str(error) and len(str(error)) < 3000


@pytest.fixture(autouse=True)
def little_memory():
    """At most 1 GB more than before, whatever the cases claim to hold."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1_000_000


def damaged(data, content):
    """Bytes with one to four of them changed, cut out, or put in; or cut off."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        kind = data.draw(st.sampled_from(["change", "cut out", "put in", "cut off"]))
        if kind == "change" and content:
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "cut out":
            del content[at : at + data.draw(st.integers(1, 9))]
        elif kind == "put in":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        else:
            del content[at:]
    return bytes(content)


def altered(data, values):
    """JSON values of which one or two, anywhere, are replaced, removed or added to."""
    values = json.loads(json.dumps(values))
    for _ in range(data.draw(st.integers(1, 2))):
        here = values
        while True:
            key = data.draw(
                st.sampled_from(sorted(here) if isinstance(here, dict) else range(len(here)))
            )
            if (
                not (isinstance(here[key], dict | list) and here[key])
                or data.draw(st.integers(0, 3)) == 0
            ):
                break
            here = here[key]
        if data.draw(st.booleans()) and isinstance(here, dict):
            here[data.draw(st.text(max_size=5))] = here.pop(key)
        else:
            here[key] = data.draw(WILD | JSON)
        if not values:
            break
    return json.dumps(values).encode()


@pytest.mark.slow
@MANY
@given(st.dictionaries(NAMES | st.text(max_size=5), JSON, max_size=4))
def test_configs(values):
    try:
        built = config_lib.from_dict(values)
    except ConfigError as error:
        one_line(error)
        return
    numbers = [
        value
        for section in config_lib.to_dict(built).values()
        for value in section.values()
        if isinstance(value, float)
    ]
    assert all(map(math.isfinite, numbers))
    assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(built)))) == built


PARTS = st.sampled_from(
    [*recipes.ROLES, "@", "-", "=", ",", "0", "3", "9", "bf16", "current", " ", "x", "²"]
)


@pytest.mark.slow
@MANY
@given(st.lists(PARTS, max_size=8).map("".join))
def test_overrides(text):
    try:
        found = recipes.parse_overrides(text, layers=4)
    except ValueError as error:
        one_line(error)
        return
    assert all(0 <= override.first <= override.last < 4 for override in found)


@pytest.mark.slow
@MANY
@given(
    st.binary(max_size=60)
    | st.text(max_size=40).map(str.encode)
    | JSON.map(lambda v: (json.dumps(v) + "\n").encode())
)
def test_logs(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_bytes(content)
    try:
        read_metrics(path)
    except MetricsError as error:
        one_line(error)


@pytest.mark.slow
@MANY
@given(
    st.binary(max_size=60)
    | (JSON | JSON.map(lambda v: {"content": v, "digest": v})).map(lambda v: json.dumps(v).encode())
)
def test_manifests(tmp_path_factory, content):
    directory = tmp_path_factory.getbasetemp() / "fuzz_checkpoint"
    directory.mkdir(exist_ok=True)
    (directory / manifest.NAME).write_bytes(content)
    found = manifest.problem(directory)
    assert found is not None
    one_line(found)


FIELDS = st.sampled_from(
    [
        f"{section}.{name}"
        for section, fields in config_lib.to_dict(config_lib.Config()).items()
        for name in fields
    ]
)
TEXTS = st.text(max_size=9) | st.sampled_from(
    [
        "",
        "-1",
        "0",
        "1",
        "1e400",
        "nan",
        "None",
        "True",
        "[]",
        "{}",
        "a\nb",
        "../..",
        "x=1,y",
        "bf16",
        "9" * 400,
    ]
)


@pytest.mark.slow
@MANY
@given(
    st.lists(st.tuples(FIELDS | st.text(max_size=12), TEXTS), min_size=1, max_size=4),
    st.sampled_from(["tiny", "8b", "", "huge", "tiny:x"]),
)
def test_config_flags(pairs, size):
    """As on the command line: a config file, and --config.section.field=value."""
    try:
        values = flags.read_config(
            "config",
            f"configs/fp8_base.py:{size}",
            [f"--config.{name}={value}" for name, value in pairs],
        )
        config_lib.from_dict(values)
    except ConfigError as error:
        one_line(error)


@pytest.mark.slow
@MANY
@given(st.data())
def test_configs_of_a_run(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz_run" / "config.json"
    path.parent.mkdir(exist_ok=True)
    values = config_lib.to_dict(config_lib.Config())
    path.write_bytes(
        data.draw(
            st.sampled_from(
                [altered, lambda data, values: damaged(data, json.dumps(values).encode())]
            )
        )(data, values)
    )
    try:
        load_config(path.parent)
    except ConfigError as error:
        one_line(error)
        assert str(path) in str(error)


@pytest.fixture(scope="module")
def token_directory(tmp_path_factory):
    byte, directory = tokenizer.load("byte"), tmp_path_factory.mktemp("tokens")
    texts = [
        byte.encode(text)
        for text in (
            "Sir Walter Elliot,",
            "of Kellynch Hall,",
            "in Somersetshire,",
            "was a man who,",
        )
    ]
    shards.write_shards(directory, byte, {"train": texts, "held_out": texts[:1]}, shard_tokens=30)
    return directory


@pytest.mark.slow
@MANY
@given(st.data(), st.sampled_from(["fail", "skip"]))
def test_token_files(token_directory, tmp_path_factory, data, policy):
    """Index and shards, altered or damaged, then read to the end, looked at and verified."""
    directory = tmp_path_factory.getbasetemp() / "fuzz_tokens"
    shutil.rmtree(directory, ignore_errors=True)
    shutil.copytree(token_directory, directory)
    path = directory / data.draw(
        st.sampled_from(
            ["index.json", "index.json", *(file.name for file in sorted(token_directory.iterdir()))]
        )
    )
    content = path.read_bytes()
    path.write_bytes(
        altered(data, json.loads(content))
        if path.suffix == ".json" and data.draw(st.booleans())
        else damaged(data, content)
    )
    config = config_lib.from_dict(
        {
            "data": {
                "source": str(directory),
                "sequence_length": 8,
                "read_threads": 0,
                "on_fault": policy,
            },
            "training": {"batch_size": 2},
        }
    )
    try:
        batches = pipeline.train_batches(config)
        for step in range(6):
            assert batches[step]["inputs"].max() < 257
        list(pipeline.held_out_batches(config, 2))
    except ConfigError as error:
        one_line(error)
        assert str(directory) in str(error)
    with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):
        assert prepare.main(["inspect", str(directory), "--verify"]) in (0, 2)


def tables(directory):
    """Files of tables and of records, as other programs write them: name → bytes."""
    pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table(
        {
            "text": [f"Sir Walter Elliot {number} é" for number in range(50)],
            "ids": [[number, 2] for number in range(50)],
        }
    )
    parquet.write_table(table, directory / "a.parquet", row_group_size=20)
    parquet.write_table(table, directory / "b.parquet", compression="zstd", use_dictionary=["text"])
    with pa.ipc.new_file(directory / "c.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=20)
    with pa.ipc.new_stream(directory / "d.arrow", table.schema) as writer:
        writer.write_table(table)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Files of documents of every kind: name → bytes."""
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(
        json.dumps({"text": f"Kellynch Hall {number} é", "n": number}) + "\n"
        for number in range(40)
    ).encode()
    plain = {"a.jsonl": lines, "a.txt": "Sir Walter Elliot é\n".encode() * 40}
    compress = {
        "gz": gzip.compress,
        "bz2": bz2.compress,
        "xz": lzma.compress,
        "zst": zstandard.compress,
    }
    packed = {
        f"{name}.{suffix}": function(content)
        for name, content in plain.items()
        for suffix, function in compress.items()
    }
    return plain | packed | tables(tmp_path_factory.mktemp("tables"))


DAMAGE = st.lists(
    st.tuples(
        st.sampled_from(["change", "cut out", "put in", "cut off"]),
        st.integers(0, 1 << 20),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)


def changed(content, damage):
    """As `damaged`, with all that is to be done given beforehand."""
    content = bytearray(content)
    for kind, place, more in damage:
        at = place % max(len(content), 1)
        if kind == "cut off":
            del content[at:]
        else:
            content[at : at + {"change": 1, "cut out": len(more), "put in": 0}[kind]] = (
                b"" if kind == "cut out" else more
            )
    return bytes(content)


@pytest.mark.slow
@MANY
@given(number=st.integers(0, 99), damage=DAMAGE, tolerant=st.booleans())
def test_documents(texts, tmp_path_factory, number, damage, tolerant):
    """Files of text, damaged, then cut into pieces and read to the end."""
    name = sorted(texts)[number % len(texts)]
    path = tmp_path_factory.getbasetemp() / f"fuzz_{name}"
    table_reader._open.cache_clear()  # it maps the file that is written anew
    path.unlink(missing_ok=True)
    path.write_bytes(changed(texts[name], damage))
    skipped = []
    try:
        for piece in documents.pieces(str(path), 1 << 12):
            for blocks in documents.read(
                piece, "text", lambda more: None, skipped.append if tolerant else None
            ):
                assert all(isinstance(block, str) for block in blocks)
    except ConfigError as error:
        one_line(error)
        assert str(path) in str(error)
    for line in skipped:
        one_line(line)


@pytest.mark.slow
@MANY
@given(st.data(), st.sampled_from([".idx", ".bin"]), st.sampled_from(["train", "held_out", "all"]))
def test_megatron(tmp_path_factory, data, suffix, split):
    prefix = str(tmp_path_factory.getbasetemp() / "fuzz_megatron")
    write_megatron(prefix, [[[65, 66, 256]], [[67], [68, 256]], [[69, 256]]])
    path = pathlib.Path(prefix + suffix)
    path.write_bytes(damaged(data, path.read_bytes()))
    try:
        array = megatron.open_stream(prefix, tokenizer.load("byte"), split)
        assert len(array[0 : len(array)]) == len(array) < 20
    except ConfigError as error:
        one_line(error)
        assert prefix in str(error)


@pytest.mark.slow
@MANY
@given(st.data())
def test_npy_records(data):
    """Bytes of an .npy file in memory, damaged or with another header."""
    stream = io.BytesIO()
    np.save(stream, np.arange(9, dtype=np.int32))
    content = stream.getvalue()
    if data.draw(st.booleans()):
        size = data.draw(
            st.sampled_from(["9", "1000000000000000", "-1", "9,9", "3,3", "2**70", "True", "9 "])
        )
        content = content.replace(b"(9,)", f"({size},)".encode())
    try:
        found = token_records._array(
            "records", 1, damaged(data, content) if data.draw(st.booleans()) else content
        )
        assert found.size <= len(content)
    except ConfigError as error:
        one_line(error)


@pytest.mark.slow
@MANY
@given(st.data())
def test_reports(tmp_path_factory, data):
    """A log and what lies beside it, altered: the page is made."""
    directory = tmp_path_factory.getbasetemp() / "fuzz_report"
    directory.mkdir(exist_ok=True)
    (directory / "report.npz").unlink(missing_ok=True)
    line = {
        "step": 10,
        "loss": 2.0,
        "step_seconds": 0.5,
        "held_out/loss": 3.0,
        "kurtosis/qkv_layers": [3.0, 4.0],
        "snr/q_layer001": 2,
    }
    event = {"step": 4, "kind": "early_warning", "level": "warn", "tensor": "qkv", "layer": 1}
    whole = {
        "metrics.jsonl": line,
        "events.jsonl": event,
        "eval.json": {"loss": 2.0, "bits_per_byte": 1.0},
        "run.json": {"fp8_share": 0.5},
        "config.json": config_lib.to_dict(config_lib.Config()),
    }
    for name, values in whole.items():
        content = data.draw(
            st.sampled_from(
                [
                    json.dumps(values).encode(),
                    altered(data, values),
                    damaged(data, json.dumps(values).encode()),
                ]
            )
        )
        (directory / name).write_bytes(content + b"\n" + json.dumps(values).encode() + b"\n")
    told = []
    for _ in range(2):
        page = report.write_report(
            [directory], directory / "report.html", remember=True, note=told.append
        )
        assert page.stat().st_size < 1e6
    for problem in told:
        one_line(problem)


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
