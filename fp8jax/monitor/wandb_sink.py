"""Log to Weights & Biases with `config.log.wandb=PROJECT`, also offline. The package is optional.

    sink = open_sink(config.log, workdir, config_dict)        # None if it is not configured
    sink.write(10, {"loss": 2.3})

The run's id lies in WORKDIR/wandb_id, so a continued run continues in the same place. Steps that a
rollback repeats are logged again: the charts' axis is the logged step, not the number of the call.
"""

import importlib
import pathlib
import uuid
from collections.abc import Mapping
from typing import Any

from fp8jax.config import ConfigError, LogConfig


class WandbSink:
    """A sink of logged steps: a run of Weights & Biases or, offline, WORKDIR/wandb for `wandb
    sync`.
    """

    def __init__(self, run: Any):
        self._run = run
        run.define_metric("step")
        run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Log one step."""
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Wait until all is sent or written."""
        self._run.finish()


def open_sink(
    config: LogConfig, workdir: pathlib.Path, values: Mapping[str, Any]
) -> WandbSink | None:
    """Open the sink that `config.log` asks for, if any.

    Args:
        config: the `log` section.
        workdir: directory of the run.
        values: the run's configuration, to be shown.

    Raises:
        ConfigError: the package is missing, or refuses to start.
    """
    if not config.wandb:
        return None
    try:
        wandb = importlib.import_module("wandb")
    except ImportError:
        raise ConfigError(
            f"config.log.wandb: {config.wandb!r} needs the package wandb: pip install -r "
            f"requirements-wandb.txt"
        ) from None
    path = workdir / "wandb_id"
    if not path.exists():
        path.write_text(uuid.uuid4().hex)
    try:
        run = wandb.init(
            project=config.wandb,
            name=workdir.resolve().name,
            id=path.read_text().strip(),
            resume="allow",
            dir=str(workdir),
            config=dict(values),
            mode="offline" if config.wandb_offline else "online",
        )
    except (wandb.errors.Error, OSError) as error:
        raise ConfigError(
            f"config.log.wandb: {error}; log in with `wandb login`, or set "
            f"config.log.wandb_offline=True"
        ) from None
    return WandbSink(run)
