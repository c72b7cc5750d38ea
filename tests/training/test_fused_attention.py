"""Training with the fused attention kernels, interpreted: the step around them, on one device and sharded."""

import jax
import numpy as np
import pytest

from configs import common
from fp8jax import config as config_lib
from fp8jax.plan import make_plan
from fp8jax.training.calibration import calibrate
from fp8jax.training.step import TrainProgram


def losses(backend, steps, devices, mesh):
    """Of a few steps of `tiny`'s block on random tokens."""
    values = common.make("tiny", architecture="fog_flash", recipe="fp8_dpa")
    values.model.update(layers=2, vocab_size=128)
    values.training.update(batch_size=8, remat="save_fp8")
    values.data.sequence_length = 130
    values.fp8.attention_backend = backend
    values.mesh.update(mesh)
    config = config_lib.from_dict(values)
    program = TrainProgram(make_plan(config, jax.devices()[:devices], vocab_size=128))
    tokens = np.random.default_rng(0).integers(0, 128, (8, 130), dtype=np.int32)
    batch = program.put(
        {
            "inputs": tokens,
            "targets": np.roll(tokens, -1, 1),
            "mask": np.ones(tokens.shape, np.float32),
        }
    )
    state, found = calibrate(program, program.init(), batch), []
    for _ in range(steps):
        state, metrics, _ = program.step(state, batch)
        found.append(float(metrics["loss"]))
    return found


def test_a_step_sharded_over_data_equals_the_definition():
    found = losses("pallas", 2, 8, {"data": 2, "fsdp": 4})
    np.testing.assert_allclose(found, losses("emulated", 2, 8, {"data": 2, "fsdp": 4}), rtol=2e-4)


@pytest.mark.slow
def test_several_steps_equal_the_definition():
    """Backends round some elements of P and dS to neighbours; after four steps the losses differ by less than 1e-3."""
    found, expected = (losses(backend, 4, 1, {}) for backend in ("pallas", "emulated"))
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    assert found[-1] < found[0]
