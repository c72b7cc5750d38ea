"""fp8jax.train, load_run, generate, evaluate: equal to what the commands give, with their lines for mistakes."""

import contextlib
import json
import subprocess
import sys
import threading

import jax
import pytest

import fp8jax
from fp8jax import __main__ as commands
from fp8jax import config as config_lib
from fp8jax.cli import flags
from fp8jax.config import CheckpointError, ConfigError
from fp8jax.presets import fp8_base
from fp8jax.runs import make_config
from tests.helpers import runs

FIELDS: dict[str, object] = {
    "model.layers": 1,
    "model.width": 32,
    "model.heads": 2,
    "model.kv_heads": 1,
    "model.head_dim": 16,
    "model.ffn_width": 32,
    "data.sequence_length": 64,
    "training.batch_size": 8,
    "training.steps": 3,
    "mesh.data": 8,
    "mesh.fsdp": 1,
    "monitor.every": 2,
    "log.every": 1,
    "log.report_minutes": 0,
    "evaluation.batches": 2,
}


def command(*words):
    """The exit code of a command, with flags as in a new process."""
    for name in flags.flags.FLAGS:
        flags.flags.FLAGS[name].unparse()
    return commands.main(list(words))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Directories of the same run, trained by the command and by the function."""
    text = tmp_path_factory.mktemp("text") / "text.jsonl"
    lines = [f'{{"text": "It is a truth universally acknowledged, {n}."}}' for n in range(99)]
    text.write_text("\n".join(lines))
    tokens = text.with_name("tokens")
    assert (
        command("prepare", f"--input={text}", f"--out={tokens}", "--validation_fraction=0.5") == 0
    )
    FIELDS["data.held_out"] = str(tokens)
    by_command = tmp_path_factory.mktemp("command")
    by_function = tmp_path_factory.mktemp("function")
    words = [f"--config.{path}={value}" for path, value in FIELDS.items()]
    cache = jax.config.jax_compilation_cache_dir
    assert command("train", "--config=fp8_base:tiny", f"--workdir={by_command}", *words) == 0
    assert fp8jax.train("fp8_base:tiny", by_function, overrides=FIELDS) == 0
    assert jax.config.jax_compilation_cache_dir == cache
    return by_command, by_function


def test_train_is_the_command(trained):
    by_command, by_function = trained
    assert runs.logged(by_command) == runs.logged(by_function)
    assert len(runs.logged(by_function)) == 3
    configs = [(path / "config.json").read_text() for path in trained]
    assert configs[0] == configs[1] and json.loads(configs[0])["model"]["width"] == 32


def test_evaluate_is_the_command(trained, capsys):
    by_command, by_function = trained
    assert command("eval", f"--workdir={by_command}") == 0
    capsys.readouterr()
    found = fp8jax.evaluate(by_function)
    assert capsys.readouterr() == ("", "")
    assert found == json.loads((by_command / "eval.json").read_text())
    assert found == json.loads((by_function / "eval.json").read_text())
    assert fp8jax.evaluate(fp8jax.load_run(by_function)) == found


def test_generate_is_the_command(trained, capsys):
    by_command, by_function = trained
    words = ["--prompt=Anne", "--tokens=12", "--temperature=0.9", "--seed=5"]
    assert command("sample", f"--workdir={by_command}", *words) == 0
    shown = capsys.readouterr().out
    options = {"tokens": 12, "temperature": 0.9, "seed": 5}
    text = fp8jax.generate(by_function, "Anne", **options)
    assert f"Anne{text}\n" == shown
    run = fp8jax.load_run(by_function, devices=jax.devices()[:1])
    assert fp8jax.generate(run, ["Anne", "It"], **options)[0] == text
    assert (run.step, run.config.model.width) == (3, 32)
    assert capsys.readouterr() == ("", "")


def test_forms_of_a_configuration_are_equal():
    by_name = make_config("fp8_base:tiny", {"training.steps": 20})
    preset = fp8_base.get_config("tiny")
    preset.training.steps = 20
    assert by_name == make_config(preset)
    assert by_name == make_config(by_name)
    assert by_name == make_config(config_lib.to_dict(by_name))
    assert by_name == make_config("configs/fp8_base.py:tiny", {"training.steps": 20})
    # The warm-up of a preset follows the length, as on the command line.
    assert by_name.optimizer.warmup_steps < make_config("fp8_base:tiny").optimizer.warmup_steps


def test_an_override_leaves_the_given_configuration_alone():
    preset = fp8_base.get_config("tiny")
    assert make_config(preset, {"training.steps": 20}).training.steps == 20
    assert preset.training.steps != 20


@pytest.mark.parametrize(
    ("config", "overrides", "line"),
    [
        ("fp8_bass:tiny", {}, "did you mean 'fp8_base'?"),
        ("fp8_base:tiny", {"training.stepps": 3}, "training.stepps"),
        ("fp8_base:tiny", {"training": 3}, "is a section"),
        ("fp8_base:tiny", {"training.steps": 0}, "config.training.steps: 0 is below 1"),
        ("fp8_base:tiny", {"training.steps": "20"}, "'20' is not int"),
        ({"model": 3}, {}, "not a section of fields"),
        (3, {}, "is no configuration"),
    ],
)
def test_a_wrong_configuration_is_one_line(tmp_path, config, overrides, line):
    with pytest.raises(ConfigError) as error:
        fp8jax.train(config, tmp_path / "run", overrides=overrides)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_wrong_places_are_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    calls = [
        lambda: fp8jax.load_run(tmp_path),
        lambda: fp8jax.evaluate(tmp_path / "nothing"),
        lambda: fp8jax.generate(tmp_path, "Anne"),
        lambda: fp8jax.train("fp8_base:tiny", tmp_path / "file"),
        lambda: fp8jax.train("fp8_base:tiny", tmp_path / "a", allow_config_change=["training.x"]),
    ]
    for call in calls:
        with pytest.raises((ConfigError, CheckpointError)) as error:
            call()
        assert "\n" not in str(error.value)


def test_a_step_that_is_not_loaded_is_refused(trained):
    run = fp8jax.load_run(trained[1])
    with pytest.raises(ConfigError, match="loaded at step 3"):
        fp8jax.evaluate(run, step=2)
    with pytest.raises(ConfigError, match="step=7"):
        fp8jax.load_run(trained[1], 7)


def test_a_run_trains_in_a_thread(trained):
    """Where Python allows no signal handlers; the run is finished already."""
    codes = []
    thread = threading.Thread(
        target=lambda: codes.append(fp8jax.train("fp8_base:tiny", trained[1], overrides=FIELDS))
    )
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_program_with_flags_of_its_own_can_import_the_functions():
    code = (
        "from absl import flags; flags.DEFINE_string('workdir', '', ''); flags.DEFINE_string('config', '', '');"
        "flags.DEFINE_integer('step', 0, ''); import fp8jax; fp8jax.train; fp8jax.evaluate"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_public_names_load_at_first_use():
    code = (
        "import sys, fp8jax; assert 'jax' not in sys.modules; assert 'train' in dir(fp8jax);"
        "[getattr(fp8jax, name) for name in fp8jax.__all__]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with contextlib.suppress(AttributeError):
        fp8jax.trian  # noqa: B018
        pytest.fail("an unknown name is an AttributeError")
