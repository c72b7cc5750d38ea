"""`python -m fp8jax report`: a page that shows one run, or several side by side."""

import argparse
import os
import pathlib
from collections.abc import Sequence

from fp8jax.cli.errors import complain
from fp8jax.monitor.report import write_report

STOPPED = 4


def main(argv: Sequence[str]) -> int:
    """Runs the command; returns the exit code."""
    options = _parser().parse_args(argv)
    if options.background:
        os.nice(15)
    try:
        out = write_report(options.workdirs, options.out)
    except ValueError as error:  # MetricsError is one
        return complain(str(error))
    except OSError as error:
        return complain(f"--out: {error}")
    except KeyboardInterrupt:
        return STOPPED
    print(f"{out}  {out.stat().st_size / 1e6:.1f} MB; open it in a browser")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fp8jax report", description="Writes a self-contained page: curves, layer by layer statistics, events.",
        epilog="example: python -m fp8jax report runs/fp8_base-tiny runs/llama3-tiny --out report.html")
    parser.add_argument("workdirs", nargs="+", type=pathlib.Path, metavar="WORKDIR", help="directory of a run; several are shown side by side")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("report.html"), help="the page (default: report.html)")
    parser.add_argument("--background", action="store_true", help="with low priority")
    return parser
