"""Train a model, or continue a run (`python train.py --help`), by fp8jax/cli/train.py and
fp8jax/training/loop.py.
"""

import sys

from fp8jax.cli import train

if __name__ == "__main__":
    sys.exit(train.main(sys.argv))
