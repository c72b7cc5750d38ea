"""Evaluates a run's checkpoint in BF16: held-out loss, perplexity and bits per byte, or tasks of lm-evaluation-harness.

    python eval.py --workdir=runs/fp8_base-tiny
    python eval.py --workdir=runs/fp8_base-tiny --step=200
    python eval.py --workdir=runs/fp8_base-tiny --tasks=lambada_openai,piqa      # docs/evaluation.md

Exit codes: 0 finished, 2 bad usage, config, checkpoint or task.
"""

import sys

from fp8jax.cli import evaluate

if __name__ == "__main__":
    sys.exit(evaluate.main(sys.argv, __doc__ or ""))
