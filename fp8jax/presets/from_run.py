"""The configuration of a run, or of a converted model, with the fields that the command line
changes.
"""

import pathlib
from typing import Any

import ml_collections

from fp8jax import config as config_lib
from fp8jax.config import open_fields
from fp8jax.data import run_tokenizer


def get_config(workdir: str | None = None) -> ml_collections.ConfigDict:
    """Return the configuration in the config.json of the run in `workdir`."""
    path = pathlib.Path(workdir or "", "config.json")
    if not workdir or not path.is_file():
        raise ValueError(f"{path}: no such file; write --config=configs/from_run.py:WORKDIR")
    # Any: by its own types a field of a ConfigDict may always be None.
    config: Any = config_lib.defaults()
    for section, fields in config_lib.to_dict(run_tokenizer.read_config(workdir)).items():
        config[section].update(fields)
    # The run serves as a preset: schedules that the command line does not set follow a length that
    # it sets.
    config.preset.update(open_fields.planned(config))
    for section, field in open_fields.OPEN:
        if field != "fsdp" or config.mesh.fsdp == -1:
            config[section][field] = None
    return config
