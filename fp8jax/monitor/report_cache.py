"""Keep what a report gathered of a run's log in WORKDIR/report.npz, so that the next one reads only
what was logged since.

    load(workdir, gathered)         # does nothing if there is no such file, or the log is another one
    gathered.read(workdir / "metrics.jsonl")
    save(workdir, gathered)

Only the report that a run keeps up to date writes this file. It may be deleted at any time.
"""

import hashlib
import json
import os
import pathlib
import zipfile
from typing import Any

import numpy as np

NAME = "report.npz"
VERSION = 2
_BEFORE = 1 << 16  # bytes of the log before the place to continue at, by which it is recognised


def load(workdir: pathlib.Path, gathered: Any) -> None:
    """Restore a new `gathered.Gathered`, if the file was kept for this log."""
    try:
        with np.load(workdir / NAME, allow_pickle=False) as kept:
            about = json.loads(str(kept["about"]))
            if about["version"] != VERSION or about["log"] != _known_by(workdir, about["end"]):
                return
            for number, (kind, *names) in enumerate(about["parts"]):
                prefix = f"{number} "
                arrays = {name.removeprefix(prefix): kept[name] for name in about["names"][number]}
                part = gathered.line(*names) if kind == "line" else gathered.table(*names)
                part.restore(arrays)
            gathered.restored(about["end"], about["problems"])
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile):
        gathered.__init__()


def save(workdir: pathlib.Path, gathered: Any) -> None:
    """Write the file atomically; a directory that cannot be written to is not an error."""
    lines = [(("line", name), line) for name, line in gathered.series.items()]
    tables = [
        (("table", statistic, tensor), table)
        for statistic, found in gathered.maps.items()
        for tensor, table in found.items()
    ]
    arrays: dict[str, np.ndarray] = {}
    names: list[list[str]] = []
    for number, (_, part) in enumerate(lines + tables):
        found = {f"{number} {name}": values for name, values in part.arrays().items()}
        names.append(list(found))
        arrays |= found
    about = {
        "version": VERSION,
        "end": gathered.end,
        "problems": sorted(gathered.problems),
        "log": _known_by(workdir, gathered.end),
        "parts": [key for key, _ in lines + tables],
        "names": names,
    }
    temporary = workdir / f"{NAME}.tmp"
    try:
        with temporary.open("wb") as file:
            values: dict[str, Any] = {"about": np.asarray(json.dumps(about)), **arrays}
            np.savez(file, **values)
        os.replace(temporary, workdir / NAME)
    except OSError:
        temporary.unlink(missing_ok=True)


def _known_by(workdir: pathlib.Path, end: int) -> str:
    """Return a digest of the log before a byte."""
    with (workdir / "metrics.jsonl").open("rb") as file:
        file.seek(max(0, end - _BEFORE))
        return hashlib.blake2b(file.read(min(end, _BEFORE)), digest_size=16).hexdigest()
