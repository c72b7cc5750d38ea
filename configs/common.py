"""The defaults of every field and the sizes of the FOG paper (Table 6), for all configs; 70b has
Llama 3's shape.
"""

from fp8jax.presets.common import SIZES, make

__all__ = ["SIZES", "make"]
