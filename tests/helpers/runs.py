"""Runs of a micro model, as tests of many rooms make them: a config, training, and what a run left behind."""

import jax
import numpy as np

from fp8jax import config as config_lib
from fp8jax.monitor.writers import read_metrics
from fp8jax.plan import make_plan
from fp8jax.training import loop
from fp8jax.training.checkpoint import Checkpoints, save_config
from fp8jax.training.step import TrainProgram

MICRO = {
    "model": {"layers": 2, "width": 32, "ffn_width": 32, "heads": 2, "kv_heads": 1},
    "data": {"sequence_length": 32},
    "training": {"steps": 8, "batch_size": 16},
    "optimizer": {"warmup_steps": 2},
    "evaluation": {"every": 4, "batches": 2},
    "monitor": {"every": 3},
    "log": {"every": 1, "report_minutes": 0},  # a report is another process, of seconds
    "checkpoint": {"every": 3},
}
ONE, EIGHT = {"fsdp": 1}, {"data": 2, "fsdp": 4}


def micro(**changes) -> config_lib.Config:
    """The micro config, with fields of sections changed."""
    sections = {"mesh": ONE} | MICRO
    return config_lib.from_dict(
        {name: sections.get(name, {}) | changes.get(name, {}) for name in sections | changes}
    )


def on_mesh(mesh, **changes) -> config_lib.Config:
    """The same with eight heads, so that every mesh of eight devices divides it."""
    return micro(
        model={"width": 64, "ffn_width": 64, "heads": 8, "kv_heads": 8}, mesh=mesh, **changes
    )


def devices_of(config):
    """As many devices as the config's mesh has."""
    mesh = config.mesh
    return jax.devices()[: mesh.data * mesh.fsdp * mesh.tensor * mesh.sequence]


def train(config, workdir):
    """Train on those devices; the exit code."""
    return loop.train(config, workdir, devices_of(config))


def program_of(config) -> TrainProgram:
    """The program of a config on those devices."""
    return TrainProgram(make_plan(config, devices_of(config)))


def saved(config, workdir):
    """All arrays of the newest checkpoint, by path, and the data's state."""
    with Checkpoints(workdir, keep=1) as checkpoints:
        items, data = checkpoints.restore(
            checkpoints.latest_step(), program_of(config).abstract_state.items()
        )
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(items)
    }, data


def logged(workdir):
    """The log without what depends on the clock."""
    timed = ("tokens_per_second", "step_seconds", "data_wait_seconds")
    return [
        {key: value for key, value in entry.items() if key not in timed}
        for entry in read_metrics(workdir / "metrics.jsonl")
    ]


def save_untrained(config, workdir):
    """A run that has saved the state it begins with as that of step 1, and has not trained; its program and state."""
    program = program_of(config)
    state = program.init()
    save_config(workdir, config)
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, dict(state.items()), {"step": 1})
    return program, state
