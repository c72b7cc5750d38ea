"""Run configurations by the names of their files; what they hold is in fp8jax/presets, which an installed fp8jax has, too."""
