"""Make the device mesh with axes `data`, `fsdp`, `tensor` and `sequence`.

    mesh = make_mesh(config)              # over all devices
    mesh = make_mesh(config, devices)     # over some, or over compile-only ones

Sizes come from `config.mesh`; one of them may be -1 and takes what is left. The axes are laid out
node by node, `data` outermost and `sequence` innermost: `data` crosses the slow links between nodes
first, `fsdp` next. sharding.py decides what is sharded.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from fp8jax.config import MESH_AXES, Config, ConfigError, MeshConfig, head_dim

UNROLLED = 32  # the most layers that are compiled one by one unless the config says so
HOST_MEMORY = "pinned_host"  # JAX's name of host memory that devices copy to and from directly


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the mesh over the given devices (default: all).

    Args:
        config: as `Definition.complete` returns it, so that the FFN's and the vocabulary's sizes
            are known too.
        devices: devices of all processes.

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, the mesh does not divide
            the model or batch, or the devices have no memory to offload to.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(config, devices)
    _check_divides(config, sizes)
    _check_offloads(config, devices)
    return Mesh(
        _arrange(devices, tuple(sizes.values())),
        MESH_AXES,
        axis_types=(AxisType.Auto,) * len(MESH_AXES),
    )


def fitting_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Return the config's mesh if these devices allow it, otherwise the nearest, over as many of
    them as it can have.

    Args:
        config: as for `make_mesh`.
        devices: devices of all processes; with several processes, all are used.

    Raises:
        ConfigError: no mesh is possible.
    """
    devices = list(jax.devices() if devices is None else devices)
    try:
        return make_mesh(config, devices)
    except ConfigError:
        asked = {axis: max(getattr(config.mesh, axis), 1) for axis in MESH_AXES}
        for count in [len(devices)] if jax.process_count() > 1 else range(len(devices), 0, -1):
            if best := _nearest_sizes(config, asked, count):
                return make_mesh(
                    dataclasses.replace(config, mesh=MeshConfig(**best)), devices[:count]
                )
        raise


def _arrange(devices: list[jax.Device], shape: tuple[int, ...]) -> np.ndarray:
    """Arrange devices in this shape: neighbours in the inner axes, nodes or TPU slices along the
    outer ones.
    """
    nodes = _nodes(devices)
    if devices[0].platform == "tpu" and len(nodes) > 1:
        if shape[0] % len(nodes):
            raise ConfigError(
                f"config.mesh.data: {shape[0]} is not a multiple of the {len(nodes)} TPU "
                f"slices; only data goes between slices"
            )
        inner, outer = (shape[0] // len(nodes), *shape[1:]), (len(nodes), 1, 1, 1)
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    if devices[0].platform == "tpu":
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # A launcher may deal processes out to nodes in turn, so numbers alone do not show which are
    # near.
    return np.asarray([device for node in nodes.values() for device in node]).reshape(shape)


def _nodes(devices: Sequence[jax.Device]) -> dict[int, list[jax.Device]]:
    """Group devices that share fast links: a TPU slice; a host of GPUs, by its slice index, or a
    process of them.
    """
    slices = {getattr(device, "slice_index", 0) or 0 for device in devices}
    by_slice = len(slices) > 1 or devices[0].platform == "tpu"
    found: dict[int, list[jax.Device]] = {}
    for device in sorted(
        devices,
        key=lambda device: (
            getattr(device, "slice_index", 0) or 0,
            device.process_index,
            device.id,
        ),
    ):
        found.setdefault(
            (getattr(device, "slice_index", 0) or 0) if by_slice else device.process_index, []
        ).append(device)
    return found


def replicas(mesh: Mesh) -> int:
    """Return how many parts the rows of a microbatch are split into."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def describe(mesh: Mesh) -> str:
    """Describe a mesh without axes of size 1, as 'data 2 x fsdp 4 (8 devices on 2 nodes; data goes
    between nodes)'.
    """
    parts = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    nodes = _nodes(list(mesh.devices.flat))
    count = f"{mesh.size} device{'s' if mesh.size > 1 else ''}"
    if len(nodes) > 1:
        crossing = ", ".join(
            axis
            for i, axis in enumerate(mesh.axis_names)
            if mesh.devices.shape[i] > 1 and _crosses(mesh.devices, i, nodes)
        )
        count += f" on {len(nodes)} nodes; {crossing} goes between nodes"
    return f"{' x '.join(parts) or 'no sharding'} ({count})"


def _crosses(devices: np.ndarray, axis: int, nodes: Mapping[int, list[jax.Device]]) -> bool:
    """Return whether neighbours along an axis are on different nodes."""
    node = {device: name for name, members in nodes.items() for device in members}
    lines = np.moveaxis(devices, axis, -1).reshape(-1, devices.shape[axis])
    return any(len({node[device] for device in line}) > 1 for line in lines)


def _sizes(config: Config, devices: Sequence[jax.Device]) -> dict[str, int]:
    count = len(devices)
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(count // fixed, 1)
    if math.prod(sizes.values()) != count:
        wanted = " x ".join(f"{axis}={getattr(config.mesh, axis)}" for axis in MESH_AXES)
        raise ConfigError(
            f"config.mesh: {wanted} does not make {count} device{'s' if count > 1 else ''}; "
            f"{_nearest(config, sizes, count)}" + _more_on_a_cpu(config, devices)
        )
    return sizes


def _more_on_a_cpu(config: Config, devices: Sequence[jax.Device]) -> str:
    """Return how to try a mesh on a CPU, if the devices are CPUs."""
    asked = math.prod(max(getattr(config.mesh, axis), 1) for axis in MESH_AXES)
    if devices[0].platform != "cpu" or asked <= len(devices):
        return ""
    return (
        f"; to try it on a CPU, make devices of it: "
        f"XLA_FLAGS=--xla_force_host_platform_device_count={asked}"
    )


def _check_divides(config: Config, sizes: dict[str, int]) -> None:
    for field, value, axes in _divided(config):
        size = math.prod(sizes[axis] for axis in axes)
        if value % size:
            split = " * ".join(f"mesh.{axis}={sizes[axis]}" for axis in axes if sizes[axis] > 1)
            raise ConfigError(
                f"config.{field}: {value} is not divisible by {split}; "
                f"{_nearest(config, sizes, math.prod(sizes.values()))}"
            )


def _divided(config: Config) -> list[tuple[str, int, tuple[str, ...]]]:
    """Return fields, their values, and the mesh axes that must divide them."""
    model, training = config.model, config.training
    # If not set, as many microbatches as the mesh allows will be chosen.
    microbatches = training.microbatches or 1
    hidden = "ffn_width" if model.ffn_hidden is None else "ffn_hidden"
    found = [
        (
            "training.batch_size / training.microbatches",
            training.batch_size // microbatches,
            ("data", "fsdp"),
        ),
        ("model.width", model.width, ("fsdp",)),
        ("model.kv_heads", model.kv_heads, ("tensor",)),
        (f"model.{hidden}", getattr(model, hidden), ("tensor",)),
        ("data.sequence_length", config.data.sequence_length, ("sequence", "tensor")),
    ]
    return (
        found
        if model.vocab_size is None
        else [*found, ("model.vocab_size", model.vocab_size, ("tensor",))]
    )


def _nearest(config: Config, asked: Mapping[str, int], count: int) -> str:
    """Describe the mesh of this many devices that works and is nearest to the configured one."""
    best = _nearest_sizes(config, asked, count)
    if best is None:
        return (
            f"no mesh of {count} devices divides this model and batch: change "
            f"training.batch_size or the number of devices"
        )
    return "the nearest mesh that works is " + " ".join(
        f"--config.mesh.{axis}={size}" for axis, size in best.items()
    )


def _nearest_sizes(config: Config, asked: Mapping[str, int], count: int) -> dict[str, int] | None:
    """Return the mesh of this many devices that model and batch allow, with sizes nearest to the
    configured ones.
    """

    def works(sizes: dict[str, int]) -> bool:
        return all(
            value % math.prod(sizes[axis] for axis in axes) == 0
            for _, value, axes in _divided(config)
        )

    def distance(sizes: dict[str, int]) -> float:
        return sum(abs(math.log2(sizes[axis] / asked[axis])) for axis in MESH_AXES)

    return min(filter(works, _factorisations(count)), key=distance, default=None)


def _factorisations(count: int) -> Iterator[dict[str, int]]:
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    for first in itertools.product(divisors, repeat=len(MESH_AXES) - 1):
        if count % math.prod(first) == 0:
            yield dict(zip(MESH_AXES, (*first, count // math.prod(first)), strict=True))


def _check_offloads(config: Config, devices: Sequence[jax.Device]) -> None:
    device = next(
        (device for device in devices if device.process_index == jax.process_index()), devices[0]
    )
    memories = {
        memory.kind for memory in device.addressable_memories()
    }  # empty for a compile-only device, which does not report its memories
    if config.training.remat == "offload_fp8" and memories and HOST_MEMORY not in memories:
        raise ConfigError(
            f"config.training.remat: offload_fp8 needs {HOST_MEMORY} memory, which "
            f"{device.device_kind} does not have; "
            "use save_fp8"
        )


def loops_over_layers(config: Config, devices: Sequence[jax.Device]) -> bool:
    """Return whether layers run in a loop, by `config.model.scan_layers`; where that is open, by
    devices and depth.

    A loop stacks what its layers keep for the backward pass, and slices it again: a quarter of what
    a GPU moves beside the GEMMs (docs/benchmarks.md). Layers that are compiled one by one take the
    longer to compile; on several nodes every node waits for that.
    """
    model = config.model
    if model.scan_layers is not None:
        return model.scan_layers
    # On a node there may be one process or one a GPU; topologies of absent devices have one a node.
    by_process = jax.process_count() == 1
    nodes = {
        device.process_index if by_process else getattr(device, "slice_index", 0) or 0
        for device in devices
    }
    return devices[0].platform != "gpu" or len(nodes) > 1 or model.layers > UNROLLED


def emulates_fp8(config: Config, device: jax.Device) -> bool:
    """Return whether FP8 GEMMs run emulated on a device, by `config.fp8.backend` and, for `auto`,
    by its units.
    """
    if config.fp8.backend != "auto":
        return config.fp8.backend == "emulated"
    return not has_fp8_units(device)


def has_fp8_units(device: jax.Device) -> bool:
    """Return whether a device multiplies FP8 numbers: NVIDIA's from compute capability 8.9 on, TPUs
    from v7.
    """
    if device.platform == "gpu":
        return float(getattr(device, "compute_capability", "0")) >= 8.9
    return device.platform == "tpu" and "7" in device.device_kind


def runs_kernels(device: jax.Device) -> bool:
    """Return whether a device runs our attention kernels: NVIDIA's Hopper (compute capability 9)."""
    return device.platform == "gpu" and getattr(device, "compute_capability", "").startswith("9.")


def has_cudnn_attention(config: Config, device: jax.Device) -> bool:
    """Return whether cuDNN can compute a config's attention in BF16 on a device at hand, as JAX
    asks while tracing.

    Raises:
        ConfigError: cuDNN is configured and cannot be used.
    """
    features = head_dim(config.model)
    suits = (
        features <= 128
        and features % 8 == 0
        and config.model.dtype == "bfloat16"
        and not config.data.document_masks
    )
    at_hand = device.platform == "gpu" and jax.default_backend() == "gpu"
    if config.fp8.attention_backend == "cudnn" and not (suits and at_hand):
        raise ConfigError(
            "config.fp8.attention_backend: cudnn needs a GPU at hand, model.dtype=bfloat16, "
            "heads of at most 128 features, a "
            "multiple of 8, and no data.document_masks; auto takes it where it can"
        )
    return suits and at_hand
