"""The early warning on made-up logs, where what is to come is known; its command line; and that replaying changes nothing.

A loss that stands still makes a range that is left more than `watch`; one that falls on does not.
"""

import json
import lzma
import math
import pathlib

import numpy as np
import pytest

from fp8jax.cli import early_warnings, report
from fp8jax.monitor.early_warning import EarlyWarning
from fp8jax.monitor.writers import MetricsError
from tests.monitor.made_up_logs import END, EVERY, LAYERS, STANDS, TOKENS, bent, growing, log

CATALOGUE = pathlib.Path(__file__).parents[2] / "benchmarks" / "early_warning"


def alarms(entries):
    watch = EarlyWarning()
    return [alarm for entry in entries for alarm in watch.observe(entry)]


@pytest.mark.parametrize("seed", range(8))
def test_a_calm_run_is_let_alone(seed):
    assert alarms(log(seed)) == []
    assert alarms(log(seed, q=growing(3)))


def test_growing_logits_are_forecast_with_layer_and_tokens():
    """1 nat is where rms(q) is 15.3: with this growth, at step 273."""
    found = [a for a in alarms(log(q=growing(3), **STANDS)) if a.tensor == "attention_logits"]
    assert [a.level for a in found] == ["watch", "warn", "act"]
    assert {a.layer for a in found} == {3} and {a.fallback for a in found} == {
        "qkv,attention_scores,attention_values"
    }
    for alarm in found[1:]:
        assert alarm.step + alarm.steps == pytest.approx(273, abs=12)
        assert alarm.tokens == alarm.steps * TOKENS
    assert found[0].step < found[1].step < found[2].step < 273
    assert "rmsnorm_frozen" in found[0].text() and "the largest is 4, growth" in found[0].text()


def test_linear_growth_far_from_the_limit_is_none_of_its_business():
    assert alarms(log(q=lambda step, layer: 1 + step / 400)) == []
    assert alarms(log(q=lambda step, layer: 1 + step / 20))


def test_the_first_layer_must_be_closer_than_the_last():
    def warned(here):
        return next(
            a.step for a in alarms(log(q=growing(here, here + 1), **STANDS)) if a.level == "warn"
        )

    assert warned(LAYERS - 2) < warned(0)


@pytest.mark.parametrize("seed", range(4))
def test_a_range_that_is_left_while_the_loss_falls_is_only_watched(seed):
    assert {a.level for a in alarms(log(seed, q=growing(*range(LAYERS))))} == {"watch"}


def test_of_many_layers_one_is_watched_and_a_fourth_is_warned_of():
    def levels(*grown, **series):
        return {
            a.level
            for a in alarms(log(layers=12, q=growing(*grown), **series))
            if a.tensor == "attention_logits"
        }

    assert levels(11, **STANDS) == {"watch"}
    assert levels(11, loss=bent(300)) == {"watch", "warn"}  # it has left, and the loss shows it
    assert levels(9, 10, 11, **STANDS) == {"watch", "warn", "act"}


def test_a_loss_off_its_trend_says_so():
    found = [a for a in alarms(log(q=growing(2, 3), loss=bent(250))) if a.level != "watch"]
    assert 250 < found[0].step <= 260 and "the loss is above its trend" in found[0].text()


def test_a_loss_off_its_trend_is_no_alarm_by_itself():
    assert alarms(log(loss=bent(250))) == []
    assert alarms(log(loss=bent(250), q=growing(2, 3)))


def test_gradients_that_stay_high_are_warned_of_where_the_loss_shows_it():
    high = lambda step: 0.8 if step < 250 else 1.6
    assert {a.level for a in alarms(log(grad_norm=high))} <= {"watch"}
    found = alarms(log(grad_norm=high, loss=bent(250)))
    assert ("warn", "gradient") in {(a.level, a.tensor) for a in found} and 250 < found[
        0
    ].step <= 260


def test_a_cast_that_has_lost_a_bit_asks_for_action():
    found = alarms(
        log(snr=lambda step, layer: 31.5 if step < 200 or layer != 2 else 20.0, **STANDS)
    )
    assert [(a.level, a.tensor, a.layer, a.steps) for a in found if a.level == "act"] == [
        ("act", "mlp_down.x", 2, 0)
    ]
    assert found[0].fallback == "mlp_down" and 200 <= found[0].step <= 210


def test_exponential_kurtosis_of_a_late_layer_is_watched():
    found = alarms(log(kurtosis=lambda step, layer: 3 * math.exp(step / 100 * (layer == 3))))
    assert found and {(a.level, a.tensor, a.layer) for a in found} == {
        ("watch", "kurtosis of qkv", 3)
    }


def test_a_gradient_and_all_weights_that_jump_ask_for_action():
    entries = log(grad_norm=lambda step: 0.8 if step < 203 else 20.0, loss=bent(203))
    for entry in entries:
        for name in entry:
            if entry["step"] > 200 and name.startswith(("amax/mlp_down.w", "rms/activation")):
                entry[name] *= 2
    found = alarms(entries)[:3]
    assert [(a.level, a.tensor, a.step) for a in found] == [
        ("watch", "gradient", 203),
        ("warn", "gradient", 205),
        ("act", "tensors", 205),
    ]


def test_a_learning_rate_that_jumps_is_warned_of_and_a_schedule_is_not():
    entries = log()
    for entry in entries:
        step = entry["step"]
        entry["learning_rate"] = 1e-3 * min(step / 150, 1.0, (END - step) / 100 + 1e-3)
    assert alarms(entries) == []
    entries[209]["learning_rate"] = 1e-2
    assert [(a.level, a.tensor, a.step) for a in alarms(entries)] == [
        ("warn", "learning rate", 210)
    ]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_asks_for_action_at_once(bad):
    found = alarms([{"step": 3, "tokens": 3000, "loss": bad, "grad_norm": 1.0}])
    assert [a.level for a in found] == ["act"]


def test_statistics_that_are_not_finite_do_no_harm():
    entries = log(q=growing(3), **STANDS)
    for entry in entries:
        if "rms/q_layer000" in entry:
            entry |= {
                "rms/q_layer000": math.inf,
                "kurtosis/qkv_layer001": math.nan,
                "snr/mlp_down.x_layer000": math.inf,
            }
    assert [a.level for a in alarms(entries) if a.layer == 3] == ["watch", "warn", "act"]


def long_run(every, loss, steps, start=0, seed=0):
    """Entries as of 390m: statistics in each, every tensor's load at 1.1 in all layers."""
    rng = np.random.default_rng(seed)
    for step in range(start + every, steps + 1, every):
        entry = {
            "step": step,
            "tokens": step * 524_288,
            "loss": loss(step) + 0.03 * rng.normal(),
            "grad_norm": math.exp(0.2 * rng.normal()),
        }
        yield (
            entry
            | {
                f"snr/mlp_down.x_layer{n:03d}": 31.5 - 6.02 - 0.41 + 0.05 * rng.normal()
                for n in range(4)
            }
            | {f"rms/mlp_out_layer{n:03d}": 1 + 0.01 * rng.normal() for n in range(4)}
        )


@pytest.mark.parametrize(("every", "steps"), [(1, 3_000), (100, 100_000)])
def test_a_healthy_long_run_is_not_asked_to_act(every, steps):
    """Whose tensors are out of range, which does no harm: its loss goes on falling, though within no 64 entries for one to see."""
    falling = lambda step: 1.9 + 9.0 * step**-0.25
    settled = steps // 10  # the first steps of a power law with a floor are no power law
    for seed in range(3):
        assert {
            alarm.level for alarm in alarms(long_run(every, falling, steps, settled, seed))
        } == {"watch"}
    stalled = lambda step: falling(min(step, steps // 2))
    assert "act" in {alarm.level for alarm in alarms(long_run(every, stalled, steps, settled))}


def test_a_warning_that_was_saved_sees_what_it_would_have_seen():
    """All but the losses from the end of the log, as a continued run does."""
    stalled = lambda step: 1.9 + 9.0 * min(step, 1_000) ** -0.25
    entries = list(long_run(1, stalled, 2_000))
    whole = EarlyWarning()
    for entry in entries[:1_800]:
        whole.observe(entry)
    again = EarlyWarning(losses=json.loads(json.dumps(whole.losses())))
    for entry in entries[1_600:1_800]:
        again.observe(entry)
    assert again.losses() == whole.losses()
    stands = []
    for entry in entries[1_800:]:
        whole.observe(entry)
        again.observe(entry)
        stands.append((whole._course.stands_still(), again._course.stands_still()))
    assert all(one == other for one, other in stands) and (True, True) in stands


def test_gradients_in_e4m3_are_judged_by_their_own_format():
    """At 24 dB e5m2 has lost a quarter of what costs a bit, e4m3 more than a bit."""
    entries = [
        entry
        | {
            f"snr/mlp_down.g_layer{n:03d}": 24.0
            for n in range(LAYERS)
            if entry["step"] % EVERY == 0
        }
        for entry in log(**STANDS)
    ]

    def tensors(gradient_format):
        watch = EarlyWarning(gradient_format=gradient_format)
        return {alarm.tensor for entry in entries for alarm in watch.observe(entry)}

    assert "mlp_down.g" in tensors("e4m3") - tensors("e5m2")


def test_replaying_a_log_leads_to_the_same_warnings():
    entries = log(q=growing(*range(LAYERS)), **STANDS)
    watch, again = EarlyWarning(), EarlyWarning()
    before = [watch.observe(entry) for entry in entries[:250]]
    for entry in entries[:250]:
        again.observe(entry)
    assert any(before)
    assert [watch.observe(entry) for entry in entries[250:]] == [
        again.observe(entry) for entry in entries[250:]
    ]


def catalogue(name):
    return [
        json.loads(line)
        for line in lzma.decompress((CATALOGUE / f"{name}.jsonl.xz").read_bytes()).splitlines()
    ]


@pytest.mark.parametrize(("name", "departs"), [("llama3_hot", 247), ("llama3_smooth_hot", 269)])
def test_llama_in_fp8_attention_is_warned_of_long_before_its_loss_departs(name, departs):
    found = next(alarm for alarm in alarms(catalogue(name)) if alarm.level == "act")
    assert found.tensor == "attention_logits" and found.step < departs - 100


def test_a_run_that_explodes_is_followed_to_its_end():
    found = alarms(catalogue("op_gains"))
    assert found[-1].step > 270 and {alarm.level for alarm in found} == {"warn", "act"}


def write(path: pathlib.Path, entries) -> pathlib.Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def test_offline_on_a_file_or_a_directory(tmp_path):
    path = write(tmp_path / "metrics.jsonl", log(q=lambda step, layer: math.exp(step / 100)))
    lines = list(early_warnings.lines(path))
    assert lines == list(early_warnings.lines(tmp_path))
    assert (
        lines[0].startswith("step ")
        and "attention_logits in layer" in lines[0]
        and "tokens" in lines[0]
    )
    assert lines[-1].startswith("400 steps: ")


def test_a_log_without_statistics_is_refused(tmp_path):
    path = write(tmp_path / "metrics.jsonl", [{"step": 1, "loss": 2.0}])
    with pytest.raises(MetricsError, match="monitor.every"):
        list(early_warnings.lines(path))
    assert len(list(early_warnings.lines(write(path, log(q=growing(3)))))) > 1


def test_the_command_prints_them_and_asks_for_one_thing(tmp_path, capsys):
    path = write(tmp_path / "metrics.jsonl", log(q=lambda step, layer: math.exp(step / 100)))
    assert report.main(["--warnings", str(path)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed == list(early_warnings.lines(path)) and any(
        "attention_logits" in line for line in printed
    )
    assert report.main(["--warnings", str(tmp_path / "none.jsonl")]) == 2
    for arguments in ([], [str(tmp_path), "--warnings", str(path)]):
        with pytest.raises(SystemExit, match="2"):
            report.main(arguments)


def test_a_loss_that_explodes_departs_where_it_leaves_not_where_its_spread_has_grown(monkeypatch):
    """A spread of the whole curve, 1.8e6 nats, put the departure at 85, where the loss was 7e5."""
    monkeypatch.syspath_prepend(str(CATALOGUE.parent))
    from early_warning_runs import departure  # a module of benchmarks/, which is no package

    entries = catalogue("large_op_hot")
    found = departure(
        [entry["step"] for entry in entries], [float(entry["loss"]) for entry in entries]
    )
    assert any(alarm.level == "warn" for alarm in alarms(entries))
    assert (found.step, found.calm) == (85, 51) and max(
        entry["loss"] for entry in entries[20:51]
    ) < 3 < entries[58]["loss"]
