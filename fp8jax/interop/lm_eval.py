"""Run lm-evaluation-harness on our models: its `LM` interface, its tasks, and one-line errors.

    tasks = load_tasks(["lambada_openai", "piqa"], task_dir=None)       # names of the harness; "fog" is FOG_TASKS
    evaluate(Inference(model), tasks)["results"]                        # {"piqa": {"acc,none": 0.6, ...}, ...}

The module needs the package lm_eval (requirements-eval.txt); torch is not needed. The harness holds
no data: its tasks download theirs once. Task files of your own, with data beside them, go into a
directory, `task_dir`; one named like a task of the harness replaces it. scoring.py computes the
answers.
"""

import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any

import datasets
import huggingface_hub
import jax
from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from fp8jax.config import ConfigError, did_you_mean
from fp8jax.interop import scoring
from fp8jax.interop.inference import Inference

# The tasks that the FOG paper evaluates.
FOG_TASKS = (
    "lambada_openai",
    "winogrande",
    "piqa",
    "social_iqa",
    "openbookqa",
    "arc_easy",
    "commonsense_qa",
    "triviaqa",
    "wikitext",
    "hellaswag",
)
GROUPS = {"fog": FOG_TASKS}


class Harness(LM):
    """A model with the harness's interface."""

    def __init__(self, inference: Inference):
        super().__init__()
        self.inference = inference

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Return, for each (context, continuation), log probability in nats, and whether greedy
        decoding would write it.
        """
        return scoring.log_likelihoods(self.inference, _arguments(requests))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return, for each (text,), its log probability in nats."""
        return scoring.rolling_log_likelihoods(
            self.inference, [request.args[0] for request in requests]
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return, for each (context, options), the text up to a stop string."""
        return scoring.generate_until(self.inference, _arguments(requests))


def evaluate(
    inference: Inference,
    tasks: Sequence[Any],
    keep: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """Run tasks from `load_tasks`, one after another, with the few-shot examples and metrics of
    each task's file.

    Args:
        inference: the model.
        tasks: the tasks; one that cannot be run does not affect the others.
        keep: called after each task with the results so far, in the form that is returned.

    Returns:
        `results` (task → metric → value), `n-shot` and `versions` (by task), `lm_eval`, the
        harness's version, and `failed` (task → why).
    """
    # Its bootstrap forks, and a fork of a process with JAX's threads may never return; in this
    # process we take fewer draws.
    os.environ["DISABLE_MULTIPROC"] = "1"
    done: dict[str, Any] = {
        "results": {},
        "n-shot": {},
        "versions": {},
        "lm_eval": version("lm_eval"),
        "failed": {},
    }
    for task in tasks:
        try:
            with contextlib.redirect_stdout(sys.stderr):
                found: Any = simple_evaluate(
                    model=Harness(inference),
                    tasks=[task],
                    task_manager=TaskManager(include_defaults=False),
                    log_samples=False,
                    bootstrap_iters=1000,
                )
        except jax.errors.JaxRuntimeError:
            raise
        except Exception as error:  # a task's own code may raise any
            done["failed"][_name(task)] = (
                f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            )
        else:
            for name in ("results", "n-shot", "versions"):
                done[name] |= found[name]
        keep(done)
    return done


def unsupported(tasks: Sequence[Any]) -> dict[str, str]:
    """Return which tasks from `load_tasks` cannot be run, and why, as far as their files say."""
    found = {}
    for task in tasks:
        for one in task.get_all_tasks() if isinstance(task, Group) else [task]:
            try:
                if one.OUTPUT_TYPE == "generate_until":
                    scoring.check_options(one.config.generation_kwargs or {})
            except (ValueError, TypeError) as error:
                found[one.task_name] = str(error)
    return found


def _name(task: Any) -> str:
    return task.name if isinstance(task, Group) else task.task_name


def load_tasks(names: Sequence[str], task_dir: pathlib.Path | None = None) -> list[Any]:
    """Return the harness's task objects, with their data.

    Args:
        names: names of tasks, the harness's groups and tags, or our GROUPS.
        task_dir: directory with task files (YAML); paths of data in them are relative to it.

    Raises:
        ConfigError: a task is unknown, its data is neither here nor can be downloaded, or the
            directory does not exist.
    """
    names = list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))
    if task_dir is not None and not task_dir.is_dir():
        raise ConfigError(f"--task_dir: {task_dir} is not a directory")
    manager = TaskManager(include_path=task_dir and str(task_dir.absolute()))
    for name in names:
        if name not in manager.task_index:
            raise ConfigError(
                f"--tasks: {name!r} is not a task of the "
                f"harness{did_you_mean(name, [*GROUPS, *manager.all_tasks])}"
                + ("" if task_dir else "; a task file of your own is found with --task_dir=DIR")
            )
    datasets.disable_progress_bars()
    for library in (
        "huggingface_hub",
        "lm_eval",
    ):  # otherwise each retry and each default of a task file is a line
        logging.getLogger(library).setLevel(logging.ERROR)
    with contextlib.chdir(task_dir or "."):
        return _load(manager, names)


def _load(manager: TaskManager, names: list[str]) -> list[Any]:
    loaded, missing = [], []
    for name in names:
        try:
            task = manager.load([name])
            loaded += (task.get("groups") or task["tasks"]).values()
        except ConnectionError:
            missing.append(name)
            # Trying the network for every other task as well would take half a minute each.
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        except Exception as error:  # its file may hold code of its own
            reason = (str(error).splitlines() or [""])[0]
            raise ConfigError(
                f"--tasks: {name}: its data cannot be read: {type(error).__name__}: {reason}"
            ) from error
    if missing:
        raise ConfigError(
            f"--tasks: the data of {', '.join(missing)} is not on this machine and "
            f"huggingface.co cannot be reached; run "
            "once with a network, copy its HF_HOME here, or give task files with local data by "
            "--task_dir=DIR"
        )
    return loaded


def _arguments(requests: list[Instance]) -> list[Any]:
    """Return the arguments of the harness's requests, whose types depend on the kind of request."""
    return [request.args for request in requests]
