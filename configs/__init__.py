"""Run configurations by file name; their content is in fp8jax/presets, which an installed fp8jax
has, too.
"""
