"""The public recipe and the functions on arrays: what `import fp8jax` gives beside its modules for
Flax.
"""
