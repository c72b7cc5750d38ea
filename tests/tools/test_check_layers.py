"""The check of imports: this checkout passes, and each kind of wrong import is found."""

import importlib.util
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
_SPEC = importlib.util.spec_from_file_location("check_layers", ROOT / "tools" / "check_layers.py")
check_layers = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(check_layers)


def test_this_checkout_passes():
    assert list(check_layers.check(ROOT)) == []


def write(root, files):
    for name, content in files.items():
        path = root / "fp8jax" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        (
            "models/a.py",
            "from fp8jax.training import step",
            "fp8jax/models/a.py:1: models imports training",
        ),
        (
            "data/a.py",
            "def f():\n    import fp8jax.models.layers",
            "fp8jax/data/a.py:2: data imports models",
        ),
        ("numerics/a.py", "from ..models import layers", "numerics imports models"),
        ("numerics/a.py", "import flax.nnx", "numerics imports flax.nnx; it is plain JAX"),
        ("audit/a.py", "from fp8jax import numerics", "audit imports numerics"),
    ],
)
def test_imports_that_point_up_are_found(tmp_path, name, content, fault):
    write(
        tmp_path,
        {
            "__init__.py": "",
            "models/layers.py": "",
            "training/step.py": "",
            "numerics/__init__.py": "",
            name: content,
        },
    )
    (found,) = check_layers.check(tmp_path)
    assert fault in found


def test_imports_that_point_down_pass_and_circles_are_found(tmp_path):
    files = {
        "__init__.py": "",
        "training/a.py": "from fp8jax.models import b",
        "models/b.py": "from . import c",
        "models/c.py": "",
    }
    write(tmp_path, files)
    assert list(check_layers.check(tmp_path)) == []
    write(tmp_path, {"models/c.py": "from fp8jax.models.b import name"})
    (found,) = check_layers.check(tmp_path)
    assert found == "circle: fp8jax.models.b -> fp8jax.models.c -> fp8jax.models.b"
