"""What a training step becomes on GPUs and TPUs that are not here: FOG's blocks wholly in FP8, and nothing wider by accident."""

import importlib.util

import pytest

from configs import fog_paper
from fp8jax import config as config_lib
from fp8jax.audit import program, targets
from fp8jax.cli.audit_step import audit
from fp8jax.plan import make_plan
from fp8jax.training.step import TrainProgram

pytestmark = pytest.mark.audit
needs_gpus, needs_tpus = (
    pytest.mark.skipif(
        importlib.util.find_spec(plugin) is None,
        reason=f"no {plugin}: pip install -r requirements-audit.txt",
    )
    for plugin in ("jax_cuda13_plugin", "libtpu")
)

# Two layers and 512 tokens: as exact for a share as 32 layers and 4096, and compiled in seconds.
FEW = dict(
    model__layers=2, data__sequence_length=512, training__batch_size=8, training__remat="save_fp8"
)
ROLES = ("qkv", "attention_scores", "attention_values", "attention_out", "mlp_up", "mlp_down")


@pytest.fixture(scope="module")
def h100s():
    return targets.resolve("h100:8")


def flops_by_role(found):
    return {
        role: sum(
            row["flops"] for row in found["gemms"] if row["role"] == role and not row["repeated"]
        )
        for role in ROLES
    }


@needs_gpus
@pytest.mark.parametrize(
    ("size", "attention", "remat"),
    [
        ("390m", "composed", "save_fp8"),
        ("1p5b", "pallas", "save_fp8"),
        ("8b", "composed", "save_fp8"),
        ("8b", "auto", "save_branches"),
    ],
)
def test_every_block_gemm_is_fp8_on_h100s(make_config, h100s, size, attention, remat):
    changes = FEW | {"training__remat": remat}
    config = make_config(size, **changes, fp8__attention_backend=attention)
    found = audit(config, h100s)
    assert (
        found["fp8_share"] == 1.0
        and found["target"]["fallbacks"] == []
        and found["target"]["float64"] == []
    )
    block = [row for row in found["gemms"] if row["role"] in ROLES]
    assert {(row["role"], row["pass"]) for row in block} == {
        (role, name) for role in ROLES for name in ("fprop", "dgrad", "wgrad")
    }
    assert {row["kernel"] for row in block} == {"cuBLASLt FP8"} | (
        {"Pallas FP8"} if attention != "composed" else set()
    )
    # Layers are compiled one by one here; barriers keep the compiler from finding that it has computed them before.
    inward, outward = {"qkv", "mlp_up"}, {"attention_out", "mlp_down"}
    again = {row["role"] for row in block if row["repeated"]} & (inward | outward)
    assert again == (inward if remat == "save_branches" else inward | outward)
    assert all(row["executions_known"] for row in found["gemms"])
    assert {row["role"] for row in found["gemms"]} == {*ROLES, "lm_head"}
    wide = [row for row in found["gemms"] if "float32" in (row["lhs_dtype"], row["rhs_dtype"])]
    assert wide == []

    flops, model = found["estimate"]["model_flops"], config.model
    assert flops["other"] == 0
    # Chunks of 256 queries in bands of two: each of the 512 takes all 512 keys. The kernels' tiles follow the diagonal.
    if attention == "composed":
        assert flops["masked_attention"] == 12 * 2 * model.width * 8 * (512 * 512 - 512 * 513 // 2)
    else:
        assert 0 < flops["masked_attention"] < flops["closed_formula_attention"] / 3
    check_gathers(found["collectives"], config)


@needs_gpus
def test_the_papers_own_settings_are_fp8_on_h100s(h100s):
    """Unrounded scales, weights whose scales come from the state: 100% of the blocks' GEMMs all the same."""
    values = fog_paper.get_config("8b")
    for name, value in FEW.items():
        section, _, field = name.partition("__")
        values[section][field] = value
    found = audit(config_lib.from_dict(values), h100s)
    assert (
        found["fp8_share"] == 1.0
        and found["target"]["fallbacks"] == []
        and found["target"]["float64"] == []
    )
    assert {row["kernel"] for row in found["gemms"] if row["role"] in ROLES} == {
        "cuBLASLt FP8",
        "Pallas FP8",
    }


def check_gathers(rows, config):
    """Blocks' weights are gathered as bytes, for the forward and for the backward pass; nothing else of their size is gathered."""
    gathered = {row["dtype"]: row["bytes"] for row in rows if row["kind"] == "all-gather"}
    assert {tuple(row["axes"]) for row in rows} == {("fsdp",)}
    model = config.model
    d, heads, kv = model.width, model.width, model.width // model.heads * model.kv_heads
    layer = d * (heads + 2 * kv) + heads * d + 2 * d * model.ffn_width * 3 // 2
    assert model.layers * layer <= gathered.pop("float8_e4m3fn") <= 2 * model.layers * layer
    head = model.vocab_size * d
    assert (
        gathered.pop("bfloat16", 0) <= 2 * head * 2
    )  # the head, which is not in FP8, at most once a pass
    assert sum(gathered.values()) < layer / 10  # token ids and gains


@needs_gpus
@pytest.mark.parametrize(
    "role", ["mlp_down", pytest.param("attention_scores", marks=pytest.mark.slow)]
)
def test_the_share_falls_by_exactly_the_role_that_is_not_fp8(make_config, h100s, role):
    found = audit(
        make_config(
            "390m", **FEW, fp8__overrides=f"{role}=bf16", fp8__attention_backend="composed"
        ),
        h100s,
    )
    assert {row["role"] for row in found["gemms"] if not row["fp8"]} == {role, "lm_head"}
    block = [row for row in found["gemms"] if row["role"] in ROLES]
    lost = sum(row["flops"] for row in block if row["role"] == role) / sum(
        row["flops"] for row in block
    )
    assert found["fp8_share"] == pytest.approx(1 - lost, abs=1e-12) and lost > 0
    # Which is not the program's own word only: what each role computes follows from shapes.
    d, f, pairs = 1024, 6144, 512 * 512
    linear = {"qkv": d * 2 * d, "attention_out": d * d, "mlp_up": d * f, "mlp_down": d * f}
    expected = {name: 6 * 2 * 512 * weights for name, weights in linear.items()} | dict.fromkeys(
        ("attention_scores", "attention_values"), 6 * 2 * d * pairs
    )
    assert flops_by_role(found) == expected


NODES = {
    "data 2 x fsdp 4": dict(mesh__data=2, mesh__fsdp=4),
    "sequence 2 x fsdp 4": dict(mesh__sequence=2, mesh__fsdp=4),
    "data 2 x fsdp 2 x tensor 2": dict(mesh__data=2, mesh__fsdp=2, mesh__tensor=2),
    "data 2 x tensor 4": dict(mesh__data=2, mesh__fsdp=1, mesh__tensor=4),
}


@needs_gpus
@pytest.mark.parametrize(
    "mesh",
    [
        pytest.param(mesh, marks=[] if name == "data 2 x fsdp 2 x tensor 2" else pytest.mark.slow)
        for name, mesh in NODES.items()
    ],
    ids=NODES,
)
def test_what_two_nodes_of_h100s_send_each_other(make_config, mesh):
    """Weights and activations of the blocks move as FP8; amaxes are compared once a step, not in the loop over layers."""
    config = make_config("390m", **FEW, **mesh)
    target = targets.resolve("h100:2x4")
    vocab_size = config.model.vocab_size
    step = TrainProgram(make_plan(config, target.devices, vocab_size=vocab_size))
    compiled, _ = targets.compile_step(
        step.jitted_step().trace(step.abstract_state, step.abstract_batch), target
    )
    found = program.read(compiled, step.mesh).collectives
    model, rows = (
        config.model,
        config.training.batch_size // (step.mesh.shape["data"] * step.mesh.shape["fsdp"]),
    )
    activation = (
        rows * config.data.sequence_length * model.width // step.mesh.shape["sequence"]
    )  # elements, as a GEMM takes it
    weight = (
        model.width**2 // step.mesh.shape["tensor"]
    )  # the smallest matrix of a block, as a GEMM takes it

    in_layers = [c for c in found if c.count % model.layers == 0]
    gathers = [c for c in in_layers if c.kind == "all-gather"]
    wide = [c for c in gathers if not c.dtype.startswith("float8")]
    assert sum(c.bytes for c in wide) < weight / 8, wide  # gains of norms
    assert {c.reduction for c in in_layers if c.reduction} == {"add"}
    assert all(
        c.bytes < activation for c in found if c.kind == "all-gather" and c.dtype == "float32"
    ), found
    largest = [c for c in found if c.reduction == "maximum"]
    assert 1 <= len(largest) <= 4 and all(c.count == 1 for c in largest)
    if (
        step.mesh.shape["tensor"] > 1
    ):  # what column-parallel layers take, and the gradients that row-parallel layers are given
        kinds = {c.dtype for c in gathers if c.axes == ("tensor",) and c.bytes >= activation}
        assert kinds == {"float8_e4m3fn", "float8_e5m2"}
    if step.mesh.shape["fsdp"] > 1:
        assert any(c.axes == ("fsdp",) and c.bytes >= weight for c in gathers)


@pytest.mark.slow
@needs_gpus
def test_emulation_on_an_h100_is_seen(make_config, h100s):
    found = audit(
        make_config("390m", **FEW | dict(model__layers=1), fp8__backend="emulated"), h100s
    )
    assert found["fp8_share"] == 0.0


@pytest.mark.slow
@needs_gpus
def test_hundreds_of_gpus_over_nodes(make_config):
    config = make_config(
        "390m", **FEW | dict(training__batch_size=512), mesh__data=64, mesh__fsdp=8
    )
    found = audit(config, targets.resolve("h100:64x8"))
    assert (
        found["target"]["devices"] == 512
        and found["fp8_share"] == 1.0
        and found["estimate"]["model_flops"]["other"] == 0
    )
    gathers = {
        tuple(row["axes"]) for row in found["collectives"] if row["dtype"] == "float8_e4m3fn"
    }
    assert gathers == {("fsdp",)}
    assert {axis for row in found["collectives"] for axis in row["axes"]} == {"data", "fsdp"}


@needs_tpus
@pytest.mark.parametrize(
    ("target", "share"), [("tpu7x:4", 1.0), pytest.param("tpu-v5p:4", 0.0, marks=pytest.mark.slow)]
)
def test_tpus_keep_fp8_where_they_have_units(make_config, target, share):
    found = audit(make_config("tiny", model__layers=2), targets.resolve(target))
    assert (
        found["fp8_share"] == share
        and found["target"]["fp8_units"] == bool(share)
        and found["target"]["fallbacks"] == []
    )
    assert (
        found["target"]["fp8_share_asked"] == 1.0 and found["estimate"]["model_flops"]["other"] == 0
    )
    assert {row["kernel"] for row in found["gemms"] if row["role"] in ROLES} == {
        "MXU FP8" if share else "MXU BF16"
    }


def beside_the_gemms(make_config, layers, **changes):
    """The bytes that a step of FOG-flash at 8B's widths moves on one H200, without rematerialisation."""
    config = make_config(
        "8b",
        architecture="fog_flash",
        model__layers=layers,
        data__sequence_length=4096,
        training__batch_size=4,
        training__microbatches=1,
        training__loss_chunk=0,
        training__remat="none",
        **changes,
    )
    return audit(config, targets.resolve("h200:1"))["non_gemm_bytes"]["total"]


@needs_gpus
def test_two_layers_move_little_beside_their_gemms(make_config):
    assert beside_the_gemms(make_config, 2) < 131e9


@pytest.mark.slow
@needs_gpus
def test_a_layer_moves_little_beside_its_gemms(make_config):
    six, two = (beside_the_gemms(make_config, layers) for layers in (6, 2))
    assert six < 210e9
    assert (six - two) / 4 < 22e9
    assert six < 0.8 * beside_the_gemms(make_config, 6, model__scan_layers=True)
