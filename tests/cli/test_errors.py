"""What mistakes on command lines are told, called in this process."""

import argparse
import pathlib

import pytest

from fp8jax.cli import errors


@pytest.mark.parametrize(
    "text", ["gs://b/x", "s3:/x", "gs:", "runs/gs:/x", "C:\\runs\\x", "C:/runs/x"]
)
def test_what_is_no_path_here_is_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is no file system|is a path of Windows"):
        errors.local_path(text)


@pytest.mark.parametrize("text", ["runs/a:b", "/mnt/x", "a", "runs/2026-11-30T12:00"])
def test_what_is_a_path_is_one(text):
    assert errors.local_path(text) == pathlib.Path(text)
