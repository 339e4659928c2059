"""What a run returns to a search: numbers of its summary, by the key `objective`."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf


def objective_of(names: str | Sequence[str], summary: dict) -> float | list[float] | None:
    """The number of summary.json named `names`, or several; None where one is missing or is not a
    finite number."""
    several = not isinstance(names, str)
    values = [summary.get(name) for name in (names if several else [names])]
    if any(not isinstance(v, (int, float)) or not math.isfinite(v) for v in values):
        return None
    return values if several else values[0]


def objective_of_run(folder: Path) -> float | list[float] | None:
    """That of a finished run; None for a folder without a summary, as function=plan leaves none."""
    summary = folder / "summary.json"
    if not summary.is_file():
        return None
    config = OmegaConf.load(folder / "config.yaml")
    return objective_of(config.objective, json.loads(summary.read_text(encoding="utf-8")))
