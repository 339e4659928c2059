"""BEST by a number of the evaluations, and the end of a run that no longer improves."""

import json

import pytest
from conftest import final_weights, read_rows, same_weights

from preflab.training.best import Best, parse_metric
from preflab.training.session import _best_of_earlier_version
from utils import ConfigError

REWARD, KL = "samples_eval/policy_reward", "samples_eval/kl"


def test_the_first_of_equal_evaluations_within_the_kl_is_the_best():
    best = Best(parse_metric("policy_reward@kl<=5"), patience=2)
    seen = [(0, 9, 0), (8, 1, 4), (16, 7, 5.1), (24, 2, 5), (32, 2, 1), (40, 1, float("nan"))]
    news = []
    for examples, reward, kl in seen:
        best.is_unsaved = False
        best = best.after({REWARD: reward, KL: kl}, examples)
        news.append((best.is_unsaved, bool(best.reason_to_stop())))
    assert news == [
        *((False, False), (True, False), (False, False)),
        *((True, False), (False, False), (False, True)),
    ]
    assert best.summary() == {
        "best_metric": "policy_reward@kl<=5",
        "best_value": 2,
        "best_examples": 24,
    }
    copy = Best(best.metric, 3)
    copy.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert copy.state_dict() == best.state_dict() and copy.reason_to_stop() is None


def test_less_is_better_of_a_loss():
    best = Best(parse_metric("eval_loss"), None)
    for examples, loss in ((8, 0.7), (16, 0.5), (24, 0.6)):
        best = best.after({"loss/eval": loss}, examples)
    assert best.summary()["best_value"] == 0.5 and best.summary()["best_examples"] == 16
    with pytest.raises(
        ConfigError, match=r"best_metric=ndcg: .* no ranking_eval/ndcg; .*eval_loss"
    ):
        Best(parse_metric("ndcg"), None).after({"loss/eval": 0.7}, 8)


def test_the_best_of_a_run_of_an_earlier_version_stays():
    best = Best(parse_metric("eval_accuracy"), None)
    best.load_state_dict(_best_of_earlier_version({"best_accuracy": 0.75}))
    assert not best.after({"rewards_eval/accuracies": 0.75}, 8).is_unsaved
    assert best.after({"rewards_eval/accuracies": 0.8}, 16).is_unsaved
    assert _best_of_earlier_version({"best_accuracy": -1.0})["value"] is None


@pytest.mark.parametrize(
    "settings, message",
    [
        (["best_metric=reward"], "did you mean"),
        (["best_metric='policy_reward@len<=5'"], "must be a largest KL in nats"),
        (["patience=2"], "best_metric, which is null"),
        (["best_metric=policy_reward", "sample_during_eval=false"], "draws none"),
        (["best_metric=policy_reward", "loss=bradley_terry"], "writes no samples"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_a_model_loads(run, settings, message):
    with pytest.raises(ConfigError, match=message):
        run("refused", *settings)


def test_a_run_ends_where_it_no_longer_improves_and_so_does_a_resumed_one(run):
    settings = (
        *("best_metric=eval_loss", "patience=2", "n_epochs=4", "sample_during_eval=false"),
        *("lr=3e-2", "eval_every=8", "save_every=1000", "reference.cache=false"),
    )
    whole = run("whole", *settings)
    losses = {
        row["step"]: row["loss/eval"]
        for row in read_rows(whole / "metrics.jsonl")
        if row["split"] == "eval" and row["step"]
    }
    best = min(losses, key=losses.get)
    summary = json.loads((whole / "summary.json").read_text())
    assert best < max(losses) == best + 2 == summary["steps"], "the rate must be too large here"
    assert (whole / "BEST").resolve().name == f"step-{best}"
    assert summary["best_value"] == losses[best] and "2 evaluations without" in summary["ended"]

    run("parts", *settings, f"n_examples={8 * (best + 1)}")
    parts = run("parts", *settings)
    assert same_weights(final_weights(whole), final_weights(parts))
    assert (parts / "BEST").resolve().name == f"step-{best}"
    assert json.loads((parts / "summary.json").read_text())["ended"] == summary["ended"]
