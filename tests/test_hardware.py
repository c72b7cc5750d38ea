"""The default size, from what nvidia-smi, the driver, the environment and the PCI bus say; no device is needed."""

import pathlib
import subprocess
import sys

import pytest

from fp8jax import hardware

EVERYTHING = {"jax_cuda13_plugin", "libtpu"}


def find(environment=None, root="/nowhere", output=None, installed=EVERYTHING):
    def ask():
        if output is None:
            raise FileNotFoundError("nvidia-smi")
        return output

    return hardware.find(environment or {}, pathlib.Path(root), ask, installed.__contains__)


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("0, GPU-1, Tesla T4, 15360, 7.5", "tiny"),
        ("0, GPU-1, NVIDIA L4, 23034, 8.9", "390m"),
        ("0, GPU-1, NVIDIA GeForce RTX 4060, 8188, 8.9", "tiny"),
        ("0, GPU-1, NVIDIA GeForce RTX 4060 Ti, 16380, 8.9", "390m"),
        ("0, GPU-1, NVIDIA A10, 23028, 8.6", "tiny"),
        ("0, GPU-1, NVIDIA A100-SXM4-40GB, 40960, 8.0", "390m"),
        ("0, GPU-1, NVIDIA A100-SXM4-80GB, 81920, 8.0", "390m"),
        ("0, GPU-1, NVIDIA H100 80GB HBM3, 81559, 9.0", "390m"),
        ("0, GPU-1, NVIDIA B200, 183359, 10.0", "390m"),
        (
            "0, GPU-1, NVIDIA H100 80GB HBM3, 81559, 9.0\n1, GPU-2, NVIDIA GeForce RTX 3060, 12288, 8.6",
            "tiny",
        ),
    ],
)
def test_gpus(line, size):
    found = find(output=line + "\n")
    assert hardware.default_size(found)[0] == size
    assert found.name in line and found.name in hardware.default_size(found)[1]


@pytest.mark.parametrize(
    ("model", "size", "fp8"),
    [
        ("Tesla T4", "tiny", False),
        ("NVIDIA L4", "390m", True),
        ("NVIDIA A100-SXM4-40GB", "390m", False),
        ("NVIDIA H100 80GB HBM3", "390m", True),
        ("NVIDIA H200", "390m", True),
        ("NVIDIA Something New", "tiny", False),
    ],
)
def test_gpus_without_nvidia_smi(tmp_path, model, size, fp8):
    file = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0/information"
    file.parent.mkdir(parents=True)
    file.write_text(f"Model: \t\t {model}\nIRQ:   \t\t 45\nGPU UUID: \t GPU-12\n")
    for output in (None, 'Field "compute_cap" is not a valid field to query.\n'):
        found = find(root=tmp_path, output=output)
        assert (found.fp8, hardware.default_size(found)[0]) == (fp8, size)


TWO = "0, GPU-aa, NVIDIA T1000, 4096, 7.5\n1, GPU-bb, NVIDIA H100 80GB HBM3, 81559, 9.0\n"


@pytest.mark.parametrize(
    ("visible", "name"),
    [
        (None, "NVIDIA T1000"),
        ("1", "NVIDIA H100 80GB HBM3"),
        ("0", "NVIDIA T1000"),
        ("GPU-bb", "NVIDIA H100 80GB HBM3"),
        ("", None),
        ("-1", None),
        ("1,-1,0", "NVIDIA H100 80GB HBM3"),
    ],
)
def test_hidden_gpus_do_not_count(visible, name):
    found = find({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}, output=TWO)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("kind", "number", "size"),
    [
        ("v5litepod-8", None, "tiny"),
        ("v5p-16", None, "390m"),
        ("v6e-64", None, "390m"),
        ("tpu7x-8", None, "390m"),
        ("v3-8", None, "tiny"),
        (None, "0x0063", "tiny"),
        (None, "0x006f", "390m"),
        (None, "0x005e", "390m"),
        (None, "0xffff", "tiny"),
    ],
)
def test_tpus(tmp_path, kind, number, size):
    device = tmp_path / "sys/bus/pci/devices/0000:00:05.0"
    device.mkdir(parents=True)
    (device / "vendor").write_text("0x1ae0\n" if number else "0x8086\n")
    (device / "device").write_text(f"{number}\n")
    found = find({"TPU_ACCELERATOR_TYPE": kind} if kind else {}, tmp_path)
    assert (hardware.default_size(found)[0] if found else "tiny") == size
    assert find({"JAX_PLATFORMS": "cpu"}, tmp_path) is None


@pytest.mark.parametrize(
    ("environment", "installed", "there"),
    [
        ({}, EVERYTHING, True),
        ({"JAX_PLATFORMS": "cpu"}, EVERYTHING, False),
        ({"JAX_PLATFORMS": "cuda,cpu"}, EVERYTHING, True),
        ({"JAX_PLATFORMS": "cpu,cuda"}, EVERYTHING, False),
        ({"JAX_PLATFORMS": "tpu"}, EVERYTHING, False),
        ({}, {"jax_cuda12_plugin"}, True),
        ({}, {"libtpu"}, False),
        ({}, set(), False),
    ],
)
def test_what_jax_does_not_use_does_not_count(environment, installed, there):
    """Without its plugin, JAX trains on the CPU whatever GPU there is."""
    assert (find(environment, output=TWO, installed=installed) is not None) == there


def test_jax_is_not_started():
    code = "import sys; from fp8jax import hardware; hardware.default_size(); sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
