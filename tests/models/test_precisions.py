"""With what accumulation every GEMM of a traced step runs, by role and pass: the recipe's word must reach the dot."""

import re

import jax
import pytest

from fp8jax import config as config_lib
from fp8jax.plan import make_plan
from fp8jax.training.step import TrainProgram

MODEL = {
    "layers": 2,
    "width": 48,
    "ffn_width": 80,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "architecture": "llama3",
    "tied_embeddings": False,
}
LINEAR = ("qkv", "attention_out", "mlp_gate", "mlp_up", "mlp_down", "lm_head")
PASSES = ("fprop", "dgrad", "wgrad")
SCOPE = re.compile(r"fp8jax\.gemm\[(\w+)\.(\w+)\]")


def dots(jaxpr, scope=""):
    """Name and equation of every dot_general."""
    for eqn in jaxpr.eqns:
        here = f"{scope}/{eqn.source_info.name_stack}"
        if eqn.primitive.name == "dot_general":
            yield SCOPE.findall(here)[-1], eqn
        for part in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            part = getattr(part, "jaxpr", part)
            if hasattr(part, "eqns"):
                yield from dots(part, here)


def precise(attention_backend="composed", loss_chunk=0, **fp8):
    """(role, pass) → whether its GEMMs of FP8 operands are precise; native FP8, which is traced and not compiled here."""
    config = config_lib.from_dict(
        {
            "model": MODEL,
            "fp8": {
                "backend": "native",
                "head": True,
                "attention_backend": attention_backend,
                **fp8,
            },
            "data": {"sequence_length": 32},
            "training": {"steps": 1, "batch_size": 2, "loss_chunk": loss_chunk},
            "optimizer": {"warmup_steps": 0},
        }
    )
    program = TrainProgram(make_plan(config, jax.devices()[:1], vocab_size=128))
    found = {}
    for name, eqn in dots(
        program.jitted_step().trace(program.abstract_state, program.abstract_batch).jaxpr.jaxpr
    ):
        assert all(str(v.aval.dtype).startswith("float8") for v in eqn.invars), name
        chosen = eqn.params["precision"]
        kinds = {str(p) for p in (chosen if isinstance(chosen, tuple) else (chosen,))}
        assert len(kinds) == 1 and found.setdefault(name, kinds) == kinds, name
    return {name: kinds == {"HIGHEST"} for name, kinds in found.items()}


@pytest.mark.parametrize(
    ("choice", "fast"), [("fprop", {"fprop"}), ("all", set(PASSES)), ("none", set())]
)
def test_accumulation_is_as_the_config_says_in_every_gemm(choice, fast):
    """Linear layers, attention and head, forward and backward: fast accumulation keeps 14 bits of a sum on Hopper GPUs."""
    found = precise(fast_accumulation=choice)
    assert set(found) == {
        (role, name)
        for role in (*LINEAR, "attention_scores", "attention_values")
        for name in PASSES
    }
    assert {name: ok for name, ok in found.items() if ok == (name[1] in fast)} == {}


@pytest.mark.parametrize(
    "options", [{"attention_backend": "emulated"}, {"loss_chunk": 32}], ids=str
)
def test_other_paths_keep_the_rule(options):
    found = precise(**options)
    assert {name: ok for name, ok in found.items() if ok == (name[1] == "fprop")} == {}
