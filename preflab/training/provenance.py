"""What made a run: code, command, packages, hardware and data, in provenance.json."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from preflab.reports.run_files import read_starts
from utils import DataError, atomic_write, content_hash

NAME = "provenance.json"
ROOT = Path(__file__).resolve().parents[2]
# Of what a resumed run is warned about.
COMPARED = ("code", "python", "packages", "hardware")


def describe(data: dict, criterion: str | None = None) -> dict:
    """The provenance of a run that starts now.

    data: the content of data.json, whose hashes are kept. criterion: a file that says, before the
    run, what its result is compared with; its content is kept.
    """
    return {
        "code": describe_code(),
        "command": [sys.executable, *sys.argv],
        "folder": os.getcwd(),
        "python": platform.python_version(),
        "packages": _packages(),
        "hardware": _hardware(),
        "data": {
            split: [
                {key: of.get(key) for key in ("name", "content")} for of in described["datasets"]
            ]
            for split, described in data.items()
        },
        "criterion": _criterion(criterion),
    }


def describe_code() -> dict:
    """Commit of the repository, and whether tracked files differ from it; nulls without git."""
    commit = _git("rev-parse", "HEAD")
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(ROOT), "--no-optional-locks", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _packages() -> dict[str, str]:
    """Versions of the packages that requirements/base.txt names."""
    lines = (ROOT / "requirements" / "base.txt").read_text(encoding="utf-8").splitlines()
    names = [line.partition("==")[0] for line in lines if line and not line.startswith("#")]
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _hardware() -> dict:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"machine": platform.machine(), "cores": os.cpu_count(), "gpus": gpus}


def _criterion(path: str | None) -> dict | None:
    if path is None:
        return None
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    return {"file": path, "hash": content_hash(text), "content": text}


def write_provenance(run_dir: Path, now: dict) -> str:
    """Write provenance.json; returns what differs from the last start, "" where nothing does.

    The file holds `starts`, one entry for each start of the run.
    """
    path = run_dir / NAME
    try:
        starts = read_starts(run_dir)
        different = differences(starts[-1], now) if starts else []
    except DataError:
        aside = f"damaged-{NAME}"
        path.replace(run_dir / aside)
        starts, different = [], [f"{NAME} was damaged and is now {aside}"]
    with atomic_write(path) as f:
        json.dump({"starts": [*starts, now]}, f, indent=1)
    return ", ".join(different)


def differences(before: dict, now: dict) -> list[str]:
    """`name was X and is now Y` for code, versions and hardware that differ."""
    flat_before, flat_now = _flat(before), _flat(now)
    return [
        f"{name} was {flat_before.get(name)} and is now {flat_now.get(name)}"
        for name in dict.fromkeys([*flat_before, *flat_now])
        if flat_before.get(name) != flat_now.get(name)
    ]


def _flat(provenance: dict) -> dict:
    flat = {}
    for group in COMPARED:
        value = provenance.get(group)
        flat |= value if isinstance(value, dict) else {group: value}
    return flat
