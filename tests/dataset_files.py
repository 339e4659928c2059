"""Small data files for the tests of readers, and records read from them."""

import csv
import json

import pyarrow
import pyarrow.parquet
import pytest
from conftest import write_jsonl

from preflab.readers.registry import open_dataset

PAIRS = [{"prompt": f"p{i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(40)]


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub-cache")


def read(name, data_dir, split="train", **options):
    source = open_dataset(str(name), split, data_dir=data_dir, **options)
    records = list(source.records())
    return records, source


def named_pairs(record):
    """Pairs as texts, which is what matters."""
    return [(record.responses[a], record.responses[b]) for a, b in record.pairs]


def scored_rows(prompt, **texts):
    return [{"prompt": prompt, "text": text, "reward": reward} for text, reward in texts.items()]


def both(path, tmp_path, **options):
    """All records of a file, of whichever split."""
    return [r for split in ("train", "test") for r in read(path, tmp_path, split, **options)[0]]


def as_file(path, data):
    if path.suffix == ".json":
        path.write_text(json.dumps(data))
    elif path.suffix == ".jsonl":
        write_jsonl(path, data)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, list(data[0]))
            writer.writeheader()
            writer.writerows(data)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), path)
    return path


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
