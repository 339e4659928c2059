"""Whether the atlas ranks trained policies: the correlations, and runs that are missing."""

import math
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import write_jsonl
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from test_study import make_study

from experiments import atlas_distance
from utils import ConfigError


def test_spearman_by_hand():
    nearly_tied = np.array([3.0, 1.0, 1.0 + 1e-9, 2.0])
    assert atlas_distance.mid_ranks(nearly_tied).tolist() == [4, 1.5, 1.5, 3]
    a, b = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([2.0, 1.0, 4.0, 3.0, 5.0])
    assert atlas_distance.spearman(a, b) == pytest.approx(1 - 6 * 4 / (5 * 24))
    assert atlas_distance.spearman(a, np.exp(-a)) == pytest.approx(-1)
    assert atlas_distance.spearman(a, np.ones(5)) is None
    rows = np.array([[1.0, 0.0], [10.0, 0.0], [0.0, 2.0], [-3.0, 0.0]])
    assert atlas_distance.cosine_distances(rows)[0].tolist() == [0, 0, 1, 2]


AT_START = {"a": 0.0, "b": 0.1, "c": 0.4, "d": 0.9}  # directions of the updates


class Planted:
    """A run of a planted study."""

    def __init__(self, planned, states):
        self.planned, self.state = planned, states.get(planned.name, "finished")


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """A study whose losses are directions in a plane: the study, states of runs by name, and the
    directions at the end by loss. The atlas does not support `e`."""
    losses = {name: {"settings": ["loss=dpo"]} for name in "abcde"}
    losses["a again"] = {"settings": ["loss=dpo"], "seed_offset": 1000}
    study = make_study(
        tmp_path, losses=losses, grid={"loss.beta": [0.1, 0.3, 1]}, seeds=[1, 2, 3], baseline="a"
    )
    states, ends = {}, {"a": 0.0, "b": 0.2, "c": 0.7, "d": 1.8, "e": 0.1, "a again": 0.01}

    def atlas_rows(study, runs, folder):
        labels = [run.planned.loss for run in runs if run.planned.loss != "e"]
        angles = np.array([AT_START[label] for label in labels])
        row = {
            "updates": [{"loss": label} for label in labels],
            "cosines": np.cos(angles[:, None] - angles).tolist(),
            "left_out": {"e": "reads weights of tokens"},
        }
        return [row, row]

    def displacements(study, runs):
        assert {run.planned.trial for run in runs} == {"loss.beta=0.3"}
        losses = [run.planned.loss for run in runs]
        turned = {loss: [math.cos(ends[loss]), math.sin(ends[loss])] for loss in losses}
        return {loss: (i + 1) * np.array(of) for i, (loss, of) in enumerate(turned.items())}

    runs = [Planted(run, states) for run in study.runs()]
    monkeypatch.setattr(atlas_distance, "study_in", lambda folder: study)
    monkeypatch.setattr(
        atlas_distance, "load_runs", lambda study: [Planted(run.planned, states) for run in runs]
    )
    monkeypatch.setattr(atlas_distance, "atlas_rows", atlas_rows)
    monkeypatch.setattr(atlas_distance, "displacements", displacements)
    return study, states, ends


def test_distances_that_rank_alike_hold_and_others_do_not(planted):
    study, _, ends = planted
    result, figure = atlas_distance.answer(study, partial=False)
    [of] = result["cases"].values()
    assert result["holds"] and of["start"]["mean"] > 0.9 and len(figure.axes) == 2
    assert of["losses"] == {"1": 4, "2": 4, "3": 4}
    assert of["baseline again"]["mean"] == pytest.approx(1 - math.cos(0.01))
    assert of["other seeds"]["mean"] == pytest.approx(1)
    assert of["from_baseline"]["d"]["start"] == pytest.approx(1 - math.cos(0.9), abs=1e-6)
    assert result["left_out"] == {"e (no atlas)": "reads weights of tokens"}
    ends |= {"b": 1.8, "c": 0.2, "d": 0.7}
    result, _ = atlas_distance.answer(study, partial=False)
    assert not result["holds"] and result["cases"]["-"]["start"]["mean"] < 0.6


def test_middle_trials_without_a_policy_are_left_out_and_missing_ones_refused(planted):
    study, states, ends = planted
    middle = {
        (run.loss, run.seed): run.name for run in study.runs() if run.trial == "loss.beta=0.3"
    }
    ends["d"] = math.nan
    states[middle["e", 1]] = "failed: NaN"
    with pytest.raises(ConfigError, match="no case and seed has 4 losses"):
        atlas_distance.answer(study, partial=False)
    ends["d"] = 1.8
    states[middle["b", 2]] = "failed: NaN"
    result, _ = atlas_distance.answer(study, partial=False)
    assert result["cases"]["-"]["losses"] == {"1": 4, "3": 4}
    assert result["left_out"][middle["b", 2]] == "failed: NaN"
    assert middle["e", 1] in result["found"]
    states[middle["c", 3]] = "not begun"
    states[study.runs()[0].name] = "not begun"  # no middle trial
    with pytest.raises(ConfigError, match=r"1 middle trials have not ended, such as .*loss-c.*3"):
        atlas_distance.answer(study, partial=False)
    result, _ = atlas_distance.answer(study, partial=True)
    assert result["cases"]["-"]["losses"] == {"1": 4} and middle["c", 3] in result["left_out"]


def test_an_atlas_of_more_losses_is_made_again(tmp_path, monkeypatch):
    """An evaluation in the folder of a finished one goes into a folder inside."""

    def execute(config, folder):
        if not folder.exists():
            losses = ["dpo", *(entry["as"] for entry in config.atlas.losses)]
            updates = [{"loss": x} | dict.fromkeys(columns) for x in losses]
            required = {"stamp": "", "baseline": "dpo", "pairs": 64, "clusters": []}
            write_jsonl(folder / "atlas.jsonl", [{"updates": updates} | required])

    columns = ("settings", "cosine", "chosen", "rejected", "x", "y")
    monkeypatch.setattr(atlas_distance, "execute", execute)
    config = {"model": {"archive": None}, "atlas": {"losses": None}}
    monkeypatch.setattr(atlas_distance, "compose", lambda *given: OmegaConf.create(config))
    runs = [
        SimpleNamespace(
            planned=SimpleNamespace(loss=loss, overrides=[]),
            run=SimpleNamespace(folder=tmp_path / loss, config={"loss": {"name": loss}}),
        )
        for loss in ("dpo", "ipo", "kto")
    ]
    study = SimpleNamespace(config_dir=None)
    for n in (2, 3, 2):
        start, trained = atlas_distance.atlas_rows(study, runs[:n], tmp_path / "atlas")
        assert len(start["updates"]) == len(trained["updates"]) == n


@pytest.mark.parametrize("holds", [True, False])
def test_one_case_decides_only_where_it_falls_short(tmp_path, monkeypatch, capsys, holds):
    study = make_study(tmp_path, cases={"one": [], "two": ["loss.beta=0.3"]})
    written = []

    def answer(study, partial):
        assert list(study.cases) == ["one"] and not partial
        return {"holds": holds, "found": "rho"}, Figure()

    monkeypatch.setattr(atlas_distance, "study_in", lambda folder: study)
    monkeypatch.setattr(atlas_distance, "answer", answer)
    monkeypatch.setattr(atlas_distance, "write_results", lambda *what: written.append(what[1]))
    monkeypatch.setattr(sys, "argv", ["atlas_distance.py", str(tmp_path), "--case", "one"])
    atlas_distance.main()
    assert "rho Not run: two." in capsys.readouterr().out
    assert [result["holds"] for result in written] == ([] if holds else [False])
    assert (tmp_path / "atlas_distance.json").exists() == holds
