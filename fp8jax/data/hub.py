"""Read datasets of the Hugging Face hub for `prepare`: 'hf:NAME' or 'hf:NAME:CONFIG', e.g.
'hf:allenai/c4:en'.

The package `datasets` downloads the split `train` once into its cache; without network only what is
there can be read, and directories of data files, 'hf:/path'. Rows are read by number, so work on
them is shared and restarted like that on files.
"""

import contextlib
import functools
import logging
import os
import socket
import urllib.parse
import urllib.request
from collections.abc import Iterator
from typing import Any

from fp8jax.config import ConfigError

PREFIX = "hf:"
_BATCH = 256


@functools.lru_cache(maxsize=4)
def dataset(name: str) -> Any:
    """Return the training split of a dataset.

    Args:
        name: 'hf:NAME' or 'hf:NAME:CONFIG'.

    Raises:
        ConfigError: the package `datasets` is missing, or the dataset cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"{name}: needs the package datasets; pip install datasets") from None
    path, _, config = name.removeprefix(PREFIX).partition(":")
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # each retry is two lines otherwise
    reachable = os.path.exists(path) or _is_reachable()
    try:
        with contextlib.nullcontext() if reachable else _offline():
            return datasets.load_dataset(path, config or None, split="train")
    except Exception as error:  # the hub and the network raise many kinds
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        if not reachable and isinstance(error, ConnectionError):
            reason = "the hub cannot be reached, and no earlier download is in its cache"
        raise ConfigError(
            f"{name}: cannot be had: {reason}; without network, download its files elsewhere "
            f"and give their "
            "directory as --input"
        ) from None


def _is_reachable() -> bool:
    """Return whether the hub's host answers; it is asked once, while the libraries would try for
    half a minute.
    """
    import huggingface_hub

    address = urllib.parse.urlsplit(huggingface_hub.constants.ENDPOINT)
    if urllib.request.getproxies().get(address.scheme):
        return True  # unknown: the proxy resolves the name
    port = address.port or (80 if address.scheme == "http" else 443)
    try:
        socket.create_connection((address.hostname, port), timeout=5).close()
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Restrict the libraries to their cache."""
    import datasets
    import huggingface_hub

    before = datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE
    datasets.config.HF_HUB_OFFLINE = huggingface_hub.constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, huggingface_hub.constants.HF_HUB_OFFLINE = before


def rows(name: str, field: str, start: int, stop: int) -> Iterator[list[str]]:
    """Yield the texts of a range of rows, a few at a time.

    Raises:
        ConfigError: the column is missing or not text, or a row has no text.
    """
    found = dataset(name)
    if getattr(found.features.get(field), "dtype", None) not in ("string", "large_string"):
        raise ConfigError(
            f"{name}: has no column {field!r} of text; --text_field is one of "
            f"{', '.join(found.column_names)}"
        )
    chosen = found.select_columns([field])
    for first in range(start, stop, _BATCH):
        texts = chosen[first : min(first + _BATCH, stop)][field]
        for number, text in enumerate(texts):
            if text is None:
                raise ConfigError(
                    f"{name}: row {first + number + 1} has no text in column {field!r}"
                )
        yield texts
