"""Samples in the format that AlpacaEval reads: `alpaca_eval --model_outputs FILE
--reference_outputs FILE`."""

import json
import re
from collections import defaultdict
from pathlib import Path

from preflab.batching.chat import prompt_of_columns, transcript
from preflab.reports.evaluation_tables import short_names
from utils import DataError, atomic_write

OTHERS = ("reference", "chosen")


def export_samples(rows: list[dict], folder: Path) -> list[Path]:
    """Write the samples of each checkpoint and temperature, and the reference's and chosen
    responses to the same prompts, as lists of {instruction, output, generator}; returns the files.

    AlpacaEval compares one output for each instruction: of several samples of a prompt the first is
    taken. rows: of samples.jsonl.
    """
    groups = defaultdict(list)
    for row in rows:
        if row.get("sample", 0) == 0:
            groups[row.get("checkpoint"), row.get("temperature")].append(row)
    if not groups:
        raise DataError("--alpaca-eval: there is no first sample of a prompt")
    names = short_names([checkpoint or "policy" for checkpoint, _ in groups])
    written = {}
    for name, ((_, temperature), members) in zip(names, groups.items(), strict=True):
        at = f"-T{temperature:g}" if len({t for _, t in groups}) > 1 else ""
        columns = {"policy": f"{name}{at}"} | {other: f"{other}{at}" for other in OTHERS}
        for column, generator in columns.items():
            outputs = [
                {
                    "instruction": transcript(prompt_of_columns(row)),
                    "output": row[column],
                    "generator": generator,
                }
                for row in members
                if row.get(column) is not None
            ]
            if outputs:
                written.setdefault(generator, outputs)
    folder.mkdir(parents=True, exist_ok=True)
    return [_write(folder, generator, outputs) for generator, outputs in written.items()]


def _write(folder: Path, generator: str, outputs: list[dict]) -> Path:
    path = folder / f"{re.sub(r'[^A-Za-z0-9.=_-]+', '-', generator)}.json"
    with atomic_write(path) as f:
        json.dump(outputs, f, ensure_ascii=False, indent=1)
    return path
