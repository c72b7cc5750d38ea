"""Estimate by closed formula the memory and time of a step with other microbatches, loss chunks and
rematerialisation.

    formula = Formula(plan)
    formula.temporary_bytes(option), formula.seconds(option)

The estimates rank options, so that few programs need be compiled: the planner (fit.py) trusts
compiled plans alone. Bytes are of one device, seconds of a step at peak rates.
tests/training/test_estimates.py checks them against compiled programs for H100s.
"""

import dataclasses
import math

import jax

from fp8jax.audit.roofline import DEVICES, Device, device_of
from fp8jax.config import Config
from fp8jax.plan import Plan


@dataclasses.dataclass(frozen=True)
class Option:
    """The fields of `config.training` that a run may choose by itself."""

    microbatches: int
    loss_chunk: int
    remat: str

    def of(self, config: Config) -> Config:
        """Return the config with this choice."""
        return dataclasses.replace(
            config, training=dataclasses.replace(config.training, **dataclasses.asdict(self))
        )

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())


class Formula:
    """The bytes and seconds of a config's step on a mesh.

    Args:
        plan: the run's plan; its devices may be compile-only.
    """

    def __init__(self, plan: Plan):
        config, definition, mesh = plan.config, plan.definition, plan.mesh
        self._config = config
        self._model = definition.config
        self._vocab = definition.vocab_size
        self._replicas = plan.replicas
        self._tensor = mesh.shape["tensor"] * mesh.shape["sequence"]
        self._fsdp = mesh.shape["fsdp"]
        self._devices = mesh.size
        self._parameters = definition.parameter_count()
        self._device: Device = device_of(plan.device.device_kind) or DEVICES["h100"]
        self._flops = plan.flops()
        self._operand = 2 if config.fp8.recipe == "bf16" else 1

    def temporary_bytes(self, option: Option) -> float:
        """Return the bytes besides the state and the batch: activations, gradients, quantised
        weights.
        """
        rows = self._config.training.batch_size // self._replicas // option.microbatches
        tokens = rows * self._config.data.sequence_length / self._tensor
        model = self._model
        residuals = model.layers * self._saved_bytes(option.remat)
        working = 0 if option.remat == "none" else self._saved_bytes("none")
        head = self._head_bytes(option.loss_chunk)
        return self.fixed_bytes() + tokens * (residuals + max(working, head))

    def fixed_bytes(self) -> float:
        """Return the bytes that do not depend on the microbatch: float32 gradients, and the
        weights' quantised copies.
        """
        sharded = self._parameters / (self._fsdp * self._tensor)
        return sharded * (4 + self._operand) + self._gathered_bytes()

    def seconds(self, option: Option) -> float:
        """Return the seconds of a step at peak rates, as the roofline counts them."""
        config, device, flops = self._config, self._device, self._flops
        block = (flops.linear + flops.attention) / self._devices
        rate = device.bf16 if config.fp8.recipe == "bf16" else device.fp8
        repeated = self._repeated(option.remat)
        head = flops.head / self._devices * (4 / 3 if option.loss_chunk else 1.0)
        gemms = block * (1 + repeated) / rate + head / device.bf16
        moved = self._traffic(option) / device.memory
        sent = option.microbatches * self._sent_bytes() / device.link
        return max(gemms + moved, sent)

    def _saved_bytes(self, remat: str) -> float:
        """Return the bytes of one token in one layer that are kept for the backward pass."""
        model = self._model
        width, hidden = model.width, model.ffn_hidden
        queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
        carry = 2 * width
        operands = self._operand * (2 * width + 2 * queries + 2 * keys + hidden)
        kept = operands if self._operand == 1 else 0
        if remat == "save_branches":
            return carry + kept + 2 * 2 * width
        if remat in ("save_fp8", "offload_fp8"):
            return carry + kept
        if remat == "full":
            return carry
        return carry + operands + 2 * (self._ups() * hidden + 2 * width + queries + keys)

    def _ups(self) -> int:
        """Return the GEMMs into the hidden width."""
        return 2 if self._model.activation in ("swiglu", "smooth_swiglu") else 1

    def _repeated(self, remat: str) -> float:
        """Return the part of the block's FLOPs that is computed again: of linear GEMMs alone if FP8
        tensors are kept.
        """
        if remat == "none":
            return 0.0
        again = 1 / 3 if remat == "full" or self._operand == 2 else 0.25
        if remat != "save_branches":
            return again
        model = self._model
        attention_in = model.width * (model.heads + 2 * model.kv_heads) * model.head_dim
        attention_out = model.width * model.heads * model.head_dim
        ffn = model.width * model.ffn_hidden
        inward = attention_in + self._ups() * ffn
        share = inward / (inward + attention_out + ffn)
        if self._operand == 1:
            return again * share
        linear, attention = self._flops.linear, self._flops.attention
        return again * (share * linear + attention) / (linear + attention)

    def _head_bytes(self, chunk: int) -> float:
        """Return the bytes of one token's logits in float32, and of what is computed from them."""
        rows = min(chunk, self._vocab) if chunk else self._vocab
        return 6.0 * rows / self._tensor

    def _gathered_bytes(self) -> float:
        """Return the bytes of tables and one layer's weights, gathered, if they are sharded over
        replicas.
        """
        if self._fsdp == 1:
            return 0.0
        tables = 2 if not self._model.tied_embeddings else 1
        return 2.0 * tables * self._vocab * self._model.width / self._tensor

    def _traffic(self, option: Option) -> float:
        """Return the bytes moved besides GEMMs; the factors are those of compiled steps for H100s.

        Recomputing writes less for the backward pass, which at peak rates can make up for its
        GEMMs; as GEMMs are further from their peak than traffic is, that gain is not counted.
        """
        config, model = self._config, self._model
        tokens = config.training.batch_size * config.data.sequence_length / self._devices
        of_layers = 14.0 * tokens * model.layers * self._saved_bytes("none")
        of_head = (13.0 if option.loss_chunk else 12.0) * tokens * self._vocab
        parameters = self._parameters / (self._fsdp * self._tensor)
        return of_layers + of_head + parameters * (16.0 * option.microbatches + 30.0)

    def _sent_bytes(self) -> float:
        """Return the bytes that one device sends per microbatch: gathers of weights in both passes,
        the gradients' reduction.
        """
        if self._replicas == 1:
            return 0.0
        others = (self._replicas - 1) / self._replicas
        return self._parameters / self._tensor * (2 * self._operand + 2) * others


def state_bytes(abstract_state: object) -> int:
    """Return the bytes of a state's shards on one device."""
    leaves = jax.tree.leaves(abstract_state)
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves
    )
