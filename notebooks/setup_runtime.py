"""Prepare a runtime of Colab or Kaggle for the quickstart: find the device, install what is missing.

    python notebooks/setup_runtime.py               # prints what it finds, then runs pip
    python notebooks/setup_runtime.py --dry_run     # prints pip's arguments instead

Such runtimes come with JAX and a plugin for their device, which must be of one version. If fp8jax
supports that version, it stays, and all else is installed around it. If it is too old, JAX and the
plugin are replaced together, within their family (CUDA 12 or 13), so that none of another version
remains. The script needs only Python's library.
"""

import argparse
import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping

ROOT = pathlib.Path(__file__).resolve().parents[1]
PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt", "libtpu")
PACKAGES = ("jax", "jaxlib", *PLUGINS)
CUDA13_DRIVER = 580  # the first driver that runs CUDA 13


def device() -> str:
    """Return 'gpu', 'tpu' or 'cpu', without starting JAX."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return "cpu"
    if pathlib.Path("/dev/nvidiactl").exists() or pathlib.Path("/dev/nvidia0").exists():
        return "gpu"
    tpu_variables = any(
        os.environ.get(name) for name in ("COLAB_TPU_ADDR", "TPU_NAME", "TPU_ACCELERATOR_TYPE")
    )
    if (
        tpu_variables
        or pathlib.Path("/dev/accel0").exists()
        or pathlib.Path("/dev/vfio/0").exists()
    ):
        return "tpu"
    return "cpu"


def installed() -> dict[str, str]:
    """Return the versions of JAX and of plugins that are installed."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def driver() -> int | None:
    """Return the major version of NVIDIA's driver, None if unknown."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired):
        return None
    match = re.match(r"\s*(\d+)\.", said)
    return int(match[1]) if match else None


def pip_arguments(
    kind: str, there: Mapping[str, str], bounds: str, nvidia_driver: int | None
) -> tuple[list[str], list[str]]:
    """Return what `pip install` is to install, and versions that must stay as they are.

    Args:
        kind: kind of device, as `device` returns it.
        there: versions of PACKAGES that are installed.
        bounds: versions of jax that fp8jax supports, such as '>=0.10.2,<0.13'.
        nvidia_driver: major version of the driver, if there is one.
    """
    base = ["-r", str(ROOT / "requirements.txt")]
    family = _family(there, nvidia_driver)
    needed = {"gpu": f"jax-{family}-plugin", "tpu": "libtpu"}.get(kind)
    if _within(there.get("jax", "0"), bounds) and (needed is None or needed in there):
        return base, [f"{name}=={version}" for name, version in there.items()]
    if kind == "gpu":
        return [*base, f"jax[{family}]{bounds}"], []
    if kind == "tpu":
        return [*base, f"jax[tpu]{bounds}"], []
    # An image for all devices has a plugin on a CPU too, which would warn of another version.
    return base + [f"{name}{bounds}" for name in there if name in PLUGINS and name != "libtpu"], []


def _family(there: Mapping[str, str], nvidia_driver: int | None) -> str:
    """Return the CUDA family of the installed plugin, or else the one that the driver runs."""
    for family in ("cuda12", "cuda13"):
        if f"jax-{family}-plugin" in there:
            return family
    return "cuda13" if nvidia_driver is None or nvidia_driver >= CUDA13_DRIVER else "cuda12"


def _within(version: str, bounds: str) -> bool:
    """Return whether a version lies in bounds like '>=0.10.2,<0.13'."""

    def numbers(text: str) -> tuple[int, ...]:
        return (*map(int, re.findall(r"\d+", text)[:3]), 0, 0, 0)[:3]

    compare = {">=": lambda a, b: a >= b, "<": lambda a, b: a < b}
    parts = re.findall(r"(>=|<)([\d.]+)", bounds)
    return all(compare[sign](numbers(version), numbers(limit)) for sign, limit in parts)


def jax_bounds() -> str:
    """Return the versions of jax that requirements.txt asks for."""
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    match = re.search(r"^jax((?:>=|<)[^\s;#]+)", text, re.MULTILINE)
    if match is None:
        raise SystemExit(f"error: {ROOT / 'requirements.txt'} names no versions of jax")
    return match[1]


def main() -> int:
    """Install; return pip's exit code."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: python notebooks/setup_runtime.py --dry_run",
    )
    parser.add_argument(
        "--dry_run", action="store_true", help="print pip's arguments, and install nothing"
    )
    options = parser.parse_args()
    kind, there = device(), installed()
    wanted, kept = pip_arguments(kind, there, jax_bounds(), driver() if kind == "gpu" else None)
    print(
        f"device: {kind}; installed: {', '.join(f'{name} {version}' for name, version in there.items()) or 'no jax'}"
    )
    print(
        "kept as they are: " + ", ".join(kept)
        if kept
        else "jax and its plugin are installed together"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("\n".join(kept) + "\n")
        constraints.flush()
        arguments = [
            "install",
            "-q",
            *wanted,
            "matplotlib",
            *(["-c", constraints.name] if kept else []),
        ]
        print("pip", *arguments, flush=True)
        return (
            0
            if options.dry_run
            else subprocess.run([sys.executable, "-m", "pip", *arguments]).returncode
        )


if __name__ == "__main__":
    sys.exit(main())
