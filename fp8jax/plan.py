"""Derive once what follows from a config and its devices, for all rooms below.

    plan = make_plan(config)                        # over all devices; allocates nothing
    plan = make_plan(config, devices)               # over some, or over compile-only ones
    plan.definition, plan.mesh, plan.recipes, plan.emulated

A program (training/step.py), an evaluation, a fit and a rehearsal all take a plan, so that none of
them asks the device for its abilities again, or the tokenizer for its size.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from fp8jax.config import Config, settled
from fp8jax.data import tokenizer
from fp8jax.models.architectures import ResolvedModel
from fp8jax.models.definition import Definition, Params, define
from fp8jax.models.flops import ModelFlops, model_flops
from fp8jax.models.model_recipes import ModelRecipes, model_recipes
from fp8jax.parallel.mesh import (
    emulates_fp8,
    fitting_mesh,
    has_cudnn_attention,
    loops_over_layers,
    make_mesh,
    replicas,
    runs_kernels,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """A run on its devices.

    Attributes:
        config: the run's configuration; fit.py chooses its open fields.
        definition: the model, every switch filled, and the structure of its parameters.
        mesh: the devices, which may be compile-only.
        recipes: recipes of a training step's GEMMs.
        bf16_recipes: recipes of evaluation and sampling, which use no FP8.
        emulated: True if FP8 GEMMs are emulated, by the config or for lack of FP8 units.
    """

    config: Config
    definition: Definition
    mesh: Mesh
    recipes: ModelRecipes
    bf16_recipes: ModelRecipes
    emulated: bool

    @property
    def model(self) -> ResolvedModel:
        """Return the model's config with every switch filled."""
        return self.definition.config

    @property
    def device(self) -> jax.Device:
        """Return one of the devices, which are all alike."""
        return self.mesh.devices.flat[0]

    @property
    def replicas(self) -> int:
        """Return how many parts the rows of a microbatch are split into."""
        return replicas(self.mesh)

    def flops(self, sequences: int | None = None) -> ModelFlops:
        """Return the model FLOPs of training on `sequences`; None for those of a step."""
        return model_flops(
            self.model,
            self.model.vocab_size,
            sequences=self.config.training.batch_size if sequences is None else sequences,
            sequence_length=self.config.data.sequence_length,
        )

    def change(self, config: Config) -> "Plan":
        """Plan another config with the same model and mesh.

        Raises:
            ConfigError: these devices do not support the recipes or the backend of attention.
        """
        return _planned(config, self.definition, self.mesh)

    def with_overrides(self, overrides: str) -> "Plan":
        """Plan more exceptions, written as `config.fp8.overrides`.

        Raises:
            ConfigError: the model does not have a role, or these devices do not support the
                recipes.
        """
        together = ",".join(part for part in (self.config.fp8.overrides, overrides) if part)
        fp8 = dataclasses.replace(self.config.fp8, overrides=together)
        return self.change(dataclasses.replace(self.config, fp8=fp8))


class LoadedModel(NamedTuple):
    """A model's parameters and the plan to compute with them, as loaded from a run or another
    program's files.
    """

    plan: Plan
    params: Params


def make_plan(
    config: Config,
    devices: Sequence[jax.Device] | None = None,
    *,
    vocab_size: int | None = None,
    other_mesh: bool = False,
) -> Plan:
    """Derive all that follows from a config and its devices.

    Args:
        config: validated configuration.
        devices: devices of all processes; None for all that JAX has.
        vocab_size: rows of the embedding; None for that of the config or its tokenizer.
        other_mesh: if the devices do not allow the config's mesh, take the nearest that they do.

    Raises:
        ConfigError: the vocabulary is too small for the tokenizer, the mesh does not suit the
            devices, the model or the batch, or these devices do not support the recipes or the
            backend of attention.
    """
    if vocab_size is None:
        vocab_size = tokenizer.vocab_size(config)
    looped = loops_over_layers(config, jax.devices() if devices is None else devices)
    model = dataclasses.replace(config.model, scan_layers=looped)
    definition = define(model, vocab_size)
    make = fitting_mesh if other_mesh else make_mesh
    complete = dataclasses.replace(config, model=definition.config)
    return _planned(config, definition, make(complete, devices))


def _planned(config: Config, definition: Definition, mesh: Mesh) -> Plan:
    device = mesh.devices.flat[0]
    plain = settled(config)
    gated = definition.gated()
    emulated = emulates_fp8(config, device)
    recipes = model_recipes(
        plain,
        gated=gated,
        emulated=emulated,
        fused=not emulated and runs_kernels(device),
        cudnn=has_cudnn_attention(config, device),
    )
    bf16_recipes = model_recipes(plain, gated=gated, emulated=emulated, recipe="bf16")
    return Plan(config, definition, mesh, recipes, bf16_recipes, emulated)
