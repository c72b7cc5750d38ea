"""Causal attention with FP8 operands: the definition, other ways to compute it, and a check that
compares them.
"""
