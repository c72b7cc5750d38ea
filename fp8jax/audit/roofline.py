"""Estimate the least time of a step from a compiled program and a device's peak rates; nothing is
measured.

    found = estimate(reading, DEVICES["h100"], mesh, per_node=8, model_flops=flops_of_one_device)
    found.step_seconds, found.mfu_bf16, found.mfu_fp8

A GEMM takes the longer of its FLOPs at the peak of its dtype and its bytes at the memory's
bandwidth; other instructions take the time of their bytes; a collective takes that of the bytes
that a ring sends, at the rate of the links, between nodes at that of all their ports. Kernels are
assumed to run one after another, at peak rates, with collectives hidden behind them where possible.
Real kernels do not reach peak rates, so a real step is slower.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
from jax.sharding import Mesh

from fp8jax.audit.collectives import Collective
from fp8jax.audit.gemms import Gemm
from fp8jax.audit.hlo import Array
from fp8jax.audit.program import Reading
from fp8jax.audit.traffic import total


@dataclasses.dataclass(frozen=True)
class Device:
    """The peak rates of one device, dense (without structured sparsity); `fp8` equals `bf16`
    without FP8 units.

    Attributes:
        bf16, fp8: peak rates, FLOP/s.
        memory: bandwidth of the memory, bytes/s.
        link: rate of sending to other devices nearby, bytes/s.
        network: rate of sending to other nodes, bytes/s.
        capacity: size of the memory, bytes.
    """

    name: str
    bf16: float
    fp8: float
    memory: float
    link: float
    network: float
    capacity: float
    source: str


_NODE = "; network: one 400 Gbit/s port a GPU, assumed"
DEVICES = {
    "h100": Device(
        "NVIDIA H100 SXM",
        989e12,
        1979e12,
        3.35e12,
        450e9,
        50e9,
        80e9,
        "NVIDIA H100 datasheet" + _NODE,
    ),
    "h200": Device(
        "NVIDIA H200 SXM",
        989e12,
        1979e12,
        4.8e12,
        450e9,
        50e9,
        141e9,
        "NVIDIA H200 datasheet" + _NODE,
    ),
    "b200": Device(
        "NVIDIA B200",
        2250e12,
        4500e12,
        7.7e12,
        900e9,
        50e9,
        180e9,
        "NVIDIA HGX B200 datasheet, an eighth of it" + _NODE,
    ),
    "tpu-v5p": Device(
        "TPU v5p",
        459e12,
        459e12,
        2.765e12,
        600e9,
        600e9,
        95e9,
        "Google Cloud TPU v5p documentation",
    ),
    "tpu-v6e": Device(
        "TPU v6e", 918e12, 918e12, 1.64e12, 448e9, 448e9, 32e9, "Google Cloud TPU v6e documentation"
    ),
    "tpu7x": Device(
        "TPU7x, one of a chip's two cores",
        1153.5e12,
        2307e12,
        3.69e12,
        600e9,
        600e9,
        96e9,
        "Google Cloud TPU7x documentation, half a chip",
    ),
}


def device_of(kind: str) -> Device | None:
    """Return the peak rates of a device by JAX's name of it ('NVIDIA H100 80GB HBM3'); None if
    unknown.
    """
    return next(
        (device for name, device in DEVICES.items() if name in kind.lower().replace(" ", "-")), None
    )


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The seconds on one device at peak rates, and the utilisation that they would mean."""

    gemm_seconds: float
    memory_seconds: float
    collective_seconds: float
    step_seconds: float
    step_seconds_no_overlap: float
    mfu_bf16: float
    mfu_fp8: float


def estimate(
    reading: Reading, device: Device, mesh: Mesh, *, per_node: int, model_flops: float
) -> Estimate:
    """Return the roofline of one step.

    Args:
        reading: the compiled step.
        device: peak rates.
        mesh: the step's mesh.
        per_node: devices, in mesh order, that share fast links.
        model_flops: FLOPs that one device's share of the step must compute.
    """
    gemm = sum(_gemm_seconds(g, device) for g in reading.gemms)
    memory = total(reading.traffic) / device.memory
    network = _collective_seconds(reading.collectives, device, mesh, per_node)
    step = max(gemm + memory, network)
    return Estimate(
        gemm,
        memory,
        network,
        step,
        gemm + memory + network,
        model_flops / (step * device.bf16),
        model_flops / (step * device.fp8),
    )


def _gemm_seconds(gemm: Gemm, device: Device) -> float:
    batch, m, n, k = gemm.shape
    moved = sum(
        Array(dtype, (batch, *dims)).bytes
        for dtype, dims in (
            (gemm.lhs_dtype, (m, k)),
            (gemm.rhs_dtype, (k, n)),
            (gemm.out_dtype, (m, n)),
        )
    )
    peak = device.fp8 if gemm.fp8 else device.bf16
    return gemm.count * max(gemm.flops / peak, moved / device.memory)


def _collective_seconds(
    found: Iterable[Collective], device: Device, mesh: Mesh, per_node: int
) -> float:
    return sum(c.sent * c.count / _rate(c.axes, device, mesh, per_node) for c in found)


def _rate(axes: tuple[str, ...], device: Device, mesh: Mesh, per_node: int) -> float:
    """Return bytes/s of a collective along mesh axes: of a node's links, or of all network ports of
    its members there.
    """
    ids = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    group = ids[
        tuple(slice(None) if axis in axes or "?" in axes else 0 for axis in mesh.shape)
    ].ravel()
    near = int((group < per_node).sum())
    return device.link if near == group.size else min(device.link, device.network * near)
