"""The mesh's order, what it must divide, and what is known of devices that are not there; rows of a process; agreement of several."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from fp8jax import config as config_lib
from fp8jax.config import MESH_AXES, ConfigError
from fp8jax.parallel import distributed
from fp8jax.parallel import mesh as mesh_lib
from fp8jax.parallel.rows import Rows
from fp8jax.parallel.sharding import activation_specs, attention_axes, partition_spec
from fp8jax.plan import make_plan
from fp8jax.training.step import TrainProgram

MODEL = {
    "layers": 2,
    "width": 16,
    "ffn_width": 16,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 4,
    "vocab_size": 24,
    "architecture": "llama3",
    "tied_embeddings": False,
}


def config_of(mesh, model=None, **sections):
    data, training = {"sequence_length": 16}, {"steps": 1, "batch_size": 8}
    return config_lib.from_dict(
        {
            "model": MODEL | (model or {}),
            "mesh": mesh,
            "optimizer": {"warmup_steps": 0},
            "data": data | sections.get("data", {}),
            "training": training | sections.get("training", {}),
        }
    )


def test_neighbours_lie_along_the_inner_axes():
    """`data` outermost, `sequence` innermost, whatever the devices' order in the list."""
    devices = jax.devices()[:8]
    mesh = mesh_lib.make_mesh(config_of({"data": 2, "fsdp": -1, "sequence": 2}), devices[::-1])
    assert mesh.axis_names == MESH_AXES and mesh.devices.shape == (2, 2, 1, 2)
    ids = [device.id for device in mesh.devices.ravel()]
    assert ids == sorted(ids)


@dataclasses.dataclass(frozen=True)
class Fake:
    """A device that is not there."""

    id: int
    process_index: int = 0
    platform: str = "gpu"


def test_processes_lie_together_and_what_crosses_them_is_told():
    """Numbers dealt out to processes in turn: each process's devices still come one after another."""
    devices = [Fake(number, 1 - number % 2) for number in range(8)]
    found = mesh_lib._arrange(devices, (2, 2, 2, 1))
    assert [device.process_index for device in found.ravel()] == [0] * 4 + [1] * 4
    assert [device.id for device in found.ravel()] == [1, 3, 5, 7, 0, 2, 4, 6]
    mesh = types.SimpleNamespace(
        shape=dict(zip(MESH_AXES, found.shape, strict=True)),
        devices=found,
        size=8,
        axis_names=MESH_AXES,
    )
    assert (
        mesh_lib.describe(mesh)
        == "data 2 x fsdp 2 x tensor 2 (8 devices on 2 nodes; data goes between nodes)"
    )
    alone = types.SimpleNamespace(
        shape=dict.fromkeys(MESH_AXES, 1), devices=found[:1, :1, :1], size=1, axis_names=MESH_AXES
    )
    assert mesh_lib.describe(alone) == "no sharding (1 device)"


@pytest.mark.parametrize(
    ("mesh", "changes", "field"),
    [
        ({"data": 8, "fsdp": 1}, {"training": {"batch_size": 4}}, "training.batch_size"),
        (
            {"data": 8, "fsdp": 1},
            {"training": {"batch_size": 8, "microbatches": 2}},
            "training.batch_size",
        ),
        ({"fsdp": 8}, {"model": {"width": 12}}, "model.width"),
        ({"fsdp": 1, "tensor": 8}, {}, "model.kv_heads"),
        ({"fsdp": 2, "tensor": 4}, {"model": {"ffn_width": 18}}, "model.ffn_width"),
        ({"fsdp": 2, "tensor": 4}, {"model": {"vocab_size": 26}}, "model.vocab_size"),
        (
            {"fsdp": 2, "tensor": 2, "sequence": 2},
            {"data": {"sequence_length": 18}},
            "data.sequence_length",
        ),
    ],
)
def test_what_a_mesh_does_not_divide_is_named(mesh, changes, field):
    with pytest.raises(
        ConfigError, match=f"config.{field}.*: .*is not divisible by.*; (the nearest|no) mesh"
    ):
        mesh_lib.make_mesh(config_of(mesh, **changes), jax.devices()[:8])


def test_a_mesh_of_too_few_devices_is_refused():
    with pytest.raises(
        ConfigError,
        match="does not make 8 devices; the nearest mesh that works is --config.mesh.data=1 --config.mesh.fsdp=4",
    ):
        mesh_lib.make_mesh(config_of({"fsdp": 3, "tensor": 2}), jax.devices()[:8])


@pytest.mark.parametrize(
    ("platform", "fields", "emulated", "kernels"),
    [
        ("gpu", {"compute_capability": "8.0"}, True, False),
        ("gpu", {"compute_capability": "8.9"}, False, False),
        ("gpu", {"compute_capability": "9.0"}, False, True),
        ("gpu", {"compute_capability": "10.0"}, False, False),
        ("tpu", {"device_kind": "TPU v5p"}, True, False),
        ("tpu", {"device_kind": "TPU7x"}, False, False),
        ("cpu", {}, True, False),
    ],
)
def test_what_devices_have(platform, fields, emulated, kernels):
    device = types.SimpleNamespace(platform=platform, **fields)
    config = config_lib.from_dict({})
    assert (
        mesh_lib.emulates_fp8(config, device) == emulated
        and mesh_lib.runs_kernels(device) == kernels
    )
    for backend in ("native", "emulated"):
        asked = config_lib.from_dict({"fp8": {"backend": backend}})
        assert mesh_lib.emulates_fp8(asked, device) == (backend == "emulated")


def gpus(processes, per_process=2, platform="gpu", nodes=1):
    """Devices as JAX gives them, so many a process, the processes spread over nodes."""
    return [
        types.SimpleNamespace(
            platform=platform, process_index=process, slice_index=process * nodes // processes
        )
        for process in range(processes)
        for _ in range(per_process)
    ]


@pytest.mark.parametrize(
    ("devices", "processes", "model", "looped"),
    [
        (gpus(1), 1, {}, False),
        (gpus(1), 1, {"layers": 33}, True),
        (gpus(1), 1, {"layers": 33, "scan_layers": False}, False),
        (gpus(1), 1, {"scan_layers": True}, True),
        (gpus(4), 4, {}, False),  # one process a GPU of a node
        (gpus(4, nodes=2), 4, {}, True),
        (gpus(2), 1, {}, True),  # absent devices: one process a node
        (gpus(1, platform="tpu"), 1, {}, True),
        (jax.devices()[:1], 1, {}, True),
    ],
)
def test_layers_are_compiled_one_by_one_on_the_gpus_of_a_node(
    monkeypatch, devices, processes, model, looped
):
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    config = config_lib.from_dict({"model": model})
    assert mesh_lib.loops_over_layers(config, devices) == looped


def test_every_matrix_is_split_over_fsdp_and_tensor():
    """Parameters and both moments: each device holds a fourth of every matrix, by the dimensions that belong together."""
    config = config_of({"fsdp": 2, "tensor": 2, "sequence": 2})
    program = TrainProgram(make_plan(config, jax.devices()[:8], vocab_size=24))
    state, seen = program.abstract_state, set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        {"params": state.params, "opt_state": state.opt_state}
    ):
        if getattr(path[-1], "key", None) == "w":
            part = leaf.sharding.shard_shape(leaf.shape)
            assert np.prod(part) * 4 == np.prod(leaf.shape), path
            seen.add(".".join(str(getattr(key, "key", getattr(key, "name", ""))) for key in path))
    assert len(seen) == 3 * 7  # qkv, out, gate, up, down, embedding, head
    blocks = state.params["blocks"]
    shapes = {
        name: leaf.sharding.shard_shape(leaf.shape)
        for name, leaf in (
            ("qkv", blocks["attention"]["qkv"]["w"]),
            ("out", blocks["attention"]["out"]["w"]),
            ("up", blocks["feed_forward"]["up"]["w"]),
            ("down", blocks["feed_forward"]["down"]["w"]),
            ("embedding", state.params["embedding"]["w"]),
        )
    }
    assert shapes == {
        "qkv": (2, 8, 2, 4, 4),
        "out": (2, 2, 2, 4, 8),
        "up": (2, 8, 8),
        "down": (2, 8, 8),
        "embedding": (12, 8),
    }


def test_activations_are_split_over_all_axes_that_there_are():
    batch = ("data", "fsdp")
    assert partition_spec(("batch", "residual", None)) == PartitionSpec(
        batch, ("sequence", "tensor"), None
    )
    assert activation_specs("embed") == (
        PartitionSpec(batch, ("sequence", "tensor"), None),
        PartitionSpec(batch, "sequence", None),
    )
    assert activation_specs("mlp") == (PartitionSpec(batch, "sequence", "tensor"),) * 2
    mesh = mesh_lib.make_mesh(config_of({"fsdp": 2, "tensor": 2, "sequence": 2}), jax.devices()[:8])
    with jax.set_mesh(mesh):
        assert attention_axes(4) == ("tensor", "sequence") and attention_axes(2) == ("tensor",)


def test_a_process_loads_the_rows_of_its_devices():
    """Of two microbatches of four rows: the second half of each, once, though two devices share every row."""
    parts = {
        Fake(0): (slice(None), slice(2, 4), slice(0, 3)),
        Fake(1): (slice(None), slice(2, 4), slice(3, 6)),
        Fake(2): None,
    }
    sharding = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: parts)
    assert Rows((2, 4, 6), sharding).numbers == [2, 3, 6, 7]


def test_rows_come_where_they_belong():
    mesh = Mesh(np.asarray(jax.devices()[:8]).reshape(4, 2), ("fsdp", "sequence"))
    rows = Rows((2, 4, 6), NamedSharding(mesh, PartitionSpec(None, "fsdp", "sequence")))
    loaded = np.arange(48, dtype=np.int32).reshape(8, 6)
    assert rows.numbers == list(range(8))
    np.testing.assert_array_equal(rows.put(loaded), loaded.reshape(2, 4, 6))


def test_flags_of_one_process_are_flags_of_all(monkeypatch):
    """Two calls later, and no longer once what was asked has been done; process 1 sets the second flag."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    agreement, theirs = distributed.Agreement(3), [False, True, False]

    def with_theirs(shape, sharding, part):
        (mine,) = part(None)
        return jax.device_put(np.array([mine] * (shape[0] - 1) + [theirs], np.int32), sharding)

    monkeypatch.setattr(jax, "make_array_from_callback", with_theirs)
    none = (False, False, False)
    assert [agreement((True, False, False)), agreement(none), agreement(none)] == [
        none,
        none,
        (True, True, False),
    ]
    agreement.forget()
    theirs[1] = False
    assert [agreement(none) for _ in range(4)] == [none] * 4
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    assert agreement((True, False, True)) == (True, False, True)
