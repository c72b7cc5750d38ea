"""Check windows of attention in config.json: the models here have none, so one must not be shorter
than the context.
"""

from collections.abc import Mapping
from typing import Any

from fp8jax.config import ModelConfig
from fp8jax.interop.hf_rope import FULL, SLIDING
from fp8jax.interop.hf_safetensors import HuggingFaceError
from fp8jax.interop.hf_values import number

# Default windows of attention, and kinds of layers.
WINDOWS = {"mistral": 4096, "qwen3": 4096, "olmo3": 4096}
_DEFAULT_LAYERS = {"mistral": (SLIDING,), "qwen3": (FULL, SLIDING), "olmo3": (FULL, SLIDING)}


def without(model: ModelConfig, model_type: str) -> dict[str, Any]:
    """Return the keys that make every layer attend to all earlier tokens."""
    if model_type not in WINDOWS:
        return {}
    if model_type == "mistral":
        return {"sliding_window": None}
    return {"layer_types": [FULL] * model.layers} | (
        {"use_sliding_window": False} if model_type == "qwen3" else {}
    )


def kinds_of_layers(values: Mapping[str, Any], model_type: str, context: int | None) -> set[str]:
    """Return the kinds of layers in a model.

    Raises:
        HuggingFaceError: a window of attention is shorter than the context, or a kind is unknown.
    """
    if model_type not in WINDOWS:
        return {FULL}
    listed, window = values.get("layer_types"), values.get("sliding_window", WINDOWS[model_type])
    if listed is not None and (
        not isinstance(listed, list) or any(kind not in (FULL, SLIDING) for kind in listed)
    ):
        raise HuggingFaceError(
            f"config.json: layer_types: {str(listed)[:60]} is not a list of {FULL!r} and "
            f"{SLIDING!r}"
        )
    kinds = set(listed or _DEFAULT_LAYERS[model_type])
    if model_type == "mistral":
        kinds = {SLIDING}
    if model_type == "qwen3":
        window = window if values.get("use_sliding_window") else None
        first = values.get("max_window_layers", 28)
        kinds = (
            {FULL}
            if listed is None and isinstance(first, int) and first >= values["num_hidden_layers"]
            else kinds
        )
    if SLIDING not in kinds or window is None:
        return {FULL} if model_type != "olmo3" else kinds
    window = number({"sliding_window": window}, "sliding_window", int)
    if context is None or window < context:
        raise HuggingFaceError(
            f"config.json: sliding_window: {window} is below max_position_embeddings={context}, "
            f"and windows of attention "
            f"are not supported; with max_position_embeddings of {window} or less there it "
            f"changes nothing"
        )
    return kinds if model_type == "olmo3" else {FULL}
