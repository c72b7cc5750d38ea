"""Collectives of compiled programs: kinds, mesh axes and bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from fp8jax.audit import hlo
from fp8jax.audit.collectives import collectives, replica_groups

PAIRS, HALVES = [(0, 1), (2, 3), (4, 5), (6, 7)], [(0, 2, 4, 6), (1, 3, 5, 7)]


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}, x", PAIRS),
        ("replica_groups={}, x", [tuple(range(8))]),
        ("replica_groups=[4,2]<=[8], x", PAIRS),
        ("replica_groups=[2,4]<=[4,2]T(1,0), x", HALVES),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_1'}, x", PAIRS),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}, x", HALVES),
        (
            "replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4], device_ids=([2,2,2]T(1,0,2)) {'axis_2'}, x",
            [(0, 1, 4, 5), (2, 3, 6, 7)],
        ),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','b'}, x", HALVES),
        ("source_target_pairs={{0,1},{1,0}}, x", [(0, 1), (1, 0)]),
    ],
)
def test_replica_groups_as_xla_writes_them(text, groups):
    assert replica_groups(text, 8) == groups


MESH = {"data": 2, "fsdp": 2, "tensor": 2}


def compiled(function, *specs, shape=(16, 32), dtype=jnp.float32):
    mesh = Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), tuple(MESH))
    arguments = jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, specs[0]))
    text = (
        jax.jit(function, out_shardings=NamedSharding(mesh, specs[1]))
        .lower(arguments)
        .compile()
        .as_text()
    )
    return collectives(hlo.parse(text), MESH)


@pytest.mark.parametrize(
    "axes",
    [
        ("data",),
        ("fsdp",),
        ("tensor",),
        ("data", "fsdp"),
        ("data", "tensor"),
        ("data", "fsdp", "tensor"),
    ],
)
def test_gathers_are_named_by_their_axes(axes):
    [found] = compiled(lambda x: x, P(axes), P())
    size = 2 ** len(axes)
    assert (found.kind, found.axes, found.group_size) == ("all-gather", axes, size)
    assert found.bytes == 16 * 32 * 4 and found.sent == found.bytes * (size - 1) // size


def test_a_reduction_sends_twice():
    [found] = compiled(lambda x: jnp.sum(x, axis=0), P(("fsdp",)), P())
    assert (found.kind, found.axes, found.bytes, found.sent) == (
        "all-reduce",
        ("fsdp",),
        32 * 4,
        32 * 4,
    )


def test_an_asynchronous_combined_gather_is_counted_once_by_dtype():
    start = (
        "((f8e4m3fn[4,8], f32[4]), (f8e4m3fn[32,8], f32[32])) all-gather-start(%a, %b), channel_id=1, "
        "replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}"
    )
    text = f"""HloModule m

ENTRY %main (a: f32[]) -> f32[] {{
  %a = f8e4m3fn[4,8]{{1,0}} parameter(0)
  %b = f32[4]{{0}} parameter(1)
  %s = {start}
  ROOT %d = (f8e4m3fn[32,8], f32[32]) all-gather-done(%s)
}}
"""
    found = collectives(hlo.parse(text), {"data": 1, "fsdp": 8})
    assert [(c.dtype, c.axes, c.bytes, c.sent) for c in found] == [
        ("float8_e4m3fn", ("fsdp",), 256, 224),
        ("float32", ("fsdp",), 128, 112),
    ]


def test_groups_that_fit_no_axis_are_marked():
    text = """HloModule m

ENTRY %main (a: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %r = f32[] all-reduce(%a), replica_groups={{0,3},{1,2}}, to_apply=%add
}
"""
    [found] = collectives(hlo.parse(text), {"data": 2, "fsdp": 2})
    assert found.axes == ("?",)
