"""What a configuration refuses, and that it says field, value and what is allowed in one line."""

import dataclasses
import importlib
import json
import pathlib
import subprocess
import sys

import pytest

from configs import common, fp8_base, from_run
from fp8jax import config as config_lib
from fp8jax.config import ConfigError
from fp8jax.numerics import low_bit_state, roles

ROOT = pathlib.Path(__file__).resolve().parents[1]
NOT_PRESETS = ("__init__", "common", "from_run")
PRESETS = [
    importlib.import_module(f"configs.{path.stem}")
    for path in sorted((ROOT / "configs").glob("*.py"))
    if path.stem not in NOT_PRESETS
]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"kv_heads": 3}}, ["config.model.kv_heads", "3", "heads=2"]),
        ({"model": {"heads": 3}}, ["config.model.heads", "3", "width=256"]),
        ({"model": {"head_dim": 33}}, ["config.model.head_dim", "33", "odd"]),
        ({"model": {"layers": 0}}, ["config.model.layers", "0", "below 1"]),
        ({"model": {"layers": "4"}}, ["config.model.layers", "'4'", "int"]),
        ({"model": {"layers": True}}, ["config.model.layers", "True", "int"]),
        ({"model": {"widht": 3}}, ["config.model.widht", "did you mean 'width'"]),
        ({"modle": {"width": 3}}, ["config.modle", "did you mean 'model'"]),
        ({"model": 3}, ["config.model", "3", "section"]),
        (
            {"model": {"architecture": "fog_maxi"}},
            ["config.model.architecture", "did you mean 'fog_max'"],
        ),
        ({"model": {"init_std": float("nan")}}, ["config.model.init_std", "finite"]),
        ({"fp8": {"history_length": 2000}}, ["config.fp8.history_length", "2000", "1025"]),
        ({"fp8": {"head": True}}, ["config.fp8.head", "tied_embeddings=False"]),
        ({"fp8": {"overrides": "mlp=bf16"}}, ["config.fp8.overrides", "mlp_up"]),
        ({"fp8": {"overrides": "qkv@3-9=bf16"}}, ["config.fp8.overrides", "0-3"]),
        (
            {"fp8": {"attention_backend": "flash"}},
            ["config.fp8.attention_backend", "flash", "composed"],
        ),
        (
            {"training": {"batch_size": 16, "microbatches": 3}},
            ["config.training.microbatches", "3", "16"],
        ),
        ({"training": {"steps": 2**31}}, ["config.training.steps", "2147483648", "not below"]),
        ({"optimizer": {"warmup_steps": 700}}, ["config.optimizer.warmup_steps", "700", "600"]),
        ({"optimizer": {"b1": 1.0}}, ["config.optimizer.b1", "below 1.0"]),
        ({"mesh": {"data": -1, "fsdp": -1}}, ["config.mesh", "-1"]),
        ({"mesh": {"tensor": 0}}, ["config.mesh.tensor", "0"]),
    ],
)
def test_mistakes(changes, words):
    with pytest.raises(ConfigError) as caught:
        config_lib.from_dict(changes)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_every_field_is_documented_and_of_a_plain_type():
    for section in dataclasses.fields(config_lib.Config):
        for field in dataclasses.fields(section.type):
            assert field.metadata["doc"], f"{section.name}.{field.name}"
            kind, _ = config_lib.kind_of(field.type)
            assert kind in (bool, int, float, str), f"{section.name}.{field.name}"


def test_defaults_build_and_survive_json():
    built = config_lib.from_dict(config_lib.defaults())
    assert built == config_lib.Config()
    assert config_lib.from_dict(json.loads(json.dumps(config_lib.to_dict(built)))) == built


def test_whole_numbers_are_taken_as_floats():
    built = config_lib.from_dict({"optimizer": {"learning_rate": 1}})
    assert built.optimizer.learning_rate == 1.0 and type(built.optimizer.learning_rate) is float


@pytest.mark.parametrize("module", PRESETS)
@pytest.mark.parametrize("size", list(common.SIZES))
def test_every_config_file_at_every_size(module, size):
    built = config_lib.from_dict(module.get_config(size))
    assert (
        built.fp8.recipe in ("bf16", "fp8_dpa") and built.model.width == common.SIZES[size]["width"]
    )


def test_tiny_fits_every_attention_backend():
    built = config_lib.from_dict(fp8_base.get_config("tiny"))
    assert config_lib.head_dim(built.model) == 128 and built.data.sequence_length % 128 == 0


def test_a_wrong_size_is_named():
    with pytest.raises(ValueError, match="'7b' is not one of tiny, 390m"):
        fp8_base.get_config("7b")


@pytest.mark.parametrize("steps", [1, 10, 50, 1000])
@pytest.mark.parametrize("size", list(common.SIZES))
@pytest.mark.parametrize("module", PRESETS)
def test_every_preset_at_any_length(module, size, steps):
    """What a preset set follows the length; no preset is changed at its own."""
    config = module.get_config(size)
    planned = config_lib.from_dict(config)
    config.training.steps = steps
    built = config_lib.from_dict(config)
    assert built.training.steps == steps >= built.optimizer.warmup_steps
    if steps < planned.training.steps:
        assert built.optimizer.warmup_steps == round(
            planned.optimizer.warmup_steps * steps / planned.training.steps
        )
        assert built.checkpoint.every <= steps and built.evaluation.every <= steps
    else:
        assert built == dataclasses.replace(planned, training=built.training)


@pytest.mark.parametrize(
    ("size", "warmup", "steps"), [("tiny", 40, 450), ("390m", 4768, 95367), ("8b", 1192, 59605)]
)
def test_presets_are_the_papers(size, warmup, steps):
    built = config_lib.from_dict(fp8_base.get_config(size))
    assert (built.optimizer.warmup_steps, built.training.steps) == (warmup, steps)
    assert (built.checkpoint.every, built.evaluation.every, built.mesh.fsdp) == (1000, 200, -1)


def test_what_the_user_set_stays_and_can_be_wrong():
    config = fp8_base.get_config("tiny")
    config.training.steps, config.optimizer.warmup_steps, config.evaluation.every = 30, 40, 200
    with pytest.raises(
        ConfigError, match="warmup_steps: 40 exceeds training.steps=30; leave it out"
    ):
        config_lib.from_dict(config)
    config.optimizer.warmup_steps = 25
    built = config_lib.from_dict(config)
    assert (built.optimizer.warmup_steps, built.evaluation.every, built.checkpoint.every) == (
        25,
        200,
        15,
    )


def test_a_run_that_goes_on_keeps_its_warm_up():
    config = fp8_base.get_config("tiny")
    config.training.steps = 30
    run = config_lib.from_dict(config)
    assert run.optimizer.warmup_steps == 3
    config.training.steps = 900
    assert config_lib.from_dict(config, run).optimizer.warmup_steps == 3
    config.training.steps = 20  # too short for a warm-up of 40, if the run has that
    assert (
        config_lib.from_dict(
            config, config_lib.from_dict(fp8_base.get_config("tiny"))
        ).optimizer.warmup_steps
        == 2
    )
    config.optimizer.warmup_steps = 7
    assert config_lib.from_dict(config, run).optimizer.warmup_steps == 7


def test_a_run_is_a_preset(tmp_path):
    config = fp8_base.get_config("tiny")
    config.training.steps, config.optimizer.warmup_steps = 100, 20
    run = config_lib.from_dict(config)
    (tmp_path / "config.json").write_text(json.dumps(config_lib.to_dict(run)))
    again = from_run.get_config(str(tmp_path))
    assert config_lib.from_dict(again) == run
    again.training.steps = 50
    assert config_lib.from_dict(again).optimizer.warmup_steps == 10


@pytest.mark.parametrize(
    ("mesh", "fsdp"),
    [
        ({}, -1),
        ({"data": -1}, 1),
        ({"tensor": -1, "data": 2}, 1),
        ({"data": 2}, -1),
        ({"fsdp": 4}, 4),
    ],
)
def test_the_users_rest_of_devices_wins(mesh, fsdp):
    config = fp8_base.get_config("tiny")
    config.mesh.update(mesh)
    assert (
        config_lib.from_dict(config).mesh.fsdp
        == fsdp
        == config_lib.from_dict({"mesh": mesh}).mesh.fsdp
    )


def test_names_of_storage_formats():
    assert tuple(low_bit_state.FORMATS) == roles.STORED


def test_a_configuration_is_checked_without_jax():
    """A mistake is known before JAX is loaded, which takes seconds."""
    code = "import sys, configs.fp8_base, fp8jax.config as c; c.from_dict(configs.fp8_base.get_config('tiny')); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


def test_a_source_may_hold_an_equals_sign(tmp_path):
    assert config_lib.parse_sources("/d/lang=en/tokens") == (("/d/lang=en/tokens", 1.0),)
    assert config_lib.parse_sources("/d/lang=en/tokens=3,other=1") == (
        ("/d/lang=en/tokens", 0.75),
        ("other", 0.25),
    )
    (tmp_path / "lang=1").mkdir()
    assert config_lib.parse_sources(str(tmp_path / "lang=1")) == ((str(tmp_path / "lang=1"), 1.0),)
    assert config_lib.parse_sources("tokens=0.5") == (("tokens", 1.0),)
