"""`python -m fp8jax audit` as a user runs it, on the devices at hand."""

import json
import pathlib

import pytest

from fp8jax.audit import limits
from fp8jax.cli import audit, audit_memory

ROOT = pathlib.Path(__file__).resolve().parents[2]
# The step of tests/audit/test_program.py, which a test session compiles once.
SMALL = [
    "--{}.model.layers=3",
    "--{}.model.width=64",
    "--{}.model.heads=4",
    "--{}.model.kv_heads=2",
    "--{}.model.ffn_width=64",
    "--{}.data.sequence_length=256",
    "--{}.training.batch_size=8",
    "--{}.training.remat=save_fp8",
    "--{}.mesh.fsdp=8",
]


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_two_configs_side_by_side_and_as_json(tmp_path, capsys):
    file = tmp_path / "audit.json"
    words = [word.format(flag) for flag in ("config", "compare") for word in SMALL]
    given = [
        "--config=configs/fp8_base.py:tiny",
        "--compare",
        "configs/fp8_base.py:tiny",
        "--target=local",
        f"--json={file}",
    ]
    assert audit.main([*given, *words]) == 0
    shown = capsys.readouterr().out
    assert (
        "Side by side" in shown
        and shown.count("configs/fp8_base.py:tiny") >= 4
        and "mlp_up" in shown
        and "FP8 share" in shown
    )
    found = json.loads(file.read_text())
    keys = [
        "config",
        "target",
        "gemms",
        "block_gemm_flops",
        "fp8_share",
        "non_gemm_bytes",
        "collectives",
        "memory",
        "estimate",
        "compile_seconds",
        "fits",
        "fit",
    ]
    assert list(found) == [*keys, "compare"] and list(found["compare"]) == keys
    assert (
        found["config"]["resolved"]["model"]["width"]
        == found["compare"]["config"]["resolved"]["model"]["width"]
        == 64
    )
    assert found["memory"]["peak_bytes_per_device"] > found["memory"]["arguments"]["total"] > 0
    assert found["fp8_share"] == 1.0 and found["block_gemm_flops"] > 0
    assert (
        found["fits"] is True
        and found["memory"]["fits"] is True
        and found["memory"]["usable_bytes"] > 0
    )
    chosen = found["fit"]
    assert (chosen["microbatches"], chosen["loss_chunk"], chosen["remat"]) == (1, 0, "save_fp8")
    assert (
        found["config"]["resolved"]["training"]["microbatches"] == 1 and "needs" in chosen["text"]
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=configs/fp8_base.py:tiny"], ["--target"]),
        (["--target=local"], ["--config"]),
        (["--config=configs/missing.py:8b", "--target=local"], ["configs/missing.py"]),
        (
            ["--config=configs/fp8_base.py:tiny", "--target=local", "--config.model.widht=3"],
            ["widht"],
        ),
        (
            ["--config=configs/fp8_base.py:tiny", "--target=local", "--config.model.kv_heads=3"],
            ["config.model.kv_heads", "3"],
        ),
        (["--config=configs/fp8_base.py:tiny", "--target=local", "--wrokdir=3"], ["--wrokdir"]),
        (
            ["--config=configs/fp8_base.py:tiny", "--target=local", "--config.mesh.fsdp=3"],
            ["config.mesh", "8 devices"],
        ),
        (["--config=configs/fp8_base.py:tiny", "--target=z100:8"], ["z100:8", "h100:8"]),
    ],
)
def test_mistakes_are_one_line(arguments, words, capsys):
    assert audit.main(arguments) == 2
    lines = [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith("compiling")
    ]
    assert (
        len(lines) == 1
        and lines[0].startswith("error: ")
        and all(word in lines[0] for word in words)
    ), lines


def test_memory_tells_what_options_save(tmp_path, capsys, monkeypatch):
    """One that is set already is left out, and one that the model does not allow; the last row is all of them."""
    monkeypatch.setattr(
        audit_memory,
        "OPTIONS",
        (
            ("optimizer.first_moment", "fp8"),
            ("training.remat", "full"),
            ("fp8.head", True),
            ("optimizer.second_moment", "bfloat16"),
        ),
    )
    file, small = (
        tmp_path / "memory.json",
        [word.format("config") for word in SMALL if "layers" not in word and "remat" not in word],
    )
    given = [
        "--config=configs/fp8_base.py:tiny",
        "--target=local",
        "--memory",
        f"--json={file}",
        "--config.training.remat=full",
    ]
    assert audit.main([*given, *small, "--config.model.layers=1"]) == 0
    shown, found = capsys.readouterr().out, json.loads(file.read_text())
    assert (
        "first moment" in shown
        and "--config.optimizer.first_moment=fp8 --config.optimizer.second_moment=bfloat16" in shown
    )
    first, second, together = found["options"]
    assert together["changes"] == first["changes"] | second["changes"]
    assert found["peak_bytes_per_device"] - together["peak_bytes_per_device"] == together["saves"]
    # A device's eighth of the moments: the first without scales is a fourth, the second a half.
    sizes = found["arguments"]
    assert sizes["first moment"] == sizes["second moment"] > 0 and found["temporaries"] > 0
    assert found["largest"][0]["bytes"] >= found["largest"][1]["bytes"] > 0
    assert (
        audit.main([*given, "--compare=configs/fp8_base.py:tiny"]) == 2
        and "leave out --compare" in capsys.readouterr().err
    )


def test_fit_shows_the_options_and_the_choice(tmp_path, capsys):
    file, words = tmp_path / "fit.json", [word.format("config") for word in SMALL]
    assert (
        audit.main(
            [
                "--config=configs/fp8_base.py:tiny",
                "--target=local",
                "--fit",
                f"--json={file}",
                *words,
            ]
        )
        == 0
    )
    shown, found = capsys.readouterr().out, json.loads(file.read_text())
    assert "chosen" in shown and "microbatches=1 loss_chunk=0 remat=save_fp8: needs" in shown
    (row,) = found["fit"]["options"]
    assert (
        found["fits"] is True
        and row["chosen"]
        and row["compiled"]["bytes_per_device"] == found["fit"]["bytes_per_device"]
    )


def test_without_a_size_the_targets_devices_decide(capsys):
    """Not those at hand, where it would be tiny."""
    arguments = [
        "--config=configs/fp8_base.py",
        "--target=h100:1",
        "--config.training.batch_size=3",
        "--config.mesh.data=2",
    ]
    assert audit.main(arguments) == 2  # as far as the mesh
    assert "size 390m" in capsys.readouterr().err
    assert (
        audit.main(["--config=configs/fp8_base.py", "--target=local", "--config.mesh.fsdp=3"]) == 2
    )
    assert "size tiny" in capsys.readouterr().err


def test_help_shows_an_example(capsys):
    with pytest.raises(SystemExit):
        audit.main(["--help"])
    assert (
        "python -m fp8jax audit --config=configs/fp8_base.py:8b --target=h100:8"
        in capsys.readouterr().out
    )


def test_some_of_the_devices_at_hand_are_those_of_a_run(monkeypatch, capsys):
    """Not of a CPU that stands for devices which are elsewhere."""
    asked = []
    monkeypatch.setattr(limits, "set_memory_fraction", lambda: asked.append(True))
    assert audit.main(["--config=configs/fp8_base.py:tiny", "--target=local:9"]) == 2
    assert asked and "is not a number of devices from 1 to 8" in capsys.readouterr().err
