"""What a run tells before its first step, and what it refuses."""

import dataclasses

import pytest

from fp8jax.config import ConfigError
from fp8jax.numerics.attention import composed as attention_composed
from fp8jax.numerics.attention import definition as attention
from fp8jax.numerics.attention.self_check import self_check
from fp8jax.plan import Plan
from fp8jax.training import banner
from tests.helpers.runs import micro, program_of


@pytest.fixture(scope="module")
def program():
    return program_of(micro())


def test_attention_is_checked_against_the_definition(program):
    (line,) = banner.check_attention(program.plan)
    assert program.recipes.attention_backend == "composed" and "composed, within" in line


def test_attention_that_computes_something_else_is_refused(program, monkeypatch):
    """One scale left out, as a miswired kernel would."""
    original = attention_composed.forward

    def wrong(call, operands):
        return original(call, operands._replace(v=operands.v._replace(scale=2 * operands.v.scale)))

    monkeypatch.setitem(attention._FORWARD, "composed", wrong)
    monkeypatch.setattr(banner, "self_check", self_check)  # not the one that remembers
    with pytest.raises(
        ConfigError, match="config.fp8.attention_backend: .*'composed' disagrees.* o 1[ ,.;]"
    ):
        banner.check_attention(program.plan)


@pytest.mark.parametrize(
    ("fp8", "lines"),
    [({"recipe": "bf16"}, 0), ({"recipe": "fp8"}, 0), ({"attention_backend": "emulated"}, 1)],
)
def test_nothing_to_check(fp8, lines):
    assert len(banner.check_attention(program_of(micro(fp8=fp8)).plan)) == lines


def test_a_backend_that_cannot_do_the_scaling_names_one_that_can():
    overrides = "attention_scores=blockwise"
    for backend in ("composed", "emulated"):
        with pytest.raises(ConfigError, match="config.fp8") as caught:
            program_of(micro(fp8={"attention_backend": backend, "overrides": overrides}))
        assert "\n" not in str(caught.value)


def test_memory_is_told_by_part(program):
    lines = banner.describe_compiled(program)
    assert len(lines) == 1 and lines[0].startswith("memory   ") and "temporaries" in lines[0]


def test_a_gemm_that_lost_fp8_is_a_warning(program, monkeypatch):
    monkeypatch.setattr(
        banner.audit,
        "fallbacks",
        lambda asked, found: ["qkv.dgrad: bfloat16 x bfloat16, cuBLASLt"],
    )
    monkeypatch.setattr(program, "plan", dataclasses.replace(program.plan, emulated=False))
    assert banner.describe_compiled(program)[1:] == [
        "warning  not compiled to an FP8 GEMM: qkv.dgrad: bfloat16 x bfloat16, cuBLASLt"
    ]


def test_every_role_that_a_warning_can_name_is_tried(monkeypatch):
    """With kernels that do FP8 alone, any role of attention may leave; what a warning cannot take out is found here."""
    model = {"head_dim": 64}
    program = program_of(
        micro(model=model, fp8={"attention_backend": "pallas"}, warning={"action": "fallback"})
    )
    tried = []
    original = Plan.with_overrides

    def noted(self, overrides):
        tried.append(overrides)
        return original(self, overrides)

    monkeypatch.setattr(Plan, "with_overrides", noted)
    banner.check_fallbacks(program.plan)
    assert {"attention_scores=bf16", "attention_values=bf16", "mlp_down=bf16"} <= set(
        tried
    ) and len(tried) == 7
    fallen = program.fallen_back("attention_scores=bf16")
    assert {fallen.recipes.backend_of(layer) for layer in range(2)} == {"composed"}
    fallen.jitted_step(collect=True).trace(fallen.abstract_state, fallen.abstract_batch)


def test_a_fallback_that_cannot_be_is_refused_at_the_start():
    for action in ("fallback", "log"):
        with pytest.raises(ConfigError, match="mlp_gate: the FFN has no gate"):
            config = micro(warning={"action": action, "fallback": "mlp_gate"})
            banner.check_fallbacks(program_of(config).plan)


@pytest.mark.parametrize(
    ("scan", "layers", "warned"), [(True, 6, False), (False, 2, False), (False, 6, True)]
)
def test_layers_that_are_compiled_one_by_one_are_a_warning(monkeypatch, scan, layers, warned):
    monkeypatch.setattr(banner, "_traced", lambda program: [])
    monkeypatch.setattr(banner.audit, "fp8_share", lambda gemms, roles: 1.0)
    model = {
        "width": 32,
        "ffn_width": 32,
        "heads": 2,
        "kv_heads": 1,
        "layers": layers,
        "scan_layers": scan,
    }
    lines = banner.describe(program_of(micro(model=model)))
    assert (
        any(line.startswith("warning  config.model.scan_layers=False") for line in lines) == warned
    )
