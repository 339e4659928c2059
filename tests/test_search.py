"""Searches with a budget: the space in hydra's words, and the sweeper on Optuna or, where that is
not installed, on a fake of the few functions that it calls."""

import importlib.util
import math
import sys
from types import ModuleType, SimpleNamespace

import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf

from preflab.settings.keys import CONFIG_DIR
from preflab.sweeps import search as search_module
from preflab.sweeps.search import OptunaSearch, folder_name, search_names
from preflab.sweeps.space import Choice, Interval, space_of
from utils import ConfigError, DataError

LR = "lr=tag(log, interval(1e-5, 1e-3))"


# --------------------------------------------------------------------------------------- the space


@pytest.mark.parametrize(
    ("word", "searched"),
    [
        ("loss=dpo,ipo", Choice(("dpo", "ipo"))),
        ("seed=choice(2,1)", Choice(("2", "1"))),
        ("lr=interval(1e-5,1e-3)", Interval(1e-5, 1e-3)),
        (LR, Interval(1e-5, 1e-3, log=True)),
        ("batch_size=int(interval(8,64))", Interval(8, 64)),
        ("batch_size=range(8,64,8)", Interval(8, 56, step=8)),
        ("max_grad_norm=range(0.5,2.0,0.5)", Interval(0.5, 1.5, step=0.5)),
        ("batch_size=range(8,9)", Choice(("8",))),
        ("datasets=[hh],[shp]", Choice(("[hh]", "[shp]"))),
    ],
)
def test_the_space_is_what_hydra_users_write(word, searched):
    space = space_of([word, "exp_name='a b'"])
    [(key, read)] = space.searched.items()
    assert key == word.split("=")[0] and read == searched
    if isinstance(read, Interval):
        assert read.is_integer == (key == "batch_size")
    assert space.fixed == {"exp_name": "'a b'"}


def test_a_later_word_replaces_an_earlier_one_and_the_corners_hold_every_end():
    space = space_of(["lr=1,2", "loss=dpo,ipo", "lr=interval(0.1,0.2)", "seed=0,1", "seed=7"])
    assert space.fixed == {"seed": "7"} and list(space.searched) == ["loss", "lr"]
    corners = space.corners()
    assert ["seed=7", "loss=ipo", "lr=0.1"] in corners and [
        "seed=7",
        "loss=dpo",
        "lr=0.2",
    ] in corners
    assert space.words({"loss": "ipo", "lr": 1.5e-07})[-1] == "lr=1.5e-07"


@pytest.mark.parametrize("word", ["lr=interval(2,1)", "lr=tag(log,interval(0,1))"])
def test_an_interval_without_numbers_is_refused(word):
    with pytest.raises(ConfigError, match="an interval"):
        space_of([word])


def test_searches_are_named_by_their_loss():
    spaces = [space_of([f"loss={loss}", LR]) for loss in ("dpo", "odpo")]
    assert search_names(spaces) == ["loss-dpo", "loss-odpo"] and search_names(spaces[:1]) == [""]
    same = [space_of([f"lr=interval({a},1)"]) for a in (0.1, 0.2)]
    assert search_names(same) == ["lr-0.1-1.0", "lr-0.2-1.0"]


# ------------------------------------------------------------------------------------- the sweeper


class FakeTrial(SimpleNamespace):
    @property
    def value(self):
        return self.values[0]


class FakeStudy:
    """Proposes points that go up in each dimension, or the first choice."""

    def __init__(self, study_name, directions):
        self.study_name = study_name
        self.directions = [SimpleNamespace(name=name.upper()) for name in directions]
        self.trials = []

    def get_trials(self, deepcopy=True):
        return list(self.trials)

    def ask(self, space):
        n = len(self.trials)
        params = {
            key: of.choices[n % len(of.choices)] if hasattr(of, "choices") else of.low + n / 1024
            for key, of in space.items()
        }
        state = SimpleNamespace(is_finished=lambda: False)
        self.trials.append(FakeTrial(number=n, params=params, state=state, values=None))
        return self.trials[-1]

    def tell(self, number, values=None, state=None):
        trial = self.trials[number]
        trial.state = SimpleNamespace(is_finished=lambda: True)
        trial.values = None if values is None else values if isinstance(values, list) else [values]

    @property
    def best_trials(self):
        sign = -1 if self.directions[0].name == "MAXIMIZE" else 1
        done = [trial for trial in self.trials if trial.values]
        return sorted(done, key=lambda trial: sign * trial.values[0])[:1]


def fake_optuna(monkeypatch):
    studies = {}

    def create_study(*, storage, study_name, sampler, directions, load_if_exists):
        return studies.setdefault((storage, study_name), FakeStudy(study_name, directions))

    def distribution(low, high, log, step):
        return SimpleNamespace(low=low, high=high)

    modules = {
        "optuna": {"create_study": create_study, "samplers": SimpleNamespace()},
        "optuna.logging": {"set_verbosity": lambda level: None, "WARNING": 30},
        "optuna.storages": {"JournalStorage": lambda backend: backend},
        "optuna.storages.journal": {"JournalFileBackend": lambda path: path},
        "optuna.trial": {"TrialState": {"FAIL": "FAIL"}},
        "optuna.distributions": {
            "CategoricalDistribution": lambda choices: SimpleNamespace(choices=choices),
            "IntDistribution": distribution,
            "FloatDistribution": distribution,
        },
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["optuna"].logging = sys.modules["optuna.logging"]
    monkeypatch.setattr(OptunaSearch, "make_sampler", lambda self, number: None)


@pytest.fixture(params=["fake", "real"])
def optuna(request, monkeypatch):
    if request.param == "real":
        return pytest.importorskip("optuna")
    return fake_optuna(monkeypatch)


class Launcher:
    """Runs whose objective is -|log10 lr + 4|, best at lr=1e-4. stops_at: number of the run at
    which a signal arrives. fails: the number of a run that fails."""

    def __init__(self, stops_at=None, fails=None):
        self.stops_at, self.fails, self.launched = stops_at, fails, []

    def launch(self, jobs, initial_job_idx):
        results = []
        for job in jobs:
            if len(self.launched) == self.stops_at:
                raise SystemExit(143)
            settings = dict(word.split("=", 1) for word in job)
            self.launched.append(settings)
            result = JobReturn(overrides=job, status=JobStatus.COMPLETED)
            result.return_value = -abs(math.log10(float(settings["lr"])) + 4)
            if settings.get("loss") == "ipo":
                result.return_value = None
            if len(self.launched) - 1 == self.fails:
                result.status, result.return_value = JobStatus.FAILED, DataError("no such file")
            results.append(result)
        return results


@pytest.fixture
def searched(monkeypatch, tmp_path):
    """Run a search with a launcher; returns its results."""
    monkeypatch.setattr(sys, "argv", ["train.py", "-m"])
    monkeypatch.setattr(OptunaSearch, "validate_batch_is_legal", lambda self, batch: None)

    def no_report(folder):
        raise DataError("no runs")

    monkeypatch.setattr("preflab.reports.sweep.report_folder", no_report)
    defaults = OmegaConf.load(CONFIG_DIR / "hydra/sweeper/optuna.yaml")
    of_sampler = OmegaConf.load(CONFIG_DIR / "hydra/sweeper/sampler/tpe.yaml")

    def run(launcher, *words, objective="policy_reward", **settings):
        given = {k: v for k, v in defaults.items() if k not in ("defaults", *settings)}
        given = {k: v for k, v in given.items() if not k.startswith("_")} | settings
        given["sampler"] = OmegaConf.create(
            given.get("sampler") or OmegaConf.merge(of_sampler, {"n_startup_trials": 3})
        )
        sweeper = OptunaSearch(**given)
        hydra = {"sweep": {"dir": str(tmp_path / "sweep")}, "overrides": {"hydra": []}}
        sweeper.config = OmegaConf.create({"hydra": hydra, "objective": objective})
        sweeper.hydra_context = SimpleNamespace(config_loader=None)
        sweeper.launcher = launcher
        return sweeper.sweep(list(words))

    return run


def test_a_search_spends_its_budget_and_says_what_was_best(optuna, searched, tmp_path, capsys):
    launcher = Launcher()
    assert len(searched(launcher, LR, "loss=dpo", n_trials=6)) == 6
    best = min(launcher.launched, key=lambda job: abs(math.log10(float(job["lr"])) + 4))
    results = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert results.best_params == {"lr": float(best["lr"])} and results.name == "optuna"
    assert len({job["hydra.sweep.subdir"] for job in launcher.launched}) == 6
    assert launcher.launched[2]["hydra.sweep.subdir"].startswith("'trial-002_lr-")
    assert "3 left" in capsys.readouterr().out
    assert searched(Launcher(), LR, "loss=dpo", n_trials=6) == []
    assert len(searched(Launcher(), LR, "loss=dpo", n_trials=7)) == 1


def test_numbers_of_test_prompts_stand_beside_the_objectives(optuna, searched, tmp_path, capsys):
    class Writing(Launcher):
        def launch(self, jobs, initial_job_idx):
            for job in jobs:
                name = dict(w.split("=", 1) for w in job)["hydra.sweep.subdir"].strip("'")
                folder = tmp_path / "sweep" / name
                folder.mkdir(parents=True)
                (folder / "summary.json").write_text(
                    '{"finished": true, "test/policy_reward": 0.25}'
                )
            return super().launch(jobs, initial_job_idx)

    searched(Writing(), LR, "loss=dpo", n_trials=2)
    results = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert results.test_value == 0.25 and results.best_value < 0
    assert "(0.25 on test prompts)" in capsys.readouterr().out


def test_a_stopped_search_goes_on_with_the_run_it_was_in(optuna, searched, tmp_path):
    whole, begun, rest = Launcher(), Launcher(stops_at=4), Launcher()
    searched(whole, LR, n_trials=6, storage=str(tmp_path / "whole"))
    with pytest.raises(SystemExit):
        searched(begun, LR, n_trials=6)
    searched(rest, LR, n_trials=6)
    assert begun.launched + rest.launched == whole.launched


def test_each_loss_has_a_search_of_its_own(optuna, searched, tmp_path):
    launcher = Launcher()
    grids = ("loss=dpo loss.beta=0.1,0.5", "loss=odpo loss.alpha=interval(0,1)")
    searched(launcher, LR, *grids, n_trials=2)
    assert [job["loss"] for job in launcher.launched] == ["dpo", "dpo", "odpo", "odpo"]
    assert ["loss.alpha" in job for job in launcher.launched] == [False, False, True, True]
    results = OmegaConf.load(tmp_path / "sweep" / "optimization_results.yaml")
    assert list(results) == ["loss-dpo", "loss-odpo"]


def test_failed_runs_and_runs_without_an_objective_are_listed(optuna, searched, capsys):
    with pytest.raises(SystemExit) as ended:
        searched(Launcher(fails=1), LR, "loss=dpo", n_trials=3)
    said = capsys.readouterr()
    assert ended.value.code == 1 and "no such file" in said.err and "trial 1: failed" in said.out
    with pytest.raises(SystemExit):
        searched(Launcher(), LR, "loss=ipo", n_trials=1, study_name="another")
    said = capsys.readouterr()
    assert "objective=policy_reward is not in" in said.err
    assert "no run has finished" in said.out


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["lr=1e-4"], {}, "nothing to search"),
        (["lr=interval(-1,1)"], {}, "lr=-1.0 must be a number above 0"),
        ([LR, "loss=dpo,odpo", "loss.alpha=0,1"], {}, "settings of loss=dpo"),
        ([LR], {"n_trials": 0}, "hydra.sweeper.n_trials=0: an integer from 1"),
        ([LR], {"direction": "up"}, "maximize or minimize"),
        ([LR], {"sampler": {"_target_": "optuna.samplers.CmaEsSampler"}}, "unpickles what"),
        (
            [LR],
            {"sampler": {"_target_": "x.Of", "base": {"_target_": "optuna.samplers.CmaEsSampler"}}},
            "use tpe or random",
        ),
        ([LR], {"objective": ["kl", "eval_loss"]}, "each objective needs a direction"),
    ],
)
def test_what_cannot_be_searched_is_refused_before_anything_runs(
    monkeypatch, searched, capsys, words, settings, message
):
    fake_optuna(monkeypatch)
    launcher = Launcher()
    with pytest.raises(SystemExit) as ended:
        searched(launcher, *words, **settings)
    assert ended.value.code == 2 and message in capsys.readouterr().err
    assert not launcher.launched


def test_without_optuna_the_command_says_what_to_install(monkeypatch, searched, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.setattr(search_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        searched(Launcher(), LR)
    assert "pip install -r requirements/search.txt" in capsys.readouterr().err


def test_names_of_folders_hold_short_numbers():
    space = space_of([LR, "loss.beta=0.1,0.5"])
    trial = SimpleNamespace(number=12, params={"loss.beta": "0.5", "lr": 0.000123456789})
    name = folder_name(SimpleNamespace(name="loss-dpo", space=space), trial)
    assert name == "loss-dpo_trial-012_lr-0.000123_loss.beta-0.5"
