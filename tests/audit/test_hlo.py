"""Reading the text of optimized programs."""

import jax
import jax.numpy as jnp
import pytest

from fp8jax.audit import hlo

TEXT = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%fused (param_0: f8e4m3fn[4,8], /*index=1*/param_1: f32[]) -> f8e4m3fn[8,4] {
  %param_0 = f8e4m3fn[4,8]{1,0:T(8,128)(4,1)S(1)} parameter(0)
  %param_1 = f32[] parameter(1)
  ROOT %transpose.1 = f8e4m3fn[8,4]{1,0} transpose(%param_0), dimensions={1,0}
}

%condition (p: (s32[], f8e4m3fn[4,8])) -> pred[] {
  %p = (s32[], f8e4m3fn[4,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] constant(12)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%body (p.1: (s32[], f8e4m3fn[4,8])) -> (s32[], f8e4m3fn[4,8]) {
  %p.1 = (s32[], /*index=1*/f8e4m3fn[4,8]{1,0}) parameter(0)
  %x = f8e4m3fn[4,8]{1,0} get-tuple-element(%p.1), index=1
  %scale = f32[] constant(1)
  %fusion.1 = f8e4m3fn[8,4]{1,0} fusion(%x, %scale), kind=kInput, calls=%fused, metadata={op_name="jit(step)/attention/mul"}
  %j = s32[] get-tuple-element(%p.1), index=0
  ROOT %t = (s32[], f8e4m3fn[4,8]{1,0}) tuple(%j, %x)
}

ENTRY %main.1 (arg: f32[8]) -> f32[8] {
  %arg = f32[8]{0} parameter(0), metadata={op_name="x"}
  %start = (s32[], f8e4m3fn[4,8]{1,0}) custom-call(), custom_call_target="make"
  %while.1 = (s32[], f8e4m3fn[4,8]{1,0}) while(%start), condition=%condition, body=%bodyKNOWN
  ROOT %copy.1 = f32[8]{0} copy(%arg)
}
"""


def runs(text):
    return {run.instruction.name: run for run in hlo.executed(hlo.parse(text))}


@pytest.mark.parametrize(
    ("note", "count"), [("", 12), (', backend_config={"known_trip_count":{"n":"7"}}', 7)]
)
def test_loops_are_multiplied_out(note, count):
    found = runs(TEXT.replace("%bodyKNOWN", "%body" + note))
    assert found["fusion.1"].count == count and found["fusion.1"].known
    assert found["copy.1"].count == 1


@pytest.mark.parametrize(
    ("first", "step", "count"),
    [("", 1, 12), ("%zero", 1, 12), ("%three", 1, 9), ("%three", 2, 5), ("%zero", 2, 6)],
)
def test_a_counter_may_begin_and_step_as_it_likes(first, step, count):
    """Regression: libtpu's loops of partial GEMMs, two turns in one body, were counted twice."""
    text = (
        TEXT.replace("KNOWN", "")
        .replace("tuple(%j, %x)", "tuple(%next, %x)")
        .replace(
            "  %j = ", f"  %step = s32[] constant({step})\n  %next = s32[] add(%j, %step)\n  %j = "
        )
    )
    if first:
        text = text.replace(
            'custom-call(), custom_call_target="make"', f"tuple({first}, %made)"
        ).replace("  %start", "  %zero = s32[] constant(0)\n  %three = s32[] constant(3)\n  %start")
    assert runs(text)["fusion.1"].count == count


ELEMENTS = """HloModule jit_step

ENTRY %main.1 (arg: f32[8]) -> f32[8] {
  %arg = ((f32[8]{0:T(8,128)(4,1)}, s32[]), /*index=1*/f8e4m3fn[4,2]{1,0:T(8,128)(4,1)S(1)}, s32[]{:T(128)}) parameter(0)
  %q = f8e4m3fn[2,4]{1,0} transpose(%arg#1), dimensions={1,0}
  %both = (f32[8]{0}, s32[]) copy(%arg#0)
  ROOT %copy.1 = f32[8]{0} copy(%both#0)
}
"""


def test_elements_of_tuples_written_in_place():
    """As libtpu of jax 0.12 writes them; regression: such an operand was the whole tuple."""
    found = runs(ELEMENTS)
    assert [found[name].operands()[0].bytes for name in ("q", "both", "copy.1")] == [8, 36, 32]
    (element,) = found["q"].operands()
    assert (
        element.shapes == (hlo.Array("float8_e4m3fn", (4, 2), (1, 0)),)
        and element.opcode == "get-tuple-element"
    )
    assert hlo.number(element.attributes, "index") == 1 and element.operands == ("arg",)


def test_a_loop_of_unknown_length_is_one_uncertain_pass():
    found = runs(TEXT.replace("KNOWN", "").replace("constant(12)", "parameter(1)"))
    assert found["fusion.1"].count == 1 and not found["fusion.1"].known


def test_shapes_scopes_and_operands():
    module = hlo.parse(TEXT.replace("KNOWN", ""))
    fusion = runs(TEXT.replace("KNOWN", ""))["fusion.1"]
    assert fusion.instruction.shapes == (hlo.Array("float8_e4m3fn", (8, 4), (1, 0)),)
    assert fusion.instruction.scope == "jit(step)/attention/mul" and fusion.instruction.bytes == 32
    assert [operand.name for operand in fusion.operands()] == ["x", "scale"]
    assert [inner.instruction.opcode for inner in hlo.nested(module, fusion)] == [
        "parameter",
        "parameter",
        "transpose",
    ]
    assert [shape.dtype for shape in module.computations["body"]["p.1"].shapes] == [
        "int32",
        "float8_e4m3fn",
    ]


@pytest.mark.parametrize(
    ("dtype", "size"),
    [
        (jnp.float8_e5m2, 1),
        (jnp.bfloat16, 2),
        (jnp.bool_, 1),
        (jnp.int32, 4),
        (jnp.uint8, 1),
        (jnp.float32, 4),
        (jnp.complex64, 8),
    ],
)
def test_dtypes_and_bytes_of_a_compiled_program(dtype, size):
    text = jax.jit(lambda x: x[::-1]).lower(jax.ShapeDtypeStruct((6, 7), dtype)).compile().as_text()
    root = hlo.root(hlo.parse(text).computations[hlo.parse(text).entry])
    assert root.shapes[0].dtype == jnp.dtype(dtype).name and root.bytes == 42 * size


def test_another_text_is_refused():
    with pytest.raises(ValueError, match="ENTRY"):
        hlo.parse("module @jit_step attributes {}")
