"""Planted faults of scales, which the probe must find by group and layer without being told; healthy states, which it must not accuse."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from fp8jax.monitor.stages import Stages
from fp8jax.training import probing
from tests.helpers.runs import micro, save_untrained

SILENT = Stages(False)


@pytest.fixture(scope="module")
def healthy():
    """The initial state of a delayed run, calibrated on its own text."""
    config = micro(
        model={"architecture": "llama3"}, fp8={"recipe": "fp8_dpa", "scaling": "delayed"}
    )
    return probing.subject_of_config(config, SILENT, jax.devices()[:1])


def with_scale(subject, role, operand, layer, factor):
    """The subject with one scale of a role in one layer off by a factor."""
    state = subject.state
    entry = state.scaling[role]
    scale = entry["scale"].at[layer, operand].multiply(factor)
    scaling = state.scaling | {role: {**entry, "scale": scale}}
    return dataclasses.replace(subject, state=dataclasses.replace(state, scaling=scaling))


@pytest.mark.slow
def test_healthy_state_is_not_accused_and_its_error_is_below_the_noise_of_batches(healthy):
    found = probing.examine(healthy, probing.Question(batches=2), SILENT)
    assert found["error"] < probing.HARMFUL
    assert found["guilty"] is None
    assert found["config"] == ""
    assert 0 < found["error_over_batch_noise"] < 1
    assert found["batch_noise"] > 0
    assert sum(sum(matrix["share"]) for matrix in found["matrices"].values()) == pytest.approx(1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("role", "operand", "group"),
    [
        ("mlp_up", 0, "mlp"),
        ("mlp_down", 1, "mlp"),
        ("qkv", 0, "attention"),
        ("attention_values", 0, "attention"),
        ("attention_out", 1, "attention_out"),
    ],
)
def test_a_scale_that_saturates_is_found_by_group_and_layer(healthy, role, operand, group):
    broken = with_scale(healthy, role, operand, 1, 2.0**-12)
    found = probing.examine(broken, probing.Question(), SILENT)
    assert found["worst"] > probing.PLACE * probing.HARMFUL
    assert found["guilty"]["group"] == group
    assert found["guilty"]["layers"] == [1, 1]
    assert "delayed scales" in found["verdict"]
    assert f"{role}@1-1=current" in found["config"]


def test_a_run_is_probed_from_its_checkpoint(tmp_path):
    save_untrained(micro(fp8={"recipe": "bf16"}), tmp_path)
    subject = probing.subject_of_run(tmp_path, None, SILENT, jax.devices()[:1])
    assert (subject.step, subject.batch) == (1, 1)
    found = probing.examine(subject, probing.Question(against="float32"), SILENT)
    assert 0 < found["error"] < 0.1  # BF16 against float32
    assert found["groups"] == {}


class Planted:
    """Tests of a run in which `mlp_up` is at fault in layers `first` to `last` of eight, and nothing else."""

    errors = {"error": 1.0, "worst": 2.0}  # noqa: RUF012

    def __init__(self, first, last):
        self.first, self.last = first, last
        self.program = SimpleNamespace(recipes=SimpleNamespace(blocks=range(8)))

    def without(self, _, targets):
        covered = set()
        for target in targets.split(","):
            role, _, span = target.partition("@")
            low, high = map(int, (span or "0-7").split("-"))
            covered |= set(range(low, high + 1)) if role == "mlp_up" else set()
        mended = covered >= set(range(self.first, self.last + 1))
        return {"error": 0.1, "worst": 0.2} if mended else self.errors


@pytest.mark.parametrize(
    ("first", "last", "found"), [(5, 5, [5, 5]), (0, 1, [0, 1]), (3, 4, [0, 7])]
)
def test_layers_are_halved_as_long_as_one_half_explains_the_error(first, last, found):
    planted = Planted(first, last)
    groups = {
        "attention": {"roles": ["qkv"], **planted.without("", "qkv")},
        "mlp": {"roles": ["mlp_up", "mlp_down"], **planted.without("", "mlp_up,mlp_down")},
    }
    guilty = probing._guilty(planted, groups)
    assert guilty == {"group": "mlp", "roles": ["mlp_up", "mlp_down"], "layers": found}


def test_no_group_is_named_where_none_explains_the_error():
    planted = Planted(0, 0)
    assert probing._guilty(planted, {"attention": {"roles": ["qkv"], **planted.errors}}) is None
    assert probing._guilty(planted, {}) is None
