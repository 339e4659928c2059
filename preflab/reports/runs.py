"""Run folders as objects, and runs in groups that differ in their seeds only.

Reports start in about a second because nothing here imports torch, and they also read the folders
of running and killed runs.
"""

import math
import os
import socket
from collections import defaultdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from preflab.reports.run_files import (
    is_number,
    read_config,
    read_data,
    read_jsonl,
    read_status,
    read_summary,
    read_winrates,
)
from utils import DataError, mean_and_error

# Longer curves are thinned to between one and two times as many points; the picture is the same.
MAX_POINTS = 2000

# The metrics of a point of the reward-KL frontier.
FRONTIER = ("samples_eval/kl", "samples_eval/policy_reward", "examples")

# How samples are drawn, as rows name it, with the value that leaves the policy as it is.
SAMPLER = {"temperature": 1, "top_p": 1, "top_k": None, "min_p": None}

# Settings of a loss that choose between its variants, such as if_tdpo2; a label always has them.
VARIANT = "if_"

# Top-level config keys that do not separate runs of a sweep into groups.
NOT_SETTINGS = (
    "local_run_dir",
    "exp_name",
    "local_dirs",
    "seed",
    "cache_dir",
    "wandb",
    "tracker",
    "criterion",
    "skip_finished",
)


def is_missing(value: Any) -> bool:
    """Whether a value of a row is null, NaN or infinite; a string or a list is not."""
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def other_sampler(row: dict) -> str:
    """How the samples of a row were drawn, such as `temperature 0.7, top-p 0.9`, and "" where they
    are the policy's: temperature 1, top-p 1, no top-k and no min-p."""
    return ", ".join(
        f"{name.replace('_', '-')} {row[name]}"
        for name, plain in SAMPLER.items()
        if row.get(name) is not None and row[name] != plain
    )


def left_out(n: int) -> str:
    """What a frontier says of the `n` evaluations that are not on it; "" for none."""
    evaluations = "evaluation" if n == 1 else "evaluations"
    return f"{n:,} {evaluations} at another temperature, top-p, top-k or min-p left out" * bool(n)


class Run:
    """The content of a run folder so far. Raises DataError, naming the file, if a file cannot be
    read; rows of metrics.jsonl that cannot are left out, and `damaged` says what is wrong with
    them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.config = OmegaConf.to_container(read_config(folder / "config.yaml", resolve=False))
        self.loss = self.config["loss"]["name"]
        self.damaged: list[str] = []
        self.rows = read_jsonl(folder / "metrics.jsonl", self.damaged)
        self.evaluations = read_jsonl(folder / "eval.jsonl")
        self.winrates = read_winrates(folder / "winrates.json")
        self.summary = read_summary(folder)
        self.status = read_status(folder)
        self.data = read_data(folder)

    @property
    def seed(self) -> int | None:
        return self.config.get("seed")

    @property
    def reward(self) -> str | None:
        return (self.config.get("reward") or {}).get("name")

    @property
    def is_evaluation(self) -> bool:
        return self.config.get("function") in ("eval", "atlas")

    @property
    def is_atlas(self) -> bool:
        return self.config.get("function") == "atlas"

    @property
    def finished(self) -> bool:
        return bool(self.summary.get("finished"))

    @property
    def state(self) -> str:
        """finished, running, stopped, killed, failed with the error, or unknown for a folder
        without status.json."""
        if self.finished:
            return "finished"
        state = self.status.get("state", "unknown")
        if state == "failed":
            return f"failed: {self.status.get('error')}"
        is_here = self.status.get("host") == socket.gethostname()
        if state == "running" and is_here and not _is_alive(self.status.get("pid")):
            return "killed"
        return state

    def series(self, split: str, name: str) -> tuple[list, list]:
        """(examples, values) of a metric at the rows where it is finite."""
        points = [
            (row["examples"], row[name])
            for row in self.rows
            if row.get("split") == split and is_number(row.get(name))
        ]
        points = points[:: max(1, len(points) // MAX_POINTS)]
        return [x for x, _ in points], [y for _, y in points]

    def count_missing(self) -> int:
        """The number of values of metrics.jsonl that are null, NaN or infinite.

        Those that are null by design are not counted: standard errors of a single value, distinct
        n-grams of an empty text, the accuracy of labels in a round of ties, and the checkpoint of a
        row.
        """
        by_design = ("checkpoint", "online/label_accuracy")
        return sum(
            is_missing(value)
            for row in self.rows
            for name, value in row.items()
            if not name.endswith("_se") and "distinct" not in name and name not in by_design
        )

    def problems(self) -> list[str]:
        """What is wrong with metrics.jsonl, a sentence each; of many damaged rows the first."""
        texts = self.damaged[:3]
        if more := len(self.damaged) - len(texts):
            texts.append(f"{self.folder / 'metrics.jsonl'}: {more:,} further rows are left out.")
        if n_missing := self.count_missing():
            texts.append(
                f"{self.folder / 'metrics.jsonl'}: {n_missing:,} values are null, NaN or infinite;"
                " the curves leave them out."
            )
        return texts

    def _sampling(self, row: dict) -> dict:
        """How the samples of a row of metrics.jsonl, which leaves out what the config says, were
        drawn."""
        config = {name: self.config.get("topp" if name == "top_p" else name) for name in SAMPLER}
        return config | {name: row[name] for name in SAMPLER if name in row}

    def sampler(self, row: dict | None = None) -> str:
        """`other_sampler` of a row of metrics.jsonl, or of all rows of a training run."""
        return other_sampler(self._sampling(row or {}))

    def rollout_sampler(self) -> str:
        """`other_sampler` of the rollouts of an online run, which another model may have drawn."""
        model = (self.config.get("online") or {}).get("sampler")
        return ", ".join(filter(None, [f"sampler {model}" if model else "", self.sampler()]))

    def frontier(self) -> list[tuple[float, float, float]]:
        """(KL, reward, examples) of every evaluation that sampled the policy as it is; of another
        sampler the logged KL is not that of the distribution that was sampled."""
        return [tuple(row[name] for name in FRONTIER) for row in self.frontier_rows()]

    def frontier_rows(self) -> list[dict]:
        """The rows of metrics.jsonl of these evaluations."""
        return [row for row in self._points() if not self.sampler(row)]

    def n_beside_frontier(self) -> int:
        """Number of evaluations with a KL and a reward that `frontier` leaves out."""
        return sum(bool(self.sampler(row)) for row in self._points())

    def _points(self) -> list[dict]:
        return [
            row
            for row in self.rows
            if row.get("split") == "eval" and all(is_number(row.get(name)) for name in FRONTIER)
        ]

    def latest(self) -> dict:
        """The summary of a finished run, or the same numbers from the last evaluation of a running
        one."""
        if self.summary:
            return self.summary
        evaluations = [row for row in self.rows if row.get("split") == "eval"]
        training = [row for row in self.rows if row.get("split") == "train"]
        last = evaluations[-1] if evaluations else {}
        of_samples = {
            key.removeprefix("samples_eval/"): value
            for key, value in last.items()
            if key.startswith("samples_eval/")
        }
        return (
            of_samples
            | self._sampling(last)
            | {
                "pairs_per_second": training[-1].get("examples_per_second") if training else None,
                "eval_accuracy": last.get("rewards_eval/accuracies"),
                "eval_loss": last.get("loss/eval"),
                "examples": last.get("examples"),
            }
        )

    def samples(self) -> list[dict]:
        """Samples of the last evaluation in training, or of all evaluated checkpoints."""
        rows = self.all_samples()
        if not rows or "checkpoint" in rows[-1]:
            return rows
        return [row for row in rows if row.get("examples") == rows[-1].get("examples")]

    def all_samples(self) -> list[dict]:
        """Samples of every evaluation."""
        return read_jsonl(self.folder / "samples.jsonl")

    def setting(self, key: str) -> str:
        """The value of a dotted config key as text, and "-" if the run does not have the key."""
        return str(flatten(self.config).get(key, "-"))


def _is_alive(pid: int | None) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:  # the process of another user
        return True
    except (OSError, TypeError, ValueError):
        return False
    return True


def find_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Runs below `folder`, and an error message for each run folder that cannot be read.

    A run folder has a config.yaml, and a metrics.jsonl or a status.json. Hidden folders are
    skipped.
    """
    runs, problems = [], []
    for path in sorted(folder.rglob("config.yaml")):
        run_dir = path.parent
        is_hidden = any(part.startswith(".") for part in run_dir.relative_to(folder).parts)
        is_run = (run_dir / "metrics.jsonl").is_file() or (run_dir / "status.json").is_file()
        if is_hidden or not is_run:
            continue
        try:
            runs.append(Run(run_dir))
        except DataError as error:
            problems.append(str(error))
    return runs, problems


def flatten(tree: dict, prefix: str = "") -> dict:
    """A nested dict as one with dotted keys."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing_settings(runs: list[Run]) -> list[str]:
    """Dotted keys whose values differ among the runs that have them, and those of variants:
    `loss.name` first, and alone if there are no others. NOT_SETTINGS are ignored."""
    configs = [flatten(run.config) for run in runs]
    keys = sorted({key for config in configs for key in config})
    keys.sort(key=lambda key: key != "loss.name")
    differing = []
    for key in keys:
        values = {str(config[key]) for config in configs if key in config}
        if key.split(".")[0] not in NOT_SETTINGS and len(values) > 1:
            differing.append(key)
    variants = (key for key in keys if key.startswith(f"loss.{VARIANT}"))
    return list(dict.fromkeys([*(differing or ["loss.name"]), *variants]))


class Group:
    """Runs that differ in their seeds only."""

    def __init__(self, settings: dict[str, str], runs: list[Run]):
        self.settings = settings
        self.runs = sorted(runs, key=lambda run: str(run.seed))

    @property
    def name(self) -> str:
        return settings_label({"loss.name": self.runs[0].loss, **self.settings})

    @property
    def family(self) -> str:
        """The name without beta: groups of a family form one reward-KL frontier."""
        others = {key: value for key, value in self.settings.items() if key != "loss.beta"}
        return settings_label({"loss.name": self.runs[0].loss, **others})

    @property
    def state(self) -> str:
        n_finished = sum(run.finished for run in self.runs)
        if n_finished == len(self.runs):
            return "finished"
        others = sorted({run.state.split(":")[0] for run in self.runs if not run.finished})
        return f"{n_finished} of {len(self.runs)} finished, {' and '.join(others)}"

    @property
    def sampler(self) -> str:
        """`other_sampler` of the evaluations of its runs."""
        return " or ".join(sorted({run.sampler() for run in self.runs} - {""}))

    def same_loss(self, other: "Group") -> bool:
        """Whether the runs of both have one loss with the same settings."""
        losses = [flatten(run.config["loss"]) for run in (*self.runs, *other.runs)]
        return all(loss == losses[0] for loss in losses)

    def by_seed(self, name: str) -> dict[str, float]:
        """The final value of a metric for each seed that has one.

        Several runs of one seed count once, with their mean: they are not independent.
        """
        values = defaultdict(list)
        for run in self.runs:
            value = run.latest().get(name)
            if is_number(value):
                values[str(run.seed)].append(value)
        return {seed: mean_and_error(of_seed)[0] for seed, of_seed in values.items()}


def settings_label(settings: dict[str, str]) -> str:
    """A name for a group, such as `dpo beta=0.1`; settings that the loss does not have ("-") are
    left out."""
    parts = []
    for key, value in settings.items():
        if value == "-":
            continue
        parts.append(value if key == "loss.name" else f"{key.removeprefix('loss.')}={value}")
    return " ".join(parts)


def training_names(rows: list[dict]) -> list[str]:
    """What the checkpoint of each eval.jsonl row was trained with: the loss, its beta, its variant,
    and every other setting in which checkpoints of that loss differ. The name of the checkpoint if
    a row does not record a loss."""
    losses = [(row.get("training") or {}).get("loss") or {} for row in rows]
    values: dict[tuple, set[str]] = defaultdict(set)
    for loss in losses:
        for key, value in loss.items():
            values[loss.get("name"), key].add(str(value))
    names = []
    for row, loss in zip(rows, losses, strict=True):
        shown = {
            f"loss.{key}": str(value)
            for key, value in loss.items()
            if value is not None
            and (
                key in ("name", "beta")
                or key.startswith(VARIANT)
                or len(values[loss.get("name"), key]) > 1
            )
        }
        names.append(settings_label(shown) if loss.get("name") else str(row.get("name")))
    return names


def group_runs(runs: list[Run], keys: list[str]) -> list[Group]:
    """Groups of runs with the same values of the dotted config keys, sorted by these values."""
    members: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        members[tuple(run.setting(key) for key in keys)].append(run)
    return [
        Group(dict(zip(keys, values, strict=True)), members[values])
        for values in sorted(members, key=str)
    ]
