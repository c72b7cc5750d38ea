"""Build the block of peers.py in PyTorch, in BF16 and with torchao's Float8Linear; compiled on a GPU, eager on a CPU.

    call = block(config.model, batch=2, length=4096, fp8=True); call()      # one forward and backward pass, waited for

torchao's recipe is tensorwise with dynamic scaling (fp8jax's `current`): e4m3 forward, e5m2
gradients. On a CPU it is emulated.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: N812  its usual name
from torch import nn

from fp8jax.config import ModelConfig


class Block(nn.Module):
    """FOG-opt's block: no norm before the branches, one after each; frozen RMSNorm on queries and keys; GELU."""

    def __init__(self, config: ModelConfig, hidden: int, length: int):
        super().__init__()
        self.config = config
        d, h = config.width, config.head_dim
        self.qkv = nn.Linear(d, (config.heads + 2 * config.kv_heads) * h, bias=False)
        self.out, self.up, self.down = (
            nn.Linear(d, d, bias=False),
            nn.Linear(d, hidden, bias=False),
            nn.Linear(hidden, d, bias=False),
        )
        self.post_attention, self.post_ffn = (
            nn.RMSNorm(d, eps=config.norm_eps),
            nn.RMSNorm(d, eps=config.norm_eps),
        )
        angles = torch.arange(length)[:, None] / config.rope_theta ** (torch.arange(0, h, 2) / h)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def _rotate(self, x_bnth: torch.Tensor) -> torch.Tensor:
        a, b = F.rms_norm(x_bnth, x_bnth.shape[-1:], eps=self.config.norm_eps).float().chunk(2, -1)
        return torch.cat((a * self.cos - b * self.sin, b * self.cos + a * self.sin), -1).to(
            x_bnth.dtype
        )

    def forward(self, x_btd: torch.Tensor) -> torch.Tensor:
        """Apply the block, [b, t, d] to [b, t, d]."""
        b, t, d = x_btd.shape
        n, k = self.config.heads, self.config.kv_heads
        qkv = self.qkv(x_btd).view(b, t, n + 2 * k, -1).transpose(1, 2)
        q, key, v = qkv.split((n, k, k), 1)
        q, key, scale = self._rotate(q), self._rotate(key), self.config.softmax_scale
        o = F.scaled_dot_product_attention(q, key, v, is_causal=True, scale=scale, enable_gqa=True)
        x_btd = x_btd + self.post_attention(self.out(o.transpose(1, 2).reshape(b, t, d)))
        return x_btd + self.post_ffn(self.down(F.gelu(self.up(x_btd))))


def block(
    config: ModelConfig, hidden: int, *, batch: int, length: int, fp8: bool
) -> Callable[[], None]:
    """Return a forward and backward pass of the block with BF16 weights, to their gradients and the input's."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Block(config, hidden, length).to(device, torch.bfloat16)
    if fp8:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training  # noqa: PLC0415

        model = convert_to_float8_training(
            model, config=Float8LinearConfig(emulate=device == "cpu")
        )
    run = torch.compile(model) if device == "cuda" else model
    x = torch.randn(
        batch, length, config.width, device=device, dtype=torch.bfloat16, requires_grad=True
    )

    def call() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        run(x).float().square().sum().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return call
