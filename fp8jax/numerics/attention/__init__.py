"""Causal attention with FP8 operands: the definition, other ways to compute it, and what compares them."""
