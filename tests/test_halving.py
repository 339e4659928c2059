"""Successive halving in studies: which trials continue, against the full grid."""

import json
import math
import shutil

import numpy as np
import pytest
from conftest import write_jsonl
from omegaconf import OmegaConf
from test_study import make_study

from preflab.distributed.signals import StopSignals
from preflab.reports.selection import TEST, Evaluation, part_of
from preflab.study import halving, work
from preflab.study.estimate import _halving
from preflab.study.halving import count_stages, due, examples_of, stages, survivors
from preflab.study.measures import load_runs, table_of_measure, trials_of
from preflab.study.page import write_study
from preflab.study.work import Worker, begin, missing
from utils import ConfigError, DataError

PROMPTS = [f"prompt {i}" for i in range(40)]
LENGTH, EVERY = 1200, 100
SETTINGS = [
    *("datasets=[{work}/data-{seed}]", "model=tiny", "n_epochs=null", f"n_examples={LENGTH}"),
    *(f"eval_every={EVERY}", "batch_size=50"),
]
ONE = {"a": {"settings": ["loss=dpo"]}}
BETAS = (0.05, 0.1, 0.3, 0.5, 1, 2)


def evaluation(examples: int, kl: float, reward: float) -> Evaluation:
    values = {"kl": dict.fromkeys(PROMPTS, kl), "policy_reward": dict.fromkeys(PROMPTS, reward)}
    return Evaluation({"examples": examples}, values)


def curve(*points: tuple[float, float]) -> list[Evaluation]:
    return [evaluation(i, *point) for i, point in enumerate(points)]


def test_trials_are_compared_at_the_largest_kl_that_all_have_reached():
    trials = {
        "fast": curve((0, 0), (1.0, 0.5), (4.0, 2.0)),  # the highest reward at its own end
        "efficient": curve((0, 0), (0.5, 0.6), (1.0, 0.9)),
        "middling": curve((0, 0), (0.8, 0.5), (1.5, 0.7)),
        "still": curve((0, 0), (0.005, 5.0)),  # has hardly moved, and is not compared
    }
    assert survivors(trials, 1, largest_kl=1.0) == {"efficient"}
    assert survivors(trials, 2, largest_kl=1.0) == {"efficient", "middling"}
    # Where the study asks about larger KLs, the one that has gone furthest continues too.
    assert survivors(trials, 1, largest_kl=None) == {"efficient", "fast"}
    assert survivors(trials, 2, largest_kl=4.0) == {"efficient", "middling", "fast"}
    assert survivors({"a": curve((0, 0)), "b": curve((0, 1))}, 1, 1.0) == {"b"}
    assert survivors(trials, 1, largest_kl=1.0, least_kl=0.0) == {"still", "fast"}
    assert survivors(trials, 1, largest_kl=1.0, least_kl=0.9) == {"efficient"}
    slow = trials | {"still": curve((0, 0), (0.5, 5.0))}
    assert survivors(slow, 2, largest_kl=1.0, least_kl=0.6) == {"efficient", "middling"}


def planted_run(study, run, config, rng_seed=0):
    """Write a run whose reward follows a (sqrt(KL) - KL / 8), with an efficiency a that depends on
    beta, and noise of prompts. A smaller beta goes further."""
    beta = float(config.loss.beta)
    efficiency = {0.05: 0.8, 0.1: 0.9, 0.3: 1.3, 0.5: 1.0, 1: 0.9, 2: 0.7}[beta]
    efficiency += 0.3 * (config.loss.name == "ipo")
    folder = study.runs_dir / run.name
    rng = np.random.default_rng([rng_seed, run.seed, int(100 * beta)])
    rows, samples = [], []
    for examples in range(0, LENGTH + 1, EVERY):
        kl = 8.0 * (0.05 / beta) ** 0.3 * examples / LENGTH
        gain = efficiency * (math.sqrt(kl) - kl / 8)
        rewards = gain + rng.normal(0, 0.2, len(PROMPTS)) * (kl > 0)
        if examples <= config.n_examples:
            row = {"samples_eval/kl": kl, "samples_eval/policy_reward": rewards.mean()}
            rows.append({"split": "eval", "examples": examples} | row)
            samples += [
                {
                    "prompt": prompt,
                    "examples": examples,
                    "kl": kl,
                    "policy_reward": {"r": reward},
                    "reference_reward": {"r": 0.0},
                }
                for prompt, reward in zip(PROMPTS, rewards.tolist(), strict=True)
            ]
    write_jsonl(folder / "metrics.jsonl", rows)
    write_jsonl(folder / "samples.jsonl", samples)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    summary = {"finished": True, "examples": int(config.n_examples)}
    (folder / "summary.json").write_text(json.dumps(summary))


def quick_compose(overrides, config_dir=None):
    """The keys that are looked at, without the two tenths of a second that hydra takes."""
    given = dict(word.split("=", 1) for word in overrides)
    config = {"lr_schedule": "constant", "warmup_steps": 5, "patience": None}
    config |= {"do_first_eval": True, "sample_during_eval": True}
    config |= {"temperature": 1.0, "topp": 1.0, "top_k": None, "min_p": None}
    config |= {key: int(given[key]) for key in ("n_examples", "eval_every", "batch_size")}
    return OmegaConf.create(
        {"n_epochs": None, "loss": {"name": given["loss"], "beta": given["loss.beta"]}} | config
    )


@pytest.fixture
def run_study(tmp_path, monkeypatch):
    """Run a study with planted runs; returns it and {folder: how far each start went}."""

    def run(name: str, **changes):
        study = make_study(
            tmp_path / name,
            grid={"loss.beta": list(BETAS)},
            settings=SETTINGS,
            seeds=[1],
            compare={"reward@kl=1": 0.1},
            **changes,
        )
        starts: dict[str, list[int]] = {}

        def execute(config, folder, stop):
            starts.setdefault(folder.name, []).append(int(config.n_examples))
            [planned] = [run for run in study.runs() if run.name == folder.name]
            planted_run(study, planned, config)

        monkeypatch.setattr(work, "execute", execute)
        for module in (work, halving):
            monkeypatch.setattr(module, "compose", quick_compose)
        monkeypatch.setattr(work, "validate", lambda config: None)
        criterion = begin(study, amended=False)
        Worker(study, criterion, 0, "one", limit=3).work(StopSignals())
        assert missing(study)  # what a stopped worker has left, another one takes
        Worker(study, criterion, 1, "two").work(StopSignals())
        return study, starts

    return run


def best_trials(study) -> dict[tuple, str]:
    """The trial that dev chooses, by loss and seed."""
    best = {}
    for trial in sorted(trials_of(study, load_runs(study)), key=lambda trial: trial.dev):
        best[trial.loss, trial.seed] = trial.trial
    return best


def test_halving_finds_the_winner_of_the_full_grid_with_fewer_runs(run_study):
    full, of_full = run_study("full")
    halved, starts = run_study("halved", halving={"rungs": [0.25, 0.5], "keep": 0.5})
    assert set(map(tuple, of_full.values())) == {(LENGTH,)} and len(of_full) == 12
    assert not missing(halved) and not missing(full)
    # Six trials up to 300 examples, three up to 600, two to the end: of each loss and seed.
    ends = sorted(tuple(of_run) for of_run in starts.values())
    assert ends == sorted(2 * [*3 * [(300,)], (300, 600), *2 * [(300, 600, 1200)]])
    assert count_stages(halved) == (22, 22)
    assert best_trials(halved) == best_trials(full)
    assert set(best_trials(full).values()) == {"loss.beta=0.3"}  # the most efficient one
    at_kl = [table_of_measure(study, load_runs(study), "reward@kl=1") for study in (full, halved)]
    for loss in ("a", "b"):
        of_full, of_halved = (np.mean(list(table[loss]["1"].values())) for table in at_kl)
        assert of_halved == pytest.approx(of_full, abs=0.1)
    plan = "\n".join(_halving(halved))
    assert "6 trials up to 300 examples, 3 trials up to 600 examples, 2 trials up to 1,200" in plan
    page = write_study(halved)
    assert "## Over-optimisation" in page and (halved.work / "report.html").exists()
    assert "| a | loss.beta=0.3 | 1 | 1 | 1 |" in page and "| a | loss.beta=2 | 1 | 0 | 0 |" in page
    assert "took 54% of the examples" in page  # 6 * 300 + 3 * 300 + 2 * 600 of 6 * 1200


def test_a_failed_trial_does_not_hold_up_the_others_and_is_tried_again(run_study):
    study, _ = run_study("study", halving={"rungs": [0.5], "keep": 0.5}, losses=ONE)
    cell = study.cells()[0]
    assert not due(study, cell)
    gone = next(run for run in cell if examples_of(study, run) == 600)
    (study.runs_dir / gone.name / "summary.json").unlink()  # killed before its rung's summary
    assert due(study, cell) == [gone.until(600)]
    assert due(study, cell, lambda run: run.name == gone.name) == []
    assert due(study, cell, lambda run: True) == []
    best = next(run for run in cell if run.trial == "loss.beta=0.3")
    (study.runs_dir / gone.name / "summary.json").write_text('{"finished": true, "examples": 600}')
    (study.runs_dir / best.name / "summary.json").unlink()  # killed while it was continued
    assert due(study, cell) == [best.until(LENGTH)]


@pytest.mark.parametrize("file", ["metrics.jsonl", "config.yaml", "summary.json", "samples.jsonl"])
def test_damage_to_a_trial_stops_no_other_cell(run_study, monkeypatch, capsys, file):
    study, _ = run_study("study", halving={"rungs": [0.5], "keep": 0.5})
    damaged, *_ = of_loss = study.cells()[0]
    folder = study.runs_dir / damaged.name
    if file in ("metrics.jsonl", "config.yaml"):  # of a run that is being continued
        (folder / "summary.json").unlink()
    (folder / file).write_text('{"examples": null, "finished": true}\n[]\n{}\n')
    shutil.rmtree(study.runs_dir / study.cells()[1][0].name)
    assert {run.name for run in missing(study)} >= {damaged.name, study.cells()[1][0].name}
    assert 0 < count_stages(study)[0] < count_stages(study)[1]
    started = []

    def execute(config, folder, stop):
        started.append(folder.name)
        if folder.name == damaged.name:
            raise DataError(f"{folder / file}: damaged")  # as a real run does
        [planned] = [run for run in study.runs() if run.name == folder.name]
        planted_run(study, planned, config)

    monkeypatch.setattr(work, "execute", execute)
    Worker(study, begin(study, amended=False), 0, "last").work(StopSignals())
    assert study.cells()[1][0].name in started  # of the other loss
    assert capsys.readouterr().out.count(f"{folder / file}") == 1
    assert [run for run in missing(study) if run.name in {of.name for of in of_loss}]


def test_a_share_of_the_trials_is_rounded_up_and_rungs_are_at_evaluations(tmp_path):
    study = make_study(
        tmp_path, settings=SETTINGS, halving={"rungs": [0.26, 0.5], "keep": 0.34}, seeds=[1]
    )
    assert study.halving.counts(6) == [6, 3, 2] and study.halving.counts(3) == [3, 2, 1]
    assert stages(study, study.runs()[0]) == [300, 600, 1200]
    assert study.halving.least_kl == 0.01


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"halving": {"rungs": [0.5]}}, "it needs rungs, keep"),
        ({"halving": {"rungs": [0.5, 0.25], "keep": 0.5}}, "growing shares"),
        ({"halving": {"rungs": [1.0], "keep": 0.5}}, "growing shares"),
        ({"halving": {"rungs": [], "keep": 0.5}}, "growing shares"),
        ({"halving": {"rungs": [0.5], "keep": 1}}, "between 0 and 1"),
        ({"halving": {"rungs": [0.5], "keep": 0.5, "least_kl": 1}}, "least_kl=1 must be"),
        ({"halving": {"rungs": [0.5], "keep": 0.5, "least": 0}}, "may have least_kl"),
        ({"halving": {"rungs": [0.5], "keep": 0.5}, "grid": {}}, "has a single trial"),
    ],
)
def test_halving_that_cannot_work_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_study(tmp_path, **changes)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("n_examples=null", "set n_examples"),
        ("eval_every=120", "no multiple of batch_size"),
        ("lr_schedule=cosine", "depend on the length"),
        ("warmup_steps=0.1", "depend on the length"),
        ("eval_every=1200", "no evaluations at the rungs"),
        ("patience=2", "set patience=null"),
        ("do_first_eval=false", "do_first_eval=true"),
        ("sample_during_eval=false", "sample_during_eval=true"),
        ("temperature=0.7", "temperature=1"),
        ("top_k=20", "top_k=null"),
    ],
)
def test_runs_that_cannot_be_stopped_and_continued_are_refused(tmp_path, setting, message):
    key = setting.split("=")[0]
    settings = [*(s for s in SETTINGS if not s.startswith(f"{key}=")), setting]
    study = make_study(tmp_path, settings=settings, halving={"rungs": [0.5], "keep": 0.5})
    with pytest.raises(ConfigError, match=message):
        stages(study, study.runs()[0])


def test_dev_prompts_choose_which_trials_go_on():
    def on_sides(dev: float, test: float) -> list[Evaluation]:
        rewards = {p: test if part_of(p) == TEST else dev for p in PROMPTS}
        end = Evaluation({"examples": 1}, {"kl": dict.fromkeys(PROMPTS, 1.0)})
        end.values["policy_reward"] = rewards
        return [evaluation(0, 0.0, 0.0), end]

    assert survivors({"dev": on_sides(2, 0), "test": on_sides(1, 9)}, 1, 1.0) == {"dev"}
