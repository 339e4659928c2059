"""The formatter's opinion, where it is installed."""

import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("ruff")


def test_every_file_is_formatted():
    command = [sys.executable, "-m", "ruff", "format", "--check", "."]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run: python -m ruff format ."
