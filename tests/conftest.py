"""Eight CPU devices (unless JAX_PLATFORMS names others), no silent dtype promotion, and each program compiled once in a session.

Most of a test's time is XLA's compiler, and most of that is LLVM's optimization, which programs of a few kilobytes do not need:
the same HLO is compiled without it in two fifths of the time. XLA_FLAGS of the user come last and win; the programs as users
have them: XLA_FLAGS="--xla_backend_optimization_level=3 --xla_cpu_use_fusion_emitters=true".
"""

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

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
