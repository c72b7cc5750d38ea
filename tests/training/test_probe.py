"""The probe's measures against float64 NumPy, and planted faults that it must find without being told."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax.config import ConfigError
from fp8jax.training.calibration import calibrate
from fp8jax.training.probe import Harm, Probe, compare
from tests.helpers.runs import EIGHT, ONE, logged, micro, program_of, saved, train


def tree(rng, scale=1.0):
    """Gradients of two layers: queries, keys and values in one, a matrix of the FFN, a gain."""
    blocks = {
        "attention": {"qkv": {"w": scale * rng.normal(size=(2, 8, 2, 4, 3))}},
        "feed_forward": {"up": {"w": scale * rng.normal(size=(2, 8, 5))}},
        "post_ffn": {"gain": rng.normal(size=(2, 8))},
    }
    return {"blocks": blocks, "embedding": {"w": rng.normal(size=(6, 8))}}


def float32(params):
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)


def test_measures_are_those_of_float64_over_the_matrices_of_the_blocks():
    rng = np.random.default_rng(0)
    run, reference = tree(rng), tree(rng)
    harm = Harm.of(compare(float32(run), float32(reference)))

    def flat(params):
        blocks = params["blocks"]
        matrices = blocks["attention"]["qkv"]["w"], blocks["feed_forward"]["up"]["w"]
        return np.concatenate([matrix.ravel() for matrix in matrices])

    a, b = flat(run), flat(reference)
    norm = np.linalg.norm
    np.testing.assert_allclose(harm.error, norm(a - b) / norm(b), rtol=1e-5)
    np.testing.assert_allclose(harm.cosine, a @ b / norm(a) / norm(b), rtol=1e-4)
    np.testing.assert_allclose(harm.norm_ratio, norm(a) / norm(b), rtol=1e-5)
    k_run, k_ref = (p["blocks"]["attention"]["qkv"]["w"][1, :, :, -2] for p in (run, reference))
    np.testing.assert_allclose(
        harm.by_place()["k"][1], norm(k_run - k_ref) / norm(k_ref), rtol=1e-5
    )
    shares = harm.by_place("share")
    assert set(shares) == {"q", "k", "v", "mlp_up"}
    np.testing.assert_allclose(sum(share.sum() for share in shares.values()), 1, rtol=1e-9)


def test_equal_zero_and_broken_gradients_have_a_defined_error():
    params = float32(tree(np.random.default_rng(0)))
    zero = jax.tree.map(jnp.zeros_like, params)
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    assert Harm.of(compare(params, params)).error == 0
    assert Harm.of(compare(zero, zero)).error == 0
    assert Harm.of(compare(zero, zero)).cosine == 1
    assert Harm.of(compare(broken, params)).error == np.inf
    assert Harm.of(compare(params, zero)).error == np.inf


DELAYED = {"recipe": "fp8_dpa", "scaling": "delayed"}


def batch_of(program):
    config = program.config
    shape = config.training.batch_size, config.data.sequence_length
    tokens = np.random.default_rng(0).integers(0, 300, (shape[0], shape[1] + 1)).astype(np.int32)
    return program.put(
        {
            "inputs": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "mask": np.ones(shape, np.float32),
        }
    )


def calibrated(program, batch):
    return calibrate(program, program.init(), batch)


@pytest.fixture(scope="module")
def delayed():
    """A calibrated program with delayed scaling, its state, batch, probe and harm."""
    program = program_of(micro(fp8=DELAYED, training={"microbatches": 2}))
    batch = batch_of(program)
    state = calibrated(program, batch)
    probe = Probe(program)
    return probe, state, batch, probe.harm(state, batch)


def with_scale(state, role, operand, layer, factor):
    """The state with one scale of a role in one layer off by a factor."""
    entry = state.scaling[role]
    scale = entry["scale"].at[layer, operand].multiply(factor)
    return dataclasses.replace(state, scaling=state.scaling | {role: {**entry, "scale": scale}})


def test_healthy_state_is_below_the_threshold(delayed):
    harm = delayed[3]
    assert 0 < harm.error < 0.3
    assert harm.cosine > 0.95


def test_a_saturating_scale_is_found_in_its_layer_and_matrix(delayed):
    """The gradient's scale of mlp_up in layer 1 is 4096 times too small: its wgrad saturates, that of mlp_down does not."""
    probe, state, batch, healthy = delayed
    harm = probe.harm(with_scale(state, "mlp_up", 1, 1, 2.0**-12), batch)
    before, after = healthy.by_place()["mlp_up"], harm.by_place()["mlp_up"]
    assert after[1] > 5 * before[1]
    np.testing.assert_allclose(harm.by_place()["mlp_down"][1], healthy.by_place()["mlp_down"][1])
    assert harm.by_place("norm_ratio")["mlp_up"][1] < 0.9
    assert harm.error > healthy.error


def test_the_group_that_is_guilty_is_the_one_whose_absence_mends_the_error(delayed):
    probe, state, batch, _ = delayed
    broken = with_scale(state, "mlp_up", 1, 1, 2.0**-12)
    reference = probe.reference(broken, batch)
    errors = {
        name: probe.without(f"{name}=bf16", broken, batch, reference).error
        for name in ("mlp_up", "attention_out")
    }
    assert errors["mlp_up"] < 0.5 * errors["attention_out"]


def test_nothing_is_measured_where_nothing_is_in_fp8():
    program = program_of(micro(fp8={"recipe": "bf16"}))
    batch = batch_of(program)
    harm = Probe(program).harm(program.init(), batch)
    assert harm.error == 0


def test_an_unknown_reference_is_refused(delayed):
    with pytest.raises(ConfigError, match="float16"):
        Probe(delayed[0].program, "float16")


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [ONE, EIGHT])
def test_a_run_that_is_probed_logs_it_and_ends_in_the_same_bits(mesh, tmp_path):
    """Delayed scaling, two microbatches and document masks: the same as a run without."""
    fields = {
        "mesh": mesh,
        "fp8": DELAYED,
        "data": {"document_masks": True},
        "evaluation": {"every": 0},
        "monitor": {"every": 0},
    }
    plain = micro(training={"microbatches": 2, "steps": 4}, **fields)
    fields["monitor"] = {"every": 0, "probe_every": 2}
    probed = micro(training={"microbatches": 2, "steps": 4}, **fields)
    for name, config in (("plain", plain), ("probed", probed)):
        assert train(config, tmp_path / name) == 0
    entries = logged(tmp_path / "probed")
    assert [entry["step"] for entry in entries if "probe/error" in entry] == [2, 4]
    last = entries[-1]
    assert 0 < last["probe/error"] < 0.3
    assert last["probe/cosine"] > 0.95
    assert last["probe/norm_ratio"] == pytest.approx(1, abs=0.1)
    assert "probe/error_mlp_up_layer001" in last
    kept = [{k: v for k, v in entry.items() if not k.startswith("probe/")} for entry in entries]
    assert kept == logged(tmp_path / "plain")
    one, other = (saved(c, tmp_path / n)[0] for n, c in (("plain", plain), ("probed", probed)))
    for path, values in one.items():
        np.testing.assert_array_equal(values, other[path], err_msg=path)
