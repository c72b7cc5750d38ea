"""The public recipe says what is wrong with it in one line."""

import dataclasses
import subprocess
import sys

import pytest

import fp8jax


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"scaling": "delayd"}, "scaling='delayd' is not one of delayed, .*did you mean 'delayed'"),
        ({"gradient_format": "e4m3fn"}, "gradient_format='e4m3fn'.*did you mean 'e4m3'"),
        ({"history_length": 0}, "history_length=0 is not an integer from 1 to"),
        ({"history_length": 2.0}, "history_length=2.0 is not an integer"),
        ({"margin": True}, "margin=True is not an integer"),
        ({"power_of_two": 1}, "power_of_two=1 is not one of True, False"),
        ({"fast_accumulation": ["all"]}, r"fast_accumulation=\['all'\] is not one of"),
        ({"scaling": "blockwise", "emulated": False}, "blockwise scaling has no FP8 kernel"),
    ],
)
def test_a_wrong_value_is_named(given, says):
    with pytest.raises(ValueError, match=f"^fp8jax.Recipe: .*{says}") as error:
        fp8jax.Recipe(**given)
    assert "\n" not in str(error.value)


def test_an_unknown_field_is_named_with_the_nearest():
    with pytest.raises(TypeError, match="no field 'histroy_length'; did you mean 'history_length'"):
        fp8jax.Recipe(histroy_length=3)


def test_recipes_are_equal_hashable_and_replaced():
    one = fp8jax.Recipe("current")
    assert hash(one) == hash(fp8jax.Recipe(scaling="current"))
    assert dataclasses.replace(fp8jax.Recipe(), scaling="current") == one


def test_import_loads_no_jax_and_every_public_name_is_there():
    program = (
        "import sys, fp8jax\n"
        "assert 'jax' not in sys.modules and 'flax' not in sys.modules\n"
        "assert set(fp8jax.__all__) <= set(dir(fp8jax))\n"
        "for name in fp8jax.__all__: assert getattr(fp8jax, name) is not None\n"
        "assert not hasattr(fp8jax, 'no_such_name')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
