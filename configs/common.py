"""What all configs share: the defaults of every field, and the sizes of the FOG paper (Table 6); 70b, not in it, has Llama 3's shape."""

from fp8jax.presets.common import SIZES, make

__all__ = ["SIZES", "make"]
