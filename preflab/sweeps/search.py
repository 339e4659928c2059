"""The sweeper `hydra/sweeper=optuna`: a search with a budget of runs, on Optuna 5.

A run is a trial: Optuna proposes its settings from the objectives of the runs before it. What is
known of a search is kept in the folder of the sweep, so that the same command continues it.
"""

import importlib.util
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from preflab.reports.run_files import read_summary
from preflab.reports.selection import TEST, number_on
from preflab.settings.sweep_words import folder_names, grids_of
from preflab.sweeps.grid import Grids, check_runs, fail, finish
from preflab.sweeps.space import Choice, Interval, Space, space_of
from utils import ConfigError, PrefLabError, atomic_write

JOURNAL = "search.journal"
RESULTS = "optimization_results.yaml"  # the name and the content that hydra's own sweeper has
DIRECTIONS = ("maximize", "minimize")

# Samplers whose proposals depend on the trials before and on random numbers alone. They get a seed
# for each trial, so that a search that continues proposes what it would have proposed.
STATELESS = ("optuna.samplers.TPESampler", "optuna.samplers.RandomSampler")


class NoObjectiveError(PrefLabError):
    """A run finished, and its objective is no finite number."""


@dataclass
class Search:
    """One study. name: that of the study, and in front of its runs' folders, where there are
    several."""

    name: str
    space: Space
    study: Any


class OptunaSearch(Grids):
    """Searches each grid with its own `n_trials` runs.

    n_jobs: runs that are proposed and launched together; None: as many as the launcher starts at a
    time, or 1. direction: of the setting `objective`, or a list. storage: a path of a journal, a
    URL of a database such as sqlite:///search.db, or None for a journal in the sweep's folder.
    sampler: the settings of an Optuna sampler, with its class as `_target_`.
    """

    def __init__(
        self,
        words: Sequence[str],
        params: dict | None,
        sampler: DictConfig,
        direction: str | Sequence[str],
        n_trials: int,
        n_jobs: int | None,
        storage: str | None,
        study_name: str | None,
    ):
        super().__init__(words, None, params)
        self.sampler_settings, self.direction = sampler, direction
        self.n_trials, self.n_jobs = n_trials, n_jobs
        self.storage, self.study_name = storage, study_name

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run all searches. Leaves with exit code 2 before the first run where something cannot
        work, and with 1 at the end where a run failed."""
        words = [*self._parse_config(), *arguments, *self.words]
        try:
            directions = self.check_settings()
            spaces = [space_of(grid, self.hydra_context.config_loader) for grid in grids_of(words)]
            for space in spaces:
                check_space(space)
                check_runs(corners := space.corners())
                self.validate_batch_is_legal(corners)
            folder = self.begin_folder()
            searches = self.begin_searches(spaces, directions, folder)
        except (PrefLabError, HydraException) as error:
            fail(error)
        names: list[str] = []
        returns: list[JobReturn] = []
        for search in searches:
            for name, result in self.run_search(search, folder):
                names.append(name)
                returns.append(result)
        print(write_results(searches, folder, self.objectives()), flush=True)
        finish(folder, names, returns)
        return returns

    # ------------------------------------------------------------------------------------ checks

    def check_settings(self) -> list[str]:
        """The directions. Raises ConfigError for settings of the search that cannot work."""
        if importlib.util.find_spec("optuna") is None:
            raise ConfigError(
                "hydra/sweeper=optuna needs the package optuna:"
                " pip install -r requirements/search.txt -c constraints.txt"
            )
        if "CmaEsSampler" in str(OmegaConf.to_container(self.sampler_settings, resolve=True)):
            raise ConfigError(
                "hydra.sweeper.sampler: CmaEsSampler unpickles what the search's file holds, which"
                " can run code; use tpe or random"
            )
        for key in ("n_trials", "n_jobs"):
            value = getattr(self, key)
            is_default = key == "n_jobs" and value is None
            if not is_default and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"hydra.sweeper.{key}={value}: an integer from 1")
        one = isinstance(self.direction, str)
        directions = [self.direction] if one else list(self.direction)
        if not directions or not set(directions) <= set(DIRECTIONS):
            raise ConfigError(
                f"hydra.sweeper.direction={self.direction}: {' or '.join(DIRECTIONS)},"
                " or a list of one for each objective"
            )
        objectives = self.objectives()
        if len(directions) != len(objectives):
            raise ConfigError(
                f"hydra.sweeper.direction has {len(directions)} and objective {len(objectives)}"
                f" entries ({', '.join(objectives)}); each objective needs a direction, as in"
                " objective=[policy_reward,kl] hydra.sweeper.direction=[maximize,minimize]"
            )
        return directions

    def objectives(self) -> list[str]:
        given = self.config.objective
        return [given] if isinstance(given, str) else list(given)

    # ---------------------------------------------------------------------------------- searches

    def begin_searches(
        self, spaces: Sequence[Space], directions: Sequence[str], folder: Path
    ) -> list[Search]:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        searches = []
        for name, space in zip(search_names(spaces), spaces, strict=True):
            study = optuna.create_study(
                storage=make_storage(self.storage, folder),
                study_name="_".join(filter(None, (self.study_name, name))) or "search",
                sampler=self.make_sampler(0),
                directions=list(directions),
                load_if_exists=True,
            )
            if [direction.name.lower() for direction in study.directions] != list(directions):
                raise ConfigError(
                    f"hydra.sweeper.direction={self.direction}: the search {study.study_name} in"
                    f" {self.storage or folder} has another; use another local_run_dir"
                )
            searches.append(Search(name, space, study))
        return searches

    def make_sampler(self, number: int) -> Any:
        """The sampler for the trial `number`."""
        import numpy as np

        settings = OmegaConf.to_container(self.sampler_settings, resolve=True)
        seed = settings.get("seed")
        if seed is not None and settings.get("_target_") in STATELESS:
            settings["seed"] = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
        return instantiate(settings)

    def run_search(self, search: Search, folder: Path) -> list[tuple[str, JobReturn]]:
        """Run what is left of the budget; returns the folders' names and the results of the runs.

        Trials that a stopped sweep has begun come first, with the settings that they had.
        """
        study, size = search.study, self.batch_size()
        is_begun = [trial for trial in study.get_trials() if not trial.state.is_finished()]
        n_left = self.n_trials - (len(study.get_trials()) - len(is_begun))
        print(f"{search.study.study_name}: {max(n_left, 0)} runs in {folder}", flush=True)
        done: list[tuple[str, JobReturn]] = []
        started = time.monotonic()
        while len(done) < n_left:
            batch = [is_begun.pop(0) for _ in range(min(size, n_left - len(done), len(is_begun)))]
            while len(batch) < min(size, n_left - len(done)):
                batch.append(self.propose(search))
            runs = [search.space.words(_plain(trial.params, search.space)) for trial in batch]
            names = [folder_name(search, trial) for trial in batch]
            for trial, name, result in zip(
                batch, names, self.launch(runs, names, batch[0].number), strict=True
            ):
                self.tell(search, trial, result, folder / name)
                done.append((name, result))
            seconds = (time.monotonic() - started) / len(done) * (n_left - len(done))
            print(progress(search, batch, n_left - len(done), seconds), flush=True)
        return done

    def batch_size(self) -> int:
        return self.n_jobs or getattr(self.launcher, "n_jobs", None) or 1

    def propose(self, search: Search) -> Any:
        """The next trial."""
        search.study.sampler = self.make_sampler(len(search.study.get_trials(deepcopy=False)))
        try:
            return search.study.ask(
                {key: _distribution(one) for key, one in search.space.searched.items()}
            )
        except ValueError as error:
            fail(
                ConfigError(
                    f"the search {search.study.study_name} was begun with another space"
                    f" ({error}); use another local_run_dir"
                )
            )

    def tell(self, search: Search, trial: Any, result: JobReturn, run_dir: Path) -> None:
        """Record a result. A run without a finite objective is a failed trial."""
        values = None
        if result.status is JobStatus.COMPLETED:
            values = result.return_value
            if values is None:
                result.status = JobStatus.FAILED
                result.return_value = NoObjectiveError(self._without_objective(run_dir))
        if values is None:
            search.study.tell(trial.number, state=_state("FAIL"))
        else:
            search.study.tell(trial.number, values)

    def _without_objective(self, run_dir: Path) -> str:
        path, names = run_dir / "summary.json", self.objectives()
        summary = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if missing := [name for name in names if name not in summary]:
            numbers = sorted(k for k, v in summary.items() if isinstance(v, (int, float)))
            there = f"; it has {', '.join(numbers)}" if numbers else ""
            return f"objective={','.join(missing)} is not in {path}{there}"
        return f"objective={','.join(names)} is not finite in {path}"


def check_space(space: Space) -> None:
    """Raises ConfigError where there is nothing to search."""
    if not space.searched:
        raise ConfigError(
            f"hydra/sweeper=optuna: nothing to search in {' '.join(space.words({}))}; give ranges"
            " such as 'lr=tag(log,interval(1e-5,1e-3))' or loss.beta=0.1,0.5"
        )


def make_storage(given: str | None, folder: Path) -> Any:
    """An Optuna storage: a journal unless `given` is a URL."""
    if given and "://" in given:
        return given
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return JournalStorage(JournalFileBackend(str(given or folder / JOURNAL)))


def _distribution(one: Choice | Interval) -> Any:
    from optuna.distributions import (
        CategoricalDistribution,
        FloatDistribution,
        IntDistribution,
    )

    if isinstance(one, Choice):
        return CategoricalDistribution(one.values)
    if one.is_integer:
        return IntDistribution(one.low, one.high, log=one.log, step=one.step or 1)
    return FloatDistribution(float(one.low), float(one.high), log=one.log, step=one.step)


def _state(name: str) -> Any:
    from optuna.trial import TrialState

    return TrialState[name]


def _plain(params: dict[str, Any], space: Space) -> dict[str, Any]:
    """The values of a trial, in the order of the command line."""
    return {key: params[key] for key in space.searched}


def search_names(spaces: Sequence[Space]) -> list[str]:
    """What tells spaces apart: their fixed settings, such as `loss-dpo`, or else their ranges too.
    An empty name for one alone."""
    if len(spaces) == 1:
        return [""]
    fixed = [space.words({}) for space in spaces]
    if len(set(map(tuple, fixed))) == len(spaces):
        return folder_names(fixed)
    ranges = [
        [f"{key}={'-'.join(one.corners())}" for key, one in space.searched.items()]
        for space in spaces
    ]
    return folder_names([a + b for a, b in zip(fixed, ranges, strict=True)])


def folder_name(search: Search, trial: Any) -> str:
    """`[SEARCH_]trial-003_lr-1.2e-05`: numbers of three digits, since the trial's own tells folders
    apart."""
    values = {
        key: f"{value:.3g}" if isinstance(value, float) else value
        for key, value in _plain(trial.params, search.space).items()
    }
    [settings] = folder_names([[f"{key}={value}" for key, value in values.items()]])
    return "_".join(filter(None, (search.name, f"trial-{trial.number:03d}", settings)))


def progress(search: Search, batch: Sequence[Any], left: int, seconds: float) -> str:
    """A line about the trials that have just ended."""
    trials = search.study.get_trials(deepcopy=False)
    ended = ", ".join(
        f"trial {trial.number}: {_shown(trials[trial.number].values)}" for trial in batch
    )
    best = "".join(
        f"; best {_shown(trial.values)} (trial {trial.number})" for trial in best_trials(search)[:1]
    )
    rest = f"; {left} left, about {math.ceil(seconds / 60)} min" if left else ""
    return f"{search.study.study_name}: {ended}{best}{rest}"


def _shown(values: Sequence[float] | None) -> str:
    return "failed" if values is None else ", ".join(f"{value:.4g}" for value in values)


def best_trials(search: Search) -> list[Any]:
    """The best trial; with several objectives, all to which none is better in each."""
    trials = sorted(search.study.best_trials, key=lambda trial: trial.number)
    return trials[:1] if len(search.study.directions) == 1 else trials


def write_results(searches: Sequence[Search], folder: Path, objectives: Sequence[str]) -> str:
    """Write optimization_results.yaml; returns its content as lines for the console.

    Objectives are those of the dev prompts, which chose, and biased upwards for the best run; the
    numbers of the test prompts stand beside them.
    """
    results, lines = {}, []
    for search in searches:
        best = best_trials(search)
        on_test = [_on_test(folder / folder_name(search, trial), objectives) for trial in best]
        results[search.study.study_name] = _results(search, best, on_test)
        for trial, numbers in zip(best, on_test, strict=True):
            settings = " ".join(f"{key}={value}" for key, value in trial.params.items())
            test = f" ({_shown(numbers)} on test prompts)" if numbers else ""
            lines.append(
                f"best of {search.study.study_name}: {_shown(trial.values)}{test} with {settings}"
                f" ({folder / folder_name(search, trial)})"
            )
        if not best:
            lines.append(f"{search.study.study_name}: no run has finished")
    [first, *others] = results.values()
    with atomic_write(folder / RESULTS) as f:
        f.write(OmegaConf.to_yaml(OmegaConf.create(results if others else first)))
    return "\n".join(lines)


def _on_test(run_dir: Path, objectives: Sequence[str]) -> list[float] | None:
    """The objectives of a run on its test prompts; None where it has no such numbers."""
    summary = read_summary(run_dir)
    keys = [number_on(TEST, name) for name in objectives]
    return [summary[key] for key in keys] if all(key in summary for key in keys) else None


def _results(search: Search, best: Sequence[Any], on_test: Sequence[list[float] | None]) -> dict:
    if len(search.study.directions) == 1:
        [trial] = best or [None]
        params = _plain(trial.params, search.space) if trial else {}
        value = trial.value if trial else None
        of_test = {"test_value": on_test[0][0]} if on_test and on_test[0] else {}
        return {"name": "optuna", "best_params": params, "best_value": value, **of_test}
    solutions = [
        {"params": _plain(trial.params, search.space), "values": list(trial.values)}
        | ({"test_values": numbers} if numbers else {})
        for trial, numbers in zip(best, on_test, strict=True)
    ]
    return {"name": "optuna", "solutions": solutions}
