"""Run the command line of eval.py; JAX is loaded after the flags have been checked."""

import importlib.util
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from fp8jax.cli import checks, processes
from fp8jax.cli.errors import local_directory
from fp8jax.cli.flags import WORKDIR, run
from fp8jax.config import ConfigError
from fp8jax.monitor.stages import Stages

USAGE = """Evaluates a run's checkpoint in BF16: held-out loss, perplexity and bits per byte, or tasks of lm-evaluation-harness.

    python eval.py --workdir=runs/fp8_base-tiny
    python eval.py --workdir=runs/fp8_base-tiny --step=450
    python eval.py --workdir=runs/fp8_base-tiny --tasks=lambada_openai,piqa      # docs/evaluation.md

Exit codes: 0 finished, 2 bad usage, config, checkpoint or task.
"""

_STEP = flags.DEFINE_integer(
    "step", None, "checkpoint to evaluate; default: the newest", lower_bound=0
)
_TASKS = flags.DEFINE_list(
    "tasks",
    [],
    "tasks of lm-evaluation-harness, separated by commas; 'fog': those of the FOG paper",
)
_TASK_DIR = flags.DEFINE_string(
    "task_dir", None, "directory with task files of your own, for --tasks"
)
_HELD_OUT = flags.DEFINE_string(
    "held_out",
    None,
    "other text than the run's: 'dirA' or 'wiki=dirA,code=dirB', as config.data.held_out",
)

flags.adopt_module_key_flags(processes)


def main(argv: Sequence[str], usage: str = USAGE) -> int:
    """Run eval.py, whose --help begins with `usage`, and return the exit code."""
    return run(argv, _joined, usage)


def _joined() -> int:
    if not WORKDIR.value:
        raise ConfigError("--workdir: is missing; for example --workdir=runs/fp8_base-tiny")
    if _TASKS.value and importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "--tasks needs lm-evaluation-harness: pip install -r requirements-eval.txt"
        )
    workdir = local_directory("workdir", WORKDIR.value)
    checks.run(workdir)
    checks.checkpoint(workdir, _STEP.value)
    if _HELD_OUT.value is not None:
        checks.held_out(_HELD_OUT.value)
    if _TASK_DIR.value is not None and not _TASKS.value:
        raise ConfigError(f"--task_dir={_TASK_DIR.value}: needs --tasks, the names of tasks there")
    if _TASK_DIR.value is not None and not local_directory("task_dir", _TASK_DIR.value).is_dir():
        raise ConfigError(
            f"--task_dir={_TASK_DIR.value}: no such directory; give one with task files"
        )
    stage = Stages(processes.is_first())
    with stage("loading JAX"):
        from fp8jax.training import evaluation  # noqa: F401
    with processes.joined(stage):
        return _evaluate_tasks(workdir, stage) if _TASKS.value else _evaluate(workdir, stage)


def _evaluate(workdir: pathlib.Path, stage: Stages) -> int:
    from fp8jax.parallel import distributed
    from fp8jax.training import evaluation

    found = evaluation.evaluate_run(workdir, _STEP.value, stage=stage, held_out=_HELD_OUT.value)
    if not distributed.is_first():
        return 0
    texts = found.get("texts", {})
    for name, values in {"": found, **texts}.items():
        print(
            f"step {found['step']}: {name}{': ' * bool(name)}loss {values['loss']:.4f}  "
            f"perplexity {values['perplexity']:.4f}  "
            f"bits per byte {values['bits_per_byte']:.4f}  ({values['tokens']:,} tokens, "
            f"{values['bytes']:,} bytes)"
        )
    return 0


def _evaluate_tasks(workdir: pathlib.Path, stage: Stages) -> int:
    with stage("loading lm-evaluation-harness"):
        from fp8jax.interop import lm_eval
    from fp8jax.interop.inference import Inference
    from fp8jax.parallel import distributed
    from fp8jax.training import evaluation

    # This comes before the model, because faults of tasks should be reported at once.
    with stage("loading tasks"):
        directory = pathlib.Path(_TASK_DIR.value) if _TASK_DIR.value else None
        tasks = lm_eval.load_tasks(_TASKS.value, directory)
    for name, reason in lm_eval.unsupported(tasks).items():
        stage.message(f"{name} will fail: {reason}")
    model, step = evaluation.load_run(workdir, _STEP.value, stage=stage)

    def keep(found: dict[str, Any]) -> None:
        evaluation.write_json(workdir / "eval_tasks.json", {"step": step, **found})

    with stage(f"evaluating {', '.join(_TASKS.value)}"):
        found = lm_eval.evaluate(Inference(model), tasks, keep)
    if distributed.is_first():
        print("\n".join(f"step {step}: {line}" for line in _lines(found)))
    if found["failed"]:
        failed = "; ".join(f"{name}: {reason}" for name, reason in found["failed"].items())
        raise ConfigError(
            f"--tasks: {failed}" + ("; the others are done" if found["results"] else "")
        )
    return 0


def _lines(found: dict[str, Any]) -> Iterator[str]:
    """Yield a line per metric; the harness names them 'acc,none' and 'acc_stderr,none': metric,
    then filter of answers.
    """
    for task, metrics in found["results"].items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            if not comma or metric.endswith("_stderr"):
                continue
            name = metric if chosen == "none" else f"{metric} ({chosen})"
            error = metrics.get(f"{metric}_stderr,{chosen}")
            spread = f" ± {error:.4f}" if isinstance(error, float) else ""
            yield f"{task:<24} {found['n-shot'].get(task, 0)}-shot  {name:<18} {value:.4f}{spread}"
