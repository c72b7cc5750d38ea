"""The device mesh: axes `data`, `fsdp`, `tensor` and `sequence`.

    mesh = make_mesh(config)              # over all devices
    mesh = make_mesh(config, devices)     # over some, or over compile-only ones

Sizes come from `config.mesh`; one of them may be -1 and takes what is left. Says nothing about what is sharded: see
sharding.py.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from fp8jax.config import MESH_AXES, Config, ConfigError, head_dim

HOST_MEMORY = "pinned_host"  # JAX's name of the memory of the host that devices copy to and from by themselves


def make_mesh(config: Config, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh over the given devices (default: all).

    Raises:
        ConfigError: the sizes do not multiply to the number of devices, the mesh does not divide the model or batch, or the devices
            have no memory to offload to.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = _sizes(config, len(devices))
    _check_divides(config, sizes)
    _check_offloads(config, devices[0])
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    return Mesh(np.asarray(devices).reshape(shape), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def describe(mesh: Mesh) -> str:
    """Like 'fsdp 4 x tensor 2 (8 devices)'; axes of size 1 are left out."""
    parts = [f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1]
    count = math.prod(mesh.shape.values())
    return f"{' x '.join(parts) or 'no sharding'} ({count} device{'s' if count > 1 else ''})"


def _sizes(config: Config, count: int) -> dict[str, int]:
    sizes = {axis: getattr(config.mesh, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(count // fixed, 1)
    if math.prod(sizes.values()) != count:
        wanted = " x ".join(f"{axis}={getattr(config.mesh, axis)}" for axis in MESH_AXES)
        raise ConfigError(f"config.mesh: {wanted} does not make {count} devices; change a size, or set one axis to -1 to fill")
    return sizes


def _check_divides(config: Config, sizes: dict[str, int]) -> None:
    model, training = config.model, config.training
    replicas = sizes["data"] * sizes["fsdp"]
    per_microbatch = training.batch_size // training.microbatches
    checks = [
        ("training.batch_size / training.microbatches", per_microbatch, "data * mesh.fsdp", replicas),
        ("model.width", model.width, "fsdp", sizes["fsdp"]),
        ("model.kv_heads", model.kv_heads, "tensor", sizes["tensor"]),
        ("model.ffn_width", model.ffn_width, "tensor", sizes["tensor"]),
        ("data.sequence_length", config.data.sequence_length, "sequence", sizes["sequence"]),
    ]
    for field, value, axis, size in checks:
        if value % size:
            smaller = max(n for n in range(1, size + 1) if value % n == 0)
            raise ConfigError(f"config.{field}: {value} is not divisible by mesh.{axis}={size}; the nearest size that works is {smaller}")


def _check_offloads(config: Config, device: jax.Device) -> None:
    memories = {memory.kind for memory in device.addressable_memories()}  # none: a device to compile for, which does not tell
    if config.training.remat == "offload_fp8" and memories and HOST_MEMORY not in memories:
        raise ConfigError(f"config.training.remat: offload_fp8 needs {HOST_MEMORY} memory, which {device.device_kind} does not have; "
                          "use save_fp8")


def emulates_fp8(config: Config, device: jax.Device) -> bool:
    """Whether FP8 GEMMs run emulated on a device: as `config.fp8.backend` says, `auto` by what the device has.

    FP8 units: NVIDIA from compute capability 8.9 (Ada, Hopper, Blackwell), TPU from v7.
    """
    if config.fp8.backend != "auto":
        return config.fp8.backend == "emulated"
    if device.platform == "gpu":
        return float(getattr(device, "compute_capability", "0")) < 8.9
    return not (device.platform == "tpu" and "7" in device.device_kind)


def runs_kernels(device: jax.Device) -> bool:
    """Whether a device runs our attention kernels: NVIDIA's Hopper (compute capability 9)."""
    return device.platform == "gpu" and getattr(device, "compute_capability", "").startswith("9.")


def has_cudnn_attention(config: Config, device: jax.Device) -> bool:
    """Whether a config's attention, were it BF16, can be cuDNN's on a device; one at hand, as JAX asks its cuDNN while tracing.

    Raises:
        ConfigError: it is asked for and cannot.
    """
    features = head_dim(config.model)
    suits = features <= 128 and features % 8 == 0 and config.model.dtype == "bfloat16" and not config.data.document_masks
    at_hand = device.platform == "gpu" and jax.default_backend() == "gpu"
    if config.fp8.attention_backend == "cudnn" and not (suits and at_hand):
        raise ConfigError("config.fp8.attention_backend: cudnn needs a GPU at hand, model.dtype=bfloat16, heads of at most 128 features, a "
                          "multiple of 8, and no data.document_masks; auto takes it where it can")
    return suits and at_hand
