"""Scripts as functions, for tests."""

import sys

from preflab.readers.registry import open_dataset


def call(monkeypatch, module, *arguments) -> int:
    """Run the command of a script in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    try:
        module.main()
    except SystemExit as leaving:
        return leaving.code or 0
    return 0


def records(name, data_dir="."):
    return [
        record
        for split in ("train", "test")
        for record in open_dataset(str(name), split, data_dir=str(data_dir)).records()
    ]


def without(row: dict, key: str) -> dict:
    return {name: value for name, value in row.items() if name != key}
