"""Statistics as a step takes them: against dumped tensors, sharded as whole, and at no cost where they are off."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fp8jax import config as config_lib
from fp8jax.models import attention, transformer
from fp8jax.models import taps as taps_lib
from fp8jax.monitor import outliers
from fp8jax.numerics import statistics
from fp8jax.plan import make_plan
from fp8jax.training.calibration import calibrate
from fp8jax.training.state_statistics import state_statistics
from fp8jax.training.step import TrainProgram
from tests.numerics.reference import spread_of

ACTIVATIONS = (
    "qkv_input",
    "qkv",
    "q",
    "k",
    "mlp_intermediate",
    "mlp_up",
    "mlp_post_act",
    "mlp_out",
    "activation",
)
GRADIENTS = ("qkv.g", "attention_out.g", "mlp_up.g", "mlp_down.g", "attention_values.do")
ONE, EIGHT = {"fsdp": 1}, {"data": 2, "fsdp": 2, "tensor": 2}


def program_of(
    mesh=ONE, dtype="float32", recipe="bf16", monitor=None, architecture="llama3", **training
):
    config = config_lib.from_dict(
        {
            "model": {
                "layers": 2,
                "width": 32,
                "ffn_width": 32,
                "heads": 4,
                "kv_heads": 2,
                "dtype": dtype,
                "architecture": architecture,
            },
            "fp8": {"recipe": recipe, "scaling": "current"},
            "data": {"sequence_length": 32},
            "training": {"steps": 200, "batch_size": 8} | training,
            "mesh": mesh,
            "monitor": monitor or {},
        }
    )
    devices = jax.devices()[: 8 if mesh is EIGHT else 1]
    return TrainProgram(make_plan(config, devices, vocab_size=128))


def batch_for(program):
    tokens = np.random.default_rng(0).integers(0, 120, (8, 33)).astype(np.int32)
    return program.put(
        {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "mask": np.ones((8, 32), np.float32)}
    )


def collected(program):
    state, _, taps = program.step(program.init(), batch_for(program), collect=True)
    return state, jax.tree.map(np.asarray, taps)


@pytest.fixture
def dumped(monkeypatch):
    """Statistics of activations come with the tensor that they are of."""
    original = statistics.distribution
    monkeypatch.setattr(
        statistics, "distribution", lambda x, *counted: original(x, *counted) | {"tensor": x}
    )


@pytest.mark.parametrize("kurtosis", ["per_token", pytest.param("pooled", marks=pytest.mark.slow)])
def test_every_activation_against_float64(dumped, kurtosis):
    _, taps = collected(
        program_of(
            recipe="fp8_dpa", dtype="bfloat16", monitor={"kurtosis": kurtosis}, remat="save_fp8"
        )
    )
    logged = outliers.flatten(
        {
            name: {key: taps[name][key] for key in ("mean", "rms", "kurtosis")}
            for name in ACTIVATIONS
        }
    )
    for name in ACTIVATIONS:
        exact = [
            dict(zip(statistics.DISTRIBUTION, spread_of(tensor), strict=True))
            for tensor in taps[name]["tensor"]
        ]
        for layer, wanted in enumerate(exact):
            wanted["kurtosis"] = wanted["pooled_kurtosis" if kurtosis == "pooled" else "kurtosis"]
            for key in ("mean", "rms", "kurtosis"):
                assert logged[f"{key}/{name}_layer00{layer}"] == pytest.approx(
                    wanted[key], rel=5e-5, abs=1e-5 * wanted["rms"]
                ), (name, key)
        assert logged[f"kurtosis/{name}_avg"] == pytest.approx(
            np.mean([wanted["kurtosis"] for wanted in exact]), rel=5e-5
        )


@pytest.mark.parametrize(
    "training",
    [
        {"microbatches": 2},
        pytest.param({}, marks=pytest.mark.slow),
        pytest.param({"remat": "full"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_sharded_equals_whole(training):
    """In float32 without casts, whose rounding would amplify the last bit: all of a step's statistics, also of gradients."""
    monitor = {"parameters": True}
    (_, whole), (_, sharded) = (
        collected(program_of(mesh, monitor=monitor, **training)) for mesh in (ONE, EIGHT)
    )
    assert {
        *ACTIVATIONS,
        *GRADIENTS,
        "attention_scores",
        "params.embedding.w",
        "mu.attention.qkv.w",
        "nu.final_norm.gain",
    } <= whole.keys()
    assert whole.keys() == sharded.keys()
    for name, stats in whole.items():
        for key, values in stats.items():
            size = stats["rms"].max() if key == "mean" else 0.0
            np.testing.assert_allclose(
                sharded[name][key], values, rtol=2e-4, atol=1e-5 * size, err_msg=f"{name} {key}"
            )


@pytest.mark.parametrize(("recipe", "microbatches"), [("fp8_dpa", 2), ("bf16", 1)])
def test_padding_does_not_count(recipe, microbatches):
    """Four rows and a half followed by padding: as a microbatch of its own, and within one; against the rows alone."""
    mask = np.repeat([[1.0], [0.0]], 4, axis=0) * np.ones((8, 32))
    tokens = np.random.default_rng(0).integers(0, 120, (8, 33)).astype(np.int32)
    tokens[4:] = 7
    padded, alone = (
        program_of(recipe=recipe, microbatches=microbatches),
        program_of(recipe=recipe, batch_size=4),
    )
    found = []
    for program, rows in ((padded, 8), (alone, 4)):
        batch = {
            "inputs": tokens[:rows, :-1],
            "targets": tokens[:rows, 1:],
            "mask": mask[:rows].astype(np.float32),
        }
        _, _, taps = program.step(program.init(), program.put(batch), collect=True)
        found.append(outliers.flatten(jax.tree.map(np.asarray, taps)))
    assert (
        found[0].keys() == found[1].keys()
        and {"kurtosis/mlp_up.g_layer001", "entropy/attention_scores_avg"} <= found[0].keys()
    )
    for name, value in found[1].items():
        size = (
            found[1][name.replace("mean/", "rms/")]
            if name.startswith("mean/") and "avg" not in name
            else abs(value)
        )
        if not name.startswith("amax/") or microbatches == 2 and ".g" in name:
            assert found[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5 * size + 1e-12), name


def test_of_a_batch_of_padding_alone_nothing_is_logged_but_amax_of_what_was_cast():
    program = program_of(recipe="fp8_dpa")
    batch = {
        "inputs": np.full((8, 32), 7, np.int32),
        "targets": np.full((8, 32), 7, np.int32),
        "mask": np.zeros((8, 32), np.float32),
    }
    _, _, taps = program.step(program.init(), program.put(batch), collect=True)
    logged = outliers.flatten(jax.tree.map(np.asarray, taps))
    of_all = {"fp8/saturated_fraction", "fp8/underflow_fraction"}  # weights are cast all the same
    assert {name.split("/")[0] for name in logged.keys() - of_all if ".w" not in name} == {"amax"}


@pytest.mark.slow
def test_gradient_statistics_ride_on_tokens_in_fp8_and_bf16():
    for recipe in ("bf16", "fp8_dpa"):
        _, taps = collected(program_of(recipe=recipe, dtype="bfloat16"))
        for name in GRADIENTS:
            found = {key: taps[name][key] for key in ("mean", "rms", "kurtosis", "amax")}
            assert all(values.shape == (2,) for values in found.values())
            assert (
                (found["amax"] > found["rms"]).all()
                and (found["rms"] > 0).all()
                and (found["kurtosis"] > 1).all()
            ), name
        logged = outliers.flatten(taps)
        assert (
            ("snr/qkv.g_avg" in logged)
            == (recipe == "fp8_dpa")
            == ("fp8/saturated_fraction" in logged)
        )


@pytest.mark.parametrize("recipe", ["fp8_dpa", pytest.param("bf16", marks=pytest.mark.slow)])
def test_every_operand_of_a_step_against_float64(monkeypatch, recipe):
    """All that tokens bring back, beside the tensors as they were in the step, forward and backward."""
    seen, original = [], statistics.report

    def report(x, q, *, spread, counted):
        row = original(x, q, spread=spread, counted=counted)
        jax.debug.callback(
            lambda *arrays: seen.append([np.asarray(array) for array in arrays]), x, row
        )
        return row

    spreads, original_distribution = {}, statistics.distribution

    def distribution(x, *counted):
        found = original_distribution(x, *counted)
        jax.debug.callback(
            lambda x, mean, rms: spreads.update({(float(mean), float(rms)): np.asarray(x)}),
            x,
            found["mean"],
            found["rms"],
        )
        return found

    monkeypatch.setattr(statistics, "report", report)
    monkeypatch.setattr(
        statistics, "distribution", distribution
    )  # attention reports dO by it, beside what it casts
    _, taps = collected(program_of(recipe=recipe, dtype="bfloat16"))
    jax.effects_barrier()
    rows = {tuple(row[8:10].tolist()): x for x, row in seen if row[statistics.REPORT.index("rows")]}
    assert (
        len(seen) == 2 * (5 * 2 + 4) and len(rows) == 2 * 5
    )  # layers, operands of linear roles, q k v do; gradients of linear roles
    rows = spreads | rows
    for x, row in seen:
        assert row[0] == np.abs(x.astype(np.float64)).max()
    for name in (*GRADIENTS, "mlp_gate.g"):
        for layer in range(2):
            found = [taps[name][key][layer] for key in ("mean", "rms", "kurtosis")]
            mean, rms, kurtosis, _ = spread_of(rows[tuple(np.float32(found[:2]).tolist())])
            assert found == pytest.approx([mean, rms, kurtosis], rel=5e-5, abs=1e-6 * rms)


@pytest.mark.slow
def test_parameters_and_moments_on_demand_against_float64():
    program = program_of(monitor={"parameters": True})
    state, taps = collected(program)
    alone = jax.jit(state_statistics)(state)
    moments = {
        "params": state.params,
        "mu": state.opt_state.moments[1].mu,
        "nu": state.opt_state.moments[1].nu,
    }
    for group, tree in moments.items():
        blocks = tree["blocks"]
        arrays = {
            "attention.qkv.w": blocks["attention"]["qkv"]["w"],
            "pre_ffn.gain": blocks["pre_ffn"]["gain"],
            "embedding.w": tree["embedding"]["w"][None],
        }
        for name, stacked in arrays.items():
            for layer, x in enumerate(np.asarray(stacked).astype(np.float64)):
                square = np.mean(x**2)
                wanted = {
                    "mean": x.mean(),
                    "rms": np.sqrt(square),
                    "kurtosis": np.mean(x**4) / square**2,
                    "amax": np.abs(x).max(),
                }
                for found in (taps, alone):
                    for key, value in wanted.items():
                        assert found[f"{group}.{name}"][key][layer] == pytest.approx(
                            value, rel=2e-5, abs=1e-6 * wanted["rms"]
                        ), (name, key)
    _, without = collected(program_of())
    assert not [name for name in without if name.startswith(("params.", "mu.", "nu."))]


def test_a_users_tap_appears_from_scan_and_remat(monkeypatch):
    """In the logs, layer by layer, whichever way layers are run."""
    original = transformer.Block.__call__

    def block(self, x_btd, *rest):
        taps_lib.tap("mine", 3 * x_btd)
        return original(self, x_btd, *rest)

    monkeypatch.setattr(transformer.Block, "__call__", block)
    found = [
        collected(program_of(remat=remat, microbatches=2))[1] for remat in ("none", "save_fp8")
    ]
    logged = outliers.flatten(found[0])
    assert (
        logged["rms/mine_layer001"] == pytest.approx(3 * logged["rms/qkv_input_layer001"], rel=1)
        and "kurtosis/mine_avg" in logged
    )
    assert logged["rms/mine_layer001"] == pytest.approx(
        3 * logged["rms/activation_layer000"], rel=1e-5
    )
    for other in found[1:]:
        np.testing.assert_allclose(
            other["mine"]["kurtosis"], found[0]["mine"]["kurtosis"], rtol=1e-5
        )


def test_taps_that_cannot_be_are_told():
    x = jnp.ones((2, 3, 4))
    with taps_lib.collecting() as found:
        taps_lib.tap("a", x)
        with pytest.raises(ValueError, match="has a tap of that name"):
            taps_lib.tap("a", x)
        with pytest.raises(ValueError, match="slash"):
            taps_lib.tap("a/b", x)
        for bad in (x[0], x.astype(jnp.int32)):
            with pytest.raises(
                ValueError, match=r"is not a floating array \[batch, tokens, \.\.\., features\]"
            ):
                taps_lib.tap("b", bad)
    assert list(found) == ["a"]
    taps_lib.tap("a", x)  # outside, nothing happens


def test_a_step_without_statistics_is_the_program_that_knows_none(monkeypatch):
    """Whatever the monitor's settings; nothing of them is even traced. The compiler gets the same text."""

    def text(**monitor):
        return (
            program_of(recipe="fp8_dpa", dtype="bfloat16", monitor=monitor).lower_step().as_text()
        )

    plain = text()

    def forbidden(*args, **kwargs):
        raise AssertionError("statistics in a step without them")

    for name in ("distribution", "health", "report", "choose"):
        monkeypatch.setattr(statistics, name, forbidden)
    monkeypatch.setattr(attention, "score_statistics", forbidden)
    assert text(every=10, kurtosis="pooled", parameters=True) == plain == text(every=0)


@pytest.mark.slow
def test_a_step_with_statistics_updates_as_one_without():
    """Also where one layer's role is not in FP8: its amax is seen, but does not enter the scaling state."""
    config = {"recipe": "fp8_dpa", "overrides": "mlp_up@1=bf16"}
    program = program_of(dtype="bfloat16")
    program = TrainProgram(
        config_lib.from_dict({**config_lib.to_dict(program.config), "fp8": config}),
        program.definition,
        program.mesh,
    )
    batch = batch_for(program)
    calibrated = [calibrate(program, program.init(), batch) for _ in range(2)]
    (plain, one, _), (observed, other, taps) = (
        program.step(state, batch, collect=i == 1) for i, state in enumerate(calibrated)
    )
    assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
    assert taps["mlp_up.x"]["amax"][1] > 0
    for state in (plain, observed):
        assert (np.asarray(state.scaling["mlp_up"]["history"])[1] == 0).all()
    assert jax.tree.structure(plain) == jax.tree.structure(observed)
    for a, b in zip(jax.tree.leaves(plain.scaling), jax.tree.leaves(observed.scaling), strict=True):
        np.testing.assert_allclose(a, b, rtol=0.3)
