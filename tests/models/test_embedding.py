"""The embedding's rows and their gradient, and a whole model's gradients, on meshes that split every axis, against NumPy and one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.models.embedding import lookup
from fp8jax.parallel.mesh import make_mesh
from fp8jax.plan import make_plan
from fp8jax.training import step
from fp8jax.training.step import TrainProgram

# `sequence` and `tensor` both above 1: the residual stream is split over both, in this order.
MESHES = {
    "fsdp 2 x tensor 2 x sequence 2": {"fsdp": 2, "tensor": 2, "sequence": 2},
    "data 2 x tensor 2 x sequence 2": {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 2},
    "data 2 x fsdp 2 x sequence 2": {"data": 2, "fsdp": 2, "sequence": 2},
}
MODEL = {
    "layers": 1,
    "width": 16,
    "ffn_width": 16,
    "heads": 8,
    "kv_heads": 4,
    "head_dim": 4,
    "dtype": "float32",
}
VOCAB, BATCH, LENGTH = 24, 4, 16


def config_of(mesh):
    return config_lib.from_dict(
        {
            "model": MODEL | {"vocab_size": VOCAB},
            "fp8": {"recipe": "bf16"},
            "mesh": mesh,
            "data": {"sequence_length": LENGTH},
            "training": {
                "microbatches": 1,
                "remat": "none",
                "loss_chunk": 0,
                "steps": 1,
                "batch_size": BATCH,
            },
            "optimizer": {"warmup_steps": 0, "gradient_dtype": "float32"},
        }
    )


def mesh_of(sizes):
    return make_mesh(config_of(sizes), jax.devices()[: np.prod(list(sizes.values()))])


@pytest.mark.parametrize("mesh", MESHES.values(), ids=MESHES)
def test_rows_and_gradient_equal_numpy(mesh):
    """Every position has another cotangent, ids repeat, and most rows lie on another device."""
    rng = np.random.default_rng(0)
    table, g = (
        rng.normal(size=(VOCAB, 16)).astype(np.float32),
        rng.normal(size=(BATCH, LENGTH, 16)).astype(np.float32),
    )
    ids = rng.integers(0, VOCAB, (BATCH, LENGTH)).astype(np.int32)

    def both(table, ids, g):
        x, pull = jax.vjp(lambda table: lookup(table, ids, 3.0, jnp.float32), table)
        return x, pull(g)[0]

    with jax.set_mesh(mesh_of(mesh)):
        x, gradient = jax.jit(both)(table, ids, g)
    wanted = np.zeros(table.shape)
    np.add.at(wanted, ids, 3.0 * g)
    np.testing.assert_allclose(x, 3.0 * table[ids], rtol=1e-6)
    np.testing.assert_allclose(gradient, wanted, rtol=1e-5, atol=1e-5)


def gradients_on(mesh):
    """Loss and gradients of one batch with an uneven mask."""
    config = config_of(mesh)
    program = TrainProgram(
        make_plan(config, jax.devices()[: np.prod(list(mesh.values()))], vocab_size=VOCAB)
    )
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, VOCAB, (BATCH, LENGTH + 1)).astype(np.int32)
    batch = program.put(
        {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "mask": (rng.random((BATCH, LENGTH)) < 0.6).astype(np.float32),
        }
    )
    state = program.init()

    def run(state, batch):
        with jax.sharding.use_abstract_mesh(program.mesh.abstract_mesh):
            return step.gradients(state, batch, config, program.definition, program.recipes)[:2]

    # The program runs once: what it is optimised for does not pay.
    options = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
    return jax.device_get(jax.jit(run, compiler_options=options)(state, batch))


@pytest.fixture(scope="module")
def on_one_device():
    return gradients_on({"fsdp": 1})


@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, marks=[] if name.startswith("fsdp") else pytest.mark.slow)
        for name, mesh in MESHES.items()
    ],
    ids=MESHES,
)
def test_gradients_of_a_model_are_those_of_one_device(on_one_device, mesh):
    """In float32 without casts, so that nothing amplifies the order of sums."""
    (wanted, wanted_grads), (loss, grads) = on_one_device, gradients_on(mesh)
    assert loss == pytest.approx(float(wanted), rel=1e-5)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(wanted_grads), jax.tree.leaves(grads), strict=True
    ):
        assert np.linalg.norm(a) > 0 and np.linalg.norm(a - b) <= 5e-5 * np.linalg.norm(a), path
