"""Run the command line of train.py; JAX is loaded after all that can be checked without it."""

import os
import pathlib
from collections.abc import Sequence

from absl import flags

from fp8jax import config as config_lib
from fp8jax import hardware
from fp8jax.cli import checks, fields, processes
from fp8jax.cli.config_files import EXAMPLE, find_config, read_config, run_in
from fp8jax.cli.errors import local_directory
from fp8jax.cli.flags import WORKDIR, run, split
from fp8jax.config import Config, ConfigError
from fp8jax.monitor.stages import Stages

USAGE = """Trains a model, or continues a run.

    python train.py --config=configs/fp8_base.py:tiny
    python train.py --config=configs/fp8_base.py:390m --config.training.steps=1000 --workdir=runs/mine

Exit codes: 0 finished, 2 bad usage or config, 3 stopped by bad numbers after saving, 4 stopped on SIGINT, SIGTERM, SIGHUP or
SIGUSR1 after saving (run again to continue).
"""

_CONFIG = flags.DEFINE_string(
    "config", None, "configuration file and size, e.g. configs/fp8_base.py:tiny"
)
_ALLOW = flags.DEFINE_list(
    "allow_config_change",
    [],
    "fields, e.g. data.source, that may differ from those of the run in the directory",
)

flags.adopt_module_key_flags(processes)


def main(argv: Sequence[str], usage: str = USAGE) -> int:
    """Run train.py, whose --help begins with `usage`, and return the exit code."""
    overrides, rest = split("config", argv)
    return run(
        rest,
        lambda: _train(overrides),
        f"{usage.strip()}\n\nFields of the configuration:\n\n{fields.reference()}",
    )


def _train(overrides: Sequence[str]) -> int:
    if not _CONFIG.value:
        raise ConfigError(f"--config: is missing; for example {EXAMPLE}")
    path, size = find_config("config", _CONFIG.value)
    lines = []
    if not size:
        size, machine = hardware.default_size()
        lines.append(
            f"size     {size}, chosen for this machine ({machine}); "
            f"--config={_CONFIG.value.rstrip(':')}:SIZE sets another"
        )
    workdir = _workdir(path, size)
    lines.append(f"workdir  {workdir}")
    config = config_lib.from_dict(
        read_config("config", f"{path}:{size}", overrides), run_in(workdir)
    )
    checks.allowed_changes(_ALLOW.value)
    checks.directory("--workdir", workdir)
    checks.data(config, workdir)
    stage = Stages(processes.is_first())
    for line in lines:
        stage.message(line)
    with stage("loading JAX"):
        import jax

    with processes.joined(stage):
        with stage("looking for devices"):
            jax.devices()
        return _train_joined(config, workdir)


def _train_joined(config: Config, workdir: pathlib.Path) -> int:
    import jax

    from fp8jax.training import loop

    # A restart does not compile again what an earlier run on this machine has compiled.
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser("~/.cache/fp8jax"))
    return loop.train(config, workdir, allow_config_change=_ALLOW.value)


def _workdir(path: pathlib.Path, size: str) -> pathlib.Path:
    """Return the directory of the run; by default that of the run whose configuration is used."""
    if WORKDIR.value:
        return local_directory("workdir", WORKDIR.value)
    return (
        pathlib.Path(size)
        if path.stem == "from_run"
        else pathlib.Path("runs", f"{path.stem}-{size}")
    )
