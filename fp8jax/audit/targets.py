"""Find devices to compile for, at hand or not: `h100:8`, `h100:64x8`, `h200:8`, `b200:8`,
`tpu-v5p:4`, `tpu7x:4`, `local`.

    target = resolve("h100:8")
    mesh = make_mesh(config, target.devices)
    executable, text = compile_step(jitted.trace(...), target)

GPUs come from target texts (target_texts/), TPUs from libtpu's topologies; neither needs the
device, both need the plugins of requirements-audit.txt. Import JAX with JAX_PLATFORMS=cpu, or it
looks for the devices first. A program compiled for a target cannot be run here.
"""

import dataclasses
import importlib.resources
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import topologies

from fp8jax.audit.target_names import FORMS, GPUS, TPUS

# This keeps libtpu from asking Google Cloud which machine this is, and from complaining that it is
# none; any known type works.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
_INSTALL = "pip install -r requirements-audit.txt"


class TargetError(ValueError):
    """An error for a target that cannot be compiled for; the message is one line."""


@dataclasses.dataclass(frozen=True)
class Target:
    """The devices of one kind.

    Attributes:
        kind: key of roofline.DEVICES: `h100`, `tpu7x` ...; `local`.
        devices: the devices in mesh order; compile-only unless local.
        per_node: devices that share fast links.
    """

    name: str
    kind: str
    platform: str
    devices: Sequence[jax.Device]
    per_node: int


def resolve(name: str) -> Target:
    """Find a target's devices.

    Raises:
        TargetError: the target or size is unknown, or a plugin is not installed.
    """
    kind, _, size = name.partition(":")
    if kind == "local":
        devices = _local(name, size)
        return Target(
            name, "local", devices[0].platform, devices, min(len(devices), jax.local_device_count())
        )
    if kind in GPUS:
        return _gpus(name, kind, size)
    if kind in TPUS:
        return _tpus(name, kind, size)
    raise TargetError(f"--target={name}: unknown; for example {', '.join(FORMS)}")


def _local(name: str, size: str) -> Sequence[jax.Device]:
    """Return all devices that are here, or as many of them as the target names."""
    devices = jax.devices()
    if not size:
        return devices
    if not re.fullmatch(r"[1-9]\d*", size) or int(size) > len(devices):
        more = (
            f"; to have {size} on a CPU: XLA_FLAGS=--xla_force_host_platform_device_count={size}"
            if devices[0].platform == "cpu"
            else ""
        )
        raise TargetError(
            f"--target={name}: {size!r} is not a number of devices from 1 to {len(devices)}, "
            f"which are here{more}"
        )
    return devices[: int(size)]


def compile_step(traced: Any, target: Target) -> tuple[Any, str | None]:
    """Compile a traced step for a target.

    Returns:
        The executable, and the optimized program's text if the executable's own `as_text()` is not
        reliable.
    """
    if target.platform == "gpu" and target.kind != "local":
        # Without a device, kernels cannot be tuned; the library's first choice stands for them.
        return traced.lower(lowering_platforms=("cuda",)).compile(
            compiler_options={"xla_gpu_autotune_level": "0"}
        ), None
    if target.platform == "tpu":
        # libtpu's text of programs with SparseCore collectives cannot be read back (jax 0.10.2);
        # its dump can.
        with tempfile.TemporaryDirectory() as directory:
            options = {"xla_dump_to": directory, "xla_dump_hlo_as_text": True}
            executable = traced.lower(lowering_platforms=("tpu",)).compile(compiler_options=options)
            dumped = sorted(pathlib.Path(directory).glob("*jit_step*.after_optimizations.txt"))
            return executable, dumped[-1].read_text() if dumped else None
    return traced.lower().compile(), None


def _gpus(name: str, kind: str, size: str) -> Target:
    found = re.fullmatch(r"(?:([1-9]\d*)x)?([1-9]\d*)", size or "1")
    if not found:
        raise TargetError(
            f"--target={name}: {size!r} is not a number of GPUs or NODESxGPUS, for example "
            f"{kind}:8 or {kind}:64x8"
        )
    if not any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13)):
        raise TargetError(f"--target={name} needs the CUDA plugin (no GPU): {_INSTALL}")
    nodes, per_node = int(found.group(1) or 1), int(found.group(2))
    text = (
        importlib.resources.files("fp8jax.audit").joinpath(f"target_texts/{kind}.txtpb").read_text()
    )
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    topology = _topology(
        name, f"{kind}", "cuda", topology=f"{nodes}x1x{per_node}", target_config=text
    )
    return Target(name, kind, "gpu", topology.devices, per_node)


def _tpus(name: str, kind: str, size: str) -> Target:
    generation, axes = TPUS[kind]
    if not importlib.util.find_spec("libtpu"):
        raise TargetError(f"--target={name} needs libtpu (no TPU): {_INSTALL}")
    if re.fullmatch(r"[1-9]\d*", size or "4"):
        size = _tpu_shape(name, int(size or 4), axes)
    if not re.fullmatch("x".join([r"[1-9]\d*"] * axes), size):
        raise TargetError(
            f"--target={name}: {size!r} is not a number of chips or a topology of {axes} sizes, "
            f"such as {'x'.join('221'[:axes])}"
        )
    for variable, value in _NO_TPU.items():
        os.environ.setdefault(variable, value)
    topology = _topology(name, f"{generation}:{size}", "tpu")
    return Target(name, kind, "tpu", topology.devices, len(topology.devices))


def _tpu_shape(name: str, chips: int, axes: int) -> str:
    """Return the most even topology of this many chips, the largest size last but at least 2x2."""
    shape = [1] * axes
    if chips < 4 or chips & (chips - 1):
        raise TargetError(
            f"--target={name}: {chips} chips; a power of two from 4 on, or a topology such as "
            f"{'x'.join('221'[:axes])}"
        )
    shape[:2], chips = [2, 2], chips // 4
    while chips > 1:
        smallest = min(range(axes), key=lambda i: (shape[i], -i))
        shape[smallest], chips = shape[smallest] * 2, chips // 2
    return "x".join(str(n) for n in shape)


def _topology(name: str, topology_name: str, platform: str, **options: str) -> Any:
    try:
        return topologies.get_topology_desc(
            topology_name=topology_name, platform=platform, **options
        )
    except Exception as error:
        raise TargetError(
            f"--target={name}: the {platform} plugin cannot describe it: "
            f"{str(error).splitlines()[0]}"
        ) from error
