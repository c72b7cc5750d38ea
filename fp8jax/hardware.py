"""Find, without JAX, which accelerator this machine has, and the size of model that suits it.

JAX must not start before `jax.distributed` has.

    found = find()                      # Accelerator(name="NVIDIA L4", gib=22.5, fp8=True), or None
    size, why = default_size()          # ("390m", "NVIDIA L4, 22 GiB, with FP8 units")

NVIDIA GPUs are those that nvidia-smi shows, or where it is not installed those that the driver
names in /proc; TPUs are named by the environment or by their PCI numbers. Of several devices the
one with the least memory counts. The size is a guess; only the compiled program shows what a step
needs.
"""

import importlib.util
import os
import pathlib
import re
import subprocess
from collections.abc import Callable, Mapping
from typing import NamedTuple

# GiB that 390m takes with one sequence of 4096 tokens at a time, and room for a display, a context
# and fragments. Without FP8 units FP8 values are multiplied as BF16 ones: slower, and without FP8's
# savings of memory.
_NEED_FP8, _NEED_EMULATED = 15.0, 30.0
_FP8_FROM = 8.9  # compute capability: Ada, Hopper, Blackwell

# For devices known only by name: GiB and compute capability of NVIDIA's, GiB and FP8 units of
# TPUs'.
_NVIDIA = {
    "T4": (15, 7.5),
    "V100": (16, 7.0),
    "L4": (22, 8.9),
    "L40": (44, 8.9),
    "A10": (22, 8.6),
    "A100": (39, 8.0),
    "H100": (79, 9.0),
    "H200": (140, 9.0),
    "H20": (94, 9.0),
    "GH200": (94, 9.0),
    "B200": (178, 10.0),
    "GB200": (184, 10.0),
    "B300": (268, 10.3),
}
_TPU = {
    "v2": (8, False),
    "v3": (16, False),
    "v4": (32, False),
    "v5e": (16, False),
    "v5p": (95, False),
    "v6e": (32, False),
    "7x": (96, True),
}
_TPU_PCI = {
    "0x0027": "v3",
    "0x005e": "v4",
    "0x0062": "v5p",
    "0x0063": "v5e",
    "0x006f": "v6e",
    "0x0076": "7x",
}
_TPU_TYPES = {
    "v2": "v2",
    "v3": "v3",
    "v4": "v4",
    "v5litepod": "v5e",
    "v5e": "v5e",
    "v5p": "v5p",
    "v6e": "v6e",
    "tpu7x": "7x",
}
_GOOGLE = "0x1ae0"
_QUERY = (
    "nvidia-smi",
    "--query-gpu=index,uuid,name,memory.total,compute_cap",
    "--format=csv,noheader,nounits",
)


class Accelerator(NamedTuple):
    """A device: its name, GiB of memory, and whether it multiplies FP8 numbers."""

    name: str
    gib: float
    fp8: bool


planned: Accelerator | None = (
    None  # the device that a run is planned for, if not this machine's: the audit sets it
)


def default_size(found: Accelerator | None = None) -> tuple[str, str]:
    """Return the default size, `390m` or `tiny`, and the reason, for this machine unless a device
    is given.
    """
    found = found or planned or find()
    if found is None:
        return "tiny", "no accelerator"
    units = "with FP8 units" if found.fp8 else "without FP8 units"
    fits = found.gib >= (_NEED_FP8 if found.fp8 else _NEED_EMULATED)
    return "390m" if fits else "tiny", f"{found.name}, {found.gib:.0f} GiB, {units}"


def find(
    environment: Mapping[str, str] = os.environ,
    root: pathlib.Path = pathlib.Path("/"),
    ask: Callable[[], str] | None = None,
    installed: Callable[[str], bool] | None = None,
) -> Accelerator | None:
    """Return the accelerator that JAX will use; None if that is the CPU.

    Args:
        environment: variables of this process.
        root: directory of /proc and /sys.
        ask: returns what nvidia-smi prints; raises OSError or a subprocess error if it cannot.
        installed: whether a module can be imported: JAX uses a device only if its plugin is there.
    """
    installed = installed or (lambda name: importlib.util.find_spec(name) is not None)
    platforms = [name for name in environment.get("JAX_PLATFORMS", "").split(",") if name]
    if platforms[:1] == ["cpu"]:
        return None
    found = []
    if not platforms or {"cuda", "gpu"} & set(platforms):
        if installed("jax_cuda13_plugin") or installed("jax_cuda12_plugin"):
            found = _visible(_nvidia(root, ask or _ask), environment)
    if not found and (not platforms or "tpu" in platforms) and installed("libtpu"):
        found = _tpus(environment, root)
    return min(found, key=lambda device: device.gib, default=None)


def _ask() -> str:
    return subprocess.run(_QUERY, capture_output=True, text=True, timeout=20, check=True).stdout


def _nvidia(root: pathlib.Path, ask: Callable[[], str]) -> list[tuple[str, str, Accelerator]]:
    """Return index, UUID and device of each GPU."""
    try:
        lines = [
            [part.strip() for part in line.split(",")]
            for line in ask().splitlines()
            if line.strip()
        ]
        return [
            (index, uuid, Accelerator(name, float(mib) / 1024, float(capability) >= _FP8_FROM))
            for index, uuid, name, mib, capability in lines
        ]
    except (
        OSError,
        subprocess.SubprocessError,
        ValueError,
    ):  # no nvidia-smi, one too old for compute_cap, or a GPU that is lost
        return _named(root)


def _named(root: pathlib.Path) -> list[tuple[str, str, Accelerator]]:
    """Return the same from the driver's own list, which has only names."""
    found = []
    for number, path in enumerate(sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))):
        text = path.read_text(errors="replace")
        model, uuid = (
            re.search(rf"^{name}:\s*(.+)$", text, re.M) for name in ("Model", "GPU UUID")
        )
        name = model[1].strip() if model else "NVIDIA GPU"
        known = [_NVIDIA[word] for word in re.split(r"[\s-]+", name) if word in _NVIDIA]
        gib, capability = known[0] if known else (0, 0.0)
        if size := re.search(r"(\d+) ?GB", name):
            gib = (
                int(size[1]) * 0.93
            )  # from the memory's decimal gigabytes, less what the driver keeps
        found.append(
            (
                str(number),
                uuid[1].strip() if uuid else "",
                Accelerator(name, gib, capability >= _FP8_FROM),
            )
        )
    return found


def _visible(
    gpus: list[tuple[str, str, Accelerator]], environment: Mapping[str, str]
) -> list[Accelerator]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names, by number or by the start of a UUID; all if
    it is not set.
    """
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        return [device for _, _, device in gpus]
    chosen = []
    for word in map(str.strip, named.split(",")):
        matching = [
            device
            for index, uuid, device in gpus
            if word == index or (word.startswith("GPU-") and uuid.startswith(word))
        ]
        if word.startswith("MIG-"):  # a part of a GPU, which nvidia-smi does not list so
            matching = [
                Accelerator(f"a part of {device.name}", device.gib / 7, device.fp8)
                for _, _, device in gpus[:1]
            ]
        if not matching:  # as in CUDA, devices after a missing number are hidden
            break
        chosen += matching
    return chosen


def _tpus(environment: Mapping[str, str], root: pathlib.Path) -> list[Accelerator]:
    """Return the TPUs that the environment or the PCI bus lists."""
    kind = environment.get("TPU_ACCELERATOR_TYPE") or environment.get("ACCELERATOR_TYPE") or ""
    generation = _TPU_TYPES.get(kind.partition("-")[0].lower())
    for vendor in sorted((root / "sys/bus/pci/devices").glob("*/vendor")):
        if generation is None and vendor.read_text().strip() == _GOOGLE:
            generation = _TPU_PCI.get((vendor.parent / "device").read_text().strip())
    if generation is None:
        return []
    gib, fp8 = _TPU[generation]
    return [Accelerator(f"TPU {generation}", gib, fp8)]
