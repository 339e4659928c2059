"""Counts and histograms of a tokenised dataset, for the console and the report."""

import numpy as np

from preflab.batching.token_store import TokenStore


def describe_data(stores: list[TokenStore]) -> dict:
    """Counts of a split's datasets and histograms of its lengths (tokens) and score gaps, for
    data.json."""
    lengths = {
        "prompt_tokens": np.concatenate([np.diff(store.prompts, axis=1)[:, 0] for store in stores]),
        "response_tokens": np.concatenate(
            [np.diff(store.responses, axis=1)[:, 0] for store in stores]
        ),
    }
    gaps = [
        np.asarray(store.scores)[store.pairs[:, 0]] - np.asarray(store.scores)[store.pairs[:, 1]]
        for store in stores
    ]
    gaps = np.concatenate(gaps)
    gaps = gaps[np.isfinite(gaps)]
    histograms = {name: histogram(values, whole=True) for name, values in lengths.items()}
    if len(gaps):
        histograms["score_gap"] = histogram(gaps, whole=False)
    return {"datasets": [store.counts for store in stores], "histograms": histograms}


def histogram(values: np.ndarray, *, whole: bool, bins: int = 30) -> dict:
    """{edges (bins + 1,), counts (bins,)} of values, (n,) with n > 0; `whole` numbers get bins of
    equal whole width, at most `bins` of them."""
    low, high = float(values.min()), float(values.max())
    if whole:  # edges between whole numbers, so that no bin is wider by chance
        width = max(1, int(np.ceil((high - low + 1) / bins)))
        edges = np.arange(low - 0.5, high + width, width)
    else:
        edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    counts, edges = np.histogram(values, bins=edges)
    return {"edges": [round(float(e), 6) for e in edges], "counts": counts.tolist()}


def counts_line(counts: dict) -> str:
    """One line for the console: what was read from a dataset split, cut and skipped."""
    told = ", ".join(
        f"{counts[key]:,} {key}"
        for key in ("rows", "prompts", "responses", "pairs")
        if key in counts
    )
    cut = (
        f"{counts['truncated_prompts']:,} prompts and {counts['truncated_responses']:,} responses"
        " truncated"
    )
    if counts.get("empty_responses"):
        told += f" ({counts['empty_responses']:,} responses are empty: EOS alone)"
    skipped = "; ".join(
        f"skipped {n:,}: {why}" for why, n in counts.get("skipped", {}).items() if n
    )
    return f"{counts['name']} {counts['split']}: " + "; ".join(
        filter(None, [told, cut, skipped, counts.get("note")])
    )
