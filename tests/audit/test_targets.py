"""Targets: names, sizes, and what is told where a plugin is missing."""

import importlib.util

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from fp8jax.audit import roofline, targets
from fp8jax.audit.collectives import Collective
from fp8jax.audit.gemms import Gemm
from fp8jax.audit.program import Memory, Reading
from fp8jax.audit.traffic import Traffic


@pytest.mark.parametrize(
    "name",
    [
        "h100:0",
        "h100:8x",
        "h100:x8",
        "a100:8",
        "h100:8x8x8",
        "h100:-1",
        "",
        "tpu7x:3",
        "tpu7x:2x2",
        "tpu-v6e:2x2x1",
        "tpu-v5p:2",
        "cpu:8",
    ],
)
def test_mistakes_are_one_line_that_shows_the_form(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: True)
    with pytest.raises(targets.TargetError, match=f"--target={name}") as error:
        targets.resolve(name)
    assert "\n" not in str(error.value) and any(
        form in str(error.value) for form in ("h100:8", "such as", "for example")
    )


@pytest.mark.parametrize("name", ["h100:8", "b200:64x8", "tpu7x:4"])
def test_a_missing_plugin_is_one_line_that_says_what_to_install(name, monkeypatch):
    def find(module):
        if "." in module:  # which is what importing the missing parent would raise
            raise ModuleNotFoundError(module)

    monkeypatch.setattr(importlib.util, "find_spec", find)
    with pytest.raises(targets.TargetError, match="pip install -r requirements-audit.txt"):
        targets.resolve(name)


def test_local_takes_the_devices_at_hand():
    assert targets.resolve("local").devices == jax.devices()


@pytest.mark.parametrize(
    ("chips", "axes", "shape"),
    [
        (4, 3, "2x2x1"),
        (8, 3, "2x2x2"),
        (64, 3, "4x4x4"),
        (4, 2, "2x2"),
        (8, 2, "4x2"),
        (256, 2, "16x16"),
    ],
)
def test_shapes_of_tpu_slices(chips, axes, shape):
    found = targets._tpu_shape("tpu", chips, axes)
    assert sorted(found.split("x")) == sorted(shape.split("x"))


def test_roofline_by_hand():
    device = roofline.Device(
        "test", bf16=1e12, fp8=2e12, memory=1e9, link=4e8, network=1e8, capacity=1e9, source="none"
    )
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    square = 1, 1000, 1000, 1000
    gemms = [
        Gemm(
            "qkv", "fprop", square, "float8_e4m3fn", "float8_e4m3fn", "bfloat16", "", 10**13, 2
        ),  # 5 s each
        Gemm("lm_head", "fprop", square, "bfloat16", "bfloat16", "float32", "", 10**6, 1),
    ]  # 8 MB at 1 GB/s
    moved = [Traffic("fusion", "", 10**9, 2 * 10**9, 1)]
    sent = [
        Collective("all-gather", "float32", ("fsdp",), 2, 0, 4 * 10**8, 1),  # in a node of 4: 1 s
        Collective("all-gather", "float32", ("data",), 4, 0, 4 * 10**8, 1),
    ]  # between nodes, two ports: 2 s
    found = roofline.estimate(
        Reading(gemms, moved, sent, Memory({}, 0, 0, 0), []),
        device,
        mesh,
        per_node=4,
        model_flops=10**13,
    )
    assert found.gemm_seconds == pytest.approx(10.008) and found.memory_seconds == pytest.approx(3)
    assert found.collective_seconds == pytest.approx(3)
    assert found.step_seconds == pytest.approx(
        13.008
    ) and found.step_seconds_no_overlap == pytest.approx(16.008)
    assert found.mfu_bf16 == pytest.approx(10 / 13.008) and found.mfu_fp8 == pytest.approx(
        5 / 13.008
    )


def test_some_of_the_devices_that_are_here():
    found = targets.resolve("local:2")
    assert len(found.devices) == 2 and found.platform == "cpu"
    for size in ("0", "x", "9"):
        with pytest.raises(
            targets.TargetError,
            match=f"--target=local:{size}: .* is not a number of devices from 1 to 8",
        ):
            targets.resolve(f"local:{size}")
