"""Small configurations."""

import pytest

from configs import common
from fp8jax import config as config_lib


@pytest.fixture
def make_config():
    """A config of a size, `changes` by 'section.field'."""

    def make(size, architecture="fog_max", recipe="fp8_dpa", **changes):
        config = common.make(size, architecture=architecture, recipe=recipe)
        for name, value in changes.items():
            section, field = name.split("__")
            config[section][field] = value
        return config_lib.from_dict(config)

    return make
