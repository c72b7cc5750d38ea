"""Eight CPU devices (unless JAX_PLATFORMS names others), no silent dtype promotion, and each program compiled once in a session."""

import os
import tempfile

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ["JAX_PLATFORMS"] = os.environ.get("JAX_PLATFORMS") or "cpu"  # tests/gpu: JAX_PLATFORMS=cuda

import jax

jax.config.update("jax_numpy_dtype_promotion", "strict")
# A run that is stopped and continued compiles what the uninterrupted one compiled. Whoever sets JAX_COMPILATION_CACHE_DIR keeps
# programs from one session of tests to the next.
_CACHE = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR") or _CACHE.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
