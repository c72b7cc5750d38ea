"""What a run chooses by itself, so that it fits: the ranking, the choice, its memory, and what it says where nothing fits."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.audit import limits
from fp8jax.audit.limits import Limit
from fp8jax.config import ConfigError
from fp8jax.plan import make_plan
from fp8jax.training import fit, fit_advice, fit_options, loop, starting
from fp8jax.training.checkpoint import save_config
from fp8jax.training.estimates import Formula, Option, state_bytes
from fp8jax.training.fit_options import Compiled
from fp8jax.training.step import TrainProgram

MODEL = {"layers": 2, "width": 32, "ffn_width": 32, "heads": 2, "kv_heads": 1}
VALUES = {
    "model": MODEL,
    "data": {"sequence_length": 32},
    "training": {"steps": 2, "batch_size": 16},
    "optimizer": {"warmup_steps": 1},
    "evaluation": {"every": 0, "batches": 1},
    "monitor": {"every": 0},
    "mesh": {"fsdp": 1},
    "fp8": {"recipe": "bf16"},  # compiled in a fraction of the time
}


def config_of(**changes):
    return config_lib.from_dict(
        {name: VALUES.get(name, {}) | changes.get(name, {}) for name in VALUES | changes}
    )


def plan_of(config, count=1):
    return make_plan(config, jax.devices()[:count])


def limit_of(size):
    return Limit(size, size, "for this test")


class Compiler:
    """Stands for the compiler: programs need what the formula says, times a factor that it does not know."""

    def __init__(self, plan, factor=1.0):
        self.formula, self.factor, self.asked = Formula(plan), factor, []
        self.state = state_bytes(TrainProgram(plan).abstract_state)

    def __call__(self, option):
        self.asked.append(option)
        return Compiled(option, self.needs(option))

    def needs(self, option):
        # Twice the state: on a CPU a save holds a copy.
        return int(2 * self.state + self.factor * self.formula.temporary_bytes(option))


@pytest.fixture(scope="module")
def plan():
    return plan_of(config_of())


def test_where_memory_is_no_matter_the_plainest_is_compiled_and_nothing_else(plan):
    compiler = Compiler(plan)
    found = fit.choose(plan, limit_of(1 << 40), compiler)
    assert found.fits and compiler.asked == [Option(1, 0, "none")] == [found.best.option]
    assert fit.choose(plan, None, compiler).best.option == Option(1, 0, "none")


@pytest.mark.parametrize("factor", [1.0, 0.3, 3.0])
def test_the_fewest_microbatches_that_fit_whatever_the_formula_is_off_by(plan, factor):
    config = dataclasses.replace(
        plan.config, training=dataclasses.replace(plan.config.training, remat="none", loss_chunk=0)
    )
    plan = plan.change(config)
    compiler = Compiler(plan, factor)
    limit = limit_of(compiler.needs(Option(4, 0, "none")) + 100)
    found = fit.choose(plan, limit, compiler)
    assert found.fits and found.best.needs <= limit.usable
    assert found.best.option == Option(4, 0, "none")
    assert len(compiler.asked) <= 4


def test_what_the_user_sets_stays(plan):
    set_by_user = config_of(training={"microbatches": 2, "remat": "full", "loss_chunk": 64})
    options = fit_options.candidates(plan.change(set_by_user))
    assert options == [Option(2, 64, "full")]
    options = fit_options.candidates(plan.change(config_of(training={"remat": "full"})))
    assert {option.remat for option in options} == {"full"}
    assert {option.microbatches for option in options} == {1, 2, 4, 8, 16}


def test_microbatches_divide_the_rows_of_a_replica():
    config = config_of(training={"batch_size": 24}, mesh={"fsdp": 2})
    options = fit_options.candidates(plan_of(config, 2))
    assert {option.microbatches for option in options} == {1, 2, 3, 4, 6, 12}


def test_the_state_is_what_a_program_takes(plan):
    program = TrainProgram(plan)
    taken = sum(
        np.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(program.abstract_state)
    )
    assert state_bytes(program.abstract_state) == taken


def run(config, workdir):
    assert loop.train(config, workdir, jax.devices()[: config.mesh.fsdp]) == 0
    return json.loads((workdir / "config.json").read_text())["training"]


def test_a_run_keeps_its_choice_and_makes_it_anew_elsewhere(tmp_path, monkeypatch, capsys):
    program = TrainProgram(plan_of(config_of()))
    needs = fit._needed(program, collect=False)
    monkeypatch.setattr(limits, "of_devices", lambda devices: limit_of(needs - 1000))
    chosen = run(config_of(), tmp_path)
    assert chosen["microbatches"] > 1 or chosen["remat"] != "none"
    assert (
        f"microbatches={chosen['microbatches']}" in chosen["fitted"]
        and "1 x cpu" in chosen["fitted"]
    )
    (line,) = (line for line in capsys.readouterr().out.splitlines() if "fit  " in line)
    assert "needs" in line and "there are" in line and "for this test" in line
    # With more memory on the same devices it goes on as it began.
    monkeypatch.setattr(limits, "of_devices", lambda devices: limit_of(1 << 40))
    longer = config_of(training={"steps": 3})
    assert run(longer, tmp_path) == chosen | {"steps": 3}
    # On others it chooses again.
    elsewhere = run(config_of(training={"steps": 4}, mesh={"fsdp": 2}), tmp_path)
    assert (elsewhere["microbatches"], elsewhere["remat"]) == (1, "none")
    assert "2 x cpu" in elsewhere["fitted"] and "made anew" in capsys.readouterr().out


def test_a_run_of_before_goes_on_as_it_began(tmp_path, monkeypatch):
    """Its config.json names microbatches that nobody need have set."""
    values = {"microbatches": 2, "remat": "full", "loss_chunk": 0}
    save_config(tmp_path, config_of(training=values))
    found = run(config_of(training={"steps": 3}), tmp_path)
    assert (found["microbatches"], found["remat"], found["loss_chunk"]) == (2, "full", 0)


def test_where_nothing_fits_one_line_says_what_would(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "of_devices", lambda devices: limit_of(600_000))
    with pytest.raises(ConfigError) as error:
        loop.train(config_of(), tmp_path, jax.devices()[:1])
    text = str(error.value)
    assert "needs" in text and "there are" in text and "\n" not in text
    assert "--config.optimizer.first_moment=fp8 saves" in text and "devices would do" in text
    assert not (tmp_path / "checkpoints").exists() or not any((tmp_path / "checkpoints").iterdir())


def test_a_value_of_the_users_that_does_not_fit_is_refused_with_what_to_change(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(limits, "of_devices", lambda devices: limit_of(1_000_000))
    values = {"microbatches": 1, "loss_chunk": 0, "remat": "none"}
    with pytest.raises(ConfigError, match="--config.training.microbatches=16 saves"):
        loop.train(config_of(training=values), tmp_path, jax.devices()[:1])


def test_the_number_of_devices_that_would_do_does(plan):
    limit = limit_of(600_000)
    compiler = Compiler(plan)
    least = Compiled(Option(16, 0, "full"), compiler.needs(Option(16, 0, "full")))
    assert least.needs > limit.usable
    count = fit_advice.devices_that_do(plan, limit, least)
    assert count in (2, 4, 8, 16)


@pytest.mark.parametrize(
    ("text", "needs"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 153.04G of 94.75G hbm.",
            153.04,
        ),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 2147483648 bytes.", 2.0),
        ("RESOURCE_EXHAUSTED: no more", None),
    ],
)
def test_a_compiler_that_refuses_says_how_much_is_needed(text, needs):
    found = fit.bytes_of_failure(RuntimeError(text))
    assert found == (fit.UNKNOWN if needs is None else int(needs * 2**30))


def test_other_errors_are_no_matter_of_memory():
    assert fit.bytes_of_failure(RuntimeError("INTERNAL: ptxas failed")) is None


def test_a_step_that_runs_out_of_memory_ends_in_one_line_with_the_state_saved(
    tmp_path, monkeypatch
):
    original = TrainProgram.step

    def step(self, state, batch, *, collect=False):
        if int(state.step) == 1:
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore"
            )
        return original(self, state, batch, collect=collect)

    monkeypatch.setattr(TrainProgram, "step", step)
    with pytest.raises(ConfigError) as error:
        loop.train(config_of(), tmp_path, jax.devices()[:1])
    text = str(error.value)
    assert "out of memory after step 1" in text and "step 1 is saved" in text and "\n" not in text
    assert "--config.training.microbatches=2" in text
    assert (tmp_path / "checkpoints" / "1").is_dir()
    monkeypatch.setattr(TrainProgram, "step", original)
    assert loop.train(config_of(), tmp_path, jax.devices()[:1]) == 0


@pytest.mark.parametrize(
    ("owner", "name"),
    [(starting, "calibrate"), (TrainProgram, "init")],
    ids=["calibrate", "init"],
)
def test_memory_that_ends_before_the_first_step_ends_in_one_line(
    owner, name, tmp_path, monkeypatch
):
    def exhausted(*given, **options):
        raise jax.errors.JaxRuntimeError(
            "RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore"
        )

    monkeypatch.setattr(owner, name, exhausted)
    with pytest.raises(ConfigError, match="^out of memory before the first step .*") as error:
        loop.train(config_of(fp8={"recipe": "fp8"}), tmp_path, jax.devices()[:1])
    assert "\n" not in str(error.value) and not (tmp_path / "checkpoints" / "0").exists()


def test_other_errors_of_a_device_are_not_called_so(tmp_path, monkeypatch):
    def step(self, state, batch, *, collect=False):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(TrainProgram, "step", step)
    with pytest.raises(jax.errors.JaxRuntimeError, match="a bug"):
        loop.train(config_of(), tmp_path, jax.devices()[:1])
