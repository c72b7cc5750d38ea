"""Evaluate a run's checkpoint (`python eval.py --help`), by fp8jax/cli/evaluate.py and
fp8jax/training/evaluation.py.
"""

import sys

from fp8jax.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate.main(sys.argv))
