"""The command line of the probe: mistakes in one line before JAX is loaded, tables, the line to paste and JSON."""

import json

import pytest

from fp8jax.cli import probe


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "give the WORKDIR"),
        (["{tmp}/none"], "no such directory"),
        (["{tmp}", "--config=configs/llama3.py:tiny"], "give the WORKDIR"),
        (["{tmp}", "--batches=0"], "--batches=0"),
        (["--config=configs/llama3.py"], "has no size"),
        (["--config=configs/llama3.py:tiny", "--step=3"], "--step=3"),
        (["{tmp}", "--config.model.layers=2"], "needs --config=FILE:SIZE"),
    ],
)
def test_mistakes_are_one_line(argv, says, tmp_path, capsys):
    code = probe.main([word.format(tmp=tmp_path) for word in argv])
    out, err = capsys.readouterr()
    assert code == 2
    assert says in err
    assert err.count("\n") == 1
    assert out == ""


@pytest.mark.slow
def test_initial_state_of_a_preset_is_probed(tmp_path, capsys):
    path = tmp_path / "probe.json"
    small = ("layers=2", "width=32", "ffn_width=32", "heads=2", "kv_heads=1")
    code = probe.main(
        [
            "--config=configs/fp8_base.py:tiny",
            *(f"--config.model.{field}" for field in small),
            "--config.data.sequence_length=32",
            "--config.training.batch_size=16",
            f"--json={path}",
        ]
    )
    out, _ = capsys.readouterr()
    assert code == 0
    found = json.loads(path.read_text())
    assert f"error {found['error']:.3f} (" in out
    assert found["verdict"] in out
    assert len(found["matrices"]["mlp_up"]["error"]) == 2
    assert set(found["groups"]) >= {"mlp", "attention_out"}
