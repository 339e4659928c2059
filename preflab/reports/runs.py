"""What run folders hold, and what several runs say together: means over seeds, paired differences,
reward-KL envelopes.

No torch here: reports start in a second, and work while runs are still going.
"""

import json
import math
import os
import socket
from collections import defaultdict
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from utils import DataError, json_lines, mean_and_error

MAX_POINTS = 2000  # of a curve; longer ones are thinned, the eye sees no difference


NOT_SETTINGS = (
    "local_run_dir",
    "exp_name",
    "local_dirs",
    "seed",
    "cache_dir",
    "wandb",
    "skip_finished",
)


def read_jsonl(path: Path) -> list[dict]:
    """Rows of a JSON-lines file; a last line that a running or killed process has not finished is
    left out."""
    if not path.is_file():
        return []
    rows = []
    lines = json_lines(path)
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise DataError(
                    f"{path}:{number}: not JSON, though more lines follow: {error}"
                ) from error
    return rows


def read_json(path: Path):
    """The content of a JSON file; {} where there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: not JSON: {error}") from error


def is_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


class Run:
    """What a run folder holds so far. Raises DataError, naming the file, where it cannot be
    read."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.config = OmegaConf.to_container(OmegaConf.load(folder / "config.yaml"))
            self.loss = self.config["loss"]["name"]
        except (OmegaConfBaseException, YAMLError, OSError, KeyError, TypeError) as error:
            raise DataError(
                f"{folder / 'config.yaml'}: not the config of a run: {str(error).splitlines()[0]}"
            ) from error
        self.rows = read_jsonl(folder / "metrics.jsonl")
        self.evaluations = read_jsonl(folder / "eval.jsonl")
        self.winrates = read_json(folder / "winrates.json") or []
        self.summary = read_json(folder / "summary.json")
        self.status = read_json(folder / "status.json")
        self.data = read_json(folder / "data.json")

    @property
    def seed(self):
        return self.config.get("seed")

    @property
    def is_evaluation(self) -> bool:
        return self.config.get("function") == "eval"

    @property
    def finished(self) -> bool:
        return bool(self.summary.get("finished"))

    @property
    def state(self) -> str:
        """finished, running, stopped, killed, or failed with the error; unknown for a run from
        before status.json."""
        if self.finished:
            return "finished"
        told = self.status.get("state", "unknown")
        if (
            told == "running"
            and self.status.get("host") == socket.gethostname()
            and not _alive(self.status.get("pid"))
        ):
            return "killed"
        return f"failed: {self.status.get('error')}" if told == "failed" else told

    def series(self, split: str, name: str) -> tuple[list, list]:
        """(examples, values) of a metric, where it has a finite value."""
        points = [
            (row["examples"], row[name])
            for row in self.rows
            if row.get("split") == split and is_number(row.get(name))
        ]
        points = points[:: max(1, len(points) // MAX_POINTS)]
        return [x for x, _ in points], [y for _, y in points]

    def not_finite(self) -> int:
        """How many values of metrics.jsonl are no numbers: null, NaN or infinite."""
        # noqa: E731
        odd = lambda value: value is None or (isinstance(value, float) and not math.isfinite(value))
        return sum(
            odd(value)
            for row in self.rows
            for name, value in row.items()
            if not name.endswith("_se") and "distinct" not in name and name != "checkpoint"
        )

    def frontier(self) -> list[tuple[float, float, float]]:
        """(KL, reward, examples) of every evaluation that sampled at temperature 1 (the KL is that
        of what was sampled)."""
        names = ("samples_eval/kl", "samples_eval/policy_reward", "examples")
        rows = [
            row
            for row in self.rows
            if row.get("split") == "eval"
            and row.get("temperature", self.config.get("temperature", 1.0)) == 1.0
        ]
        return [
            tuple(row[n] for n in names)
            for row in rows
            if all(is_number(row.get(n)) for n in names)
        ]

    def latest(self) -> dict:
        """The summary of a finished run, or the same numbers from the last evaluation of a running
        one."""
        if self.summary:
            return self.summary
        evals = [row for row in self.rows if row.get("split") == "eval"]
        last = evals[-1] if evals else {}
        found = {
            key.removeprefix("samples_eval/"): value
            for key, value in last.items()
            if key.startswith("samples_eval/")
        }
        trained = [row for row in self.rows if row.get("split") == "train"]
        found["pairs_per_second"] = trained[-1].get("examples_per_second") if trained else None
        return found | {
            "eval_accuracy": last.get("rewards_eval/accuracies"),
            "eval_loss": last.get("loss/eval"),
            "examples": last.get("examples"),
        }

    def samples(self) -> list[dict]:
        """Samples of the last evaluation, or of all evaluations of checkpoints."""
        rows = read_jsonl(self.folder / "samples.jsonl")
        if not rows or "checkpoint" in rows[-1]:
            return rows
        return [row for row in rows if row.get("examples") == rows[-1].get("examples")]

    def setting(self, key: str) -> str:
        return str(flatten(self.config).get(key, "-"))


def _alive(pid) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:  # it is somebody else's
        return True
    except (OSError, TypeError, ValueError):
        return False
    return True


def find_runs(folder: Path) -> tuple[list[Run], list[str]]:
    """Run folders below `folder` (those with a config.yaml and a metrics.jsonl or a status.json),
    and what is wrong with others."""
    runs, problems = [], []
    for path in sorted(folder.rglob("config.yaml")):
        home = path.parent
        if any(part.startswith(".") for part in home.relative_to(folder).parts) or not (
            (home / "metrics.jsonl").is_file() or (home / "status.json").is_file()
        ):
            continue
        try:
            runs.append(Run(home))
        except DataError as error:
            problems.append(str(error))
    return runs, problems


def flatten(tree: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in tree.items():
        flat |= (
            flatten(value, f"{prefix}{key}.")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def differing_settings(runs: list[Run]) -> list[str]:
    """Dotted keys whose values differ among the runs that have them, the loss first; seeds are
    aggregated over."""
    flat = [flatten(run.config) for run in runs]
    keys = sorted({key for f in flat for key in f}, key=lambda key: (key != "loss.name", key))
    return [
        key
        for key in keys
        if key.split(".")[0] not in NOT_SETTINGS
        and len({str(f[key]) for f in flat if key in f}) > 1
    ] or ["loss.name"]


class Group:
    """Runs that differ in their seeds only."""

    def __init__(self, settings: dict[str, str], runs: list[Run]):
        self.settings, self.runs = settings, sorted(runs, key=lambda run: str(run.seed))

    @property
    def name(self) -> str:
        return label({"loss.name": self.runs[0].loss, **self.settings})

    @property
    def family(self) -> str:
        """All of the settings but beta, along which a frontier runs."""
        return label(
            {
                "loss.name": self.runs[0].loss,
                **{key: value for key, value in self.settings.items() if key != "loss.beta"},
            }
        )

    @property
    def state(self) -> str:
        finished = sum(run.finished for run in self.runs)
        if finished == len(self.runs):
            return "finished"
        others = sorted({run.state.split(":")[0] for run in self.runs if not run.finished})
        return f"{finished} of {len(self.runs)} finished, {' and '.join(others)}"

    def by_seed(self, name: str) -> dict[str, float]:
        """The final value of each seed that has one; of several runs with one seed, their mean:
        they are no further evidence."""
        values = defaultdict(list)
        for run in self.runs:
            if is_number(value := run.latest().get(name)):
                values[str(run.seed)].append(value)
        return {seed: mean_and_error(of_seed)[0] for seed, of_seed in values.items()}


def label(settings: dict[str, str]) -> str:
    """`dpo beta=0.1`: the loss by its name, other settings with the last part of theirs; what a
    loss does not have is left out."""
    parts = [
        value if key == "loss.name" else f"{key.removeprefix('loss.')}={value}"
        for key, value in settings.items()
        if value != "-"
    ]
    return " ".join(parts)


def group_runs(runs: list[Run], keys: list[str]) -> list[Group]:
    groups: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        groups[tuple(run.setting(key) for key in keys)].append(run)
    return [
        Group(dict(zip(keys, values)), members)
        for values, members in sorted(groups.items(), key=lambda item: str(item[0]))
    ]
