"""Reduce a JAX profiler trace to a small table of a step's milliseconds by kernel class.

    with traced(folder): run three steps
    found = milliseconds(folder, compiled.as_text(), steps=3)      # {"classes": {...}, "kernels": [...], ...}

A kernel belongs to the instruction of the compiled program that the trace names, or whose name the
kernel carries; the instruction gives its kind, and its scope the place in the model. Kernels
without an instruction (CUDA graphs hide it) are sorted by their own name. The longest ones are
listed, so that the classes can be checked.
"""

import collections
import contextlib
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.profiler import ProfileData

from fp8jax.audit import hlo
from fp8jax.audit.hlo import Instruction, Module

LISTED = 60
IDLE = "idle"


@contextlib.contextmanager
def traced(folder: pathlib.Path) -> Iterator[None]:
    """Trace what runs inside, to its end."""
    jax.profiler.start_trace(folder)
    try:
        yield
    finally:
        jax.profiler.stop_trace()


def milliseconds(folder: pathlib.Path, program: str, steps: int) -> dict[str, Any]:
    """Return milliseconds per step by class of kernel.

    Args:
        folder: folder of the trace.
        program: text of the compiled step.
        steps: how many steps the trace holds.

    Returns:
        `classes`: class → ms per step, with `idle` between the first and the last kernel; `busy_ms`
        and `span_ms` per step; `kernels`: the longest, each with its class, ms and number per step.
    """
    instructions = _instructions(hlo.parse(program))
    names: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    spans = []
    for name, operation, start, duration in _events(folder):
        names[
            _classify(name, instructions.get(_plain(operation)) or instructions.get(_plain(name))),
            name,
        ].append(duration)
        spans.append((start, start + duration))
    classes: dict[str, float] = collections.defaultdict(float)
    for (kind, _), durations in names.items():
        classes[kind] += sum(durations) / steps / 1e6
    span = (max(end for _, end in spans) - min(start for start, _ in spans)) if spans else 0.0
    busy = _union(spans)
    classes[IDLE] = (span - busy) / steps / 1e6
    longest = sorted(names.items(), key=lambda item: -sum(item[1]))[:LISTED]
    kernels = [
        {
            "class": kind,
            "kernel": name[:120],
            "ms": sum(found) / steps / 1e6,
            "calls": len(found) / steps,
        }
        for (kind, name), found in longest
    ]
    ordered = dict(sorted(classes.items(), key=lambda item: -item[1]))
    return {
        "classes": ordered,
        "busy_ms": busy / steps / 1e6,
        "span_ms": span / steps / 1e6,
        "kernels": kernels,
    }


def _events(folder: pathlib.Path) -> Iterator[tuple[str, str, float, float]]:
    """Yield (kernel, operation or '', start, duration in ns) of the device's work; on a CPU, of the host's threads."""
    for path in sorted(folder.rglob("*.xplane.pb")):
        planes = list(ProfileData.from_file(str(path)).planes)
        devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
        lines = [
            line
            for plane in devices or planes
            for line in plane.lines
            if not devices or line.name.startswith("Stream")
        ]
        for line in lines:
            for event in line.events:
                stats = {key: value for key, value in event.stats if key == "hlo_op"}
                if devices or stats:
                    yield (
                        event.name,
                        str(stats.get("hlo_op", "")),
                        event.start_ns,
                        event.duration_ns,
                    )


def _instructions(module: Module) -> dict[str, Instruction]:
    return {_plain(run.instruction.name): run.instruction for run in hlo.executed(module)}


def _plain(name: str) -> str:
    """Return a name without punctuation, as kernels carry instructions' names with other punctuation."""
    return re.sub(r"\W", "_", name.lstrip("%"))


def _classify(kernel: str, instruction: Instruction | None) -> str:
    """Return the class of a kernel, in the words of the table."""
    target, scope = (instruction.target, instruction.scope) if instruction else ("", "")
    role = re.search(r"fp8jax\.gemm\[(\w+)", scope)
    where = (
        "attention"
        if role and role[1].startswith("attention_") and role[1] != "attention_out"
        else "linear"
    )
    if "lm_head" in scope:
        where = "head"
    if kernel.startswith("fp8_attention"):
        return "attention kernel, ours"
    if "fmha" in target or re.search(r"sdpa|flash|fmha", kernel):
        return "attention kernel, cuDNN"
    if target.startswith("__cublas") or re.search(r"nvjet|gemm|cutlass|xmma|cublas", kernel):
        fp8 = "f8" in target or re.search(
            r"e4m3|e5m2|nvjet_sm90_[qr]{2}|f8", kernel
        )  # in nvjet's names, q is e4m3 and r is e5m2
        return f"{'FP8' if fp8 else 'other'} GEMM, {where}"
    if target or re.search(r"mosaic|pallas", kernel):
        return f"custom kernel, {where}"
    return _fusion(kernel, instruction.name if instruction else "", scope)


def _fusion(kernel: str, name: str, scope: str) -> str:
    if re.search(r"memcpy|memset", kernel, re.IGNORECASE):
        return "memory copies"
    if re.search(r"transpose|copy", f"{kernel} {name}"):
        return "transposes and copies"
    for part in ("optimizer", "loss", "quantise_weight", "attention", "feed_forward", "lm_head"):
        if re.search(rf"\b{part}\b", scope.replace("_weight.", "_weight ")):
            return f"fusions: {part}"
    return "fusions: elsewhere"


def _union(spans: list[tuple[float, float]]) -> float:
    """Return the length that intervals cover."""
    covered, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        covered += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return covered
