"""A healthy run where JAX looks for NaN in whatever a program returns: the first thing to try when hunting one."""

import os
import subprocess
import sys
import textwrap

import pytest

from tests.helpers.runs import logged

pytestmark = pytest.mark.slow

RUN = textwrap.dedent("""
    import sys
    from tests.helpers.runs import micro, train

    for steps in (2, 3):  # the second is a resume
        config = micro(training={"steps": steps, "batch_size": 4, "microbatches": 2, "skip_spikes": 8.0},
                       fp8={"overrides": "mlp_up@1=bf16,qkv@0=current"}, monitor={"every": 1, "parameters": True},
                       evaluation={"every": 1, "batches": 1}, checkpoint={"every": 1})
        assert train(config, sys.argv[1]) == 0
""")


def test_a_healthy_run_makes_no_nan(tmp_path):
    """Statistics of layers with other recipes, evaluation, saving and resuming included."""
    environment = os.environ | {
        "JAX_DEBUG_NANS": "True",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.getcwd(),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert logged(tmp_path)[-1]["step"] == 3
