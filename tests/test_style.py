"""What ruff says of the layout and of the code, where it is installed."""

import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("ruff", reason="ruff is not installed: pip install -r requirements/tests.txt")


@pytest.mark.parametrize("command, fix", [("format --check", "format"), ("check", "check --fix")])
def test_ruff_has_nothing_to_say(command, fix):
    arguments = [sys.executable, "-m", "ruff", *command.split(), "."]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}{done.stderr}run: python -m ruff {fix} ."
