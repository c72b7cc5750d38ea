"""FP8 for models in Flax Linen."""
