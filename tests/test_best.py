"""BEST by a number of the evaluations, and the end of a run that no longer improves."""

import hashlib
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
        "best_prompts": "all",  # the evaluations have no dev prompts
        "best_test_value": None,
        "best_examples": 24,
    }
    copy = Best(best.metric, 3)
    copy.load_state_dict(json.loads(json.dumps(best.state_dict())))
    assert copy.state_dict() == best.state_dict() and copy.reason_to_stop() is None


def with_sides(reward: tuple, kl: tuple) -> dict:
    """An evaluation with numbers of all, dev and test prompts."""
    names = ("samples_eval/", "dev/", "test/")
    return {
        f"{name}{of}": value
        for of, values in (("policy_reward", reward), ("kl", kl))
        for name, value in zip(names, values, strict=True)
    } | {"dev/prompts": 3, "test/prompts": 5}


def test_dev_prompts_choose_and_test_prompts_give_the_number(caplog):
    caplog.set_level("INFO")
    # All prompts would choose the last evaluation, and test prompts the first.
    seen = [((2, 1, 3), (1, 6, 1)), ((3, 5, 1), (6, 4, 8)), ((6, 4, 8), (1, 1, 1))]
    best = Best(parse_metric("policy_reward@kl<=5"), patience=None)
    for number, evaluation in enumerate(seen):
        best = best.after(with_sides(*evaluation), 8 * (number + 1))
    summary = best.summary()
    assert (summary["best_examples"], summary["best_value"]) == (16, 5)
    assert (summary["best_prompts"], summary["best_test_value"]) == ("dev", 1)
    assert caplog.text.count("3 dev prompts choose BEST, and 5 test prompts do not") == 1


def test_a_run_that_began_on_all_prompts_goes_on_with_them(caplog):
    best = Best(parse_metric("policy_reward"), None)
    best.load_state_dict({"value": 2.5, "examples": 8, "misses": 1})  # of an earlier version
    assert not best.after(with_sides((2, 9, 9), (1, 1, 1)), 16).is_unsaved
    assert best.after(with_sides((3, 0, 0), (1, 1, 1)), 24).summary()["best_prompts"] == "all"
    alone = Best(parse_metric("eval_loss"), None).after({"loss/eval": 0.7}, 8)
    assert alone.prompts == "all" and "biased upwards" in caplog.text


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


def test_dev_and_test_numbers_are_means_over_the_prompts_of_each_side(run):
    folder = run("run", "n_eval_model_samples=8", "samples_per_prompt=2", "do_first_eval=false")
    row = [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "eval"][-1]
    samples = [s for s in read_rows(folder / "samples.jsonl") if s["examples"] == row["examples"]]
    summary = json.loads((folder / "summary.json").read_text())
    for side, is_dev in (("dev", True), ("test", False)):
        of_side = [s for s in samples if is_on_dev(s["prompt"]) == is_dev]
        assert of_side and row[f"{side}/prompts"] == len(of_side) / 2
        lengths = [s["policy_tokens"] for s in of_side]
        assert row[f"{side}/policy_length"] == pytest.approx(sum(lengths) / len(lengths))
        kls = [s["kl"] for s in of_side]
        assert row[f"{side}/kl"] == summary[f"{side}/kl"] == pytest.approx(sum(kls) / len(kls))
    weights = [row[f"{side}/examples"] / 8 for side in ("dev", "test")]
    assert sum(weights) == 1
    for name, key in (("eval_loss", "loss/eval"), ("eval_accuracy", "rewards_eval/accuracies")):
        of_sides = [row[f"{side}/{name}"] for side in ("dev", "test")]
        whole = sum(w * value for w, value in zip(weights, of_sides, strict=True))
        assert whole == pytest.approx(row[key])


def is_on_dev(prompt: str) -> bool:
    """The rule of docs/evaluation.md: the first bit of the SHA-256 of a dev prompt is 0."""
    return hashlib.sha256(prompt.encode()).digest()[0] < 128


def test_a_run_ends_where_it_no_longer_improves_and_so_does_a_resumed_one(run):
    settings = (
        *("best_metric=eval_loss", "patience=2", "n_epochs=4", "sample_during_eval=false"),
        *("lr=3e-2", "eval_every=8", "save_every=1000", "reference.cache=false"),
    )
    whole = run("whole", *settings)
    losses = {
        row["step"]: row["dev/eval_loss"]
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
