"""Studies: verdicts in simulations, the file, what is run, and what is chosen and reported."""

import itertools
import json
import math
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, small_run, write_jsonl
from omegaconf import OmegaConf

from experiments.pairs import flip
from preflab.distributed.signals import StopSignals
from preflab.objective.registry import LOSSES
from preflab.reports.distributions import t_cdf
from preflab.reports.run_files import read_jsonl, read_summary
from preflab.reports.runs import Group
from preflab.reports.selection import TEST, part_of
from preflab.reports.statistics import Spread, over_seeds, over_seeds_and_prompts
from preflab.reports.sweep_plots import frontier_figure
from preflab.reports.verdicts import (
    BETTER,
    EQUAL,
    UNDECIDED,
    WORSE,
    check,
    decide,
    holm,
    needed_to_decide,
    p_equal,
    power_of,
)
from preflab.study import work
from preflab.study.estimate import describe_plan
from preflab.study.halving import is_finished
from preflab.study.measures import Trial, best_of, load_runs, table_of_measure
from preflab.study.page import write_study
from preflab.study.plan import FOLDER, parse_study, read_study
from preflab.study.work import Worker, begin, missing, prepare, read_log, write_log
from utils import ConfigError, DataError

# ---------------------------------------------------------------------------------------- verdicts


def test_holm_by_hand():
    adjusted = holm({"a": 0.04, "b": 0.01, "c": 0.03})
    assert adjusted == pytest.approx({"b": 0.03, "c": 0.06, "a": 0.06})
    assert holm({"a": 0.02, "b": None}) == {"a": 0.04, "b": None}


def test_the_four_verdicts():
    base = np.array([-0.01, 0.0, 0.01])
    values = {"up": base + 1, "down": base - 1, "same": base, "noisy": base * 100}
    words = {
        name: verdict.word
        for name, verdict in decide({n: over_seeds(v) for n, v in values.items()}, 0.2).items()
    }
    assert words == {"up": BETTER, "down": WORSE, "same": EQUAL, "noisy": UNDECIDED}
    small = over_seeds(base + 0.1)  # different from 0, and smaller than what matters
    assert decide({"small": small}, 0.2)["small"].word == EQUAL
    two = decide({"two": over_seeds([1.0, 1.0]), "none": None}, 0.2)
    assert [v.word for v in two.values()] == [UNDECIDED] * 2 and two["two"].p_differs is None
    one = over_seeds_and_prompts(np.ones((1, 30)) + np.linspace(-0.1, 0.1, 30))
    assert one.low > 0.9  # over prompts, for this one seed
    assert decide({"one": one}, 0.2)["one"].word == UNDECIDED


def test_the_equivalence_test_is_two_one_sided_t_tests():
    estimate = over_seeds([0.1, 0.3, 0.2, 0.4])
    error = np.std([0.1, 0.3, 0.2, 0.4], ddof=1) / 2
    one_sided = [1 - float(t_cdf((0.25 + side * 0.5) / error, 3)) for side in (1,)]
    other = float(t_cdf((0.25 - 0.5) / error, 3))
    assert p_equal(estimate, 0.5) == pytest.approx(max(*one_sided, other))


@pytest.mark.parametrize(
    "spread, seeds, prompts",
    [
        (Spread(4e-4), 5, 0),
        (Spread(0.0, 4e-3, 0.04), 3, 60),
        (Spread(1e-3, 1e-3, 0.02), 5, 40),
    ],
)
def test_a_loss_is_not_different_from_itself_and_a_planted_difference_is_found(
    spread, seeds, prompts
):
    """200 comparisons, in studies of four losses against a baseline."""
    # A margin that makes each comparison right with 80%, and what the simulation says of it.
    margin = 0.001
    while power_of(spread, seeds, prompts, margin, 0.05 / 4) < 0.8:
        margin *= 1.3
    result = check([spread] * 4, seeds, prompts, margin)
    assert result.same_called_different <= 0.05
    assert result.planted_found >= 0.8
    # With a margin that is too small to be found, the same number of them is not called different.
    small = check([spread] * 4, seeds, prompts, margin / 5)
    assert small.same_called_different <= 0.05 and small.planted_found < 0.5


def test_the_seeds_that_would_decide_are_the_least_with_enough_power():
    rng = np.random.default_rng(0)
    estimate = over_seeds_and_prompts(rng.normal(size=(4, 50)) + 0.3 * rng.normal(size=(4, 1)))
    seeds, prompts = needed_to_decide(estimate, 0.3)
    powers = [power_of(estimate.spread, n, 50, 0.3) for n in (seeds - 1, seeds)]
    assert powers[0] < 0.8 <= powers[1]
    if prompts is not None:
        assert power_of(estimate.spread, 4, prompts, 0.3) >= 0.8
    # No number of prompts makes up for few seeds.
    of_seeds = over_seeds_and_prompts(np.repeat(rng.normal(size=(3, 1)), 20, axis=1))
    assert needed_to_decide(of_seeds, 0.1)[1] is None


# ---------------------------------------------------------------------------------------- the file

STUDY = {
    "question": "Is b better than a?",
    "baseline": "a",
    "losses": {"a": {"settings": ["loss=dpo"]}, "b": {"settings": ["loss=ipo"], "seed_offset": 10}},
    "grid": {"loss.beta": [0.1, 0.5]},
    "seeds": [1, 2, 3],
    "settings": ["datasets=[{work}/data-{seed}]", "model=tiny"],
    "choose_within_kl": 1,
    "compare": {"reward@kl=1": 0.1, "win_rate": 0.1, "accuracy": 0.1},
}


def make_study(tmp_path, **changes):
    content = STUDY | {"work": str(tmp_path / "work")} | changes
    text = OmegaConf.to_yaml(OmegaConf.create(content))
    return parse_study("made", text, content, tmp_path / "made.yaml")


def test_the_runs_of_a_study(tmp_path):
    study = make_study(tmp_path, cases={"x": [], "y": ["min_gap=0.5"]})
    runs = study.runs()
    assert len(runs) == 3 * 2 * 2 * 2 and len({run.name for run in runs}) == len(runs)
    order = [(run.case, run.seed) for run in runs]
    assert order == sorted(order)  # a whole case first, and in it whole seeds
    last = runs[-1]
    assert (last.case, last.loss, last.trial, last.seed) == ("y", "b", "loss.beta=0.5", 3)
    assert last.overrides == [
        f"datasets=[{study.work}/data-3]",
        *("model=tiny", "min_gap=0.5", "loss=ipo", "loss.beta=0.5", "seed=13"),
        *("wandb.enabled=false", "report=false", "reference.compare=true"),
    ]
    assert study.drawn_by_seed() == [
        *("the order of the data", "the samples", "the data, with the prompts")
    ]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"baseline": "c"}, "baseline=c is no loss of the study"),
        ({"lossess": {}}, "did you mean losses"),
        ({"losses": {"a": {"grid": {"loss.beta": [1]}}, "b": None}}, "same number of trials"),
        ({"losses": {"a": {"beta": 1}}}, r"losses\.a: \['beta'\]; accepted: settings"),
        ({"compare": {"reward": 0.1}}, "compare: reward; accepted: policy_reward"),
        ({"compare": {"win_rate": 0}}, "smallest difference that matters, a number above 0"),
        ({"seeds": [1, 1]}, "must be different whole numbers"),
        ({"seeds": "1,2"}, "seeds='1,2' has another type"),
        ({"prepare": [{"run": "x"}]}, "each step has `makes` and `run`"),
        ({"prepare": [{"run": "python 'x", "makes": "y"}]}, "`run` a command line"),
        ({"prepare": [{"run": "", "makes": "y"}]}, "`run` a command line"),
        ({"prepare": [{"run": "x", "makes": ""}]}, "`makes` is a file"),
        ({"work": ""}, "work='' must be a text"),
        ({"work": "a\0b"}, "must be a text"),
        ({"question": "\ud800"}, "must be a text"),
        ({"choose_within_kl": -1}, "choose_within_kl=-1 must be a number of nats above 0"),
        ({"choose_within_kl": math.nan}, "must be a number of nats above 0"),
        ({"compare": {"win_rate": 10**400}}, "a number above 0"),
        ({"seeds": []}, "must be different whole numbers"),
        ({"seeds": [True]}, "must be different whole numbers"),
        ({"cases": {}}, "cases has none"),
        ({"cases": {"x": 3}}, r"cases\.x=3 must be a list"),
        ({"grid": {"loss.beta": 0.1}}, r"grid\.loss\.beta=0\.1 must be a list"),
        ({"losses": {"a": {"seed_offset": "x"}}}, "seed_offset='x' must be a whole number"),
        ({"compare": {"win_rate": math.nan}}, "a number above 0"),
        ({"assume": {"kl": {}}}, "assume: kl is not among `compare`"),
        ({"assume": {"win_rate": {"seed": 1}}}, "accepted: numbers of 0 or more for seeds"),
    ],
)
def test_a_file_that_cannot_be_answered_is_refused(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        make_study(tmp_path, **changes)


@pytest.mark.parametrize("text", ["question: ${", "[" * 5000, "a: [", "a: &a [*a]", "[]", ""])
def test_a_file_that_is_no_study_is_refused(tmp_path, text):
    path = tmp_path / "made.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"made\.yaml"):
        read_study(str(path))


def test_a_study_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="did you mean quick"):
        read_study("quikc")


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.yaml")))
def test_a_shipped_study_is_accepted(name):
    study = read_study(name)
    run = study.runs()[-1]
    work.compose_run(study, run, FOLDER / f"{name}.yaml")
    assert all("{" not in text for step in study.steps_of(run) for text in (step.makes, step.run))


def test_a_changed_criterion_is_refused_or_said(tmp_path):
    study = make_study(tmp_path)
    first = begin(study, amended=False)
    assert first.name == "study.yaml" and first.read_text() == study.text
    assert begin(study, amended=False) == first
    changed = make_study(tmp_path, compare={"win_rate": 0.5})
    with pytest.raises(ConfigError, match=r"differs from .*study\.yaml.* or give --amended"):
        begin(changed, amended=False)
    assert begin(changed, amended=True).name == "study-2.yaml"
    assert begin(study, amended=False) == first  # back to the one that runs were started with


# ------------------------------------------------------------------------------------------ running


def write_run(study, run, rewards, kls=(0.0, 2.0), wins=1.0):
    """The folder of a finished run with two evaluations. rewards: of the second one on (dev, test);
    the first has a reward of 0."""
    folder = study.runs_dir / run.name
    prompts = [f"prompt {i}" for i in range(12)]
    rows, samples = [], []
    for examples, kl in zip((0, 64), kls, strict=True):
        of_prompts = {p: examples and rewards[part_of(p) == TEST] for p in prompts}
        rows.append(
            {
                "split": "eval",
                "examples": examples,
                "samples_eval/kl": kl,
                "samples_eval/policy_reward": sum(of_prompts.values()) / len(prompts),
                "rewards_eval/accuracies": 0.25,
                "test/eval_accuracy": 0.75,
            }
        )
        samples += [
            {
                "prompt": p,
                "examples": examples,
                "kl": kl,
                "policy_tokens": 7,
                "policy_reward": {"r": reward},
                "reference_reward": {"r": reward - 1 if wins else reward},
            }
            for p, reward in of_prompts.items()
        ]
    write_jsonl(folder / "metrics.jsonl", rows)
    write_jsonl(folder / "samples.jsonl", samples)
    config = {"loss": {"name": "dpo"}, "seed": run.seed}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    criterion = {"hash": study.hash}
    (folder / "provenance.json").write_text(json.dumps({"starts": [{"criterion": criterion}]}))
    (folder / "summary.json").write_text(json.dumps({"finished": True}))


def test_workers_run_what_is_missing_and_one_failure_stops_no_other(tmp_path, monkeypatch):
    study = make_study(tmp_path, seeds=[1, 2])
    criterion = begin(study, amended=False)
    taken, bad = [], study.runs()[1].name

    def execute(config, folder, stop):
        taken.append(folder.name)
        assert config.criterion == str(criterion)
        if folder.name == bad:
            raise ValueError("a bad run")
        [run] = [run for run in study.runs() if run.name == folder.name]
        write_run(study, run, (1.0, 1.0))

    monkeypatch.setattr(work, "execute", execute)
    write_run(study, study.runs()[0], (1.0, 1.0))
    Worker(study, criterion, 1, "one", limit=2).work(StopSignals())
    assert len(taken) == 2 and all(name.endswith("seed-2") for name in taken)  # its first seed
    Worker(study, criterion, 0, "one").work(StopSignals())
    Worker(study, criterion, 1, "one").work(StopSignals())  # finds nothing that it may take
    assert sorted(taken) == sorted(run.name for run in study.runs()[1:])
    assert [run.name for run in missing(study)] == [bad]
    plan = describe_plan(study)
    assert "finished: 7; missing: 1" in plan and "s a run (median of 6)" in plan
    [failure] = [row for row in read_jsonl(study.work / "log.jsonl") if row["error"]]
    assert (failure["run"], failure["error"]) == (bad, "ValueError: a bad run")
    bad = None
    Worker(study, criterion, 0, "two").work(StopSignals())  # a later command tries it again
    assert not missing(study)


@pytest.mark.parametrize("summary", ["[]", '{"fini', '{"kl": "high"}'])
def test_a_run_with_a_damaged_summary_is_not_finished_and_stops_no_other(
    tmp_path, monkeypatch, summary
):
    study, taken = make_study(tmp_path, seeds=[1], grid={}), []
    for run in study.runs():
        write_run(study, run, (1.0, 1.0))
    (study.runs_dir / study.runs()[0].name / "summary.json").write_text(summary)

    def execute(config, folder, stop):
        taken.append(folder.name)
        read_summary(folder)  # as a real run does first

    monkeypatch.setattr(work, "execute", execute)
    assert missing(study) == [study.runs()[0]]
    Worker(study, begin(study, amended=False), 0, "s").work(StopSignals())
    [failure] = read_log(study)
    assert taken == [failure["run"]] and "summary.json: not" in failure["error"]


def test_a_log_and_a_provenance_that_are_damaged(tmp_path):
    study = make_study(tmp_path, seeds=[1], grid={})
    study.work.mkdir()
    write_log(study, run="one", session="s", error=None, seconds=1.0)
    with open(study.work / "log.jsonl", "a") as log:
        log.write('[]\n5\n{"seconds": "long"}\n{"run": "two", "sess')  # a full disk
    write_log(study, run="three", session="s", error="e", seconds=2.0)
    assert [row["run"] for row in read_log(study)] == ["one", "three"]
    for run in study.runs():
        write_run(study, run, (1.0, 1.0))
    (study.runs_dir / run.name / "provenance.json").write_text('{"starts": {}}')
    with pytest.raises(DataError, match=r"provenance\.json: not what was written there"):
        write_study(study)


def test_a_step_ends_with_its_worker(tmp_path):
    note = "open('{work}/pid', 'w').write(str(os.getpid()))"
    sleep = f'python -c "import os, time; {note}; time.sleep(99)"'
    study = make_study(tmp_path, prepare=[{"makes": "nothing", "run": sleep}])
    study.work.mkdir()
    if (worker := os.fork()) == 0:
        prepare(study, study.runs()[0], StopSignals())
    note = study.work / "pid"
    assert wait_until(lambda: note.is_file() and note.read_text())
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    assert wait_until(lambda: not Path(f"/proc/{note.read_text()}").exists())


def wait_until(holds, seconds: float = 60.0) -> bool:
    """Whether something holds within some time."""
    end = time.monotonic() + seconds
    while not (held := holds()) and time.monotonic() < end:
        time.sleep(0.05)
    return bool(held)


def test_a_run_of_another_worker_is_left_to_it(tmp_path, monkeypatch):
    study = make_study(tmp_path, seeds=[1], grid={})
    run = study.runs()[0]
    taken = []
    monkeypatch.setattr(work, "execute", lambda config, folder, stop: taken.append(folder.name))
    with work.claimed(study.work / "locks" / f"{run.name}.lock") as is_mine:
        assert is_mine
        Worker(study, tmp_path / "c.yaml", 0, "s").work(StopSignals())
    assert taken == [study.runs()[1].name]


def test_steps_are_made_once_and_a_failed_one_is_named(tmp_path):
    write = "python -c \"open('{work}/{seed}', 'a').write('x')\""
    study = make_study(tmp_path, prepare=[{"makes": "{work}/{seed}", "run": write}])
    study.work.mkdir()
    for run in study.runs():
        prepare(study, run, StopSignals())
    assert [(study.work / str(seed)).read_text() for seed in study.seeds] == ["x"] * 3
    study = make_study(tmp_path, prepare=[{"makes": "nothing", "run": "python -c 'exit(3)'"}])
    with pytest.raises(ConfigError, match=r"python -c 'exit\(3\)': ended with 3"):
        prepare(study, study.runs()[0], StopSignals())


def test_a_real_run_holds_the_hash_of_the_study(tmp_path, imdb_dir, llama_folder):
    settings = small_run(llama_folder, imdb_dir, tmp_path / "unused", "n_examples=8")
    settings = [s for s in settings if not s.startswith(("local_run_dir", "loss", "seed"))]
    arms = {"a": {"settings": ["loss=dpo"]}, "free": {"settings": ["loss=cpo"]}}
    study = make_study(
        tmp_path, losses=arms, grid={}, seeds=[1], settings=settings, compare={"win_rate": 0.1}
    )
    Worker(study, begin(study, amended=False), 0, "s").work(StopSignals())
    run, without_reference = study.runs()
    assert is_finished(study, run), read_jsonl(study.work / "log.jsonl")
    [row, *_] = read_jsonl(study.runs_dir / without_reference.name / "metrics.jsonl")
    assert row["samples_eval/kl"] == 0 == row["samples_eval/reward_gain"]
    [start] = json.loads((study.runs_dir / run.name / "provenance.json").read_text())["starts"]
    assert start["criterion"]["hash"] == study.hash
    assert f"Every run was started with this study file ({study.hash[:12]})" in write_study(study)


# ----------------------------------------------------------------------------- numbers and the page


OF_B = {"loss.beta=0.1": (1.2, 9.0), "loss.beta=0.5": (1.6, 1.5)}


def finished_study(tmp_path):
    """`b` is better by 0.5 on test; on dev its trial with beta 0.5 is the better one, on test the
    other."""
    study = make_study(tmp_path)
    for run in study.runs():
        noise = 0.01 * run.seed
        reward = (1.0, 1.0) if run.loss == "a" else OF_B[run.trial]
        write_run(study, run, tuple(value + noise for value in reward), wins=run.loss == "b")
    return study


def test_dev_chooses_the_trial_and_test_gives_the_numbers(tmp_path):
    study = finished_study(tmp_path)
    runs = load_runs(study)
    at_kl = table_of_measure(study, runs, "reward@kl=1")
    prompts = [p for p in (f"prompt {i}" for i in range(12)) if part_of(p) == TEST]
    for seed in (1, 2, 3):  # half of the way from 0 at KL 0 to the reward at KL 2
        assert at_kl["b"][str(seed)] == pytest.approx(
            dict.fromkeys(prompts, (1.5 + 0.01 * seed) / 2)
        )
    assert set(table_of_measure(study, runs, "accuracy")["a"]["1"].values()) == {0.75}
    # Within KL 1 there is only the start, whose reward is 1 above the reference's for b.
    assert set(table_of_measure(study, runs, "win_rate")["b"]["2"].values()) == {1.0}
    (study.runs_dir / study.runs()[-1].name / "summary.json").unlink()
    assert set(table_of_measure(study, load_runs(study), "accuracy")["b"]) == {"1", "2"}


def test_the_page_has_verdicts_budgets_and_failures(tmp_path):
    study = finished_study(tmp_path)
    failed = study.runs()[-1]
    page = write_study(study)
    assert "| b | 0.760 ± 0.003 (3 seeds) | +0.250 [" in page and "**better**" in page
    assert "p-values are corrected for 1 comparisons (Holm)" in page
    assert "A/A check: of 200 simulated comparisons" in page
    assert "## Best of k trials" in page and "| loss | k = 1 | k = 2 |" in page
    assert "## Failures\n\nNone." in page
    assert (study.work / "frontier.png").stat().st_size > 1000
    numbers = json.loads((study.work / "study.json").read_text())
    assert numbers["hash"] == study.hash
    assert numbers["cases"]["-"]["reward@kl=1"]["b"]["word"] == BETTER
    folder = study.runs_dir / failed.name
    samples = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").unlink()
    page = write_study(study)
    assert "- b: the evaluations of 1 finished runs have no reward or no KL of samples" in page
    assert "(2 seeds)" in page.split("| b |")[1].splitlines()[0]
    (folder / "samples.jsonl").write_text(samples)
    (folder / "summary.json").unlink()
    (folder / "status.json").write_text(json.dumps({"state": "failed", "error": "no memory"}))
    (folder / "provenance.json").write_text(
        json.dumps({"starts": [{"criterion": {"hash": "f00"}}]})
    )
    page = write_study(study)
    assert f"- `{failed.name}`: failed: no memory" in page
    assert "**The study file was changed after runs had been started**" in page


def test_one_case_is_run_and_reported_alone(tmp_path):
    study = make_study(tmp_path, cases={"x": [], "y": []})
    alone = study.with_only("y")
    of_case = [run for run in study.runs() if run.case == "y"]
    assert alone.runs() == of_case and alone.hash == study.hash
    for run in study.runs():
        write_run(study, run, (1.0, 1.0))
    write_study(study)
    page = write_study(alone)
    assert (
        page.startswith("# Study: made, case y alone") and f"{len(of_case)} runs finished" in page
    )
    numbers = json.loads((study.work / "study.json").read_text())
    [(case, of_y)] = json.loads((study.work / "case-y" / "study.json").read_text())["cases"].items()
    assert case == "y" and of_y == numbers["cases"]["y"]
    with pytest.raises(ConfigError, match="study made has no case 'z'; it has x, y"):
        study.with_only("z")


def test_losses_without_values_are_a_note_and_no_rows(tmp_path):
    study = finished_study(tmp_path)
    for run in study.runs():
        if run.loss == "b" and run.trial == "loss.beta=0.1":
            (study.runs_dir / run.name / "samples.jsonl").unlink()
        elif run.loss == "b":
            (study.runs_dir / run.name / "config.yaml").unlink()
    page = write_study(study)
    assert page.count("No seed has finished: b.") == len(study.compare) and "| b |" not in page
    assert "2 of 4 trials have no run yet" in page
    assert "- b: the evaluations of 3 finished runs have" in page
    assert page.count("| a |") == len(study.compare) + 4  # frontier, budgets, two trials


def test_a_frontier_of_many_losses_has_lines_with_markers_and_its_legend_below(tmp_path):
    losses = {f"loss {i}": {"settings": ["loss=dpo"]} for i in range(14)}
    study = make_study(tmp_path, losses=losses, baseline="loss 0", grid={}, seeds=[1])
    for run in study.runs():
        write_run(study, run, (1.0, 1.0))
    groups = [Group({"loss.name": run.planned.loss}, [run.run]) for run in load_runs(study)]
    many, few = frontier_figure(groups, largest_kl=1.5), frontier_figure(groups[:3])
    [ax], [plain] = many.axes, few.axes
    assert not ax.get_legend() and len(many.legends[0].get_texts()) == 14
    assert len(ax.lines) == 28 + 14 and not ax.collections  # no points, lines, markers, no bands
    assert max(line.get_xdata().max() for line in ax.lines if len(line.get_xdata())) == 1.5
    assert "cut at KL 1.5" in ax.get_title(loc="left")
    assert len(plain.get_legend().get_texts()) == 3 and len(plain.collections) == 3
    assert max(line.get_xdata().max() for line in plain.lines) == 2.0


def test_the_best_of_k_trials_is_the_mean_over_all_draws():
    rng = np.random.default_rng(0)
    trials = [
        Trial("a", str(i), 1, dev, test, 0, 0, 0)
        for i, (dev, test) in enumerate(rng.normal(size=(5, 2)).tolist())
    ]
    for k, value in enumerate(best_of(trials), 1):
        draws = list(itertools.combinations(trials, k))
        chosen = [max(draw, key=lambda trial: trial.dev).test for draw in draws]
        assert value == pytest.approx(math.fsum(chosen) / len(draws))


def test_a_fifth_of_the_labels_is_flipped():
    rows = [{"prompt": str(i // 2), "text": str(i), "reward": float(i)} for i in range(2000)]
    flipped = flip(rows, seed=0)
    changed = [a["reward"] != b["reward"] for a, b in zip(rows, flipped, strict=True)]
    assert 0.15 < sum(changed) / 2000 < 0.25 and changed[::2] == changed[1::2]
    assert [row["text"] for row in flipped] == [row["text"] for row in rows]
    assert flip(rows, seed=0) == flipped != flip(rows, seed=1)


def test_the_study_of_losses_has_all_that_need_nothing_but_pairs_and_scores():
    """tdpo is tdpo1 and tdpo2 under the names of its authors' settings."""
    yaml = OmegaConf.load(ROOT / "config" / "study" / "losses.yaml")
    others = {"tdpo", "bradley_terry", "weighted_sum"}  # a reward model, and sums of the rest
    others |= {"qrpo", "xpo", "sepo", "tis-dpo"}  # quantiles, samples or weights of tokens
    pairwise = {name for name, spec in LOSSES.items() if spec.examples == "pairs"}
    assert pairwise - others == set(yaml.losses) - {"dpo again"}
