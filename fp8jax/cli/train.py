"""The command line of train.py."""

import functools
import os
import pathlib
from collections.abc import Sequence

import jax
from absl import flags
from ml_collections import config_flags

from configs import common
from fp8jax import config as config_lib
from fp8jax.cli import processes
from fp8jax.cli.errors import complain
from fp8jax.cli.flags import run
from fp8jax.config import Config
from fp8jax.monitor.writers import Silent
from fp8jax.parallel import distributed
from fp8jax.training import loop

_CONFIG = config_flags.DEFINE_config_file("config", None, "configuration file and size, e.g. configs/fp8_base.py:tiny")
_WORKDIR = flags.DEFINE_string("workdir", None, "directory of the run; default runs/CONFIG-SIZE")
_ALLOW = flags.DEFINE_list("allow_config_change", [], "fields, e.g. data.source, that may differ from those of the run in the directory")

flags.adopt_module_key_flags(processes)


def main(argv: Sequence[str], usage: str) -> int:
    """Runs train.py, whose --help begins with `usage`; returns the exit code."""
    flags.mark_flag_as_required("config")
    name, size = _config_argument(argv)
    if name and not pathlib.Path(name).is_file():
        return complain(f"--config={name}: no such file; for example --config=configs/fp8_base.py:tiny")
    return run(argv, lambda: _train(name, size), f"{usage.strip()}\n\nFields of the configuration:\n\n{config_lib.reference()}")


def _train(name: str, size: str) -> int:
    config = config_lib.from_dict(_CONFIG.value)
    with processes.joined():
        return _train_joined(config, name, size)


def _train_joined(config: Config, name: str, size: str) -> int:
    tell = functools.partial(print, flush=True) if distributed.is_first() else Silent().message
    if not size:
        size = common.default_size()
        tell(f"size     {size}, chosen for this machine; --config={name}:SIZE sets another")
    # A restart compiles nothing that an earlier run on this machine has compiled.
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/fp8jax"))
    workdir = _WORKDIR.value or f"runs/{pathlib.Path(name).stem}-{size}"
    tell(f"workdir  {workdir}")
    return loop.train(config, workdir, allow_config_change=_ALLOW.value)


def _config_argument(argv: Sequence[str]) -> tuple[str, str]:
    """Config file and size, from --config=FILE:SIZE or --config FILE:SIZE; empty where not given."""
    words = [word.removeprefix("-").removeprefix("-") for word in argv]
    value = next((word.removeprefix("config=") for word in words if word.startswith("config=")), None)
    if value is None and "config" in words[:-1]:
        value = words[words.index("config") + 1]
    name, _, size = (value or "").partition(":")
    return name, size
