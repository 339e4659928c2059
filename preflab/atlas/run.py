"""function=atlas: measures the losses at each checkpoint, and writes atlas.jsonl and atlas.csv."""

import csv
import gc
import json
import logging
import math
from pathlib import Path

import numpy as np
import torch

from preflab.atlas import geometry
from preflab.atlas.checks import sketch_of
from preflab.atlas.entries import entries_of
from preflab.atlas.gradients import Gradients, trained_parameters
from preflab.atlas.measure import Measured, measure, pairs_of
from preflab.batching.examples import PreferenceData
from preflab.batching.loader import epoch_order
from preflab.batching.packing import Layout
from preflab.distributed.process_group import World
from preflab.evaluation.worklist import Checkpoint, describe, expand_archives
from preflab.modeling.loading import build_policy, build_reference
from preflab.modeling.logprobs import Scorer
from preflab.objective.registry import BoundLoss
from preflab.reports.atlas import ROWS
from preflab.reports.run_files import read_jsonl
from preflab.settings.schema import Settings
from preflab.settings.values import changed, dataset_names
from utils import DataError, append_rows, atomic_write, seed_everything

logger = logging.getLogger(__name__)

TABLE = "atlas.csv"
COLUMNS = (
    "loss",
    "cosine",
    "chosen",
    "rejected",
    "ratio",
    "share",
    "length",
    "cluster",
    "x",
    "y",
)


def run_atlas(
    settings: Settings,
    loss: BoundLoss,
    tokenizer,
    data: PreferenceData,
    run_dir: Path,
    world: World,
) -> dict:
    """Write a row of atlas.jsonl for every checkpoint of `model.archive` that has none yet, then
    atlas.csv and summary.json; returns the summary.

    Raises DataError for data with fewer pairs than `atlas.pairs`, and Stopped between two passes of
    the model if a signal arrived; the same command continues after the last row.
    """
    seed_everything(settings.seed)
    pairs = pairs_of(data, _first_pairs(settings, data))
    checkpoints = [describe(path) for path in expand_archives(settings.model.archive)]
    done = {(row["checkpoint"], row["stamp"]) for row in read_jsonl(run_dir / ROWS)}
    entries, left_out = entries_of(settings, loss)
    reference = None
    for checkpoint in checkpoints:
        if (checkpoint.path, checkpoint.stamp) in done:
            continue
        policy, reference = _models(settings, checkpoint, reference)
        layout = Layout("padded", pad_id=tokenizer.pad_token_id)
        parameters = trained_parameters(policy.model)
        gradients = Gradients(parameters, sketch_of(settings, parameters), settings.seed)
        measured = measure(
            policy, reference, pairs, entries, layout, gradients, stop=world.stop_if_asked
        )
        row = row_of(measured, checkpoint, gradients.sketch, settings.atlas.same, left_out)
        append_rows(run_dir / ROWS, [row])
        reference = None if reference.adapter_off else reference  # it is the policy's own model
        del policy, gradients, parameters, measured
        gc.collect()  # two policies need not be in memory at once
    rows = read_jsonl(run_dir / ROWS)
    _write_table(run_dir / TABLE, rows)
    summary = {
        "finished": True,
        "function": settings.function,
        "loss": loss.name,
        "checkpoints": len(rows),
        "losses": len(rows[-1]["updates"]),
        "pairs": len(pairs.examples),
        "seed": settings.seed,
    }
    with atomic_write(run_dir / "summary.json") as f:
        json.dump(summary, f, indent=1)
    return summary


def _first_pairs(settings: Settings, data: PreferenceData) -> np.ndarray:
    """The pairs that training with this seed begins with."""
    n = settings.atlas.pairs
    if len(data) < n:
        names = ", ".join(dataset_names(settings))
        raise DataError(f"atlas.pairs={n}: datasets=[{names}] hold {len(data)}; ask for fewer")
    order = settings.seed, 0, settings.order
    if data.mixture is not None:
        return data.mixture.epoch_order(data.groups, *order)[:n]
    return epoch_order(data.groups, *order)[:n]


def _models(
    settings: Settings, checkpoint: Checkpoint, reference: Scorer | None
) -> tuple[Scorer, Scorer]:
    """The policy of a checkpoint, with its adapter where the run trains one, and the reference,
    which is built with the first policy.

    An adapter of a checkpoint lies on the weights of the reference. On merged weights of a
    checkpoint it is a new one, and the reference is a separate model.
    """
    model = changed(settings.model, archive=checkpoint.source)
    step = _step_with_adapter(checkpoint) if model.lora.r else None
    if step is None:
        policy = build_policy(model)
    else:
        policy = build_policy(changed(model, archive=model.reference_archive), checkpoint=step)
    if reference is None:
        own = checkpoint.source is not None and step is None
        reference = build_reference(settings.model, policy, training=False, own=own)
    return policy, reference


def _step_with_adapter(checkpoint: Checkpoint) -> Path | None:
    """The step folder of a checkpoint that holds an adapter to continue from."""
    if checkpoint.source is None:
        return None
    folders = [Path(checkpoint.source), *Path(checkpoint.source).parents][:3]
    return next((folder for folder in folders if (folder / "adapter").is_dir()), None)


def row_of(
    measured: Measured,
    checkpoint: Checkpoint,
    sketch: int | None,
    same: float,
    left_out: dict[str, str],
) -> dict:
    """The row of a checkpoint in atlas.jsonl; the units are those of docs/atlas.md.

    same: the least cosine within a cluster.
    """
    gram, coefficients = measured.gram, measured.coefficients
    length = geometry.norms(gram, coefficients)
    if not length[0] > 0:
        raise DataError(
            f"loss={measured.entries[0].label} has no gradient on these pairs at"
            f" {checkpoint.about['name']}; compare with another loss, or take other pairs"
        )
    cosine = geometry.cosines(gram, coefficients)
    drawn = [i for i in range(len(length)) if length[i] > 0]
    places, shown = geometry.plane(cosine[drawn][:, drawn])
    groups = geometry.clusters(cosine[drawn][:, drawn], same)
    groups = [[drawn[i] for i in group] for group in groups]
    updates = _updates(measured, cosine, length)
    for number, group in enumerate(groups):
        for i in group:
            x, y = places[drawn.index(i)].tolist()
            updates[i] |= {"cluster": number, "x": x, "y": y}
    return {
        "checkpoint": checkpoint.path,
        "stamp": checkpoint.stamp,
        **checkpoint.about,
        "pairs": len(measured.pairs.examples),
        "responses": measured.n_responses,
        "weights": measured.n_weights,
        "sketch": sketch,
        "sketch_error": vars(measured.error) if measured.error else None,
        "baseline": measured.entries[0].label,
        "same": same,
        "plane_shows": shown,
        "updates": updates,
        "clusters": [_cluster(group, cosine, updates) for group in groups],
        "cosines": [[_number(value) for value in line] for line in cosine],
        "left_out": left_out | measured.left_out,
    }


def _updates(measured: Measured, cosine: torch.Tensor, length: torch.Tensor) -> list[dict]:
    """The numbers of each loss; it has no place and no cluster yet."""
    moves = geometry.changes_per_unit(measured.gram, measured.coefficients)
    chosen, rejected = (
        moves[:, of].mean(1) for of in (measured.pairs.chosen, measured.pairs.rejected)
    )
    share = geometry.carrying_share(measured.weights)
    return [
        {
            "loss": entry.label,
            "settings": entry.settings,
            "cosine": _number(cosine[i, 0]),
            "chosen": _number(chosen[i]),
            "rejected": _number(rejected[i]),
            "ratio": _number(measured.pushes[i, 1] / measured.pushes[i, 0]),
            "share": float(share[i]),
            "length": float(length[i]),
            "own_gradient": measured.own[i],
            "cluster": None,
            "x": None,
            "y": None,
        }
        for i, entry in enumerate(measured.entries)
    ]


def _cluster(group: list[int], cosine: torch.Tensor, updates: list[dict]) -> dict:
    """A cluster, named after its most central loss and what its update does to the pairs."""
    center = updates[geometry.middle(cosine, group)]
    moves = ", ".join(
        f"{side} {'up' if center[side] > 0 else 'down'}" for side in ("chosen", "rejected")
    )
    name = center["loss"] if len(group) == 1 else f"around {center['loss']}"
    members = [updates[i]["loss"] for i in group]
    return {"name": f"{name}: {moves}", "center": center["loss"], "losses": members}


def _number(value: torch.Tensor) -> float | None:
    return float(value) if math.isfinite(value) else None


def _write_table(path: Path, rows: list[dict]) -> None:
    """One line for each checkpoint and loss, in full precision."""
    with atomic_write(path) as f:
        writer = csv.writer(f)
        writer.writerow(["checkpoint", "step", *COLUMNS, "settings"])
        for row in rows:
            for loss in row["updates"]:
                settings = " ".join(f"{key}={value}" for key, value in loss["settings"].items())
                numbers = [loss[column] for column in COLUMNS]
                writer.writerow([row["checkpoint"], row.get("step"), *numbers, settings])
