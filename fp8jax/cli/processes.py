"""Read the flags of a run of several processes, shared by train.py and eval.py."""

import contextlib
import os
from collections.abc import Iterator

from absl import flags

from fp8jax.monitor.stages import Stages
from fp8jax.parallel import launchers

_ADDRESS = flags.DEFINE_string(
    "coordinator_address",
    None,
    "several processes: HOST:PORT of process 0, if no launcher gives it; the port "
    "after it is used, too",
)
_COUNT = flags.DEFINE_integer(
    "num_processes", None, "several processes: how many, one command each", lower_bound=1
)
_PROCESS = flags.DEFINE_integer(
    "process_id", None, "several processes: which one this is, from 0", lower_bound=0
)
_START = flags.DEFINE_integer(
    "start_timeout", 300, "seconds to wait at the start for all processes", lower_bound=1
)
_HEARTBEAT = flags.DEFINE_integer(
    "heartbeat_timeout", 100, "seconds of silence after which JAX gives up a process", lower_bound=5
)


def is_first() -> bool:
    """Return whether this process prints, as far as is known before JAX has started: on TPU pods,
    each does.
    """
    launch = _launch()
    return launch is None or launch.process == 0


@contextlib.contextmanager
def joined(stage: Stages) -> Iterator[None]:
    """Join the other processes of this run, from flags or a launcher; enter it before JAX's devices
    start.
    """
    from fp8jax.audit.limits import set_memory_fraction  # loads JAX, as the next line does
    from fp8jax.parallel import distributed

    set_memory_fraction()
    with contextlib.ExitStack() as stack:
        launch = _launch()
        with (
            stage(f"waiting for {launch.count or 'all'} processes ({launch.by})")
            if launch
            else contextlib.nullcontext()
        ):
            stack.enter_context(
                distributed.start(
                    launch, start_timeout=_START.value, heartbeat_timeout=_HEARTBEAT.value
                )
            )
        yield


def _launch() -> launchers.Launch | None:
    return launchers.find(
        os.environ,
        coordinator_address=_ADDRESS.value,
        num_processes=_COUNT.value,
        process_id=_PROCESS.value,
    )
