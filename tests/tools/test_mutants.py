"""The runner of mutants: what it finds in code however that is laid out, what is stale, which tests a file has."""

import importlib.util
import pathlib
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def mutants():
    spec = importlib.util.spec_from_file_location("mutants", ROOT / "tools" / "mutants.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["mutants"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def mutant(mutants, old, new="0"):
    return mutants.Mutant("name", "code.py", old, new, "a fault", "models")


@pytest.mark.parametrize("old", ["f(a, b)", "f( a,b )", "f(\n    a,\n    b,\n)"])
def test_layout_does_not_count(mutants, tmp_path, old):
    """One line, or one argument a line with a trailing comma: a formatter makes nothing stale."""
    for text in ("x = f(a, b)\n", "x = f(\n    a,\n    b,\n)\n"):
        (tmp_path / "code.py").write_text(text)
        found = mutant(mutants, old.replace("b,\n)", "b\n)")).applied(tmp_path)
        assert found == "x = 0\n"


@pytest.mark.parametrize(
    ("text", "times"),
    [("x = g(a, b)\n", 0), ("x = f(a, b) + f(a, b)\n", 2), ("x = ff(a, b_)\n", 0)],
)
def test_what_is_not_there_once_is_stale(mutants, tmp_path, text, times):
    (tmp_path / "code.py").write_text(text)
    with pytest.raises(
        mutants.StaleError,
        match=f"name: code.py has this text {times} times, not once: 'f\\(a, b\\)'",
    ):
        mutant(mutants, "f(a, b)").applied(tmp_path)


def test_a_fault_that_is_no_code_is_refused(mutants, tmp_path):
    (tmp_path / "code.py").write_text("x = f(a, b)\n")
    with pytest.raises(SyntaxError):
        mutant(mutants, "f(a, b)", "f(").applied(tmp_path)


def test_faults_are_read_and_their_files_exist(mutants):
    found = mutants.load_mutants()
    assert len(found) >= 150 and {one.room for one in found} >= {
        "numerics",
        "models",
        "training",
        "parallel",
        "monitor",
        "data",
    }
    assert all((ROOT / one.file).is_file() and one.old != one.new and one.fault for one in found)
    assert all((ROOT / test.partition("::")[0]).is_file() for one in found for test in one.tests)


def test_tests_mirror_the_path(mutants):
    extra = {"fp8jax/training/optimizer.py": ["tests/training/test_run.py"]}
    assert mutants.tests_of("fp8jax/training/optimizer.py", extra) == [
        "tests/training/test_optimizer.py",
        "tests/training/test_run.py",
    ]
    assert mutants.tests_of("fp8jax/files.py", {}) == ["tests/test_files.py"]
    assert mutants.tests_of("fp8jax/training/nothing.py", {}) == []


def test_rooms_are_counted(mutants):
    one, other = mutant(mutants, "a"), mutants.Mutant("b", "code.py", "a", "b", "", "data")
    lines = mutants.table(
        [(one, mutants.CAUGHT), (other, mutants.SURVIVED), (other, mutants.CAUGHT)]
    ).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["models", "1", "1", "100%"],
        ["data", "1", "2", "50%"],
        ["all", "2", "3", "67%"],
    ]
