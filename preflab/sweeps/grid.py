"""The sweeper of `-m`: all runs of some grids, none of which stops the others."""

import sys
from collections.abc import Sequence
from pathlib import Path

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from omegaconf import OmegaConf

from preflab.settings.command_line import parse_flags, sources_of
from preflab.settings.overrides import check_overrides, fail
from preflab.settings.sweep_words import folder_names, grids_of, runs_of
from utils import ConfigError, DataError, PrefLabError, first_line


class Grids(BasicSweeper):
    """Runs every combination of every grid, lists what failed, and compares the runs.

    words: settings of the sweep beside those of the command line; one of them may be a whole grid.
    max_batch_size: largest number of runs that the launcher gets at once. params: more keys to
    sweep over, as hydra's own sweeper has them.
    """

    def __init__(self, words: Sequence[str], max_batch_size: int | None, params: dict | None):
        super().__init__(max_batch_size, params)
        self.words = list(words)

    def sweep(self, arguments: list[str]) -> list[JobReturn]:
        """Run everything. Leaves with exit code 2 before the first run where one cannot be
        composed, and with 1 at the end where a run failed."""
        try:
            runs = self.runs([*self._parse_config(), *arguments, *self.words])
            check_runs(runs)
            self.validate_batch_is_legal(runs)
        except (PrefLabError, HydraException) as error:
            fail(error)
        names = folder_names(runs)
        folder = self.begin_folder()
        print(f"{len(runs)} runs in {folder}", flush=True)
        returns: list[JobReturn] = []
        size = self.max_batch_size or len(runs)
        for begin in range(0, len(runs), size):
            returns += self.launch(runs[begin : begin + size], names[begin:], len(returns))
        finish(folder, names, returns)
        return returns

    def runs(self, words: Sequence[str]) -> list[list[str]]:
        """The settings of each run."""
        loader = self.hydra_context.config_loader
        return [run for grid in grids_of(words) for run in runs_of(grid, loader)]

    def begin_folder(self) -> Path:
        """The folder of the sweep, with the settings of hydra in it."""
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        return folder

    def launch(
        self, runs: Sequence[list[str]], names: Sequence[str], first: int
    ) -> list[JobReturn]:
        """Run a batch in the folders `names` of the sweep's. first: the number of its first run."""
        given = any("hydra.sweep.subdir=" in o for o in self.config.hydra.overrides.hydra)
        jobs = [
            [*run, *([] if given else [f"hydra.sweep.subdir='{name}'"])]
            for run, name in zip(runs, names, strict=False)
        ]
        return list(self.launcher.launch(jobs, initial_job_idx=first))


def check_runs(runs: Sequence[Sequence[str]]) -> None:
    """Refuse a sweep in which some run has a setting that its loss, reward or recipe does not have.

    Raises ConfigError, which says how each loss gets settings of its own.
    """
    sources = sources_of(parse_flags(sys.argv[1:]))
    for run in runs:
        try:
            check_overrides(run, sources)
        except ConfigError as error:
            raise ConfigError(
                f"{error}. In a sweep, settings that only some losses have"
                " go with their loss into one word in quotes:"
                " -m loss=dpo 'loss=odpo loss.alpha=0.5,1.0' seed=0,1"
            ) from error


def finish(folder: Path, names: Sequence[str], returns: Sequence[JobReturn]) -> None:
    """Print the comparison of the runs and what failed; exit code 1 if anything did."""
    from preflab.reports.sweep import report_folder  # matplotlib takes a second to import

    try:
        print(report_folder(folder)[0])
        print(folder / "report.html", flush=True)
    except DataError:
        pass  # no run left a folder, as with function=plan
    failed = [
        (name, error_of(result))
        for name, result in zip(names, returns, strict=True)
        if result.status is not JobStatus.COMPLETED
    ]
    if failed:
        lines = [f"error: {len(failed)} of {len(returns)} runs did not finish:"]
        lines += [f"  {name}: {error}" for name, error in failed]
        print("\n".join(lines), file=sys.stderr, flush=True)
        raise SystemExit(1)


def error_of(result: JobReturn) -> str:
    """Why a run failed, in one line."""
    error = result._return_value  # the property raises it
    return str(error) if isinstance(error, PrefLabError) else first_line(error)
