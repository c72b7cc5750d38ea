"""Reads a program: its GEMMs and their dtypes, its collectives, its memory and the traffic beside the GEMMs.

    gemms = program.traced_gemms(traced.jaxpr)                # before compilation, the same on every device
    reading = program.read(compiled, mesh)                    # what the compiler made of it, on one device
    print(program.fp8_share(reading.gemms, {"qkv", "mlp_up", ...}), reading.memory.peak_bytes)
    for line in program.fallbacks(gemms, reading.gemms): ...  # asked for in FP8, compiled to something else

Reading takes a fraction of a second; nothing is compiled or run. A plan is read, not a run: speed, autotuning and what a
library does inside a call are not in it.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from fp8jax.audit import hlo
from fp8jax.audit.collectives import Collective, collectives
from fp8jax.audit.compiled_gemms import compiled_gemms
from fp8jax.audit.gemms import Gemm, fp8_share, summary
from fp8jax.audit.jaxpr import traced_gemms
from fp8jax.audit.traffic import Traffic, traffic

__all__ = ["Gemm", "Memory", "Reading", "UnreadableError", "fallbacks", "fp8_share", "read", "summary", "traced_gemms"]


class UnreadableError(ValueError):
    """A compiled program without a text; the message is one line."""


_PARTS = {"params": "params", "scaling": "scaling", "opt_state": "optimizer"}


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device, as the compiler has planned them.

    arguments: part of the arguments → bytes: `params`, `optimizer`, `scaling`, `counters`, `batch`.
    argument_bytes: of all arguments, padding included.
    temporary_bytes: activations, gradients, workspaces: the arena that the compiler lays them out in.
    output_bytes: of results that are not written over a donated argument.
    """

    arguments: Mapping[str, int]
    argument_bytes: int
    temporary_bytes: int
    output_bytes: int

    @property
    def peak_bytes(self) -> int:
        """What a device must have free beside the runtime's own memory."""
        return self.argument_bytes + self.temporary_bytes + self.output_bytes


@dataclasses.dataclass(frozen=True)
class Reading:
    """A compiled program, of one device.

    wide: names of instructions with a 64-bit float result; there should be none.
    """

    gemms: list[Gemm]
    traffic: list[Traffic]
    collectives: list[Collective]
    memory: Memory
    wide: list[str]


def read(compiled: Any, mesh: Mesh, text: str | None = None) -> Reading:
    """Reads an executable.

    Args:
        compiled: `jax.jit(step).lower(...).compile()`.
        mesh: the devices that it runs on.
        text: the optimized program, where `compiled.as_text()` cannot give it (see targets.compile_step).

    Raises:
        UnreadableError: the runtime cannot write the program as text (known of some TPU7x programs).
    """
    try:
        module = hlo.parse(text or compiled.as_text())
    except jax.errors.JaxRuntimeError as error:
        raise UnreadableError(f"the compiled program cannot be read: {str(error).splitlines()[0]}") from error
    wide = [run.instruction.name for run in hlo.executed(module)
            if any(shape.dtype in ("float64", "complex128") for shape in run.instruction.shapes)]
    return Reading(compiled_gemms(module), traffic(module), collectives(module, mesh.shape), _memory(compiled), wide)


def fallbacks(asked: Iterable[Gemm], found: Iterable[Gemm]) -> list[str]:
    """GEMMs, as 'role.pass: dtypes, kernel', that the traced program has in FP8 and the compiled one has not, or not at all."""
    wanted = {(gemm.role, gemm.pass_name) for gemm in asked if gemm.fp8}
    by_name: dict[tuple[str, str], list[Gemm]] = {}
    for gemm in found:
        by_name.setdefault((gemm.role, gemm.pass_name), []).append(gemm)
    lines = [f"{role}.{name}: no GEMM of this name in the compiled program" for role, name in sorted(wanted - by_name.keys())]
    for role, name in sorted(wanted & by_name.keys()):
        slow = {f"{g.lhs_dtype} x {g.rhs_dtype}, {g.kernel}" for g in by_name[role, name] if not g.fp8}
        lines += [f"{role}.{name}: {what}" for what in sorted(slow)]
    return lines


def _memory(compiled: Any) -> Memory:
    plan = compiled.memory_analysis()
    parts: dict[str, int] = {}
    shardings = jax.tree.leaves(compiled.input_shardings)
    for (path, leaf), sharding in zip(jax.tree_util.tree_leaves_with_path(compiled.args_info), shardings, strict=True):
        size = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        part = _part(path)
        parts[part] = parts.get(part, 0) + size
    return Memory(parts, plan.argument_size_in_bytes, plan.temp_size_in_bytes, plan.output_size_in_bytes - plan.alias_size_in_bytes)


def _part(path: tuple) -> str:
    """Field of the state that an argument belongs to; the small ones are `counters`."""
    name = next((key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)), None)
    return _PARTS.get(name, "counters") if name else "batch"
