"""`python -m fp8jax data show` against the batches that training reads."""

import json

import pytest

from fp8jax import config as configs
from fp8jax.cli import data as command
from fp8jax.data import pipeline, prepare


@pytest.fixture
def run(tmp_path):
    """A run's directory, and its config, on two prepared sources."""
    sources = []
    for letter, count in (("a", 40), ("b", 30)):
        path = tmp_path / f"{letter}.jsonl"
        path.write_text(
            "".join(
                json.dumps({"text": f"{letter}{n} über \x1b[31m" * (n % 5)}) + "\n"
                for n in range(count)
            )
        )
        prepare.prepare([path], tmp_path / letter, best_fit=[32], validation_fraction=0.1)
        sources.append(str(tmp_path / letter))

    def make(**data):
        config = configs.from_dict(
            {
                "data": {"source": f"{sources[0]}=0.7,{sources[1]}=0.3", "sequence_length": 32}
                | data,
                "training": {"batch_size": 10},
            }
        )
        (tmp_path / "config.json").write_text(json.dumps(configs.to_dict(config)))
        return tmp_path, config

    return make


def texts(shown):
    """The texts of the sequences, from what the command printed."""
    return [
        part.partition("\n")[2].removesuffix("\n") for part in shown.split("\n--- sequence ")[1:]
    ]


@pytest.mark.parametrize("data", [{}, {"packing": "best_fit", "document_masks": True}])
@pytest.mark.parametrize("step", [1, 7, 10**7])
def test_shows_what_the_step_saw(run, capsys, data, step):
    workdir, config = run(**data)
    assert command.main(["show", f"--workdir={workdir}", f"--step={step}"]) == 0
    shown = capsys.readouterr().out
    batch = next(pipeline.train_iterator(config, start_step=step - 1))
    assert f"step {step}: 10 sequences of 32 tokens" in shown and "epoch" in shown
    for text, targets, mask in zip(texts(shown), batch["targets"], batch["mask"], strict=True):
        ids = [
            byte
            for n, part in enumerate(text.encode(errors="replace").split(command.END.encode()))
            for byte in ([256] if n else []) + list(part)
        ]
        expected = targets[mask == 1].tolist()
        # A window may cut a character; then its bytes are shown as U+FFFD.
        assert ids == expected or "\ufffd" in text
    assert ("documents apart" in shown) == ("document_masks" in data)


def test_passes_over_the_batches_that_a_rollback_passed_over(run, capsys):
    workdir, _ = run()
    events = [
        {"kind": "started", "step": 0, "skipped_batches": 0},
        {"kind": "started", "step": 4, "skipped_batches": 3},
    ]
    (workdir / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    for step, batch in ((4, 4), (5, 8)):
        assert command.main(["show", f"--workdir={workdir}", f"--step={step}"]) == 0
        after = capsys.readouterr().out
        (workdir / "events.jsonl").rename(workdir / "kept")
        assert command.main(["show", f"--workdir={workdir}", f"--step={batch}"]) == 0
        assert texts(after) == texts(capsys.readouterr().out)
        (workdir / "kept").rename(workdir / "events.jsonl")


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--step=0"], "--step: 0 is below 1"),
        (["--step=1", "--workdir=nowhere"], "nowhere/config.json: no such file"),
    ],
)
def test_mistakes_are_one_line(run, capsys, arguments, fault):
    workdir, _ = run()
    assert command.main(["show", f"--workdir={workdir}", *arguments]) == 2
    assert fault in (found := capsys.readouterr().err) and found.count("\n") == 1
