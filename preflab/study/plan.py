"""The file of a study, and the runs that it asks for.

docs/studies.md describes the file. `{work}`, `{seed}` and `{case}` in its texts stand for the
folder of the study, and the seed and the case of a run.
"""

import itertools
import math
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from preflab.settings.keys import CONFIG_DIR, ROOT
from preflab.settings.sweep_words import folder_names
from utils import ConfigError, content_hash, first_line, nearest

FOLDER = CONFIG_DIR / "study"

KEYS = {
    "question": str,
    "work": str,
    "baseline": str,
    "losses": Mapping,
    "grid": Mapping,
    "seeds": Sequence,
    "cases": Mapping,
    "prepare": Sequence,
    "config_dir": str,
    "settings": Sequence,
    "choose_within_kl": (int, float),
    "halving": Mapping,
    "compare": Mapping,
    "assume": Mapping,
}
REQUIRED = ("question", "baseline", "losses", "seeds", "settings", "compare")
OF_A_LOSS = ("settings", "grid", "seed_offset")
OF_HALVING = ("rungs", "keep")
LEAST_KL = 0.01  # `halving.least_kl` of a study that does not say; docs/studies.md has the reason
SPREADS = ("seeds", "prompts", "rest", "n_prompts")

# What can be compared, and whether more is better; None for neither.
MEASURES = {
    "policy_reward": True,
    "win_rate": True,
    "accuracy": True,
    "policy_length": None,
    "kl": None,
}
AT_KL = "reward@kl="


@dataclass(frozen=True)
class Step:
    """A command that makes data or a model before the runs that need it. makes: the file that it
    writes last."""

    makes: str
    run: str


@dataclass(frozen=True)
class Arm:
    """A loss of the study with its grid. settings: overrides. trials: those of each point of the
    grid, by its name. seed_offset: added to the seeds of its runs."""

    settings: list[str]
    trials: dict[str, list[str]]
    seed_offset: int = 0


@dataclass(frozen=True)
class PlannedRun:
    """A run of a study. name: of its folder below `WORK/runs`. overrides: of train.py."""

    name: str
    case: str
    loss: str
    trial: str
    seed: int
    overrides: list[str]

    def until(self, examples: int) -> "PlannedRun":
        """The same run, which ends after so many examples and can be continued later."""
        others = [word for word in self.overrides if not word.startswith("n_examples=")]
        return replace(self, overrides=[*others, f"n_examples={examples}"])


@dataclass(frozen=True)
class Halving:
    """At each rung, a share of a run's examples, the share `keep` of the trials continues.

    least_kl: the share of the furthest trial's KL below which a trial is not compared.
    """

    rungs: list[float]
    keep: float
    least_kl: float = LEAST_KL

    def counts(self, trials: int) -> list[int]:
        """How many of the trials train up to each rung, and to the end."""
        counts = [trials]
        for _ in self.rungs:
            counts.append(math.ceil(self.keep * counts[-1] - 1e-9))
        return counts


@dataclass(frozen=True)
class Study:
    """The content of a study's file. text: the file, as it is. cases: overrides by case. only: the
    one case that is run and reported, where not all of them are."""

    name: str
    text: str
    question: str
    work: Path
    baseline: str
    arms: dict[str, Arm]
    seeds: list[int]
    cases: dict[str, list[str]]
    prepare: list[Step]
    config_dir: Path | None
    settings: list[str]
    choose_within_kl: float | None
    compare: dict[str, float]
    assume: dict[str, dict[str, float]]
    halving: Halving | None = None
    only: str | None = None

    @property
    def hash(self) -> str:
        return content_hash(self.text)

    @property
    def page_dir(self) -> Path:
        return self.work if self.only is None else self.work / f"case-{self.only}"

    def with_only(self, case: str) -> "Study":
        """The study of one of its cases. Raises ConfigError for another name."""
        if case not in self.cases:
            raise ConfigError(
                f"study {self.name} has no case {case!r}; it has {', '.join(self.cases)}"
            )
        return replace(self, cases={case: self.cases[case]}, only=case)

    @property
    def runs_dir(self) -> Path:
        return self.work / "runs"

    def filled(self, text: str, *, seed: int | str = "{seed}", case: str = "{case}") -> str:
        """A text with {work}, {seed} and {case} replaced. Other braces stay."""
        values = {"work": self.work, "seed": seed, "case": case}
        return re.sub(r"\{(work|seed|case)\}", lambda match: str(values[match[1]]), text)

    def runs(self) -> list[PlannedRun]:
        """All runs: one case after another, so that a study that is stopped has verdicts about the
        cases that it got to, and in a case one seed after another."""
        return [
            self._run(seed, case, loss, trial)
            for case, seed in itertools.product(self.cases, self.seeds)
            for loss, arm in self.arms.items()
            for trial in arm.trials
        ]

    def cells(self) -> list[list[PlannedRun]]:
        """The runs of each case, seed and loss: the trials among which dev prompts choose."""
        runs = self.runs()
        size = len(self.arms[self.baseline].trials)
        return [runs[i : i + size] for i in range(0, len(runs), size)]

    def _run(self, seed: int, case: str, loss: str, trial: str) -> PlannedRun:
        arm = self.arms[loss]
        given = [*self.settings, *self.cases[case], *arm.settings, *arm.trials[trial]]
        parts = [] if case == "-" else [f"case={case}"]
        parts += [f"loss={loss}", *arm.trials[trial], f"seed={seed}"]
        [name] = folder_names([parts])
        overrides = [self.filled(setting, seed=seed, case=case) for setting in given]
        overrides += [f"seed={seed + arm.seed_offset}", "wandb.enabled=false", "report=false"]
        overrides.append("reference.compare=true")  # a study reads the KL of every loss
        return PlannedRun(name, case, loss, trial, seed, overrides)

    def steps_of(self, run: PlannedRun) -> list[Step]:
        """What has to be made before a run, in order."""
        return [
            Step(*(self.filled(text, seed=run.seed, case=run.case) for text in (s.makes, s.run)))
            for s in self.prepare
        ]

    def drawn_by_seed(self) -> list[str]:
        """What a seed draws: what the intervals over seeds are about."""
        given = [*self.settings, *(s for of in self.cases.values() for s in of)]
        drawn = ["the order of the data", "the samples"]
        if _has_seed(given, "model."):
            drawn.append("the model that training starts from")
        if _has_seed(given, "datasets="):
            drawn.append("the data, with the prompts")
        return drawn


def _has_seed(settings: Sequence[str], begin: str) -> bool:
    return any(setting.startswith(begin) and "{seed}" in setting for setting in settings)


def read_study(name: str) -> Study:
    """The study of `config/study/NAME.yaml`, or of a path that ends in .yaml.

    Raises ConfigError for a file that is not there, and for a key or a value that is not accepted.
    """
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file():
        names = sorted(file.stem for file in FOLDER.glob("*.yaml"))
        raise ConfigError(f"study {name}: no such file {path}; {nearest(name, names)}")
    try:
        text = path.read_text(encoding="utf-8")
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, ValueError, OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML: {first_line(error)}") from error
    return parse_study(path.stem, text, content, path)


def parse_study(name: str, text: str, content: Any, path: Path) -> Study:
    """A study from the content of its file, checked. Raises ConfigError."""
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, such as `baseline: dpo`")
    for key, value in content.items():
        if key not in KEYS:
            raise ConfigError(f"{path}: {key}: no such key of a study; {nearest(str(key), KEYS)}")
        if not isinstance(value, KEYS[key]) or (KEYS[key] is Sequence and isinstance(value, str)):
            raise ConfigError(f"{path}: {key}={value!r} has another type; see docs/studies.md")
        if isinstance(value, str) and not _is_text(value):
            raise ConfigError(f"{path}: {key}={value!r} must be a text, and no empty one")
    if missing := [key for key in REQUIRED if key not in content]:
        raise ConfigError(f"{path} has no {', '.join(missing)}")
    grid = content.get("grid", {})
    arms = {str(loss): _arm(path, loss, of, grid) for loss, of in content["losses"].items()}
    cases = content.get("cases", {"-": []})
    study = Study(
        name=name,
        text=text,
        question=content["question"].strip(),
        work=(ROOT / content.get("work", f"runs/study/{name}")).resolve(),
        baseline=content["baseline"],
        arms=arms,
        seeds=list(content["seeds"]),
        cases={str(case): _texts(path, f"cases.{case}", of) for case, of in cases.items()},
        prepare=[_step(path, step) for step in content.get("prepare", [])],
        config_dir=ROOT / content["config_dir"] if "config_dir" in content else None,
        settings=_texts(path, "settings", content["settings"]),
        choose_within_kl=content.get("choose_within_kl"),
        compare=dict(content["compare"]),
        assume=dict(content.get("assume", {})),
        halving=_halving(path, content["halving"]) if "halving" in content else None,
    )
    _check(study, path)
    return study


def _texts(path: Path, key: str, values: Any) -> list[str]:
    """The texts of a list; none for null. Raises ConfigError."""
    values = [] if values is None else values
    if not isinstance(values, list) or any(isinstance(v, (list, dict)) for v in values):
        raise ConfigError(f"{path}: {key}={values!r} must be a list of settings or values")
    return [str(value) for value in values]


def _step(path: Path, step: Any) -> Step:
    if not isinstance(step, Mapping) or set(step) != {"makes", "run"}:
        raise ConfigError(f"{path}: prepare: each step has `makes` and `run`, and is {step!r}")
    makes, run = str(step["makes"]), str(step["run"])
    try:
        is_command = bool(shlex.split(run)) and _is_text(run)
    except ValueError:  # an open quotation mark
        is_command = False
    if not is_command or not _is_text(makes):
        raise ConfigError(f"{path}: prepare: {step!r}: `makes` is a file, and `run` a command line")
    return Step(makes, run)


def _arm(path: Path, name: str, given: Any, grid: Mapping) -> Arm:
    """A loss of the study. given: {settings, grid, seed_offset}, each of which may be left out, or
    null for `loss=NAME` with the grid of the study."""
    given = {} if given is None else given
    if not isinstance(given, Mapping) or (unknown := set(given) - set(OF_A_LOSS)):
        found = sorted(unknown) if isinstance(given, Mapping) else repr(given)
        raise ConfigError(f"{path}: losses.{name}: {found}; accepted: {', '.join(OF_A_LOSS)}")
    grid = given.get("grid", grid) or {}
    if not isinstance(grid, Mapping):
        raise ConfigError(f"{path}: grid={grid!r} must have a list of values for each key")
    axes = [
        [f"{key}={value}" for value in _texts(path, f"grid.{key}", values)]
        for key, values in grid.items()
    ]
    trials = {" ".join(point) or "-": list(point) for point in itertools.product(*axes)}
    settings = _texts(path, f"losses.{name}.settings", given.get("settings", [f"loss={name}"]))
    offset = given.get("seed_offset", 0)
    if not _is_seed(offset):
        raise ConfigError(f"{path}: losses.{name}.seed_offset={offset!r} must be a whole number")
    return Arm(settings, trials, offset)


def _halving(path: Path, given: Mapping) -> Halving:
    """Raises ConfigError for shares that are none."""
    if set(given) - {"least_kl"} != set(OF_HALVING):
        raise ConfigError(
            f"{path}: halving has {sorted(given)}; it needs {', '.join(OF_HALVING)}, and may have"
            " least_kl"
        )
    rungs, keep, least_kl = given["rungs"], given["keep"], given.get("least_kl", LEAST_KL)
    is_list = isinstance(rungs, list) and all(_is_size(r) and 0 < r < 1 for r in rungs)
    if not is_list or not rungs or rungs != sorted(set(rungs)):
        raise ConfigError(
            f"{path}: halving.rungs={rungs!r} must be growing shares of the examples of a run,"
            " between 0 and 1, such as [0.25, 0.5]"
        )
    if not _is_size(keep) or not 0 < keep < 1:
        raise ConfigError(
            f"{path}: halving.keep={keep!r} must be the share of the trials that continues, between"
            " 0 and 1"
        )
    if not _is_size(least_kl) or least_kl >= 1:
        raise ConfigError(
            f"{path}: halving.least_kl={least_kl!r} must be the share of the furthest trial's KL"
            " below which a trial is not compared, from 0 to below 1"
        )
    return Halving(rungs, keep, least_kl)


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_text(text: str) -> bool:
    """Whether a text has letters, and can be a file's name and be written: YAML can escape a null
    byte, and half of a character."""
    try:
        return bool(text.strip()) and b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False


def _is_size(value: Any) -> bool:
    """Whether a value is a number of 0 or more, which fits into a float."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value <= sys.float_info.max


def _check(study: Study, path: Path) -> None:
    """Refuse a study that cannot be answered. Raises ConfigError."""
    if study.baseline not in study.arms:
        raise ConfigError(
            f"{path}: baseline={study.baseline} is no loss of the study;"
            f" {nearest(study.baseline, study.arms)}"
        )
    counts = {name: len(arm.trials) for name, arm in study.arms.items()}
    if len(set(counts.values())) > 1:
        raise ConfigError(
            f"{path}: every loss needs the same number of trials, because the best of more trials"
            f" looks better; there are {counts}"
        )
    distinct = all(map(_is_seed, study.seeds)) and len(set(study.seeds)) == len(study.seeds)
    if not distinct or not study.seeds:
        raise ConfigError(f"{path}: seeds={study.seeds} must be different whole numbers from 0")
    kl = study.choose_within_kl
    if kl is not None and (not _is_size(kl) or kl == 0):
        raise ConfigError(f"{path}: choose_within_kl={kl!r} must be a number of nats above 0")
    if study.halving and min(counts.values()) < 2:
        raise ConfigError(f"{path}: halving needs a grid: each loss has a single trial")
    if not study.cases:
        raise ConfigError(f"{path}: cases has none; leave the key out for a study without cases")
    for measure, margin in study.compare.items():
        if not _is_measure(measure):
            accepted = f"{', '.join(MEASURES)}, or {AT_KL}NUMBER"
            raise ConfigError(f"{path}: compare: {measure}; accepted: {accepted}")
        if not _is_size(margin) or margin == 0:
            raise ConfigError(
                f"{path}: compare: {measure}: {margin!r} must be the smallest difference that"
                " matters, a number above 0"
            )
    for measure, spread in study.assume.items():
        if measure not in study.compare:
            raise ConfigError(f"{path}: assume: {measure} is not among `compare`")
        _check_spread(path, measure, spread)


def _check_spread(path: Path, measure: str, spread: Any) -> None:
    is_valid = isinstance(spread, Mapping) and all(
        key in SPREADS and _is_size(value) for key, value in spread.items()
    )
    if not is_valid:
        raise ConfigError(
            f"{path}: assume: {measure}: {spread!r}; accepted: numbers of 0 or more for"
            f" {', '.join(SPREADS)}"
        )


def _is_measure(name: Any) -> bool:
    at_kl = re.escape(AT_KL) + r"\d+(\.\d+)?"
    return isinstance(name, str) and (name in MEASURES or bool(re.fullmatch(at_kl, name)))
