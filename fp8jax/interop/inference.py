"""A loaded model with the tokenizer of its text, for generation.py and scoring.py.

inference = Inference(load_run("runs/fp8_base-tiny")[0])      # fp8jax.training.evaluation.load_run
"""

from fp8jax.data import tokenizer
from fp8jax.models.runner import Runner
from fp8jax.plan import LoadedModel


class Inference(Runner):
    """A runner in BF16 (models/runner.py).

    Attributes:
        config: the run's configuration.
        tokenizer: the run's tokenizer.
        context: tokens of the context that the model was trained with, config.data.sequence_length.
    """

    def __init__(self, model: LoadedModel):
        plan = model.plan
        super().__init__(plan.definition, model.params, plan.mesh, plan.bf16_recipes)
        self.config = plan.config
        self.tokenizer = tokenizer.of(self.config.data)
        self.context = self.config.data.sequence_length
