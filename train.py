"""Trains a model, or continues a run.

    python train.py --config=configs/fp8_base.py:tiny
    python train.py --config=configs/fp8_base.py:390m --config.training.steps=1000 --workdir=runs/mine

Exit codes: 0 finished, 2 bad usage or config, 3 stopped by bad numbers after saving, 4 stopped on SIGINT, SIGTERM or SIGUSR1
after saving (run again to continue).
"""

import sys

from fp8jax.cli import train

if __name__ == "__main__":
    sys.exit(train.main(sys.argv, __doc__ or ""))
