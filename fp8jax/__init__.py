"""fp8jax: language-model pre-training with every matrix multiplication of the transformer block in FP8.

The letters in array names are b batch, t time, s key time, d model width, n heads, k KV heads, g
query heads per KV head, h head dim, f FFN width, v vocabulary, l layers.
"""

__version__ = "0.1.0"

# The tested versions go from the first of these to below the second, as in requirements.txt.
JAX_VERSIONS = (0, 10, 2), (0, 13)


def untested_jax(version: str) -> str | None:
    """Return a warning on a version of JAX that fp8jax was not tested with; None for a tested one."""
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:3])
    if JAX_VERSIONS[0] <= numbers < JAX_VERSIONS[1]:
        return None
    least, below = (".".join(map(str, numbers)) for numbers in JAX_VERSIONS)
    return f"warning: jax {version} is not tested with fp8jax, which needs >={least},<{below}: pip install -r requirements.txt"
