"""Eight CPU devices (unless JAX_PLATFORMS names others), no silent dtype promotion, each program compiled once in a session.

Most of a test's time is XLA's compiler, and most of that is LLVM's optimization, which programs of a few kilobytes do not need:
the same HLO is compiled without it in two fifths of the time. XLA_FLAGS of the user come last and win; the programs as users
have them: XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true".

What is left is mostly Python's, tracing. Tracing makes many objects and no garbage worth a search, so the collector runs seldom,
leaves out what importing has made, and frees what a file's programs hold at its end.
"""

import functools
import gc
import os
import tempfile

_FAST = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XLA_FLAGS"] = f"{_FAST} {os.environ.get('XLA_FLAGS', '')}"
os.environ["JAX_PLATFORMS"] = (
    os.environ.get("JAX_PLATFORMS") or "cpu"
)  # tests/gpu: JAX_PLATFORMS=cuda
# A run that is stopped and continued compiles what the uninterrupted one compiled, and so do processes that tests start. Whoever sets
# JAX_COMPILATION_CACHE_DIR keeps programs from one session of tests to the next.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory()
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name

import jax
import pytest

from fp8jax.training import banner, calibration, fit
from fp8jax.training.step import TrainProgram

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def pytest_collection_finish():
    """Collect garbage less often, and never look again at what exists now."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(scope="module", autouse=True)
def _memory_is_freed():
    """Free the compiled programs of a file: they hang on cycles of closures, gigabytes in a session."""
    yield
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def _attention_is_checked_once():
    """Check each backend and recipe of attention once in a session, not in each run that a test starts; failures are not kept."""
    original, passed = banner.self_check, {}

    @functools.wraps(original)
    def once(backend, recipes, *, head_dim, statistics):
        case = backend, tuple(recipes.items()), head_dim, statistics
        if case not in passed:
            passed[case] = original(backend, recipes, head_dim=head_dim, statistics=statistics)
        return passed[case]

    banner.self_check = once
    yield
    banner.self_check = original


@pytest.fixture
def same_programs(monkeypatch):
    """Let runs of equal config and devices share the programs of `train` in a test, as equal calls of a jitted function do."""
    original, made = fit.TrainProgram, {}

    def program(plan):
        case = repr(plan.config), plan.mesh
        if case not in made:
            made[case] = original(plan)
        return made[case]

    monkeypatch.setattr(fit, "TrainProgram", program)
    monkeypatch.setattr(TrainProgram, "jitted_init", functools.cache(TrainProgram.jitted_init))
    calibrated = functools.cache(calibration.jitted_calibration)
    monkeypatch.setattr(calibration, "jitted_calibration", calibrated)
