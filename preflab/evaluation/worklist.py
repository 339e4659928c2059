"""Which checkpoints an evaluation compares, what is known of them, and which of its rows are still
to be written."""

import glob
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from preflab.modeling.weights_io import archive_files
from preflab.settings.identity import same_settings
from utils import ConfigError, append_rows, atomic_write, content_hash, json_lines

TOLD = (
    "loss",
    "seed",
    "lr",
    "n_epochs",
    "exp_name",
)  # of the training run that a checkpoint comes from


@dataclass(frozen=True)
class Checkpoint:
    """An archive to evaluate. path: as it was given, None for the model as `name_or_path` has it;
    source: what to load, which stays the same while a LATEST moves on; stamp: changes with its
    files."""

    path: str | None
    source: str | None
    stamp: str
    about: dict = field(
        compare=False
    )  # name, step, and settings of its training run, where they are known


def temperatures(config) -> list[float]:
    """`temperature` as a list."""
    return (
        [config.temperature]
        if isinstance(config.temperature, (int, float))
        else list(config.temperature)
    )


def draws_samples(config, loss) -> bool:
    """Whether evaluations sample from policy and reference, and measure the KL between them."""
    if "scalar_head" in loss.reads:
        return False
    return config.sample_during_eval or config.function == "eval"


def expand_archives(archive) -> list[str | None]:
    """`model.archive` as a list of paths: one or several archives, globs, and folders of runs (the
    newest checkpoint of each).

    Raises ConfigError for a path that is not there, a glob without a match and a folder without
    checkpoints.
    """
    if archive is None:
        return [None]
    given = [archive] if isinstance(archive, str) else list(archive)
    if not given:
        raise ConfigError(
            "model.archive=[] names no archive; leave it out to evaluate the model as it is"
        )
    found: dict[tuple, str] = {}
    for path in (path for item in given for path in _expand(str(item))):
        found.setdefault(
            tuple(file.resolve() for file in archive_files(path)), path
        )  # LATEST is also a step-N
    return list(found.values())


def _expand(item: str) -> list[str]:
    if not Path(item).exists():
        found = sorted(glob.glob(item, recursive=True), key=_natural)
        if not found:
            raise ConfigError(
                f"model.archive={item}: no such file or folder, and no match as a pattern"
            )
        return [path for match in found for path in _expand(match)]
    try:
        archive_files(item)
        return [item]
    except ConfigError:
        runs = sorted(
            {str(p.parent.parent) for p in Path(item).rglob("LATEST/policy.pt")}, key=_natural
        )
        if not runs:
            raise
        return runs


def _natural(path: str) -> list:
    """Sorts step-9 before step-10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path)]


def describe(path: str | None) -> Checkpoint:
    """What evaluating an archive needs to tell of it."""
    if path is None:
        return Checkpoint(None, None, "", {"name": "the model as it is"})
    files = archive_files(path)
    stats = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in (f.resolve() for f in files)
    ]
    about = {"name": path}
    step = re.search(r"step-(\d+)", str(files[0].resolve()))
    about |= {"step": int(step[1])} if step else {}
    run = next(
        (folder for folder in files[0].absolute().parents if (folder / "config.yaml").is_file()),
        None,
    )
    if run is not None:
        config = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
        about |= {"run": str(run), "training": {key: config.get(key) for key in TOLD}}
    source = files[0].resolve() if len(files) == 1 else files[0].resolve().parent
    return Checkpoint(path, str(source), content_hash(json.dumps(stats)), about)


def pending(config, run_dir: Path) -> list[tuple[Checkpoint, list[float]]]:
    """The checkpoints and temperatures that `run_dir` has no row for; what a killed evaluation left
    half done is dropped."""
    rows, path = _rows(run_dir / "eval.jsonl"), run_dir / "samples.jsonl"
    done = {(row["checkpoint"], row["stamp"], row["temperature"]) for row in rows}
    left = []
    for checkpoint in map(describe, expand_archives(config.model.archive)):
        if missing := [
            t for t in temperatures(config) if (checkpoint.path, checkpoint.stamp, t) not in done
        ]:
            left.append((checkpoint, missing))
    if not left:  # it was stopped between its last row and its summary
        left = [(describe(expand_archives(config.model.archive)[-1]), temperatures(config)[-1:])]
    again = {(checkpoint.path, t) for checkpoint, missing in left for t in missing}
    for file, known in ((run_dir / "eval.jsonl", rows), (path, _rows(path))):
        kept = [
            row for row in known if (row.get("checkpoint"), row.get("temperature")) not in again
        ]
        if file.is_file():
            with atomic_write(file) as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    return left


def covered(config, run_dir: Path) -> bool:
    """Whether `run_dir` has a row for every checkpoint, as its files are now, at every
    temperature."""
    done = {
        (row["checkpoint"], row["stamp"], row["temperature"])
        for row in _rows(run_dir / "eval.jsonl")
    }
    return all(
        (c.path, c.stamp, t) in done
        for c in map(describe, expand_archives(config.model.archive))
        for t in temperatures(config)
    )


def finish_evaluation(
    run_dir: Path, checkpoint: Checkpoint, samples: list[dict], values: dict
) -> None:
    """Add the samples, then the row that says they are complete."""
    append_rows(run_dir / "samples.jsonl", samples, checkpoint=checkpoint.path, examples=0)
    append_rows(
        run_dir / "eval.jsonl",
        [{"checkpoint": checkpoint.path, "stamp": checkpoint.stamp, **checkpoint.about, **values}],
    )


def _rows(path: Path) -> list[dict]:
    """Rows of a file that is only ever written whole."""
    return [json.loads(line) for line in json_lines(path)] if path.is_file() else []


def finished_like(config: DictConfig, folder: str | None) -> Path | None:
    """A finished run below `folder` with the settings of `config`, if there is one."""
    for path in sorted(Path(folder).rglob("config.yaml")) if folder else ():
        done = (path.parent / "summary.json").is_file() and same_settings(
            OmegaConf.load(path), config
        )
        if done and (config.function != "eval" or covered(config, path.parent)):
            return path.parent
    return None
