"""Sums of losses: the same to the last bit however rows are spread over devices."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from fp8jax.parallel.sharding import RULES
from fp8jax.training.losses import sum_of_rows
from tests.helpers.runs import on_mesh, program_of

MESHES = [{"data": n, "fsdp": m} for n, m in ((2, 1), (1, 4), (2, 4), (8, 1))]


def summed(x_bt, mesh, function):
    """As a step computes it on a mesh."""
    sharding = NamedSharding(mesh, PartitionSpec(RULES["batch"], RULES["sequence"]))

    def run(x_bt):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(x_bt)

    return np.asarray(jax.jit(run)(jax.device_put(x_bt, sharding)))


def test_sums_are_equal_however_many_devices_share_the_rows():
    meshes = [program_of(on_mesh(mesh)).mesh for mesh in MESHES]
    values = np.random.default_rng(0).normal(size=(20, 16, 32)).astype(np.float32) * 1e3
    one, *others = ([summed(x, mesh, sum_of_rows) for x in values] for mesh in meshes)
    for found in others:
        np.testing.assert_array_equal(found, one)
    plain = [[summed(x, mesh, jnp.sum) for x in values] for mesh in (meshes[0], meshes[-1])]
    assert not np.array_equal(*plain)  # what the test would see
