"""What the loop does about an early warning: falls back without a restart, saves, goes back, stops; all of it survives a restart."""

import json

import jax
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.monitor.early_warning import Alarm, EarlyWarning
from fp8jax.monitor.warning_actions import Reaction
from fp8jax.monitor.writers import read_metrics
from fp8jax.training.checkpoint import Checkpoints
from tests.helpers.runs import micro, program_of, train

AT = 4


@pytest.fixture(autouse=True)
def alarm_at(monkeypatch):
    """The early warning, which has nothing to say of eight steps, says one thing at step AT."""

    def observe(self, entry):
        advice = "move attention_scores to BF16", "attention_scores"
        return (
            [Alarm(AT, "act", "attention_logits", 1, "off", 0, 0, *advice)]
            if entry["step"] == AT
            else []
        )

    monkeypatch.setattr(EarlyWarning, "observe", observe)


def config_with(**warning):
    return micro(
        warning=warning, checkpoint={"every": 2, "keep": 9}, evaluation={"every": 0, "batches": 1}
    )


def events(workdir, kind):
    return [event for event in read_metrics(workdir / "events.jsonl") if event["kind"] == kind]


def arrays_of(config, workdir, step):
    with Checkpoints(workdir, keep=9) as checkpoints:
        program = program_of(config).fallen_back(checkpoints.data_state(step)["fallback"])
        items, data = checkpoints.restore(step, program.abstract_state.items())
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(items)
    }, data


def test_roles_fall_back_from_the_next_step_without_a_restart(tmp_path):
    config = config_with(action="fallback")
    assert train(config, tmp_path / "fallen") == 0
    assert train(config_with(action="log"), tmp_path / "left") == 0
    assert [e["overrides"] for e in events(tmp_path / "fallen", "early_warning_action")] == [
        "attention_scores=bf16"
    ]
    assert len(events(tmp_path / "fallen", "started")) == 1
    fallen, left = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("fallen", "left"))
    assert [e["loss"] for e in fallen[:AT]] == [e["loss"] for e in left[:AT]]
    assert fallen[AT]["loss"] != left[AT]["loss"]
    assert (
        "snr/attention_scores.q_layer000" in left[5]
        and "snr/attention_scores.q_layer000" not in fallen[5]
    )
    before, data = arrays_of(config, tmp_path / "fallen", AT - 2)
    assert data["fallback"] == ""
    after, data = arrays_of(config, tmp_path / "fallen", AT)
    assert data["fallback"] == "attention_scores=bf16"
    histories = {name for name in before if "history" in name}
    assert {name for name in histories if name not in after} == {
        "['scaling']['attention_scores']['history']"
    }
    for name in histories & after.keys():
        assert np.array_equal(after[name][..., 2:], before[name][..., :-2]), name


@pytest.mark.slow
def test_a_fallback_is_kept_by_a_continued_run_bit_for_bit(tmp_path, stop_at):  # noqa: F811
    config = config_with(action="fallback")
    assert train(config, tmp_path / "whole") == 0
    stop_at(6, 2)
    assert train(config, tmp_path / "parts") == 4
    stop_at(-1, 2)
    assert train(config, tmp_path / "parts") == 0
    whole, whole_data = arrays_of(config, tmp_path / "whole", 8)
    parts, parts_data = arrays_of(config, tmp_path / "parts", 8)
    assert whole_data == parts_data and whole.keys() == parts.keys()
    for name, array in whole.items():
        assert array.tobytes() == parts[name].tobytes(), name
    assert len(events(tmp_path / "parts", "early_warning_action")) == 1


@pytest.mark.slow
def test_named_roles_fall_back_in_place_of_those_of_the_warning(tmp_path):
    config = config_with(action="fallback", fallback="mlp_down@1,attention_values")
    assert train(config, tmp_path) == 0
    assert arrays_of(config, tmp_path, 8)[1]["fallback"] == "mlp_down@1=bf16,attention_values=bf16"
    last = read_metrics(tmp_path / "metrics.jsonl")[5]
    assert "snr/mlp_down.x_layer001" not in last and np.isfinite(last["snr/mlp_down.x_layer000"])


@pytest.mark.slow
def test_a_rollback_passes_over_the_batches_in_between_and_stays_fallen_back(tmp_path):
    assert (
        train(config_with(action="rollback"), tmp_path) == 3
    )  # warns each time it comes by, until rollbacks are used up
    back = events(tmp_path, "rollback")
    assert [event["step"] for event in back] == [AT, AT]
    assert events(tmp_path, "bad_numbers")[0]["step"] == AT


@pytest.mark.parametrize(
    ("action", "code"),
    [
        ("stop", 3),
        pytest.param("checkpoint", 0, marks=pytest.mark.slow),
        pytest.param("log", 0, marks=pytest.mark.slow),
    ],
)
def test_stop_checkpoint_and_log(tmp_path, action, code):
    config = micro(
        warning={"action": action},
        checkpoint={"every": 0, "keep": 9},
        evaluation={"every": 0, "batches": 1},
    )
    assert train(config, tmp_path) == code
    steps = Checkpoints(tmp_path).steps()
    assert steps == {"stop": [AT], "checkpoint": [AT, 8], "log": [8]}[action]


def test_a_continued_run_has_seen_its_log_up_to_its_step_and_no_further(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        EarlyWarning, "observe", lambda self, entry: seen.append(entry["step"]) or []
    )
    lines = [
        json.dumps({"step": step, "tokens": step, "loss": 2.0, "grad_norm": 1.0}) + "\n"
        for step in range(1, 7)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    for step in (3, 5):
        seen.clear()
        Reaction(config_lib.WarningConfig(), tmp_path, step, "")
        assert seen == list(range(1, step + 1))


@pytest.mark.slow
def test_a_level_below_the_configured_one_changes_nothing(tmp_path, monkeypatch):
    weak = Alarm(AT, "warn", "attention_logits", 1, "off", 0, 0, "", "attention_scores")
    monkeypatch.setattr(
        EarlyWarning, "observe", lambda self, entry: [weak] if entry["step"] == AT else []
    )
    assert train(config_with(action="stop"), tmp_path) == 0
    assert train(config_with(action="stop", level="warn"), tmp_path / "warn") == 3


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("action", "restart", "config.warning.action"),
        ("fallback", "mlp_don", "config.warning.fallback"),
        ("fallback", "mlp_down@9", "config.warning.fallback"),
    ],
)
def test_what_cannot_be_done_is_refused(field, value, told):
    with pytest.raises(config_lib.ConfigError, match=told):
        config_with(**{field: value})
