"""Compute the feed-forward branch of a block: two layers with a nonlinearity between, or gated."""

import jax
from flax import nnx

from fp8jax.models import activations, architectures
from fp8jax.models.architectures import ResolvedModel
from fp8jax.models.gemms import LayerGemms
from fp8jax.models.layers import Dense
from fp8jax.models.taps import tap


class FeedForward(nnx.Module):
    """The layers up, nonlinearity, down, with a gate GEMM beside `up` for the gated kinds."""

    def __init__(self, config: ResolvedModel, rngs: nnx.Rngs):
        d, f, std = config.width, config.ffn_hidden, config.init_std
        self.kind = config.activation
        self.gate = (
            Dense(rngs, "mlp_gate", (d, f), ("embed", "mlp"), std=std)
            if architectures.gated(config)
            else None
        )
        self.up = Dense(rngs, "mlp_up", (d, f), ("embed", "mlp"), std=std)
        self.down = Dense(rngs, "mlp_down", (f, d), ("mlp", "embed"), std=std)
        self.xielu = activations.XIELU() if self.kind == "xielu" else None

    def __call__(self, x_btd: jax.Array, gemms: LayerGemms) -> jax.Array:
        """Apply the branch, [b, t, d] to [b, t, d]."""
        up = self.up(x_btd, gemms)
        gate = None if self.gate is None else self.gate(x_btd, gemms)
        tap("mlp_intermediate", up if gate is None else gate)
        if gate is not None:
            tap("mlp_up", up)
        s = None
        if self.kind == "smooth_swiglu":
            hidden, s = activations.smooth_swiglu(gate, up)
        elif self.kind == "swiglu":
            hidden = activations.swiglu(gate, up)
        else:
            hidden = {"xielu": self.xielu, "gelu": activations.gelu, "relu2": activations.relu2}[
                self.kind
            ](up)
        tap("mlp_post_act", hidden)
        out = self.down(hidden, gemms)
        out = out if s is None else (out.astype(s.dtype) * s).astype(out.dtype)
        tap("mlp_out", out)
        return out
