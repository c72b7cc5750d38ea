"""docs/library.md: its programs run, in the order of the page, and its first one alone."""

import pathlib
import re

import pytest

import fp8jax

PAGE = pathlib.Path(__file__).resolve().parents[1] / "docs" / "library.md"
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)


@pytest.fixture
def as_users_have_it():
    """JAX as it is outside of these tests: dtypes promote."""
    import jax

    with jax.numpy_dtype_promotion("standard"):
        yield


def test_the_blocks_run_in_the_order_of_the_page(as_users_have_it, capsys):
    names = {"__name__": "page"}
    for block in BLOCKS:
        exec(compile(block, str(PAGE), "exec"), names)  # noqa: S102
    first, second = re.findall(r"^loss ([\d.]+)$", capsys.readouterr().out, re.M)
    assert float(first) < 0.5 and float(second) < 3.5
    history = names["model"].up.scaling.history.get_value()
    assert (history[:, :51] > 0).all() and (history[:, 51:] == 0).all()


def test_the_first_program_is_of_one_screen():
    lines = [line for line in BLOCKS[0].splitlines() if line.strip()]
    assert len(lines) < 36


def test_the_reference_has_every_public_name():
    shown = PAGE.with_name("api.md").read_text()
    public = {f"fp8jax.{name}" for name in fp8jax.__all__ if name not in ("nnx", "linen")}
    public |= {f"fp8jax.nnx.{name}" for name in fp8jax.nnx.__all__}
    public |= {f"fp8jax.linen.{name}" for name in fp8jax.linen.__all__}
    assert {name for name in public if f'heading: "{name}"' not in shown} == set()
