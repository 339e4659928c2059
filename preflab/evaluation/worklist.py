"""The evaluations of checkpoints that a run compares, and those whose rows are not written yet."""

import glob
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import OmegaConf

from preflab.modeling.weights_io import POLICY_PT, archive_files, archive_place, weights_of
from preflab.reports.run_files import read_config, read_jsonl
from preflab.reports.runs import NOT_SETTINGS, flatten
from preflab.settings.keys import CONFIG_DIR, GROUPS, load_yaml
from preflab.settings.schema import ModelSettings, Settings, part_of_run
from preflab.settings.values import temperatures
from utils import ConfigError, append_rows, atomic_write, content_hash

# Settings of the training run that are written into a checkpoint's row, beside those of
# config.yaml that the run has changed.
DESCRIBING_KEYS = ("loss", "seed", "lr", "n_epochs", "batch_size", "datasets", "exp_name")
DESCRIBING_GROUPS = (
    *("model.name_or_path", "model.lora.r", "model.lora.alpha", "model.lora.target_modules"),
    "reward.name",
)


@dataclass(frozen=True)
class Checkpoint:
    """An archive to evaluate.

    path: as the user gave it; None for the model of `name_or_path`.
    source: the file or folder to load, with links such as LATEST resolved.
    stamp: changes with the files of the archive.
    about: name, step, and settings of its training run, where they are known.
    """

    path: str | None
    source: str | None
    stamp: str
    about: dict = field(compare=False)


def draws_samples(config: Settings, loss) -> bool:
    """Whether evaluations sample from policy and reference, and measure the KL between them."""
    if "scalar_head" in loss.reads:
        return False
    return config.sample_during_eval or config.function == "eval"


def expand_archives(archive) -> list[str | None]:
    """`model.archive` as a list of paths.

    It may be archives, glob patterns, and folders of runs, which stand for the newest checkpoint of
    each run. An archive that is given twice, for example as LATEST and as step-N, is listed once.
    Raises ConfigError for a path that does not exist, a pattern without a match and a folder
    without checkpoints.
    """
    if archive is None:
        return [None]
    given = [archive] if isinstance(archive, str) else list(archive)
    if not given:
        raise ConfigError(
            "model.archive=[] names no archive; leave it out to evaluate the model as it is"
        )
    paths: dict[tuple, str] = {}
    for item in given:
        for path in _expand(str(item)):
            paths.setdefault(_files(path), path)
    return list(paths.values())


def says_compared_with_itself(model: ModelSettings) -> str | None:
    """What to say where the policy of an evaluation is its reference; None where none is."""
    reference = _files(model.reference_archive)
    same = next((p for p in expand_archives(model.archive) if _files(p) == reference), "")
    if same == "":
        return None
    if same is None:
        what = f"no model.archive, so model.name_or_path={model.name_or_path}"
    else:
        what = f"model.archive={same}, which is model.reference_archive too,"
    return (
        f"{what} is compared with itself, and its KL and reward gain are 0; give model.archive=RUN"
        " for a trained policy"
    )


def _files(path: str | None) -> tuple | None:
    return tuple(file.resolve() for file in archive_files(path)) if path else None


def _expand(item: str) -> list[str]:
    if not Path(item).exists():
        if archive_place(item).exists():
            return [item]
        matches = sorted(_matches(item), key=_natural)
        if not matches:
            raise ConfigError(
                f"model.archive={item}: no such file or folder, and no match as a pattern"
            )
        return [path for match in matches for path in _expand(match)]
    try:
        archive_files(item)
        return [item]
    except ConfigError:
        newest = (path for path in Path(item).rglob("LATEST") if weights_of(path))
        runs = sorted({str(path.parent) for path in newest}, key=_natural)
        if not runs:
            raise
        return runs


def _matches(pattern: str) -> list[str]:
    """The paths that match a pattern. One of `policy.pt` matches checkpoints without that file."""
    if matches := glob.glob(pattern, recursive=True):
        return matches
    folder, name = os.path.split(pattern)
    checkpoints = glob.glob(folder, recursive=True) if name == POLICY_PT else []
    return [path for path in checkpoints if weights_of(Path(path))]


def _natural(path: str) -> list:
    """A sort key that puts step-9 before step-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def describe(path: str | None) -> Checkpoint:
    """The checkpoint at a path; None is the model of `name_or_path`."""
    if path is None:
        return Checkpoint(None, None, "", {"name": "the model as it is"})
    files = archive_files(path)
    resolved = [file.resolve() for file in files]
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in resolved]
    about: dict = {"name": path}
    if step := re.search(r"step-(\d+)", str(resolved[0])):
        about["step"] = int(step[1])
    folders = files[0].absolute().parents
    run = next((folder for folder in folders if (folder / "config.yaml").is_file()), None)
    if run is not None:
        config = OmegaConf.to_container(
            read_config(run / "config.yaml", resolve=False, complete=False)
        )
        about["run"] = str(run)
        about["training"] = _training(config)
    source = resolved[0] if len(files) == 1 else resolved[0].parent
    return Checkpoint(path, str(source), content_hash(json.dumps(stats)), about)


def _training(config: dict) -> dict:
    """What a row says of the training run of its checkpoint."""
    flat = flatten(config)
    defaults = flatten(OmegaConf.to_container(load_yaml(CONFIG_DIR / "config.yaml")))
    changed = {
        key: value
        for key, value in flat.items()
        if key in defaults
        and value != defaults[key]
        and "${" not in str(defaults[key])  # differs wherever the repository lies
        and key.split(".")[0] not in (*DESCRIBING_KEYS, *GROUPS, *NOT_SETTINGS)
        and part_of_run(key)
    }
    return (
        {key: config.get(key) for key in DESCRIBING_KEYS}
        | {key: flat[key] for key in DESCRIBING_GROUPS if key in flat}
        | changed
    )


def pending(config: Settings, run_dir: Path) -> list[tuple[Checkpoint, list[float]]]:
    """The checkpoints and temperatures that `run_dir` has no row for.

    Earlier rows of theirs are deleted: they are outdated, or from an evaluation that was killed.
    """
    evaluated = _evaluated(run_dir)
    checkpoints = [describe(path) for path in expand_archives(config.model.archive)]
    work = []
    for checkpoint in checkpoints:
        missing = [
            t
            for t in temperatures(config)
            if (checkpoint.path, checkpoint.stamp, t) not in evaluated
        ]
        if missing:
            work.append((checkpoint, missing))
    if not work:  # the run was stopped between its last row and its summary: redo the last row
        work = [(checkpoints[-1], temperatures(config)[-1:])]
    redone = {(checkpoint.path, t) for checkpoint, missing in work for t in missing}
    for file in (run_dir / "eval.jsonl", run_dir / "samples.jsonl"):
        if file.is_file():
            _drop_rows(file, redone)
    return work


def _drop_rows(file: Path, redone: set[tuple]) -> None:
    rows = read_jsonl(file)
    with atomic_write(file) as f:
        for row in rows:
            if (row.get("checkpoint"), row.get("temperature")) not in redone:
                f.write(json.dumps(row, ensure_ascii=False) + "\n")


def covered(config: Settings, run_dir: Path) -> bool:
    """Whether `run_dir` has a row for every checkpoint, as its files are now, at every
    temperature."""
    evaluated = _evaluated(run_dir)
    return all(
        (checkpoint.path, checkpoint.stamp, t) in evaluated
        for checkpoint in map(describe, expand_archives(config.model.archive))
        for t in temperatures(config)
    )


def _evaluated(run_dir: Path) -> set[tuple]:
    rows = read_jsonl(run_dir / "eval.jsonl")
    return {(row.get("checkpoint"), row.get("stamp"), row["temperature"]) for row in rows}


def finish_evaluation(
    run_dir: Path, checkpoint: Checkpoint, samples: list[dict], values: dict
) -> None:
    """Append the samples, then the row of eval.jsonl that says they are complete."""
    append_rows(run_dir / "samples.jsonl", samples, checkpoint=checkpoint.path, examples=0)
    row = {"checkpoint": checkpoint.path, "stamp": checkpoint.stamp, **checkpoint.about, **values}
    append_rows(run_dir / "eval.jsonl", [row])
