"""What an evaluation reads by default, what that costs, and under which limit."""

import importlib
import re

import jax
import numpy as np
import pytest

from configs import common
from fp8jax import config as config_lib
from fp8jax.data import pipeline, shards, tokenizer
from fp8jax.models.flops import model_flops
from fp8jax.training import evaluation, guards
from fp8jax.training.checkpoint import save_config
from fp8jax.training.evaluation import Evaluator, batches_by_share
from fp8jax.training.watchdog import Watchdog
from tests.helpers.runs import logged, micro, on_mesh, program_of, save_untrained, train


@pytest.mark.parametrize("size", common.SIZES)
def test_by_default_an_evaluation_costs_two_percent_of_every_preset(size):
    config = config_lib.from_dict(importlib.import_module("configs.fp8_base").get_config(size))
    assert config.evaluation.batches == -1
    sequences = batches_by_share(config) * config.training.batch_size
    step = model_flops(
        config.model, 131072, sequences=config.training.batch_size, sequence_length=4096
    ).total
    read = model_flops(config.model, 131072, sequences=sequences, sequence_length=4096).total / 3
    assert 0.019 < read / (config.evaluation.every * step) <= 0.02


@pytest.mark.parametrize(
    ("every", "steps", "batches"),
    [(200, 450, 12), (50, 450, 3), (10, 450, 1), (0, 1000, 60), (200, 30, 1)],
)
def test_what_is_read_follows_the_interval_alone(every, steps, batches):
    config = micro(
        evaluation={"every": every, "batches": -1}, training={"steps": steps, "batch_size": 16}
    )
    assert batches_by_share(config) == batches


def test_a_part_is_spread_over_the_split_and_no_sequence_comes_twice(tmp_path):
    byte = tokenizer.load("byte")
    documents = [np.arange(250, dtype=np.uint16)]
    shards.write_shards(tmp_path / "tokens", byte, {"train": documents, "held_out": documents})
    config = micro(data={"sequence_length": 4, "source": str(tmp_path / "tokens")})
    assert pipeline.held_out_sequences(config) == 63
    batches = list(pipeline.held_out_batches(config, 4, sequences=10))
    first = np.concatenate([batch["targets"][batch["mask"][:, 0] == 1, 0] for batch, _ in batches])
    assert first.tolist() == [4 * (number * 63 // 10) for number in range(10)]
    assert sum(count for _, count in batches) == 40
    for sequences in (0, 63, 1000):
        assert (
            sum(
                batch["mask"].sum()
                for batch, _ in pipeline.held_out_batches(config, 4, sequences=sequences)
            )
            == 251
        )


def test_a_part_is_the_same_whatever_the_microbatches():
    found = []
    for microbatches in (1, 4):
        config = micro(
            training={"steps": 8, "batch_size": 16, "microbatches": microbatches},
            evaluation={"batches": 3},
        )
        program = program_of(config)
        found.append(Evaluator(program.plan.change(config))(program.init().params))
    assert found[0]["tokens"] == found[1]["tokens"] == 3 * 16 * 32 and found[0]["sequences"] == 48
    assert found[0]["all_sequences"] == -(-466854 // 32)
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-6)


def test_an_evaluation_is_not_under_the_limit_of_a_step_but_watched_batch_by_batch(
    tmp_path, monkeypatch, capsys
):
    seen = []

    class Watched(Watchdog):
        def begin(self, kind, what):
            super().begin(kind, what)
            if kind == "evaluation":
                seen.append((what, sorted(self._under_way)))

    monkeypatch.setattr(guards, "Watchdog", Watched)
    monkeypatch.setattr(evaluation, "ONE_IN", 1)
    assert (
        train(
            micro(
                evaluation={"every": 2, "batches": -1},
                training={"steps": 2, "batch_size": 16},
                checkpoint={"every": 0},
            ),
            tmp_path,
        )
        == 0
    )
    assert seen == [
        (f"evaluation of step 2, batch {number} of 6", ["evaluation"]) for number in range(1, 7)
    ]
    assert logged(tmp_path)[-1]["held_out/tokens"] == 6 * 16 * 32
    told = capsys.readouterr().out
    assert (
        "held-out 96 of 14,590 sequences, every 2 steps and at the end" in told
        and "eval.py reads the whole split" in told
    )
    assert re.search(
        r"step 2  held-out loss \S+  bits per byte \S+  \(96 of 14,590 sequences\)", told
    )


def test_a_run_is_evaluated_on_its_own_mesh_and_on_any_number_of_devices(tmp_path):
    """Four sequences at a time do not go onto eight devices of fsdp alone."""
    config = on_mesh({"fsdp": 4, "tensor": 2}, training={"batch_size": 16, "microbatches": 4})
    _, state = save_untrained(config, tmp_path)
    shapes, losses = [], []
    for count in (8, 4, 3, 1):
        model, step = evaluation.load_run(tmp_path, devices=jax.devices()[:count])
        mesh = model.plan.mesh
        shapes.append((mesh.shape["fsdp"], mesh.shape["tensor"], mesh.size))
        losses.append(
            Evaluator(model.plan.change(config))(model.params)["loss"]
            if count in (8, 3)
            else losses[0]
        )
        for kept, found in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(model.params), strict=True
        ):
            np.testing.assert_array_equal(np.asarray(kept), np.asarray(found))
    assert shapes[0] == (4, 2, 8) and [size for *_, size in shapes] == [8, 4, 2, 1]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-4)


@pytest.mark.parametrize(
    "changes",
    [
        {"fp8": {"attention_backend": "pallas"}},
        {"fp8": {"attention_backend": "cudnn"}},
        {"training": {"remat": "offload_fp8"}},
    ],
)
def test_a_run_of_a_gpu_is_evaluated_on_a_cpu(tmp_path, changes):
    config = micro(**changes)
    save_untrained(micro(), tmp_path)
    save_config(tmp_path, config)
    model, step = evaluation.load_run(tmp_path, devices=jax.devices()[:1])
    assert step == 1 and np.isfinite(Evaluator(model.plan)(model.params)["loss"])


def held_out_directories(tmp_path):
    byte, random = tokenizer.load("byte"), np.random.default_rng(0)
    for name, count in (("wiki", 1300), ("code", 500)):
        documents = {
            split: [random.integers(97, 123, count).astype(np.uint16)] for split in shards.SPLITS
        }
        shards.write_shards(tmp_path / name, byte, documents)
    return str(tmp_path / "wiki"), str(tmp_path / "code")


def test_several_texts_have_losses_of_their_own_and_one_together(tmp_path):
    """Each is what it is alone; together they are their sum over all tokens."""
    wiki, code = held_out_directories(tmp_path)
    settings = {"evaluation": {"batches": 0}, "training": {"batch_size": 16}}
    found = []
    for held_out in (f"{wiki},c={code}", wiki, code):
        config = micro(data={"sequence_length": 32, "held_out": held_out}, **settings)
        program = program_of(config)
        found.append(Evaluator(program.plan.change(config))(program.init().params))
    both, alone = found[0], found[1:]
    assert list(both["texts"]) == ["wiki", "c"] and "texts" not in alone[0]
    for text, one in zip(both["texts"].values(), alone, strict=True):
        assert text == {name: one[name] for name in text}
    assert (
        both["tokens"] == 1301 + 501
        and both["bytes"] == 1800
        and both["sequences"] == both["all_sequences"] == 41 + 16
    )
    assert both["loss"] == pytest.approx(
        (1301 * alone[0]["loss"] + 501 * alone[1]["loss"]) / 1802, rel=1e-12
    )


def test_several_texts_share_what_an_evaluation_reads():
    config = micro(evaluation={"batches": 10}, training={"batch_size": 4})
    assert evaluation._parts(config, {"": 1000}) == {"": (40, 1000)}
    assert evaluation._parts(config, {"a": 700, "b": 300, "c": 3}) == {
        "a": (28, 700),
        "b": (12, 300),
        "c": (3, 3),
    }
    assert evaluation._parts(micro(evaluation={"batches": 0}), {"a": 700, "b": 3}) == {
        "a": (700, 700),
        "b": (3, 3),
    }


@pytest.mark.slow
@pytest.mark.parametrize("held_out", ["several", "none"])
def test_a_run_logs_each_text_by_its_name_or_none(tmp_path, capsys, held_out):
    wiki, code = held_out_directories(tmp_path)
    config = micro(
        data={"held_out": f"{wiki},c={code}" if held_out == "several" else "none"},
        training={"steps": 2},
        monitor={"every": 0},
        evaluation={"every": 2, "batches": 1},
        checkpoint={"every": 0},
    )
    assert train(config, tmp_path / "run") == 0
    names = {
        f"held_out/{text}{name}"
        for text in ("", "wiki/", "c/")
        for name in ("loss", "perplexity", "bits_per_byte", "tokens")
    }
    assert {name for name in logged(tmp_path / "run")[-1] if name.startswith("held_out")} == (
        names if held_out == "several" else set()
    )
    assert (tmp_path / "run" / "eval.json").exists() == (held_out == "several")
    told = capsys.readouterr().out
    assert (
        "held-out none: " in told and "eval.py --workdir" in told and "--held_out=DIR" in told
    ) == (held_out == "none")
    if held_out == "none":
        with pytest.raises(
            config_lib.ConfigError,
            match="has no held-out text; give some with eval.py --held_out=DIR",
        ):
            evaluation.evaluate_run(tmp_path / "run")
        assert evaluation.evaluate_run(tmp_path / "run", held_out=code)["tokens"] == 501
