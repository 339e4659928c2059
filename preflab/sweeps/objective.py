"""What a run returns to a search: numbers of its summary, by the key `objective`.

They are those of the dev prompts, so that the test prompts do not choose among the runs.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from preflab.reports.selection import DEV, number_on


def objective_of(names: str | Sequence[str], summary: dict) -> float | list[float] | None:
    """The number of summary.json named `names`, or several, on the dev prompts if it has them; None
    where one is missing or is not a finite number."""
    several = not isinstance(names, str)
    values = [number_of(name, summary, DEV) for name in (names if several else [names])]
    if any(not isinstance(v, (int, float)) or not math.isfinite(v) for v in values):
        return None
    return values if several else values[0]


def number_of(name: str, summary: dict, side: str) -> Any:
    """A number on dev or test prompts; on all where the run has too few, or is no evaluation."""
    return summary.get(number_on(side, name), summary.get(name))


def objective_of_run(folder: Path) -> float | list[float] | None:
    """That of a finished run; None for a folder without a summary, as function=plan leaves none."""
    summary = folder / "summary.json"
    if not summary.is_file():
        return None
    config = OmegaConf.load(folder / "config.yaml")
    return objective_of(config.objective, json.loads(summary.read_text(encoding="utf-8")))
