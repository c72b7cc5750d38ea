"""Write one page that shows runs: self-contained HTML, opened from disk or sent by mail, without
network.

    write_report(["runs/fp8", "runs/bf16"], "report.html")

report_data.py reads and reduces a run's data; the page itself, plain JavaScript of our own that
draws on canvases, is in report_page/. While a run trains, `Refresher` lets another process write
its page from time to time.
"""

import contextlib
import datetime
import json
import logging
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import fp8jax
from fp8jax.monitor import log_series, report_data

PAGE = pathlib.Path(__file__).parent / "report_page"
# In this order they form one script: top-level code uses what stands above it.
SCRIPTS = ("axes.js", "charts.js", "cards.js", "page.js")
CELLS = 1_350_000  # cells of all maps of all runs, 2.7 bytes each in the page
SHARE = 20  # a refresh waits at least this multiple of the time that the last one took


def write_report(
    workdirs: Sequence[str | pathlib.Path],
    out: str | pathlib.Path,
    *,
    remember: bool = False,
    note: Callable[[str], object] = lambda line: None,
) -> pathlib.Path:
    """Write the page atomically and return its path; it shows what there is, and says what is
    missing.

    Args:
        workdirs: directories of runs.
        out: path of the page.
        remember: as in `report_data.read_run`.
        note: receives a line on each thing that is missing.

    Raises:
        MetricsError: no directory has a log.
    """
    out = pathlib.Path(out)
    runs = _read(workdirs, remember, note)
    names = [run["name"] for run in runs]
    for run in runs:
        if names.count(run["name"]) > 1:
            run["name"] = run["workdir"]
    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    data = {"runs": runs, "made": made, "version": fp8jax.__version__, "points": log_series.POINTS}
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_text(_page(data), encoding="utf-8")
    temporary.replace(out)
    return out


def _read(
    workdirs: Sequence[str | pathlib.Path], remember: bool, note: Callable[[str], object]
) -> list[dict[str, Any]]:
    runs, missing = [], []
    for workdir in workdirs:
        try:
            runs.append(
                report_data.read_run(workdir, cells=CELLS // len(workdirs), remember=remember)
            )
        except report_data.MetricsError as error:
            missing.append(error)
            continue
        for problem in runs[-1]["problems"]:
            note(f"{workdir}: {problem}")
    if not runs:
        raise missing[0]
    for error in missing:
        note(str(error))
    return runs


def _page(data: dict) -> str:
    def source(name: str) -> str:
        return (PAGE / name).read_text(encoding="utf-8")

    # In a script element, '<' could end it.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    page = (
        source("page.html")
        .replace("/*STYLE*/", source("style.css"))
        .replace("/*SCRIPT*/", "".join(source(name) for name in SCRIPTS))
    )
    before, after = page.split("/*DATA*/null")
    return before + text + after


class Refresher:
    """A writer that keeps WORKDIR/report.html up to date while a run trains, in another process of
    low priority.

    Args:
        workdir: directory of the run.
        minutes: least time between refreshes, longer if writing the page takes long; 0 never
            refreshes.
    """

    def __init__(self, workdir: str | pathlib.Path, minutes: float):
        self._workdir, self._pause, self._minutes = pathlib.Path(workdir).resolve(), 0.0, minutes
        self._process: subprocess.Popen | None = None
        self._due = self._started = time.monotonic()

    def write(self, step: int, values: Mapping[str, float | int]) -> None:
        """Start a refresh if one is due, without waiting for it; called after each logged step."""
        now = time.monotonic()
        if self._process is not None and self._process.poll() is not None:
            self._pause, self._process = SHARE * (now - self._started), None
            self._due = self._started + max(60 * self._minutes, self._pause)
        if not self._minutes or self._process is not None or now < self._due:
            return
        self._started = now
        command = [
            "-m",
            "fp8jax",
            "report",
            str(self._workdir),
            "--out",
            str(self._workdir / "report.html"),
            "--background",
        ]
        self._due = now + 60 * self._minutes  # if it does not start
        with contextlib.suppress(OSError):
            self._process = subprocess.Popen(
                [sys.executable, *command],
                cwd=pathlib.Path(fp8jax.__file__).parent.parent,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def close(self) -> None:
        """Write the page a last time; a page that cannot be written is logged and not raised."""
        try:
            if self._process is not None:
                self._process.terminate()
                self._process.wait()
            if self._minutes and (self._workdir / "metrics.jsonl").exists():
                write_report([self._workdir], self._workdir / "report.html", remember=True)
        except Exception as error:  # a run must not fail because of its report
            logging.getLogger(__name__).warning(
                "report.html was not written: %s: %s", type(error).__name__, error
            )
