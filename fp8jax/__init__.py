"""fp8jax: language-model pre-training with every matrix multiplication of the transformer block in
FP8.

The letters in array names are b batch, t time, s key time, d model width, n heads, k KV heads, g
query heads per KV head, h head dim, f FFN width, v vocabulary, l layers.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp8jax import linen as linen
    from fp8jax import nnx as nnx
    from fp8jax.library.functions import attention as attention
    from fp8jax.library.functions import dot_general as dot_general
    from fp8jax.library.functions import kurtosis as kurtosis
    from fp8jax.library.recipe import Recipe as Recipe
    from fp8jax.models.taps import collecting as collecting
    from fp8jax.models.taps import tap as tap
    from fp8jax.runs import LoadedRun as LoadedRun
    from fp8jax.runs import evaluate as evaluate
    from fp8jax.runs import generate as generate
    from fp8jax.runs import load_run as load_run
    from fp8jax.runs import train as train

__version__ = "0.1.0"

# The public names, and the modules that they are loaded from at first use: `import fp8jax` starts
# no JAX. None stands for a module of that name.
_PUBLIC: dict[str, str | None] = {
    "LoadedRun": "runs",
    "Recipe": "library.recipe",
    "attention": "library.functions",
    "collecting": "models.taps",
    "dot_general": "library.functions",
    "evaluate": "runs",
    "generate": "runs",
    "kurtosis": "library.functions",
    "linen": None,
    "load_run": "runs",
    "nnx": None,
    "tap": "models.taps",
    "train": "runs",
}
__all__ = [
    "LoadedRun",
    "Recipe",
    "attention",
    "collecting",
    "dot_general",
    "evaluate",
    "generate",
    "kurtosis",
    "linen",
    "load_run",
    "nnx",
    "tap",
    "train",
]


def __getattr__(name: str) -> Any:
    """Load a public name at its first use."""
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    where = _PUBLIC[name]
    module = importlib.import_module(f"{__name__}.{where or name}")
    found = module if where is None else getattr(module, name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    """Return the names of this module, public ones that are not loaded yet among them."""
    return sorted({*globals(), *_PUBLIC})


# The tested versions go from the first of these to below the second, as in requirements.txt.
JAX_VERSIONS = (0, 10, 2), (0, 13)


def untested_jax(version: str) -> str | None:
    """Return a warning on a version of JAX that fp8jax was not tested with; None for a tested one."""
    numbers = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split(".")[:3])
    if JAX_VERSIONS[0] <= numbers < JAX_VERSIONS[1]:
        return None
    least, below = (".".join(map(str, numbers)) for numbers in JAX_VERSIONS)
    return (
        f"warning: jax {version} is not tested with fp8jax, which needs >={least},<{below}: "
        f"pip install -r requirements.txt"
    )
