"""Read RoPE from a Hugging Face config.json and write it: unscaled, Llama-3, linear, dynamic (NTK)
and YaRN.

    fields = read(values, "llama", theta=10000.0, left_out=None)     # {"rope_theta": ..., "rope_scaling": "yarn", ...}
    write(model, always=False)                                       # {"rope_type": "yarn", ...}

Keys are those of transformers 4 (`rope_theta`, `rope_scaling`) or 5 (`rope_parameters`, one for all
layers or one per kind of layer). models/layers.py explains their meaning.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

from fp8jax.config import ModelConfig
from fp8jax.interop.hf_safetensors import HuggingFaceError
from fp8jax.interop.hf_values import number

KEYS = ("rope_theta", "rope_scaling", "rope_parameters")
SLIDING, FULL = "sliding_attention", "full_attention"  # kinds of layers
_FIELDS = {
    "factor": "rope_scaling_factor",
    "low_freq_factor": "rope_low_freq_factor",
    "high_freq_factor": "rope_high_freq_factor",
    "original_max_position_embeddings": "rope_original_context",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "attention_factor": "rope_attention_factor",
    "truncate": "rope_truncate",
}
_LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
_YARN = (
    "factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "truncate",
)
# Scaling type → keys that it must have, and others that it may have.
_KINDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "llama3": (_LLAMA3, ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor",), ()),
    "yarn": ((), (*_YARN, "mscale", "mscale_all_dim")),
}


def read(
    values: Mapping[str, Any],
    *,
    theta: float,
    left_out: Mapping[str, Any] | None,
    context: int | None,
    layers: Collection[str] = (FULL,),
) -> dict[str, Any]:
    """Return the RoPE fields of a model config.

    Args:
        values: the content of config.json.
        theta: the default if config.json has none.
        left_out: the default scaling of the model_type; None if it is unscaled.
        context: the model's max_position_embeddings, if known.
        layers: kinds of the model's layers; scaling in the keys of transformers 4 applies to FULL
            ones alone.

    Raises:
        HuggingFaceError: keys contradict each other, are missing, or are not understood.
    """
    key, scaling = _stated(values, left_out, layers)
    scaling = {name: value for name, value in scaling.items() if value is not None}
    found = scaling.pop("rope_theta", values.get("rope_theta"))
    found = theta if found is None else found
    if values.get("rope_theta") not in (None, found):
        raise HuggingFaceError(
            f"config.json: rope_theta: {values['rope_theta']!r}, but {found!r} in rope_parameters"
        )
    kind, other = scaling.pop("rope_type", None), scaling.pop("type", None)
    kind = kind or other or "default"
    fields = {"rope_theta": number({"rope_theta": found}, "rope_theta")}
    if not isinstance(kind, str) or kind not in _KINDS:
        raise HuggingFaceError(
            f"config.json: {key}: type {str(kind)[:60]!r} is not supported, only "
            f"{', '.join(map(repr, _KINDS))}"
        )
    if kind in ("yarn", "llama3") and context is not None:
        scaling.setdefault("original_max_position_embeddings", context)
    _check_names(key, kind, scaling)
    if kind == "default":
        return fields
    if kind == "yarn":
        scaling = _settled_yarn(key, scaling, context)
    if kind == "dynamic":
        if context is None:
            raise HuggingFaceError(
                "config.json: max_position_embeddings: missing; dynamic scaling begins there"
            )
        scaling["original_max_position_embeddings"] = context
    return (
        fields | {"rope_scaling": kind} | {_FIELDS[name]: _value(scaling, name) for name in scaling}
    )


def write(model: ModelConfig, *, always: bool) -> dict[str, Any] | None:
    """Return the `rope_scaling` of a resolved model config; None without scaling, unless `always`."""
    if model.rope_scaling_factor == 1.0 and model.rope_attention_factor == 1.0:
        return {"rope_type": "default"} if always else None
    names = {"llama3": _LLAMA3, "linear": ("factor",), "dynamic": ("factor",), "yarn": _YARN}[
        model.rope_scaling
    ]
    return {"rope_type": model.rope_scaling} | {
        name: getattr(model, _FIELDS[name]) for name in names
    }


def _stated(
    values: Mapping[str, Any], left_out: Mapping[str, Any] | None, layers: Collection[str]
) -> tuple[str, dict[str, Any]]:
    """Return the key that describes the scaling, and its value for all the model's layers."""
    old, new = values.get("rope_scaling"), values.get("rope_parameters")
    if isinstance(new, dict) and (FULL in new or SLIDING in new):
        return "rope_parameters", _of_all(new, layers)
    if old is not None and new is not None and old != new:
        raise HuggingFaceError("config.json: rope_scaling and rope_parameters differ; keep one")
    key, scaling = ("rope_parameters", new) if new is not None else ("rope_scaling", old)
    if scaling is None and left_out and key in values:
        raise HuggingFaceError(
            f"config.json: {key}: null is Llama-3 scaling to some releases of transformers and "
            f"none to others; "
            'write {"rope_type": "default"} for none, or leave the key out'
        )
    scaling = left_out if scaling is None else scaling
    scaling = dict(scaling or {}) if isinstance(scaling, Mapping | None) else {"rope_type": scaling}
    if (
        key == "rope_scaling"
        and scaling.get("rope_type", scaling.get("type")) not in (None, "default")
        and SLIDING in layers
    ):
        raise HuggingFaceError(
            "config.json: rope_scaling: is that of full attention alone, and layers of sliding "
            "attention have none; "
            "one RoPE for all layers is supported"
        )
    return key, scaling


def _of_all(nested: Mapping[str, Any], layers: Collection[str]) -> dict[str, Any]:
    """Return the RoPE of all kinds of layers that the model has, which must be the same."""
    found = [nested.get(kind) or {"rope_type": "default"} for kind in sorted(layers)]
    if any(one != found[0] for one in found) or not all(isinstance(one, dict) for one in found):
        raise HuggingFaceError(
            "config.json: rope_parameters: differ between kinds of layers; one RoPE for all "
            "layers is supported"
        )
    return dict(found[0])


def _check_names(key: str, kind: str, scaling: Mapping[str, Any]) -> None:
    needed, optional = _KINDS[kind]
    for name in scaling:
        if name not in needed and name not in optional:
            raise HuggingFaceError(
                f"config.json: {key}: {name or 'an empty name'} is not understood for type {kind!r}"
            )
    for name in needed:
        if name not in scaling:
            raise HuggingFaceError(f"config.json: {key}: {name} is missing for type {kind!r}")


def _settled_yarn(key: str, scaling: Mapping[str, Any], context: int | None) -> dict[str, Any]:
    """Return YaRN's keys, with transformers' defaults for those that are left out."""
    if "original_max_position_embeddings" not in scaling:
        raise HuggingFaceError(
            f"config.json: {key}: original_max_position_embeddings is missing for type 'yarn'"
        )
    settled: dict[str, Any] = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True, **scaling}
    original = number(scaling, "original_max_position_embeddings", int)
    if "factor" not in settled:
        if context is None:
            raise HuggingFaceError(f"config.json: {key}: factor is missing for type 'yarn'")
        settled["factor"] = context / original
    factor = number(settled, "factor")
    mscale, over = (
        number({name: settled.pop(name, 0.0)}, name) for name in ("mscale", "mscale_all_dim")
    )
    if "attention_factor" not in settled:
        both = mscale and over
        settled["attention_factor"] = (
            _mscale(factor, mscale) / _mscale(factor, over) if both else _mscale(factor, 1.0)
        )
    return settled


def _mscale(factor: float, weight: float) -> float:
    """Return YaRN's factor on rotated queries and keys."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _value(scaling: Mapping[str, Any], name: str) -> Any:
    if name == "truncate":
        if type(scaling[name]) is not bool:
            raise HuggingFaceError(f"config.json: truncate: {scaling[name]!r} is not true or false")
        return scaling[name]
    return number(scaling, name, int if name == "original_max_position_embeddings" else float)
