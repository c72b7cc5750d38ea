"""What the commands do, as functions: `fp8jax.train`, `load_run`, `generate`, `evaluate`.

    fp8jax.train("fp8_base:tiny", "runs/a", overrides={"training.steps": 20})    # 0: finished
    run = fp8jax.load_run("runs/a")
    fp8jax.generate(run, "Anne Elliot", tokens=50)
    fp8jax.evaluate(run)["bits_per_byte"]

A mistake raises ConfigError or CheckpointError, both ValueErrors, with the line that the command
prints. `train` prints its log to standard output, as the command does; the others print nothing.
"""

import functools
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import ml_collections

from fp8jax import config as config_lib
from fp8jax import hardware
from fp8jax.cli import checks
from fp8jax.cli.config_files import find_config, read_config, run_in
from fp8jax.cli.errors import local_directory
from fp8jax.config import Config, ConfigError
from fp8jax.interop import generation
from fp8jax.interop.inference import Inference
from fp8jax.plan import LoadedModel
from fp8jax.training import evaluation, loop


class LoadedRun:
    """A run's model, as `load_run` returns it.

    Attributes:
        workdir: directory of the run.
        step: step of the checkpoint.
        config: the run's configuration.
        params: parameters, a pytree of float32 arrays.
        tokenizer: the run's tokenizer, with `encode(text)` and `decode(ids)`.
    """

    def __init__(self, workdir: pathlib.Path, step: int, model: LoadedModel):
        self.workdir = workdir
        self.step = step
        self.model = model
        self.config = model.plan.config
        self.params = model.params

    @functools.cached_property
    def inference(self) -> Inference:
        """The model with its weights in BF16, ready to compute with."""
        return Inference(self.model)

    @property
    def tokenizer(self) -> Any:
        """The run's tokenizer."""
        return self.inference.tokenizer


def train(
    config: Config | ml_collections.ConfigDict | Mapping[str, Any] | str,
    workdir: str | pathlib.Path,
    *,
    overrides: Mapping[str, Any] | None = None,
    devices: Sequence[jax.Device] | None = None,
    allow_config_change: Sequence[str] = (),
) -> int:
    """Train a model, or continue the run in a directory, as `fp8jax train` does.

    SIGINT, SIGTERM, SIGHUP and SIGUSR1 finish the running step, save, and return 4.

    Args:
        config: "fp8_base:tiny", a preset with its size; the path of a file such as
            "my_config.py:tiny"; or a Config, ConfigDict or dictionary of section → field → value.
        workdir: directory of the run; made if missing.
        overrides: "section.field" → value, as `--config.section.field=value`.
        devices: devices of the mesh; None for all.
        allow_config_change: fields, such as "data.source", that may differ from those of the run in
            the directory.

    Returns:
        0 if finished, 3 if stopped by bad numbers or the early warning, 4 if stopped by a signal,
        both after saving.

    Raises:
        ConfigError: config, directory or data cannot be used; one line says what to change.
        CheckpointError: the run in the directory cannot be continued.
    """
    directory = local_directory("workdir", str(workdir))
    made = make_config(config, overrides, directory)
    checks.allowed_changes(allow_config_change)
    checks.directory("--workdir", directory)
    checks.data(made, directory)
    return loop.train(made, directory, devices, allow_config_change=allow_config_change)


def make_config(
    config: Config | ml_collections.ConfigDict | Mapping[str, Any] | str,
    overrides: Mapping[str, Any] | None = None,
    workdir: str | pathlib.Path | None = None,
) -> Config:
    """Return a validated configuration.

    Args:
        config: as for `train`.
        overrides: as for `train`.
        workdir: directory of a run that continues, whose schedules are kept.

    Raises:
        ConfigError: there is no such preset, section or field, or a value or a combination is not
            allowed.
    """
    given = dict(overrides or {})
    for path, value in given.items():
        _check_override(path, value)
    if isinstance(config, str):
        config = read_config("config", _with_size(config))
    if isinstance(config, Config):
        values: Any = config_lib.to_dict(config)
    elif isinstance(config, ml_collections.ConfigDict):
        values = config.copy_and_resolve_references()
    elif isinstance(config, Mapping):
        values = {
            section: dict(fields) if isinstance(fields, Mapping) else fields
            for section, fields in config.items()
        }
    else:
        raise ConfigError(
            f"config: {config!r} is no configuration; give 'fp8_base:tiny', a Config, a "
            f"ConfigDict or a dictionary"
        )
    _set(values, given)
    return config_lib.from_dict(values, run_in(pathlib.Path(workdir)) if workdir else None)


def _with_size(file: str) -> str:
    """Return a preset with its size; the one that suits this machine if it has none, as on the
    command line.
    """
    path, size = find_config("config", file)
    return f"{path}:{size or hardware.default_size()[0]}"


def _check_override(path: str, value: Any) -> None:
    section, _, field = path.partition(".")
    config_lib.check_name(section)
    if not field:
        raise ConfigError(f"config.{section}: is a section; set a field of it, '{section}.FIELD'")
    config_lib.check_field(section, field, value)


def _set(values: Any, overrides: Mapping[str, Any]) -> None:
    """Set fields, whose values have been checked."""
    for path, value in overrides.items():
        section, _, field = path.partition(".")
        if isinstance(values, ml_collections.ConfigDict):
            with values.ignore_type():
                getattr(values, section)[field] = value
        else:
            values.setdefault(section, {})[field] = value


def load_run(
    workdir: str | pathlib.Path,
    step: int | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> LoadedRun:
    """Load the model of a run from a checkpoint.

    Args:
        workdir: directory of the run.
        step: step of the checkpoint; None for the newest.
        devices: devices for the parameters; None for all. They may differ from those that trained.

    Raises:
        ConfigError: there is no run, or no such checkpoint.
        CheckpointError: the checkpoint cannot be read.
    """
    directory = local_directory("workdir", str(workdir))
    checks.run(directory)
    checks.checkpoint(directory, step)
    model, step = evaluation.load_run(directory, step, devices)
    return LoadedRun(directory, step, model)


def generate(
    run: LoadedRun | str | pathlib.Path,
    prompts: str | Sequence[str],
    *,
    tokens: int = 200,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Any:
    """Continue a prompt, or several in one batch, in BF16, as `fp8jax sample` does.

    Args:
        run: a run from `load_run`, or its directory, which is loaded on one device.
        prompts: a text, or a list of texts; '' begins a document.
        tokens: the most new tokens of each.
        temperature: 0 always takes the likeliest token; 1 draws with the model's probabilities.
        top_p: draw from the likeliest tokens of this total probability.
        seed: equal seeds give equal texts.

    Returns:
        The continuation, without the prompt: a text for a text, a list for a list.

    Raises:
        ValueError: an option is out of range, or a prompt is longer than the context.
    """
    if not isinstance(run, LoadedRun):
        # Generation reads all weights for every token, and sharded ones would travel each time.
        run = load_run(run, devices=jax.devices()[:1])
    single = isinstance(prompts, str)
    texts = generation.generate(
        run.inference,
        [prompts] if single else list(prompts),
        tokens=tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    return texts[0] if single else texts


def evaluate(
    run: LoadedRun | str | pathlib.Path,
    *,
    step: int | None = None,
    held_out: str | None = None,
    tasks: Sequence[str] = (),
    task_dir: str | pathlib.Path | None = None,
) -> dict[str, Any]:
    """Evaluate a checkpoint, as `fp8jax eval` does, which writes eval.json or eval_tasks.json.

    Args:
        run: a run from `load_run`, or its directory.
        step: step of the checkpoint, for a directory; None for the newest.
        held_out: other text than that of the run: "dirA" or "wiki=dirA,code=dirB".
        tasks: tasks of lm-evaluation-harness, which are run instead; "fog": those of the paper.
        task_dir: directory with task files of your own.

    Returns:
        `step`, `loss` in nats a token, `perplexity`, `bits_per_byte`, `tokens` and `bytes`; of
        tasks, the harness's `results`, and what `failed`.

    Raises:
        ConfigError: there is no run, checkpoint, text or task of that name.
    """
    if isinstance(tasks, str):
        tasks = tasks.split(",")
    if isinstance(run, LoadedRun) and step not in (None, run.step):
        raise ConfigError(f"step={step}: the run is loaded at step {run.step}; give its directory")
    if held_out is not None:
        checks.held_out(held_out)
    if tasks and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("tasks: need lm-evaluation-harness: pip install 'fp8jax[eval]'")
    if not isinstance(run, LoadedRun):
        run = load_run(run, step)
    if tasks:
        return _evaluate_tasks(run, tasks, task_dir)
    return evaluation.evaluate_model(run.model, run.workdir, run.step, held_out=held_out)


def _evaluate_tasks(
    run: LoadedRun, names: Sequence[str], task_dir: str | pathlib.Path | None
) -> dict[str, Any]:
    from fp8jax.interop import lm_eval

    directory = pathlib.Path(task_dir) if task_dir else None
    tasks = lm_eval.load_tasks(list(names), directory)

    def keep(found: dict[str, Any]) -> None:
        evaluation.write_json(run.workdir / "eval_tasks.json", {"step": run.step, **found})

    return {"step": run.step, **lm_eval.evaluate(run.inference, tasks, keep)}
