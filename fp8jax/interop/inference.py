"""A loaded model with the tokenizer of its text, for generation.py and scoring.py.

inference = Inference(load_run("runs/fp8_base-tiny")[0])      # fp8jax.training.evaluation.load_run
"""

from fp8jax.data import tokenizer
from fp8jax.models.definition import LoadedModel
from fp8jax.models.runner import Runner


class Inference(Runner):
    """A runner in BF16 (models/runner.py).

    Attributes:
        tokenizer: the run's tokenizer.
        context: tokens of the context that the model was trained with, config.data.sequence_length.
    """

    def __init__(self, model: LoadedModel):
        super().__init__(model)
        self.tokenizer = tokenizer.of(self.config.data)
        self.context = self.config.data.sequence_length
