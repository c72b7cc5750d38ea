"""Bytes that move beside the GEMMs, against counts by hand."""

import pytest

from fp8jax.audit import hlo
from fp8jax.audit.traffic import TRANSPOSED_FP8, Traffic, traffic

FUSIONS = """HloModule m

%slice_of_layers (p: f32[8,100], i: s32[]) -> bf16[100] {
  %p = f32[8,100]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %d = f32[1,100]{1,0} dynamic-slice(%p, %i, %z), dynamic_slice_sizes={1,100}
  %r = f32[100]{0} bitcast(%d)
  ROOT %c = bf16[100]{0} convert(%r)
}

%update_in_place (p: f32[8,100], u: bf16[100], i: s32[]) -> f32[8,100] {
  %p = f32[8,100]{1,0} parameter(0)
  %u = bf16[100]{0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  %c = f32[100]{0} convert(%u)
  %b = f32[1,100]{1,0} bitcast(%c)
  ROOT %w = f32[8,100]{1,0} dynamic-update-slice(%p, %b, %i, %z)
}

%cast_and_transpose (p: bf16[40,50]) -> (f8e4m3fn[40,50], f8e4m3fn[50,40]) {
  %p = bf16[40,50]{1,0} parameter(0)
  %c = f8e4m3fn[40,50]{1,0} convert(%p)
  %t = f8e4m3fn[50,40]{1,0} transpose(%c), dimensions={1,0}
  ROOT %r = (f8e4m3fn[40,50], f8e4m3fn[50,40]) tuple(%c, %t)
}

%only_transpose (p: u8[40,50]) -> f8e4m3fn[50,40] {
  %p = u8[40,50]{1,0} parameter(0)
  %c = f8e4m3fn[40,50]{1,0} bitcast-convert(%p)
  ROOT %t = f8e4m3fn[50,40]{1,0} transpose(%c), dimensions={1,0}
}

ENTRY %main (a: f32[]) -> f32[] {
  %layers = f32[8,100]{1,0} parameter(0)
  %one = s32[] parameter(1)
  %x = bf16[40,50]{1,0} parameter(2)
  %u = u8[40,50]{1,0} parameter(3)
  %q = f8e4m3fn[40,50]{1,0} parameter(4)
  %v = bf16[100]{0} parameter(5)
LINE
}
"""


def rows(line):
    return traffic(hlo.parse(FUSIONS.replace("LINE", f"  ROOT {line}")))


def fusion(shape, arguments, body, scope="jit(step)/attention/mul"):
    return f'%f = {shape} fusion({arguments}), kind=kLoop, calls=%{body}, metadata={{op_name="{scope}"}}'


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            fusion("bf16[100]{0}", "%layers, %one", "slice_of_layers"),
            [Traffic("fusion", "attention", 404, 200, 1)],
        ),
        (
            fusion("f32[8,100]{1,0}", "%layers, %v, %one", "update_in_place"),
            [Traffic("fusion", "attention", 204, 400, 1)],
        ),
        (
            fusion(
                "(f8e4m3fn[40,50], f8e4m3fn[50,40])",
                "%x",
                "cast_and_transpose",
                "jit(step)/quantise_weight.qkv/mul",
            ),
            [
                Traffic("fusion", "quantise_weight", 4000, 2000, 1),
                Traffic(TRANSPOSED_FP8, "quantise_weight", 0, 2000, 1),
            ],
        ),
        (
            fusion("f8e4m3fn[50,40]{1,0}", "%u", "only_transpose"),
            [Traffic(TRANSPOSED_FP8, "attention", 2000, 2000, 1)],
        ),
        ("%c = f8e4m3fn[40,50]{0,1} copy(%q)", [Traffic(TRANSPOSED_FP8, "", 2000, 2000, 1)]),
        ("%c = f8e4m3fn[40,50]{1,0} copy(%q)", [Traffic("copy", "", 2000, 2000, 1)]),
        (
            "%t = bf16[50,40]{1,0} transpose(%x), dimensions={1,0}",
            [Traffic("transpose", "", 4000, 4000, 1)],
        ),
        ("%g = bf16[40,50]{1,0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add", []),
        ("%b = bf16[2000]{0} bitcast(%x)", []),
    ],
)
def test_bytes_by_kind_and_place(line, expected):
    found = [row for row in rows(line) if row.read + row.written]
    assert sorted(found, key=str) == sorted(expected, key=str)


def test_a_fusion_that_goes_on_beside_others_counts_once():
    """As jax 0.11.2 compiles loops for an H100: the result of the start names operands, result and a context."""
    start = (
        "%s = ((f32[8,100]{1,0}, bf16[100]{0}, s32[]), f32[8,100]{1,0}, u32[]) fusion-start(%layers, %v, %one), kind=kLoop, "
        'calls=%update_in_place, metadata={op_name="jit(step)/attention/mul"}'
    )
    text = FUSIONS.replace("LINE", f"  {start}\n  ROOT %f = f32[8,100]{{1,0}} fusion-done(%s)")
    assert traffic(hlo.parse(text)) == [Traffic("fusion", "attention", 204, 400, 1)]


ON_A_TPU = """HloModule m

%other_tiles (p: u8[8,100]) -> u8[8,100] {
  %p = u8[8,100]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %c = u8[8,100]{1,0:T(8,128)(4,1)} copy(%p)
}

%layer (p: u8[8,100], i: s32[]) -> f8e4m3fn[100] {
  %p = u8[8,100]{1,0:T(32,128)(4,1)} parameter(0)
  %i = s32[] parameter(1)
  %z = s32[] constant(0)
  %t = u8[8,100]{1,0:T(8,128)(4,1)} fusion(%p), kind=kLoop, calls=%other_tiles
  %d = u8[1,100]{1,0:T(8,128)(4,1)} dynamic-slice(%t, %i, %z), dynamic_slice_sizes={1,100}
  ROOT %c = f8e4m3fn[100]{0} bitcast-convert(%d)
}

%whole (p: u8[8,100]) -> u8[8,100] {
  %p = u8[8,100]{1,0:T(32,128)(4,1)} parameter(0)
  ROOT %t = u8[8,100]{1,0:T(8,128)(4,1)} fusion(%p), kind=kLoop, calls=%other_tiles
}

%a_slice (p: s8[800]) -> s8[200] {
  %p = s8[800]{0} parameter(0)
  ROOT %s = s8[200]{0:T(128)S(1)} slice(%p), slice={[0:200]}
}

%turned (p: f8e4m3fn[40,50]) -> f8e4m3fn[40,50] {
  %p = f8e4m3fn[40,50]{1,0} parameter(0)
  ROOT %t = f8e4m3fn[40,50]{0,1} copy(%p)
}

%on_the_side (p: f8e4m3fn[40,50]) -> f8e4m3fn[40,50] {
  %p = f8e4m3fn[40,50]{1,0} parameter(0)
  ROOT %s = f8e4m3fn[40,50]{0,1} call(%p), to_apply=%turned
}

%further_aside (p: f8e4m3fn[40,50]) -> f8e4m3fn[40,50] {
  %p = f8e4m3fn[40,50]{1,0} parameter(0)
  %s = ((f8e4m3fn[40,50]{1,0}), f8e4m3fn[40,50]{0,1}, u32[]{:S(8)}) async-start(%p), calls=%on_the_side
  ROOT %d = f8e4m3fn[40,50]{0,1} async-done(%s)
}

ENTRY %main (a: f32[]) -> f32[] {
  %state = (u8[8,100]{1,0:T(32,128)(4,1)}, s32[]{:T(128)}, f32[1000]{0}) parameter(0)
  %bytes = s8[800]{0} parameter(1)
  %q = f8e4m3fn[40,50]{1,0} parameter(2)
LINES
}
"""


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (
            ["ROOT %f = f8e4m3fn[100]{0} fusion(%state#0, %state#1), kind=kLoop, calls=%layer"],
            ["fusion", 100 + 4, 100, 1],
        ),
        (
            ["ROOT %f = u8[8,100]{1,0} fusion(%state#0), kind=kLoop, calls=%whole"],
            ["fusion", 800, 800, 1],
        ),
        (
            [
                "%s = (f32[1000]{0:S(1)}, f32[1000]{0}, u32[]{:S(2)}) copy-start(%state#2)",
                "ROOT %d = f32[1000]{0:S(1)} copy-done(%s)",
            ],
            ["copy", 4000, 4000, 1],
        ),
        (
            [
                "%s = ((s8[800]{0}), s8[200]{0:S(1)}, s32[]{:S(2)}) async-start(%bytes), calls=%a_slice",
                "%d = s8[200]{0:S(1)} async-done(%s)",
                'ROOT %c = s8[400]{0:S(1)} custom-call(%d, %d), custom_call_target="ConcatBitcast"',
            ],
            ["other", 200, 200, 1],
        ),
        (
            [
                '%s = ((), (), (s32[1]{0})) async-start(), async_execution_thread="sparsecore", calls=%further_aside',
                "%u = ((f8e4m3fn[40,50]{1,0}), f8e4m3fn[40,50]{0,1}) async-update(%s, %q)",
                "ROOT %d = f8e4m3fn[40,50]{0,1} async-done(%u)",
            ],
            [TRANSPOSED_FP8, 2000, 2000, 1],
        ),
    ],
    ids=["layer", "whole", "prefetch", "slice", "sparsecore"],
)
def test_as_libtpu_writes_programs(lines, expected):
    """Lines of what libtpu 0.0.50 made of a step for TPU7x, made small. Elements of tuples had counted as the tuples, layers as all layers."""
    kind, *numbers = expected
    text = ON_A_TPU.replace("LINES", "\n".join(f"  {line}" for line in lines))
    assert traffic(hlo.parse(text)) == [Traffic(kind, "", *numbers)]
