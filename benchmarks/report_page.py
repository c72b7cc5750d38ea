"""Measure how large the report of a long run is and how fast Chromium opens it; take pictures of reports for docs/.

    python benchmarks/report_page.py                               # a synthetic log of 10,000 steps and 32 layers; size and seconds
    python benchmarks/report_page.py --runs runs/a runs/b --shots docs/report   # docs/report-desktop.png, -phone.png, -dark.png

The script needs Chromium (apt-get install chromium). The synthetic numbers only have the shape of a
run's.
"""

import argparse
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
from fp8jax.monitor.report import write_report

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LINEAR = ("qkv", "attention_out", "mlp_up", "mlp_down")
CASTS = (
    [f"{role}.{operand}" for role in LINEAR for operand in "xwg"]
    + [f"attention_scores.{x}" for x in ("q", "k", "ds")]
    + ["attention_values.v", "attention_values.do"]
)
TAPS = (
    "qkv_input",
    "qkv",
    "q",
    "k",
    "mlp_intermediate",
    "mlp_up",
    "mlp_post_act",
    "mlp_out",
    "activation",
)
SPREAD = [*TAPS, *(f"{role}.g" for role in LINEAR), "attention_values.do"]
STATISTICS = (
    dict.fromkeys(("kurtosis", "rms", "mean"), SPREAD)
    | dict.fromkeys(("max_logit", "entropy"), ["attention_scores"])
    | dict.fromkeys(
        ("amax", "scale", "overflow", "underflow", "zero", "negative_zero", "snr"), CASTS
    )
)
SHOTS = {
    "desktop": ("1440,2300",),
    "phone": ("500,2600",),
    "dark": ("1440,2300", "--blink-settings=preferredColorScheme=0"),
}


def made_up(
    workdir: pathlib.Path,
    *,
    steps: int = 10_000,
    layers: int = 32,
    every: int = 10,
    statistics_every: int = 50,
) -> pathlib.Path:
    """Make a directory with logs as a run of that size would leave them."""
    workdir.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    names = [
        f"{key}/{tensor}_layer{i:03d}"
        for key, tensors in STATISTICS.items()
        for tensor in tensors
        for i in range(layers)
    ]
    size = random.lognormal(0, 1, len(names))
    with (workdir / "metrics.jsonl").open("w") as file:
        for step in range(every, steps + 1, every):
            entry = {
                "step": step,
                "loss": 2.3 + 8 * step**-0.4 + random.normal(0, 0.02),
                "grad_norm": random.lognormal(-1, 0.3),
                "learning_rate": 1e-3 * min(1, step / 200),
                "tokens": step * 4096,
                "step_seconds": 0.004,
                "tokens_per_second": random.normal(1e6, 1e4),
            }
            if step % statistics_every == 0:
                values = (
                    size * (step / steps) ** 0.3 * random.lognormal(0, 0.1, len(names))
                ).astype(np.float32)
                entry |= dict(zip(names, map(float, values), strict=True)) | {
                    "held_out/bits_per_byte": 0.8 + 2 * step**-0.4
                }
            file.write(json.dumps(entry) + "\n")
    return workdir


def browser() -> str | None:
    """Return the path of a Chromium, if there is one."""
    return next((path for name in BROWSERS if (path := shutil.which(name))), None)


def chromium(page: pathlib.Path, *options: str) -> str:
    """Run headless Chromium on a page, and return what it prints."""
    with tempfile.TemporaryDirectory() as profile:
        fixed = (
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--user-data-dir={profile}",
        )
        command = [browser() or BROWSERS[0], *fixed, *options, page.resolve().as_uri()]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=180, check=True
        ).stdout


def ready_seconds(page: pathlib.Path) -> float:
    """Return the seconds from the start of loading until everything is drawn."""
    return (
        float(
            re.search(
                r'data-ready="(\d+)"', chromium(page, "--dump-dom", "--window-size=1440,900")
            ).group(1)
        )
        / 1e3
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Print figures, or take pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", nargs="*", type=pathlib.Path, default=[])
    parser.add_argument("--shots", type=pathlib.Path, help="prefix of pictures")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        runs = args.runs or [made_up(directory / "made-up")]
        start = time.perf_counter()
        page = write_report(runs, directory / "report.html")
        print(f"written in {time.perf_counter() - start:.1f} s, {page.stat().st_size / 1e6:.2f} MB")
        print(f"opened in {min(ready_seconds(page) for _ in range(3)):.2f} s, the best of three")
        for name, (size, *more) in SHOTS.items() if args.shots else ():
            chromium(
                page,
                f"--screenshot={args.shots}-{name}.png",
                f"--window-size={size}",
                "--virtual-time-budget=3000",
                *more,
            )


if __name__ == "__main__":
    main()
