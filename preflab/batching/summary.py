"""Counts and histograms of a tokenised dataset, for the console and the report."""

from pathlib import Path

import numpy as np

from preflab.batching.token_store import TokenStore
from utils import ConfigError


def describe_data(stores: list[TokenStore]) -> dict:
    """Counts of a split's datasets, and histograms of its lengths (tokens) and score gaps (chosen
    minus rejected), for data.json."""
    histograms = {
        "prompt_tokens": histogram(_lengths([store.prompts for store in stores]), whole=True),
        "response_tokens": histogram(_lengths([store.responses for store in stores]), whole=True),
    }
    gaps = np.concatenate([_score_gaps(store) for store in stores])
    gaps = gaps[np.isfinite(gaps)]
    if len(gaps):
        histograms["score_gap"] = histogram(gaps, whole=False)
    return {"datasets": [store.counts for store in stores], "histograms": histograms}


def check_same_data(saved: dict, stores: dict[str, list[TokenStore]], run_dir: Path) -> None:
    """Refuse to continue a run on other data. saved: the content of its data.json.

    Data sets without a "content", which are of an earlier version, are accepted.
    """
    for split, of_split in stores.items():
        earlier = saved.get(split, {}).get("datasets", [])
        for before, store in zip(earlier, of_split, strict=False):
            now = store.counts
            if before.get("content", now["content"]) == now["content"]:
                continue
            raise ConfigError(
                f"datasets=[{store.name}] ({split}) is not what {run_dir} began with:"
                f" {_size(before)} then, {_size(now)} now, with other tokens, scores or pairs;"
                " restore the data, or take another local_run_dir"
            )


def _size(counts: dict) -> str:
    keys = ("prompts", "responses", "pairs")
    return ", ".join(f"{counts[key]:,} {key}" for key in keys if key in counts)


def _lengths(spans: list[np.ndarray]) -> np.ndarray:
    """Lengths of spans, (n, 2) each: begin and end."""
    return np.concatenate([part[:, 1] - part[:, 0] for part in spans])


def _score_gaps(store: TokenStore) -> np.ndarray:
    scores, pairs = np.asarray(store.scores), np.asarray(store.pairs)
    return scores[pairs[:, 0]] - scores[pairs[:, 1]]


def histogram(values: np.ndarray, *, whole: bool, bins: int = 30) -> dict:
    """{edges (bins + 1,), counts (bins,)} of values, (n,) with n > 0.

    whole: the values are whole numbers, and get at most `bins` bins of equal whole width.
    """
    low, high = float(values.min()), float(values.max())
    if whole:  # edges lie between whole numbers, so that each bin holds equally many of them
        width = max(1, int(np.ceil((high - low + 1) / bins)))
        edges = np.arange(low - 0.5, high + width, width)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts, edges = np.histogram(values, bins=edges)
    return {"edges": [round(float(e), 6) for e in edges], "counts": counts.tolist()}


def counts_line(counts: dict) -> str:
    """One line for the console: what was read from a dataset split, truncated and skipped."""
    keys = [key for key in ("rows", "prompts", "responses", "pairs") if key in counts]
    read = ", ".join(f"{counts[key]:,} {key}" for key in keys)
    if counts.get("empty_responses"):
        read += f" ({counts['empty_responses']:,} responses are empty: EOS alone)"
    if counts.get("joined_prompts"):
        read += (
            f" ({counts['joined_prompts']:,} prompts end before a token that joins the generation"
            " prompt and an answer)"
        )
    truncated = (
        f"{counts['truncated_prompts']:,} prompts and {counts['truncated_responses']:,} responses"
        " truncated"
    )
    skipped = [f"skipped {n:,}: {reason}" for reason, n in counts.get("skipped", {}).items() if n]
    parts = [read, truncated, *skipped]
    if counts.get("note"):
        parts.append(counts["note"])
    return f"{counts['name']} {counts['split']}: " + "; ".join(parts)
