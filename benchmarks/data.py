"""Measure how fast text becomes token shards, and token shards become batches.

    python benchmarks/data.py                        # 1 GB of text; 20 minutes on 2 cores
    python benchmarks/data.py --megabytes=20         # under a minute

The text is passages of the embedded novels in random order, in a .jsonl made by the script; the
tokenizer is a byte-level BPE trained on them. `prepare` is compared with the tokenizer library
alone, on text that is already in memory. Batches are read by one core without reading ahead, as
tokens per second of CPU time, at step 10,000,000, because a resumed run reads there.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import common
import numpy as np
import tokenizers

from configs import common as configs
from fp8jax import config as config_lib
from fp8jax.data import pipeline, sources, tokenizer

STEP = 10_000_000
VOCABULARY, LENGTH = 8192, 4096
BATCH = 1000  # documents per call of the library
KINDS = {
    "concat": {},
    "concat, document masks": {"document_masks": True},
    "best fit, document masks": {"packing": "best_fit", "document_masks": True},
}


def passages(megabytes: float) -> Iterator[str]:
    """Yield passages of 200 to 20,000 characters, mostly short, together about `megabytes`."""
    random = np.random.default_rng(0)
    novels = [document.decode() for document in sources.embedded_documents("train")]
    left = megabytes * 1e6
    while left > 0:
        novel = novels[random.integers(len(novels))]
        size = int(200 * 100 ** random.random())
        start = int(random.integers(max(len(novel) - size, 1)))
        left -= size
        yield novel[start : start + size]


def library_alone(file: pathlib.Path, texts: list[str]) -> dict[str, Any]:
    """Measure the tokenizer library on text in memory, with all cores."""
    library = tokenizers.Tokenizer.from_file(str(file))
    start, cpu, tokens = time.perf_counter(), time.process_time(), 0
    for first in range(0, len(texts), BATCH):
        tokens += sum(
            len(found)
            for found in library.encode_batch_fast(
                texts[first : first + BATCH], add_special_tokens=False
            )
        )
    return _rate(
        "tokenizers alone", texts, time.perf_counter() - start, time.process_time() - cpu
    ) | {"tokens": tokens}


def prepare(
    file: pathlib.Path, text: pathlib.Path, out: pathlib.Path, texts: list[str]
) -> dict[str, Any]:
    """Measure `python -m fp8jax prepare` from the .jsonl to finished shards, best fit included, and its peak memory."""
    command = [
        sys.executable,
        "-m",
        "fp8jax",
        "prepare",
        f"--input={text}",
        f"--out={out}",
        f"--tokenizer={file}",
        "--best_fit",
        str(LENGTH),
    ]
    start, cpu = time.perf_counter(), os.times()
    process = subprocess.Popen(
        command,
        cwd=common.ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    peak = _Peak(process.pid)
    _, errors = process.communicate()
    seconds, after = time.perf_counter() - start, os.times()
    if process.returncode:
        sys.exit(f"prepare failed: {errors}")
    used = after.children_user + after.children_system - cpu.children_user - cpu.children_system
    return _rate("prepare", texts, seconds, used) | {"peak_mib": peak.stop()}


def _rate(what: str, texts: list[str], seconds: float, cpu: float) -> dict[str, Any]:
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    return {
        "measure": what,
        "megabytes": megabytes,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "mb_per_second": megabytes / seconds,
        "mb_per_cpu_second": megabytes / cpu,
    }


class _Peak(threading.Thread):
    """A sampler of the memory of a session of processes, shared pages once; 0 if the system has no /proc."""

    def __init__(self, session: int):
        super().__init__(daemon=True)
        self._session, self._largest, self._ended = session, 0.0, threading.Event()
        self.start()

    def run(self) -> None:
        while not self._ended.wait(0.2):
            self._largest = max(
                self._largest,
                sum(
                    _proportional_kib(pid)
                    for pid in pathlib.Path("/proc").glob("[0-9]*")
                    if self._is_ours(int(pid.name))
                ),
            )

    def _is_ours(self, pid: int) -> bool:
        try:
            return os.getsid(pid) == self._session
        except OSError:
            return False

    def stop(self) -> float:
        """Stop and return the largest sum seen, MiB."""
        self._ended.set()
        self.join()
        return self._largest / 1024


def _proportional_kib(process: pathlib.Path) -> float:
    try:
        lines = (process / "smaps_rollup").read_text().splitlines()
    except OSError:  # the process has ended
        return 0.0
    return next((float(line.split()[1]) for line in lines if line.startswith("Pss:")), 0.0)


def reading(
    kind: str, directory: pathlib.Path, batches: int, length: int = LENGTH
) -> dict[str, Any]:
    """Measure reading batches of 32,768 tokens at STEP by one core, and the seconds until the first."""
    values = configs.make("tiny", architecture="fog_max", recipe="fp8_dpa")
    values.data.update(source=str(directory), sequence_length=length, read_threads=0, **KINDS[kind])
    values.training.batch_size = 8 * LENGTH // length
    start = time.perf_counter()
    iterator = pipeline.train_iterator(config_lib.from_dict(values), start_step=STEP)
    next(iterator)
    resumed, cpu = time.perf_counter() - start, time.process_time()
    tokens = sum(next(iterator)["inputs"].size for _ in range(batches))
    return {
        "measure": f"batches, {kind}, sequences of {length}",
        "tokens": tokens,
        "mtok_per_cpu_second": tokens / (time.process_time() - cpu) / 1e6,
        "seconds_to_first_batch_of_step_1e7": resumed,
    }


def main(argv: Sequence[str] | None = None) -> pathlib.Path:
    """Print the table, write the results, and return their file."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="example: python benchmarks/data.py --megabytes=20",
    )
    parser.add_argument(
        "--megabytes", type=float, default=1000.0, help="text to prepare (default: 1000)"
    )
    parser.add_argument("--batches", type=int, default=300, help="batches to read")
    parser.add_argument("--results", type=pathlib.Path, default=common.RESULTS)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder, texts = pathlib.Path(name), list(passages(args.megabytes))
        file, text, shards = folder / "tokenizer.json", folder / "text.jsonl", folder / "tokens"
        file.write_text(tokenizer.train(texts[:2000], VOCABULARY))
        with text.open("w") as out:
            out.writelines(json.dumps({"text": passage}) + "\n" for passage in texts)
        rows = [library_alone(file, texts), prepare(file, text, shards, texts)]
        rows += [reading(kind, shards, args.batches) for kind in KINDS]
        rows += [
            reading(kind, shards, args.batches, 256)
            for kind in ("concat", "concat, document masks")
        ]
    return common.save(
        "data", rows, args.results, cores=len(os.sched_getaffinity(0)), vocabulary=VOCABULARY
    )


if __name__ == "__main__":
    main()
