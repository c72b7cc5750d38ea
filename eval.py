"""Evaluates a run's checkpoint on the held-out split: loss, perplexity and bits per byte, in BF16.

    python eval.py --workdir=runs/fp8_base-tiny
    python eval.py --workdir=runs/fp8_base-tiny --step=200

Exit codes: 0 finished, 2 bad usage, config or checkpoint.
"""

import sys

from fp8jax.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate.main(sys.argv))
