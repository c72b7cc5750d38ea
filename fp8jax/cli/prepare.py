"""Run `python -m fp8jax prepare`, raw text to token shards, and `prepare inspect DIR`, what such a
directory holds.
"""

import argparse
import functools
import itertools
import os
import sys
import time
from collections.abc import Sequence

from fp8jax.cli import checks
from fp8jax.cli.errors import Parser, complain, local_path, run_command
from fp8jax.data import inspection, shards
from fp8jax.data import prepare as preparation

_SAMPLES, _SOURCES = 3, 10


def main(argv: Sequence[str]) -> int:
    """Run the command, and return the exit code."""
    if argv[:1] == ["inspect"]:
        return run_command(lambda: _inspect(argv[1:]))
    return run_command(lambda: _prepare(argv), stopped="\nstopped; run again to continue")


def _prepare(argv: Sequence[str]) -> int:
    options = _parser().parse_args(argv)
    checks.directory("--out", options.out)
    began = time.monotonic()
    tokenizer = options.tokenizer
    if options.train_tokenizer is not None:
        tokenizer = preparation.train_tokenizer(
            options.input, options.out, options.train_tokenizer, options.text_field
        )
        print(f"trained  {tokenizer}", flush=True)
    splits = preparation.prepare(
        options.input,
        options.out,
        tokenizer=tokenizer,
        text_field=options.text_field,
        workers=options.workers,
        validation_fraction=options.validation_fraction,
        best_fit=options.best_fit,
        tell=_Progress(),
        allow_normalisation=options.allow_normalisation,
        skip_bad_rows=options.skip_bad_rows,
        note=functools.partial(print, flush=True),
    )
    for split, found in splits.items():
        print(
            f"{split:<8} {found['documents']:,} documents, {found['tokens']:,} tokens, "
            f"{found['text_bytes']:,} bytes of text"
        )
    for length, packed in shards.read_index(options.out).get("best_fit", {}).items():
        print(
            f"best fit for sequences of {length}: {packed['windows']:,} windows, "
            f"{packed['padding']:.3%} padding"
        )
    print(
        f"written  {options.out} in {_duration(time.monotonic() - began)}; to train on it: "
        f"--config.data.source={options.out}"
    )
    return 0


class _Progress:
    """The progress: a line that is rewritten on a terminal, a line every ten seconds elsewhere."""

    def __init__(self):
        self._live, self._began, self._shown = sys.stderr.isatty(), time.monotonic(), 0.0
        self._first: int | None = None
        self._finished = False

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if self._first is None:
            self._first = done  # bytes that an earlier, interrupted run did
        if self._finished or (now - self._shown < (0.2 if self._live else 10.0) and done < total):
            return
        self._finished = done >= total
        self._shown, seconds, new = now, now - self._began, done - self._first
        speed = new / seconds if seconds else 0.0
        left = _duration((total - done) / speed) if speed else "?"
        text = (
            f"prepare  {done / max(total, 1):6.1%} of {total / 1e6:,.1f} MB  "
            f"{speed / 1e6:.1f} MB/s  ETA {left}"
        )
        end = "\n" if self._finished or not self._live else ""
        print(f"\r{text}\x1b[K" if self._live else text, end=end, file=sys.stderr, flush=True)


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return (
        f"{minutes // 60}h{minutes % 60:02d}m"
        if minutes >= 60
        else f"{minutes}m{seconds:02d}s"
        if minutes
        else f"{seconds}s"
    )


def _inspect(argv: Sequence[str]) -> int:
    options = _inspect_parser().parse_args(argv)
    try:
        return _show(options)
    except (KeyError, TypeError, AttributeError):
        return complain(f"{options.directory}/{shards.INDEX}: is damaged; prepare it again")


def _show(options: argparse.Namespace) -> int:
    directory = options.directory
    index, tokenizer = shards.read_index(directory), inspection.tokenizer_of(directory)
    if options.verify and (fault := shards.verify(directory)):
        return complain(fault)
    print(
        f"{directory}: {index['dtype']} ids of a vocabulary of {index['vocab_size']:,}, "
        f"tokenizer {index['tokenizer'][:19]}"
        + (", checksums as written" if options.verify else "")
    )
    for split, found in index["splits"].items():
        print(
            f"\n{split}: {found['documents']:,} documents, {found['tokens']:,} tokens, "
            f"{found['text_bytes']:,} bytes of text, "
            f"{len(found['shards'])} shards"
        )
        if found["documents"]:
            print(
                f"  {found['tokens'] / found['documents']:.1f} tokens a document, "
                f"{found['text_bytes'] / max(1, found['tokens'] - found['documents']):.2f} "
                f"bytes a token"
            )
            _print_histogram(
                inspection.length_histogram(shards.open_ends(directory, tokenizer, split))
            )
    for length, packed in index.get("best_fit", {}).items():
        print(
            f"\nbest fit for sequences of {length}: {packed['windows']:,} windows, "
            f"{packed['padding']:.3%} padding"
        )
    files = index["source_files"] if "source_files" in index else len(index.get("sources", ()))
    print(f"\nsources: {files:,} files")
    for source in itertools.islice(shards.read_sources(directory), _SOURCES):
        print(
            f"  {_printable(source['file'])}: {source['documents']:,} documents, "
            f"{source['bytes']:,} bytes"
        )
    for path, number, text in inspection.sample_documents(directory, tokenizer, "train", _SAMPLES):
        print(f"\n{path}, document {number}:\n  {_printable(text)}")
    return 0


def _print_histogram(bins: list[inspection.Bin]) -> None:
    most = max(one.documents for one in bins)
    for one in bins:
        print(
            f"  {one.low:>10,} to {one.high:>10,} tokens {one.documents:>12,}  "
            f"{'#' * -(-40 * one.documents // most)}"
        )


def _printable(text: str) -> str:
    """Return the text on one line, without characters that would act on a terminal."""
    return "".join(c if c.isprintable() else "\\n" if c == "\n" else "\ufffd" for c in text)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fp8jax prepare",
        description="Tokenises text into shards to train on. Run again after an interruption, "
        "it continues. `prepare inspect DIR` "
        "shows what was made.",
        epilog="example: python -m fp8jax prepare --input 'crawl/*.jsonl.zst' --tokenizer "
        "tokenizer.json --out tokens\n"
        "         python train.py --config=configs/fp8_base.py:tiny --config.data.source=tokens "
        "--workdir=runs/own",
    )
    _add_input_and_output(parser)
    _add_options(parser)
    return parser


def _add_input_and_output(parser: Parser) -> None:
    parser.add_argument(
        "--input",
        nargs="+",
        action="extend",
        required=True,
        metavar="PATH",
        help="files, directories or quoted patterns: .jsonl, .txt, .md (also .gz, .bz2, .xz, "
        ".zst), .parquet, .arrow, "
        ".array_record (token ids); or hf:NAME[:CONFIG], a dataset of the Hugging Face hub",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        metavar="DIR",
        help="where the shards go; an empty directory",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--tokenizer",
        default="byte",
        metavar="NAME",
        help="byte (default), tekken, or the path of a tokenizer.json",
    )
    which.add_argument(
        "--train_tokenizer",
        type=int,
        metavar="VOCAB",
        help="train a byte-level BPE of so many ids on the input",
    )


def _add_options(parser: Parser) -> None:
    parser.add_argument(
        "--text_field",
        default="text",
        help="field of an object, or column of a table, with the text or with token ids; a.b is "
        "b within a (default: text)",
    )
    parser.add_argument(
        "--validation_fraction",
        type=float,
        default=0.01,
        help="of the documents, held out (default: 0.01)",
    )
    parser.add_argument(
        "--best_fit",
        type=int,
        nargs="+",
        default=(),
        metavar="LENGTH",
        help="also pack whole documents into sequences of so many tokens, for "
        "--config.data.packing=best_fit",
    )
    parser.add_argument(
        "--allow_normalisation",
        action="store_true",
        help="accept a tokenizer.json that brings text into a Unicode form (NFC) first; bits "
        "per byte is then of that text",
    )
    parser.add_argument(
        "--skip_bad_rows",
        action="store_true",
        help="skip lines and rows that hold no text, and count them",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: one a core)",
    )


def _inspect_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fp8jax prepare inspect",
        description="Counts, lengths and sample documents of a directory of token shards.",
        epilog="example: python -m fp8jax prepare inspect tokens",
    )
    parser.add_argument("directory", type=local_path, help="made by prepare")
    parser.add_argument(
        "--verify", action="store_true", help="read everything and compare it with the checksums"
    )
    return parser
