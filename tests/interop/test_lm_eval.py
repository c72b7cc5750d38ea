"""The adapter to lm-evaluation-harness on the local tasks beside this file; needs requirements-eval.txt, no network, no torch."""

import importlib.util
import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

from fp8jax.cli.evaluate import main as eval_main
from fp8jax.config import ConfigError
from fp8jax.interop import inference as inference_module
from fp8jax.interop import scoring
from fp8jax.interop.scoring import encode_pair, windows
from fp8jax.training import evaluation

INSTALLED = importlib.util.find_spec("lm_eval") is not None
needs_harness = pytest.mark.skipif(not INSTALLED, reason="needs requirements-eval.txt")
pytestmark = pytest.mark.filterwarnings("ignore")  # of the harness and of what it imports

TASKS = pathlib.Path(__file__).parent / "data" / "tasks"
ROOT = pathlib.Path(__file__).resolve().parents[2]
END = 256


def rows(name):
    return [json.loads(line) for line in (TASKS / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """The adapter, with nothing to be downloaded and nothing cached outside the test."""
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("hf"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    from fp8jax.interop import lm_eval

    return lm_eval


@needs_harness
def test_local_tasks_of_every_kind(harness, inference):
    found = harness.evaluate(inference, harness.load_tasks(["persuasion"], TASKS))
    results = found["results"]
    words = scoring.log_likelihoods(
        inference, [(row["text"], " " + row["word"]) for row in rows("words.jsonl")]
    )
    assert results["persuasion_last_word"]["perplexity,none"] == pytest.approx(
        math.exp(-sum(n for n, _ in words) / len(words)), rel=1e-4
    )
    assert results["persuasion_last_word"]["acc,none"] == sum(greedy for _, greedy in words) / len(
        words
    )
    right = 0
    for row in rows("words.jsonl"):
        nats = [
            n
            for n, _ in scoring.log_likelihoods(
                inference, [(row["text"], " " + word) for word in row["words"]]
            )
        ]
        right += nats.index(max(nats)) == row["label"]
    assert results["persuasion_word_choice"]["acc,none"] == pytest.approx(
        right / len(rows("words.jsonl"))
    )
    texts = [row["text"] for row in rows("passages.jsonl")]
    nats, size = (
        sum(scoring.rolling_log_likelihoods(inference, texts)),
        sum(len(text.encode()) for text in texts),
    )
    assert results["persuasion_passages"]["bits_per_byte,none"] == pytest.approx(
        -nats / math.log(2) / size, rel=1e-4
    )
    assert (
        results["persuasion_names"]["exact_match,none"] == 0
        and results["persuasion_names"]["sample_len"] == 6
    )
    assert found["n-shot"]["persuasion_names"] == 0 and found["lm_eval"]
    assert "torch" not in sys.modules


@needs_harness
@pytest.mark.parametrize("count", [1, 63, 64, 65, 130, 200])
def test_rolling_windows_are_the_harness_s(harness, count):
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    tokens = list(range(count))
    wanted = [
        make_disjoint_window(pair)
        for pair in get_rolling_token_windows(tokens, END, max_seq_len=64, context_len=1)
    ]
    assert [(w.ids[: -w.scored], w.ids[-w.scored :]) for w in windows([END], tokens, 64)] == wanted


@needs_harness
@pytest.mark.parametrize(
    ("context", "continuation"),
    [("Anne", " Elliot"), ("Anne  ", "Elliot"), ("Anne\n", " é"), (" a ", "")],
)
def test_pairs_are_encoded_as_by_the_harness(harness, inference, context, continuation):
    from lm_eval.api.model import TemplateLM

    class Encoder:
        backend = "causal"

        def tok_encode(self, text, **_):
            return inference.tokenizer.encode(text).tolist()

    before, after = TemplateLM._encode_pair(Encoder(), context, continuation)
    assert encode_pair(inference, context, continuation) == ([END, *before], after)


@needs_harness
def test_the_tasks_of_the_paper_are_known_and_without_data_it_is_one_line(harness):
    with pytest.raises(ConfigError) as error:
        harness.load_tasks(["fog"])
    message = str(error.value)
    assert (
        all(task in message for task in harness.FOG_TASKS)
        and "--task_dir" in message
        and "\n" not in message
    )


@needs_harness
def test_mistakes_are_one_line(harness, tmp_path):
    with pytest.raises(ConfigError, match="'hellaswg'.*'hellaswag'"):
        harness.load_tasks(["hellaswg"])
    with pytest.raises(ConfigError, match="not a directory"):
        harness.load_tasks(["piqa"], tmp_path / "missing")
    (tmp_path / "mine.yaml").write_text(
        (TASKS / "persuasion_names.yaml").read_text().replace("names.jsonl", "absent.jsonl")
    )
    with pytest.raises(ConfigError, match=r"persuasion_names.*absent\.jsonl"):
        harness.load_tasks(["persuasion_names"], tmp_path)


@needs_harness
def test_a_local_file_takes_the_place_of_a_task_of_the_harness(harness, tmp_path, inference):
    import lm_eval.tasks

    shipped = pathlib.Path(lm_eval.tasks.__file__).parent / "lambada" / "lambada_openai.yaml"
    local = [
        "task: lambada_openai",
        "dataset_path: json",
        "dataset_name: null",
        "dataset_kwargs: {data_files: {test: text.jsonl}}",
    ]
    (tmp_path / "lambada_openai.yaml").write_text("\n".join([f"include: {shipped}", *local]))
    (tmp_path / "text.jsonl").write_text(
        json.dumps({"text": "Sir Walter Elliot, of Kellynch Hall"}) + "\n"
    )
    found = harness.evaluate(inference, harness.load_tasks(["lambada_openai"], tmp_path))
    ((nats, _),) = scoring.log_likelihoods(inference, [("Sir Walter Elliot, of Kellynch", " Hall")])
    assert found["results"]["lambada_openai"]["perplexity,none"] == pytest.approx(
        math.exp(-nats), rel=1e-4
    )


@pytest.mark.slow
@needs_harness
def test_a_task_that_cannot_be_run_leaves_the_others_as_they_are(harness, tmp_path, inference):
    """What is done before and after it is kept, and it is known before anything is computed."""
    task = (
        (TASKS / "persuasion_names.yaml")
        .read_text()
        .replace("names.jsonl", str(TASKS / "names.jsonl"))
    )
    kinds = {
        "a_none": "max_gen_toks: 0",
        "b_beams": "num_beams: 4",
        "c_same": "max_new_tokens: 3\n  num_beams: 1",
        "d_raises": "max_gen_toks: 1",
    }
    for name, options in kinds.items():
        text = task.replace("max_gen_toks: 16", options).replace(
            "task: persuasion_names", f"task: {name}"
        )
        text = text.replace('"{{text}}"', "!function broken.text") if name == "d_raises" else text
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "broken.py").write_text(
        "def text(doc):\n    return {'Sir Walter Ell': 'Sir'}[doc['text']]\n"
    )
    tasks = harness.load_tasks(list(kinds), tmp_path)
    assert harness.unsupported(tasks) == {
        "b_beams": "generation option num_beams=4 is not supported; change generation_kwargs of the task"
    }
    kept = []
    found = harness.evaluate(
        inference,
        tasks,
        lambda done: kept.append((sorted(done["results"]), sorted(done["failed"]))),
    )
    assert kept == [
        (["a_none"], []),
        (["a_none"], ["b_beams"]),
        (["a_none", "c_same"], ["b_beams"]),
        (["a_none", "c_same"], ["b_beams", "d_raises"]),
    ]
    assert (
        found["failed"]["b_beams"].startswith("ValueError: generation option num_beams=4")
        and "KeyError" in found["failed"]["d_raises"]
    )
    assert found["results"]["a_none"]["exact_match,none"] == 0 and found["n-shot"] == {
        "a_none": 0,
        "c_same": 0,
    }


@pytest.mark.slow
@needs_harness
def test_the_command_keeps_what_is_done_and_names_what_is_not(
    harness, tmp_path, inference, monkeypatch, capsys
):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    (tmp_path / "checkpoints" / "7" / "MANIFEST.json").write_text("{}")
    monkeypatch.setattr(evaluation, "load_run", lambda *_, **__: (None, 7))
    monkeypatch.setattr(inference_module, "Inference", lambda model: inference)
    text = (
        (TASKS / "persuasion_names.yaml")
        .read_text()
        .replace("names.jsonl", str(TASKS / "names.jsonl"))
    )
    (tmp_path / "bad.yaml").write_text(
        text.replace("max_gen_toks: 16", "num_beams: 4").replace(
            "task: persuasion_names", "task: bad"
        )
    )
    (tmp_path / "good.yaml").write_text(
        text.replace("max_gen_toks: 16", "max_gen_toks: 0").replace(
            "task: persuasion_names", "task: good"
        )
    )
    assert (
        eval_main(
            ["eval.py", f"--workdir={tmp_path}", "--tasks=bad,good", f"--task_dir={tmp_path}"]
        )
        == 2
    )
    output = capsys.readouterr()
    assert (
        "error: --tasks: bad: ValueError: generation option num_beams=4 is not supported"
        in output.err
    )
    assert "the others are done" in output.err
    assert "step 7: good" in output.out
    saved = json.loads((tmp_path / "eval_tasks.json").read_text())
    assert list(saved["results"]) == ["good"] and list(saved["failed"]) == ["bad"]


@pytest.mark.skipif(INSTALLED, reason="lm_eval is installed")
def test_without_the_harness_it_says_what_to_install(tmp_path):
    result = subprocess.run(
        [sys.executable, "eval.py", f"--workdir={tmp_path}", "--tasks=fog"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        timeout=300,
    )
    assert (
        result.returncode == 2
        and result.stderr
        == "error: --tasks needs lm-evaluation-harness: pip install -r requirements-eval.txt\n"
    )
