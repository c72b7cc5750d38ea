"""Checkpoints: bit-equal, on any mesh, safe against donation and against being killed; errors that name the array."""

import dataclasses
import logging
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from fp8jax import config as config_lib
from fp8jax.training import checkpoint


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Scale:
    history: jax.Array
    scale: jax.Array


class Pair(NamedTuple):
    first: jax.Array
    second: tuple


def sharding(shape, names, spec):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    mesh = jax.sharding.Mesh(devices, names, axis_types=(AxisType.Auto,) * len(names))
    return lambda x: NamedSharding(mesh, spec if x.ndim == 2 else P())


EIGHT = sharding((8,), ("fsdp",), P("fsdp"))
FOUR = sharding((2, 2), ("data", "tensor"), P("tensor", "data"))
ONE = sharding((1,), ("fsdp",), P())


def make_state(where=EIGHT):
    """Every container and dtype that a run may hold, with NaN payloads and negative zeros."""
    w = jax.random.normal(jax.random.key(0), (16, 8))
    params = {
        "blocks": {"w": w, "bf16": w.astype(jnp.bfloat16).at[0, 0].set(jnp.nan).at[0, 1].set(-0.0)},
        "e4m3": w.astype(jnp.float8_e4m3fn),
        "e5m2": w.astype(jnp.float8_e5m2).at[1, 0].set(jnp.inf),
    }
    state = {
        "params": params,
        "scaling": {
            "qkv": Scale(jnp.arange(4.0), jnp.float32(0.5)),
            "none": {},
            "pair": Pair(jnp.int8(-3), (w > 0,)),
        },
        "opt_state": optax.adamw(1e-3).init({"w": w}),
        "counters": {"step": jnp.int32(7), "key": jax.random.key(3), "bad": jnp.uint32(2**32 - 1)},
        "empty": {},
    }
    return jax.tree.map(lambda x: jax.device_put(x, where(x)), state)


def abstract(state, where):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where(x)), state)


def bits(x):
    x = jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
    return np.asarray(x).tobytes()


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and bits(x) == bits(y)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with one checkpoint, for tests that only read."""
    workdir = tmp_path_factory.mktemp("run")
    with checkpoint.Checkpoints(workdir, keep=2) as checkpoints:
        checkpoints.save(7, make_state(), {"step": 7, "seen": [1, None, "x", 0.5]})
    return workdir


@pytest.mark.parametrize("where", [EIGHT, FOUR, ONE])
def test_restore_is_bit_equal_on_any_mesh(run, where):
    state = make_state()
    restored, data_state = checkpoint.Checkpoints(run, keep=2).restore(7, abstract(state, where))
    assert_same(restored, state)
    assert data_state == {"step": 7, "seen": [1, None, "x", 0.5]}
    for x in jax.tree.leaves(restored):
        assert x.sharding.is_equivalent_to(where(x), x.ndim)


def test_restored_state_may_be_donated(run):
    state = make_state()
    restored, _ = checkpoint.Checkpoints(run, keep=2).restore(7, abstract(state, EIGHT))
    double = jax.jit(lambda tree: jax.tree.map(lambda x: x + x, tree), donate_argnums=0)
    result = double(restored["opt_state"])
    assert_same(result, jax.tree.map(lambda x: x + x, state["opt_state"]))


def test_partial_restore_reads_chosen_items(run):
    state = make_state()
    wanted = {name: abstract(state[name], ONE) for name in ("params", "scaling")}
    checkpoints = checkpoint.Checkpoints(run, keep=2)
    restored, _ = checkpoints.restore(7, wanted, partial=True)
    assert_same(restored, {name: state[name] for name in wanted})
    with pytest.raises(
        checkpoint.CheckpointError,
        match=r"counters/bad is \(\) uint32 in the checkpoint, absent in",
    ):
        checkpoints.restore(7, wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda p: p["blocks"].update(w=jnp.zeros((16, 4))),
            r"params/blocks/w is \(16, 8\) float32 in the checkpoint, \(16, 4\) float32 in this run; use ",
        ),
        (
            lambda p: p.update(e4m3=p["e5m2"]),
            r"params/e4m3 is \(16, 8\) float8_e4m3fn in .*, \(16, 8\) float8_e5m2 in",
        ),
        (
            lambda p: p["blocks"].update(w_gate=jnp.zeros(3)),
            r"blocks/w_gate is absent \(nearest: params/blocks/w\)",
        ),
        (
            lambda p: p.pop("e5m2"),
            r"params/e5m2 is \(16, 8\) float8_e5m2 in the checkpoint, absent in this run",
        ),
    ],
)
def test_first_difference_is_named(run, change, message):
    params = make_state()["params"]
    change(params)
    with pytest.raises(checkpoint.CheckpointError, match=message) as error:
        checkpoint.Checkpoints(run, keep=2).restore(
            7, {"params": abstract(params, ONE)}, partial=True
        )
    assert "\n" not in str(error.value)


def test_missing_step_lists_the_others(run, tmp_path):
    with pytest.raises(
        checkpoint.CheckpointError, match="no checkpoint of step 8; complete checkpoints: 7"
    ):
        checkpoint.Checkpoints(run, keep=2).restore(8, {})
    nothing = checkpoint.Checkpoints(tmp_path / "new", keep=2)
    assert nothing.latest_step() is None
    with pytest.raises(checkpoint.CheckpointError, match="complete checkpoints: none"):
        nothing.restore(1, {})
    assert not (tmp_path / "new").exists()  # looking writes nothing


def test_donated_buffers_do_not_reach_the_checkpoint(tmp_path):
    where = EIGHT
    make = jax.jit(lambda: {"w": jnp.arange(2.0**20).reshape(1024, 1024), "v": jnp.arange(2.0**18)})
    state = jax.tree.map(lambda x: jax.device_put(x, where(x)), make())
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, {"params": state}, {})
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
        checkpoints.wait()
        restored, _ = checkpoints.restore(1, {"params": abstract(state, where)})
    assert_same(restored["params"], make())


def test_newest_are_kept_and_a_saved_step_stays(tmp_path):
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        for step in (10, 20, 30, 30):
            checkpoints.save(step, {"counters": {"step": jnp.int32(step)}}, {"step": step})
        checkpoints.save(30, {"counters": {"step": jnp.int32(0)}}, {"step": 0})
    with checkpoint.Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.steps() == [20, 30]
        restored, data_state = checkpoints.restore(
            30, {"counters": {"step": abstract(jnp.int32(0), ONE)}}
        )
        assert restored["counters"]["step"] == 30 and data_state == {"step": 30}
        checkpoints.save(40, {"counters": {"step": jnp.int32(40)}}, {"step": 40})
        checkpoints.wait()
        assert checkpoints.steps() == [30, 40] and checkpoints.latest_step() == 40


KILLED = """
    import os, signal, sys
    import jax, jax.numpy as jnp
    from fp8jax.training import checkpoint
    checkpoints = checkpoint.Checkpoints(sys.argv[1], keep=1)
    checkpoints.save(1, {"params": {"w": jnp.ones(3)}}, {})
    checkpoints.wait()
    checkpoints.save(2, {"params": {"w": jax.random.normal(jax.random.key(0), (2**23,))}}, {})
    while len(os.listdir(checkpoints.directory)) < 2:
        pass
    assert checkpoints.latest_step() == 1
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_kill_in_the_middle_of_a_save_leaves_the_older_one(tmp_path):
    command = [sys.executable, "-c", textwrap.dedent(KILLED), tmp_path]
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=pathlib.Path(__file__).parents[2]
    )
    assert run.returncode == -signal.SIGKILL, run.stderr
    left = os.listdir(tmp_path / "checkpoints")
    assert len(left) == 2 and "1" in left and "2" not in left  # so it was the middle of a save
    with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.latest_step() == 1
        wanted = {
            "params": {"w": jax.ShapeDtypeStruct((3,), jnp.float32, sharding=ONE(jnp.ones(3)))}
        }
        restored, _ = checkpoints.restore(1, wanted)
        checkpoints.save(2, restored, {})  # takes the place of what was left
    assert os.listdir(tmp_path / "checkpoints") == ["2"]


def test_failed_save_is_reported_and_is_no_checkpoint(tmp_path):
    (tmp_path / "checkpoints").write_text("a file in the way")
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    with pytest.raises(
        checkpoint.CheckpointError, match="checkpoints: saving failed: .*; check free space"
    ):
        checkpoints.save(1, {"params": {"w": jnp.ones(3)}}, {})


def test_orbax_is_quiet_under_absl(tmp_path, caplog):
    with (
        caplog.at_level(logging.INFO, logger="absl"),
        checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints,
    ):
        checkpoints.save(1, {"params": {"w": jnp.ones(3)}}, {})
    assert [record for record in caplog.records if "orbax" in record.pathname] == []


def test_config_round_trip_and_errors(tmp_path):
    config = config_lib.from_dict(
        {"training": {"steps": 50, "seed": 3}, "optimizer": {"warmup_steps": 5}}
    )
    checkpoint.save_config(tmp_path / "new", config)
    assert checkpoint.load_config(tmp_path / "new") == config
    assert os.listdir(tmp_path / "new") == ["config.json"]
    with pytest.raises(checkpoint.CheckpointError, match=r"config\.json: no such file"):
        checkpoint.load_config(tmp_path)
    for text in ('{"training": {"stepz": 3}}', "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(config_lib.ConfigError, match=r"config\.json: "):
            checkpoint.load_config(tmp_path)
