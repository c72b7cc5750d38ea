"""lm-evaluation-harness on our models: its `LM` interface, its tasks, and one line for what stands in the way.

    tasks = load_tasks(["lambada_openai", "piqa"], task_dir=None)       # names of the harness; "fog" is FOG_TASKS
    evaluate(Inference(model), tasks)["results"]                        # {"piqa": {"acc,none": 0.6, ...}, ...}

Needs the package lm_eval (requirements-eval.txt), which does not need torch, nor does anything here. The harness carries no
data: its tasks download theirs once. Task files of one's own, with data beside them, go into a directory, `task_dir`; one
named like a task of the harness takes its place. What is computed is in scoring.py.
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

# What the FOG paper evaluates.
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
    """The harness's view of a model."""

    def __init__(self, inference: Inference):
        super().__init__()
        self.inference = inference

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Of (context, continuation): log probability in nats, and whether greedy decoding would write it."""
        return scoring.log_likelihoods(self.inference, [request.args for request in requests])

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of (text,): log probability in nats."""
        return scoring.rolling_log_likelihoods(
            self.inference, [request.args[0] for request in requests]
        )

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Of (context, options): the text up to a stop string."""
        return scoring.generate_until(self.inference, [request.args for request in requests])


def evaluate(
    inference: Inference,
    tasks: Sequence[Any],
    keep: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """Run tasks from `load_tasks`, one after another; few-shot examples and metrics are as each task's file says.

    Args:
        inference: the model.
        tasks: a task that cannot be run leaves the others as they are.
        keep: given what is done after each task: what this returns in the end.

    Returns:
        `results` (task → metric → value), `n-shot` and `versions` (by task), `lm_eval`, the harness's version, and `failed` (task → why).
    """
    # Its bootstrap forks, and a fork of a process with JAX's threads may never return; in this process fewer draws must do.
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
        except Exception as error:  # whatever a task's own code raises
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
    """The harness's task objects, with their data.

    Args:
        names: of tasks, the harness's groups and tags, or our GROUPS.
        task_dir: directory with task files (YAML); paths of data in them are relative to it.

    Raises:
        ConfigError: an unknown task; data that is neither here nor can be downloaded; no such directory.
    """
    names = list(dict.fromkeys(task for name in names for task in GROUPS.get(name, (name,))))
    if task_dir is not None and not task_dir.is_dir():
        raise ConfigError(f"--task_dir: {task_dir} is not a directory")
    manager = TaskManager(include_path=task_dir and str(task_dir.absolute()))
    for name in names:
        if name not in manager.task_index:
            raise ConfigError(
                f"--tasks: {name!r} is not a task of the harness{did_you_mean(name, [*GROUPS, *manager.all_tasks])}"
                + ("" if task_dir else "; a task file of your own is found with --task_dir=DIR")
            )
    datasets.disable_progress_bars()
    for library in (
        "huggingface_hub",
        "lm_eval",
    ):  # each retry and each default of a task file is a line otherwise
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
            # Asking the network for every other task as well would take half a minute each.
            datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
        except Exception as error:  # its file may bring code of its own
            reason = (str(error).splitlines() or [""])[0]
            raise ConfigError(
                f"--tasks: {name}: its data cannot be read: {type(error).__name__}: {reason}"
            ) from error
    if missing:
        raise ConfigError(
            f"--tasks: the data of {', '.join(missing)} is not on this machine and huggingface.co cannot be reached; run "
            "once with a network, copy its HF_HOME here, or give task files with local data by --task_dir=DIR"
        )
    return loaded
