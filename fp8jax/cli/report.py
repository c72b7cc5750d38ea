"""Run `python -m fp8jax report`: a page that shows runs side by side, or the early warnings of a
log.
"""

import argparse
import os
import pathlib
from collections.abc import Sequence

from fp8jax.cli import checks
from fp8jax.cli.errors import Parser, local_path, run_command
from fp8jax.config import ConfigError
from fp8jax.monitor.report import write_report


def main(argv: Sequence[str]) -> int:
    """Run the command, and return the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    if bool(options.workdirs) == bool(options.warnings):
        parser.error("give WORKDIRs for a page, or --warnings FILE")
    if options.background:
        os.nice(15)
    return run_command(lambda: _warnings(options) if options.warnings else _page(options))


def _warnings(options: argparse.Namespace) -> None:
    from fp8jax.cli import early_warnings  # needs JAX, which a page's refresh should not start

    for line in early_warnings.lines(options.warnings):
        print(line)


def _page(options: argparse.Namespace) -> None:
    checks.new_file("--out", options.out)
    try:
        out = write_report(
            options.workdirs,
            options.out,
            remember=options.background,
            note=lambda line: print(f"note     {line}"),
        )
    except OSError as error:
        raise ConfigError(f"--out: {error}") from None
    print(f"{out}  {out.stat().st_size / 1e6:.1f} MB; open it in a browser")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m fp8jax report",
        description="Writes a self-contained page: curves, layer by layer statistics, events.",
        epilog="example: python -m fp8jax report runs/fp8_base-tiny runs/llama3-tiny --out "
        "report.html",
    )
    parser.add_argument(
        "workdirs",
        nargs="*",
        type=local_path,
        metavar="WORKDIR",
        help="directory of a run; several are shown side by side",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        default=pathlib.Path("report.html"),
        help="the page (default: report.html)",
    )
    parser.add_argument(
        "--warnings",
        type=local_path,
        metavar="FILE",
        help="instead: the early warnings of a metrics.jsonl, or of the one in a directory",
    )
    parser.add_argument(
        "--background",
        action="store_true",
        help="with low priority, reading only what is new in a log",
    )
    return parser
