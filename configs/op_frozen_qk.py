"""The outlier-protected block with frozen QK gains, an ablation of the FOG paper."""

from fp8jax.presets.op_frozen_qk import get_config

__all__ = ["get_config"]
