"""Run the FOG paper's ten tasks by our adapter and by the harness's own for Hugging Face models, on one exported model.

    pip install -r requirements-eval.txt torch transformers accelerate
    python benchmarks/tasks.py                       # 5 minutes of a CPU core, no network

The model is a small Llama, trained on the embedded novels in float32 with a BPE of 1,024 ids,
exported by `convert to-hf`; the harness is set to begin texts with the tokenizer's first token, as
we do. Tasks are the harness's own files; their data is made from the embedded novels, in each data
set's own columns.
"""

import argparse
import contextlib
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import common
import jax
import lm_eval.tasks
import numpy as np
import torch
import transformers
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM

from fp8jax import config as config_lib
from fp8jax.cli import convert
from fp8jax.data import sources, tokenizer
from fp8jax.interop import lm_eval as ours
from fp8jax.interop.inference import Inference
from fp8jax.training.evaluation import load_run
from fp8jax.training.loop import train

# Task → its file in the harness.
FILES = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "winogrande": "winogrande/default.yaml",
    "piqa": "piqa/piqa.yaml",
    "social_iqa": "siqa/siqa.yaml",
    "openbookqa": "openbookqa/openbookqa.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "triviaqa": "triviaqa/default.yaml",
    "wikitext": "wikitext/wikitext.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}
MODEL = {
    "architecture": "llama3",
    "layers": 2,
    "width": 64,
    "ffn_width": 128,
    "heads": 4,
    "kv_heads": 2,
    "dtype": "float32",
    "tied_embeddings": False,
}


def phrases(random: np.random.Generator, words: int) -> str:
    """Return `words` consecutive words from one of the novels."""
    novel = _words()[random.integers(len(_words()))]
    start = random.integers(len(novel) - words)
    return " ".join(novel[start : start + words])


_CACHE: list[list[str]] = []


def _words() -> list[list[str]]:
    if not _CACHE:
        _CACHE.extend(document.decode().split() for document in sources.embedded_documents("train"))
    return _CACHE


def documents(task: str, count: int) -> Iterator[dict[str, Any]]:
    """Yield rows in the columns of the task's data set."""
    random = np.random.default_rng(sorted(FILES).index(task))

    def choices(number: int, words: int) -> list[str]:
        return [phrases(random, int(random.integers(1, words + 1))) for _ in range(number)]

    for _ in range(count):
        question, label = phrases(random, int(random.integers(5, 40))), int(random.integers(2))
        letters = list("ABCDE")
        yield {
            "lambada_openai": {"text": question},
            "winogrande": {
                "sentence": f"{question} _ {phrases(random, 6)}",
                "option1": "Anne",
                "option2": "Captain Wentworth",
                "answer": str(label + 1),
            },
            "piqa": {
                "goal": question,
                "sol1": phrases(random, 9),
                "sol2": phrases(random, 4),
                "label": label,
            },
            "social_iqa": {
                "context": question,
                "question": "Why?",
                "label": str(label + 1),
                **dict(zip(("answerA", "answerB", "answerC"), choices(3, 6), strict=True)),
            },
            "openbookqa": {
                "question_stem": question,
                "choices": {"text": choices(4, 5), "label": letters[:4]},
                "answerKey": letters[label],
            },
            "arc_easy": {
                "question": question,
                "choices": {"text": choices(4, 5), "label": letters[:4]},
                "answerKey": letters[label],
            },
            "commonsense_qa": {
                "question": question,
                "choices": {"text": choices(5, 2), "label": letters},
                "answerKey": letters[label],
            },
            "triviaqa": {"question": question, "answer": {"aliases": choices(3, 2)}},
            "wikitext": {"page": f" = {phrases(random, 3)} = \n {phrases(random, 600)} . \n"},
            "hellaswag": {
                "ctx_a": question,
                "ctx_b": phrases(random, 4),
                "activity_label": phrases(random, 2),
                "endings": choices(4, 12),
                "label": str(label),
            },
        }[task]


def write_tasks(directory: pathlib.Path, count: int) -> None:
    """Write the harness's task files with local data in place of theirs."""
    root = pathlib.Path(lm_eval.tasks.__file__).parent
    for task, file in FILES.items():
        (directory / f"{task}.jsonl").write_text(
            "".join(json.dumps(row) + "\n" for row in documents(task, count))
        )
        splits = "{train: %s, validation: %s, test: %s}" % ((f"{directory / task}.jsonl",) * 3)
        lines = [
            f"include: {root / file}",
            f"task: {task}",
            "dataset_path: json",
            "dataset_name: null",
            f"dataset_kwargs: {{data_files: {splits}}}",
        ]
        (directory / f"{task}.yaml").write_text("\n".join(lines) + "\n")


def make_run(directory: pathlib.Path, steps: int) -> pathlib.Path:
    """Train a run, and export its model beside it."""
    file = directory / "tokenizer.json"
    file.write_text(
        tokenizer.train(
            (document.decode() for document in sources.embedded_documents("train")), 1024
        )
    )
    config = config_lib.from_dict(
        {
            "model": MODEL,
            "data": {"tokenizer": str(file), "sequence_length": 512},
            "fp8": {"recipe": "bf16"},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": steps // 10},
            "training": {"steps": steps, "batch_size": 8},
            "monitor": {"every": 0},
            "log": {"report_minutes": 0},
        }
    )
    train(config, directory / "run", devices=jax.devices()[:1])
    if convert.main(
        ["to-hf", "--workdir", str(directory / "run"), "--out", str(directory / "exported")]
    ):
        sys.exit("the export failed")
    return directory / "run"


def by_harness(directory: pathlib.Path, tasks: list[Any]) -> dict[str, Any]:
    """Return the results of the harness's own adapter.

    A text of a perplexity task follows the first token in either case: with `add_bos_token` the
    adapter puts a second one after it, and scores that as part of the text.
    """
    found = {}
    for task in tasks:
        begin = task.OUTPUT_TYPE != "loglikelihood_rolling"
        model = HFLM(
            pretrained=str(directory),
            dtype="float32",
            device="cpu",
            add_bos_token=begin,
            batch_size=1,
        )
        with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
            found |= simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)["results"]
    return found


def main() -> None:
    """Run the tasks both ways and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20, help="documents a task")
    parser.add_argument("--steps", type=int, default=300, help="steps that the model is trained")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["HF_HOME"] = scratch
        directory = pathlib.Path(scratch)
        write_tasks(directory, options.rows)
        run = make_run(directory, options.steps)
        found = ours.evaluate(
            Inference(load_run(run, devices=jax.devices()[:1])[0]),
            ours.load_tasks(["fog"], directory),
        )
        if found["failed"]:
            sys.exit(f"failed: {found['failed']}")
        theirs = by_harness(directory / "exported", ours.load_tasks(["fog"], directory))
    rows = []
    for task in FILES:
        for name, value in theirs[task].items():
            metric, comma, _ = name.partition(",")
            if comma and not metric.endswith("_stderr"):
                mine = found["results"][task][name]
                rows.append(
                    {
                        "task": task,
                        "metric": metric,
                        "fp8jax": mine,
                        "lm_eval's hf": value,
                        "difference": abs(mine - value),
                    }
                )
    common.save(
        "tasks", rows, model=MODEL, lm_eval=found["lm_eval"], transformers=transformers.__version__
    )


if __name__ == "__main__":
    main()
