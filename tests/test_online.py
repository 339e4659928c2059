"""Online learning: who labels what, what it costs, and that a run stopped anywhere continues
as if it had not been."""

import json
import math
import os
import shutil
import signal
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
from conftest import (
    losses_to_run,
    make_model,
    make_pictures,
    read_rows,
    run_here,
    save_model,
    saved_weights,
    small_run,
    write_jsonl,
)
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Layout
from preflab.batching.token_store import store_of
from preflab.distributed.process_group import world
from preflab.distributed.signals import Stopped
from preflab.evaluation.samples import measure_samples
from preflab.modeling.logprobs import Scorer
from preflab.modeling.shared_samples import equal_models
from preflab.online import build, discriminator, rounds
from preflab.online.ahead import copy_weights, twin_of
from preflab.online.labelers import DiscriminatorLabels, GoldLabels
from preflab.online.ledger import Ledger, price
from preflab.online.measures import RoundMeasures, logged_rewards
from preflab.online.rollouts import Rollouts, best_and_worst
from preflab.online.round_steps import RoundSteps
from preflab.online.rounds import OnlineTrainer
from preflab.rewards.registry import RewardError
from preflab.settings.identity import must_match
from preflab.settings.run_folder import owned
from preflab.training.session import Session
from utils import ConfigError, DataError

# A gold of the user's own: letters a to m in a response; it notes what it was asked, and fails when
# asked to.
GOLD = """
import json
from pathlib import Path
from rewards import register_reward

@register_reward("letters")
def letters(*, log: str):
    def score(prompts, responses):
        trouble = Path(log + ".trouble")
        if trouble.exists():
            answer = trouble.read_text()
            if answer == "raise":
                raise RuntimeError("the oracle is asleep")
            nan, few = [float("nan")] * len(responses), [0.0] * (len(responses) - 1)
            return {"nan": nan, "few": few}[answer]
        with open(log, "a") as f:
            for p, r in zip(prompts, responses):
                f.write(json.dumps([p, r]) + "\\n")
        return [float(sum(c in "abcdefghijklm" for c in r.lower())) for r in responses]
    return score
"""


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2", scale=1.0)


@pytest.fixture
def go(imdb_dir, small_folder, tmp_path):
    """Run function=online with the gold above in a folder by name; returns the folder."""
    module = tmp_path / "gold.py"
    module.write_text(GOLD)

    def go(name: str, *overrides: str):
        folder = tmp_path / name
        settings = {
            "function": "online",
            "+reward.log": folder.with_suffix(".asked"),
            "reward.module": module,
            "online.rounds": 6,
            "online.prompts_per_round": 8,
            "online.eval_every": 3,
            "online.save_every": 2,
            "batch_size": 4,
            "optimizer": "AdamW",
            "lr": 1e-3,
            "sample_during_eval": "false",
            "online.measure_gold": "false",
            "online.relabel_every": 32,
            "online.relabels": 4,
            "warmup_steps": 0,
            "reward": "length",
            "~reward.unit": "words",
            "reward.name": "letters",
        }
        given = {o.split("=")[0] for o in overrides}
        run_here(
            *small_run(
                small_folder,
                imdb_dir,
                folder,
                *(f"{key}={value}" for key, value in settings.items() if key not in given),
                *overrides,
            )
        )
        return folder

    return go


def asked(folder) -> list:
    path = folder.with_suffix(".asked")
    return read_rows(path) if path.exists() else []


def rounds_of(folder) -> list[dict]:
    return [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "online"]


def weights(folder, inside: str = "") -> dict:
    return saved_weights(folder / "LATEST" / inside)


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def untimed_rows(folder) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    clock = ("seconds", "per_second")
    return [
        {key: value for key, value in row.items() if not any(word in key for word in clock)}
        for row in read_rows(folder / "metrics.jsonl")
    ]


D2PO = (
    "online.discriminator=bradley_terry",
    "online.discriminator_lr=1e-3",
    "online.discriminator_epochs=2",
    "online.replay=1",
)


# -------------------------------------------------------------------------------------- small parts


def test_a_store_in_memory_is_what_the_batches_see():
    trees = [([1, 2], [[3, 4], [5]]), ([6], [[7], [8]]), ([9, 9], [[10], [11, 12], [13]])]
    store = store_of("x", trees, [[0.0, 1.0], [0.5, 0.5], [3.0, 1.0, 2.0]], [(1, 0), None, (0, 1)])
    data = PreferenceData([store], "pairs", "x")
    batch = collate(data, np.arange(2), Layout("padded"))
    assert batch.examples == [0, 1] and len(data) == 2
    pieces = [batch.targets[batch.owners == r].tolist() for r in range(len(batch.lengths))]
    assert [pieces[i] for i in batch.chosen] == [[5], [10]] and [
        pieces[i] for i in batch.rejected
    ] == [[3, 4], [11, 12]]
    assert batch.scores[batch.chosen].tolist() == [1.0, 3.0] and batch.scores[
        batch.rejected
    ].tolist() == [0.0, 1.0]
    targets = PreferenceData([store], "targets", "x")
    assert [targets.responses_of(i)[1] for i in range(2)] == [[1], [2]]
    assert len(store_of("none", trees, [[0.0] * 2, [0.0] * 2, [0.0] * 3], [None] * 3).prompts) == 0


def test_best_and_worst():
    assert best_and_worst([1.0, 3.0, 2.0]) == (1, 0)
    assert best_and_worst([2.0, 1.0, 1.0]) == (0, 1)
    assert best_and_worst([1.0, 1.0]) is None


def requests_for(n: int, number: int = 1, k: int = 2) -> list[dict]:
    return [
        {
            "round": number,
            "key": i,
            "prompt": f"p{i}",
            "prompt_tokens": [1],
            "responses": ["x" * (i + j) for j in range(k)],
            "tokens": [[1]] * k,
        }
        for i in range(n)
    ]


def by_length(prompts, responses):
    return [float(len(r)) for r in responses]


def test_the_ledger_counts_what_was_paid_and_cannot_overspend(tmp_path):
    ledger = Ledger(tmp_path / "labels.jsonl", 6)
    assert [row["scores"] for row in ledger.buy(requests_for(3), by_length)] == [
        [0.0, 1.0],
        [1.0, 2.0],
        [2.0, 3.0],
    ]
    assert ledger.bought == 3 and ledger.affords(1) == 3 and ledger.affords(2) == 1
    with pytest.raises(
        RewardError, match="4 comparisons were to be labelled and the budget has room for 3"
    ):
        ledger.buy(requests_for(4), by_length)
    assert ledger.buy(requests_for(1, 2, k=3), by_length)[0]["cost"] == 3
    assert ledger.affords(1) == 0 and ledger.bought_until(1) == 3 and ledger.bought_until(2) == 6
    again = Ledger(tmp_path / "labels.jsonl", 6)
    assert again.rows == ledger.rows and again.affords(1) == 0


def comparisons_for_best_and_worst(scores) -> int:
    """How many comparisons it takes in pairs: the winners have the best, the losers the worst."""
    n, pairs = 0, [scores[i : i + 2] for i in range(0, len(scores) - 1, 2)]
    winners, losers = [max(pair) for pair in pairs], [min(pair) for pair in pairs]
    n += len(pairs)
    if len(scores) % 2:
        winners, losers = [*winners, scores[-1]], [*losers, scores[-1]]
    n += len(winners) - 1 + len(losers) - 1
    assert (max(winners), min(losers)) == (max(scores), min(scores))
    return n


@pytest.mark.parametrize("k", range(2, 12))
def test_labels_cost_what_the_oracle_has_to_be_asked(k):
    assert price(k, "scores") == price(k, "scores", ranks=True) == k
    assert price(k, "comparisons") == comparisons_for_best_and_worst([*range(k)])
    # log2 of the number of orders is the least that any method needs, and up to 11 merge insertion
    # needs no more.
    least = math.ceil(math.log2(math.factorial(k)))
    assert price(k, "comparisons", ranks=True) == least


def test_a_gold_that_fails_costs_nothing(tmp_path):
    def fails(prompts, responses):
        raise RewardError("no")

    ledger = Ledger(tmp_path / "labels.jsonl", 5)
    with pytest.raises(RewardError, match="no"):
        ledger.buy(requests_for(2), fails)
    assert ledger.bought == 0 and not (tmp_path / "labels.jsonl").exists()


def test_a_ledger_cut_short_loses_its_last_line_alone(tmp_path):
    path = tmp_path / "labels.jsonl"
    Ledger(path, None).buy(requests_for(3), by_length)
    path.write_bytes(path.read_bytes()[:-20])
    cut = Ledger(path, None)
    assert cut.bought == 2
    cut.buy(requests_for(1, 2), by_length)
    assert [row["round"] for row in read_rows(path)] == [1, 1, 2]
    lines = path.read_text().splitlines()
    for wrong in (lines[0][:-5], "{}", "[]", "7", lines[0].replace('"cost": 1', '"cost": -50')):
        path.write_text("\n".join([wrong, *lines[1:]]) + "\n")
        with pytest.raises(DataError, match=r"labels\.jsonl:1: expected a bought label"):
            Ledger(path, None)


class Longest:
    """A discriminator that prefers long texts, and notes what it learns."""

    def __init__(self):
        self.learnt = []

    def score_responses(self, prompts, responses):
        return [[float(len(r)) for r in of_prompt] for of_prompt in responses]

    def learn(self, pairs, *, epochs, seed):
        self.learnt.append(list(pairs))


class Settings:
    """As in config.yaml."""

    relabel_every, relabels, select, stop_labels, replay, discriminator_epochs, initial_epochs = (
        8,
        2,
        "conf",
        None,
        1,
        1,
        3,
    )

    def __init__(self, **more):
        vars(self).update(more)


def rollouts(number: int, texts: list[list[str]]) -> Rollouts:
    n = len(texts)
    return Rollouts(
        number,
        list(range(n)),
        [f"p{i}" for i in range(n)],
        [[1]] * n,
        texts,
        [[[1]] * len(t) for t in texts],
    )


def shortest(prompts, responses):
    return [-float(len(r)) for r in responses]


def test_bought_labels_overrule_the_discriminator_and_are_what_it_learns(tmp_path):
    discriminator = Longest()
    labeller = DiscriminatorLabels(
        shortest, Ledger(tmp_path / "l", None), discriminator, Settings(), 0
    )
    first = labeller.label(rollouts(1, [["aaaa", "a"], ["bb", "bbb"]]))
    assert (
        first.pairs == [(0, 1), (1, 0)] and labeller.ledger.bought == 0 and labeller.gathered == 4
    )
    labels = labeller.label(rollouts(2, [["c", "cc"], ["dddd", "d"]]))
    # The closest two of the whole pool: bb/bbb of the round before, and c/cc of this one.
    assert [row["responses"] for row in labeller.ledger.rows] == [["bbb", "bb"], ["cc", "c"]]
    assert discriminator.learnt == [[("p1", "bbb"[:2], "bbb"), ("p0", "c", "cc")]]
    assert labels.guesses.pairs == [(1, 0), (0, 1)] and labels.guesses.scores == [
        [1.0, 2.0],
        [4.0, 1.0],
    ]  # what it would have said
    assert labels.pairs == [(0, 1), (0, 1)] and labels.scores == [
        [2.0, 1.0],
        [4.0, 1.0],
    ]  # of the bought pair gold says which; the scores change sides
    assert labeller.pool == [] and labeller.gathered == 0
    labeller.label(rollouts(3, [["e", "ee"], ["f", "ffff"], ["g", "g"], ["h", "hhh"]]))
    assert [len(batch) for batch in discriminator.learnt] == [
        2,
        4,
    ]  # with the batch before, replayed; g/g are the same text, nobody is asked
    assert all(row["responses"] != ["g", "g"] for row in labeller.ledger.rows)


def test_equal_gold_scores_cost_and_teach_nothing_and_form_no_pair(tmp_path):
    discriminator = Longest()
    labeller = DiscriminatorLabels(
        lambda p, r: [1.0] * len(r),
        Ledger(tmp_path / "l", None),
        discriminator,
        Settings(relabel_every=4),
        0,
    )
    labels = labeller.label(rollouts(1, [["a", "aa"], ["b", "bbb"]]))
    assert (
        labeller.ledger.bought == 2 and discriminator.learnt == [] and labels.pairs == [None, None]
    )


@pytest.mark.parametrize(
    "limits, bought",
    [
        ({"budget": 3}, 3),
        ({"stop_labels": 5}, 5),
        ({"budget": 4, "stop_labels": 9}, 4),
        ({}, 8),
    ],
)
def test_limits_are_kept_to_the_label(tmp_path, limits, bought):
    settings = Settings(relabel_every=4, relabels=2, stop_labels=limits.get("stop_labels"))
    labeller = DiscriminatorLabels(
        shortest,
        Ledger(tmp_path / "l", limits.get("budget")),
        discriminator := Longest(),
        settings,
        0,
    )
    for number in range(1, 5):
        labels = labeller.label(rollouts(number, [["a", "aa"], ["b", "bbb"]]))
    assert labeller.ledger.bought == bought == sum(row["cost"] for row in read_rows(tmp_path / "l"))
    assert len(discriminator.learnt) == math.ceil(bought / 2) and len(labels.pairs) == 2


@pytest.mark.parametrize(
    "oracle, ranks, budget, cost",
    [
        ("comparisons", False, 20, 4),
        ("comparisons", True, 23, 5),
        ("scores", False, 20, 4),
        ("scores", True, 20, 4),
    ],
)
def test_gold_charges_for_pairs_and_for_lists(tmp_path, oracle, ranks, budget, cost):
    ledger = Ledger(tmp_path / "l", budget, oracle=oracle)
    labeller = GoldLabels(by_length, ledger, 4, ranks=ranks)
    assert labeller.room(1) == budget // cost
    labels = labeller.label(rollouts(1, [["a", "aaa", "aa", "aaaa"], ["b", "b", "b", "b"]]))
    assert labels.pairs == [(3, 0), None] and labeller.bought_until(1) == 2 * cost


def test_a_gold_tie_makes_two_responses_of_a_list_equal(tmp_path):
    def label(**more):
        ledger = Ledger(tmp_path / f"{more}", None)
        labeller = DiscriminatorLabels(
            lambda p, r: [1.0] * len(r), ledger, Longest(), Settings(relabel_every=4), 0, **more
        )
        return labeller.label(rollouts(1, [["a", "aaa", "aa", "aaaa"]]))

    alone, listed = label(), label(ranks=True)
    assert alone.pairs == listed.pairs == [None] and alone.scores == [[1, 3, 2, 4]]
    assert listed.scores == [[2.5, 3, 2, 2.5]]
    listed.pair_by_scores()
    assert listed.pairs == [(1, 2)]


def test_scores_of_a_pair_are_two_labels(tmp_path):
    labeller = DiscriminatorLabels(
        shortest,
        Ledger(tmp_path / "l", 7, oracle="scores"),
        Longest(),
        Settings(relabel_every=4, relabels=2, stop_labels=5),
        0,
    )
    for number in range(1, 4):
        labeller.label(rollouts(number, [["a", "aa"], ["b", "bbb"]]))
    assert [row["cost"] for row in labeller.ledger.rows] == [2, 2]  # a third would be six


def test_gold_labels_of_best_and_worst(tmp_path):
    labeller = GoldLabels(by_length, Ledger(tmp_path / "l", 7), 3)
    assert labeller.room(1) == 2
    labels = labeller.label(rollouts(1, [["a", "aaa", "aa"], ["b", "b", "b"]]))
    assert (
        labels.pairs == [(1, 0), None]
        and labeller.bought_until(1) == 6
        and labeller.spent(2)
        and not labeller.spent(1)
    )


# --------------------------------------------------------------------------------------------- runs


def test_opo_with_gold_buys_a_label_a_pair_until_the_budget_is_spent(go):
    folder = go("opo", "online.budget=29", "online.rounds=50")
    assert [len(row["responses"]) for row in read_rows(folder / "labels.jsonl")] == [2] * 29
    assert len(asked(folder)) == 58  # nothing else was asked
    rows = rounds_of(folder)
    assert [row["online/labels_bought"] for row in rows] == [8, 16, 24, 29] and rows[-1][
        "online/pairs"
    ] + rows[-1]["online/ties"] == 5
    summary = json.loads((folder / "summary.json").read_text())
    assert (
        summary["labels_bought"] == 29
        and summary["ended"] == "the budget of 29 labels is spent"
        and summary["rounds"] == 4
    )
    assert summary["seconds_sampling"] > 0 and (folder / "LATEST" / "hf").is_dir()
    rollouts = read_rows(folder / "rollouts.jsonl")
    for row in rollouts:
        better, worse = row["pair"] or (0, 0)
        assert row["rewards"]["letters"] == row["scores"] and (row["pair"] is None) == (
            row["scores"][0] == row["scores"][1]
        )
        assert row["pair"] is None or row["scores"][better] > row["scores"][worse]


def test_only_bought_labels_reach_the_learner(go):
    folder = go("d2po", *D2PO)
    rows = rounds_of(folder)
    assert [row["online/labels_bought"] for row in rows] == [0, 4, 4, 8, 8, 12]
    assert len(asked(folder)) == 24  # two texts a label, and none for anything else
    assert not same(
        weights(folder, "discriminator"),
        saved_weights(folder / "step-4" / "discriminator"),
    )


def test_measured_gold_is_shown_to_the_log_and_to_nobody_else(go):
    without, with_gold = go("without", *D2PO), go("with", *D2PO, "online.measure_gold=true")
    assert same(weights(without), weights(with_gold)) and same(
        weights(without, "discriminator"), weights(with_gold, "discriminator")
    )
    row, rollout = rounds_of(with_gold)[-1], read_rows(with_gold / "rollouts.jsonl")[-8:]
    assert row["online/gold_reward"] == pytest.approx(
        np.mean([g for r in rollout for g in r["rewards"]["letters"]])
    )
    guessed = [best_and_worst(r["scores"]) for r in rollout]  # before bought labels overruled them
    right = [
        r["rewards"]["letters"][pair[0]] - r["rewards"]["letters"][pair[1]]
        for r, pair in zip(rollout, guessed, strict=True)
        if pair
    ]
    assert row["online/label_accuracy"] == pytest.approx(np.mean([gap > 0 for gap in right if gap]))
    assert row["online/kl"] > 0 and "online/gold_reward" not in rounds_of(without)[-1]
    assert read_rows(without / "labels.jsonl") == read_rows(with_gold / "labels.jsonl")


def test_initial_labels_are_bought_of_the_first_policy_and_learnt_first(go):
    folder = go("begin", *D2PO, "online.initial_labels=11", "online.stop_labels=11")
    rows = read_rows(folder / "labels.jsonl")
    assert {row["round"] for row in rows} == {0} and len(rows) == 11 and len(asked(folder)) == 22
    assert [row["online/labels_bought"] for row in rounds_of(folder)] == [11] * 6
    steps = [row["examples"] for row in read_rows(folder / "discriminator" / "metrics.jsonl")]
    ties = sum(len(set(row["scores"])) == 1 for row in rows)
    assert steps[-1] == 8 * (11 - ties)  # initial_epochs, and frozen from then on


@pytest.mark.parametrize(
    "setting, measured", [("auto", [False, True]), (True, [True, True]), (False, [False, False])]
)
def test_a_gold_that_costs_money_is_not_asked_for_the_log(setting, measured):
    settings = OmegaConf.create(
        {
            "reward": {"name": "ultrafeedbackgold"},
            "more_rewards": ["length"],
            "online": {"measure_gold": setting},
        }
    )
    assert logged_rewards(settings) == dict(
        zip(("ultrafeedbackgold", "length"), measured, strict=True)
    )


AHEAD = ("online.ahead=true",)
DPO_D2PO = (*D2PO, "online.discriminator=dpo", "online.select=rand")
PARTS = {
    "opo": (),
    "d2po": D2PO,
    "dpo as discriminator": DPO_D2PO,
    "adapters, dpo as discriminator": (*DPO_D2PO, "model.lora.r=2", "online.select=d_optimal"),
    "heads, four responses": (
        *D2PO,
        "online.select={name: double_thompson, heads: 4}",
        "online.responses_per_prompt=4",
        "online.prompts_per_round=4",
    ),
    "sampled ahead": AHEAD,
    "sampled ahead, d2po, adapters": (*AHEAD, *D2PO, "model.lora.r=2"),
}


@pytest.mark.parametrize("settings", PARTS.values(), ids=PARTS)
def test_a_run_in_two_parts_is_the_run_in_one(go, settings):
    whole = go("whole", *settings)
    go(
        "parts", *settings, "online.rounds=3"
    )  # between two checkpoints of the other, the pool half full
    parts = go("parts", *settings)
    assert same(weights(whole), weights(parts))
    if (whole / "discriminator").is_dir():
        assert same(weights(whole, "discriminator"), weights(parts, "discriminator"))
    assert [row for row in untimed_rows(whole) if row["split"] == "online"] == [
        row for row in untimed_rows(parts) if row["split"] == "online"
    ]
    assert read_rows(whole / "labels.jsonl") == read_rows(parts / "labels.jsonl") and asked(
        whole
    ) == asked(parts)
    assert read_rows(whole / "rollouts.jsonl") == read_rows(parts / "rollouts.jsonl")
    make_pictures(parts)


def test_sampled_ahead_a_round_has_the_samples_of_the_policy_before_the_last(go):
    def texts(name, *settings):
        folder = go(name, *settings, "online.rounds=3", "lr=1e-2")
        rows = read_rows(folder / "rollouts.jsonl")
        return folder, [[r["responses"] for r in rows if r["round"] == n] for n in (1, 2, 3)]

    _, on_policy = texts("now")
    _, off_policy = texts("ahead", *AHEAD)
    fixed, initial = texts("fixed", "online.sampler=reference")
    assert off_policy[:2] == initial[:2] and on_policy[:1] == initial[:1]
    assert on_policy[1] != initial[1] and off_policy[2] != initial[2]
    assert on_policy[2] != off_policy[2]
    # Of the policy that round 2 began with, which the ends of the first rounds are.
    first = go("first", *AHEAD, "online.rounds=1", "lr=1e-2")
    _, of_first = texts("of first", f"online.sampler={first}")
    assert off_policy[2] == of_first[2]
    # A fixed sampler writes the same at any time.
    fixed_ahead, same_texts = texts("fixed ahead", "online.sampler=reference", *AHEAD)
    assert same_texts == initial and same(weights(fixed), weights(fixed_ahead))


def test_the_model_that_samples_ahead_shares_what_is_not_trained():
    policy = Scorer(make_model("gpt2"))
    frozen = {name for name, _ in list(policy.model.named_parameters())[::2]}
    for name, weight in policy.model.named_parameters():
        weight.requires_grad_(name not in frozen)
    twin = twin_of(policy)
    ours = dict(policy.model.named_parameters())
    for name, weight in twin.model.named_parameters():
        assert (weight is ours[name]) == (name in frozen) and not weight.requires_grad
    with torch.no_grad():
        for name, weight in ours.items():
            weight.add_(0.0 if name in frozen else 1.0)
    assert not equal_models(twin, policy)
    copy_weights(twin, policy)
    assert equal_models(twin, policy)


@pytest.mark.parametrize(
    "settings", [("online.responses_per_prompt=3",), ("online.updates_per_round=2", *AHEAD)]
)
def test_what_is_computed_once_is_what_would_be_computed_twice(go, monkeypatch, settings):
    """The KL of a round has the hidden states of sampling and those of the reference in learning,
    and learning the log-probs of that reference."""
    own, hidden, ran = RoundMeasures._kl, Scorer.hidden, []

    def noted(self, *arguments):
        ran.append(self)
        return hidden(self, *arguments)

    def compared(self, rollouts, read):
        learner = self.learner
        with monkeypatch.context() as noting:
            noting.setattr(Scorer, "hidden", noted)
            values = own(self, rollouts, read)
        assert (learner.policy in ran) == (AHEAD[0] in settings)
        assert len(read) > 0
        prompts = [p for p in rollouts.prompt_tokens for _ in rollouts.tokens[0]]
        responses = [tokens for of_prompt in rollouts.tokens for tokens in of_prompt]
        models = learner.policy, learner.initial_reference
        expected = measure_samples(*models, prompts, responses, 16, learner.layout)
        assert max(expected["kl"]) > 1e-3 or rollouts.round == 1
        for name, of_name in values.items():
            np.testing.assert_allclose(of_name, expected[name], atol=2e-5)
        return values

    with monkeypatch.context() as patch:
        patch.setattr(RoundMeasures, "_kl", compared)
        once = go("once", *settings, "online.rounds=3")
    with monkeypatch.context() as patch:
        patch.setattr(RoundSteps, "read_reference", lambda self: [])
        patch.setattr(build, "keeps_hidden", lambda learner: False)
        twice = go("twice", *settings, "online.rounds=3")
    assert same(weights(once), weights(twice))


def test_a_discriminator_of_another_architecture(go, llama_folder):
    settings = (*D2PO, f"online.discriminator_path={llama_folder}")
    whole = go("whole", *settings)
    go("parts", *settings, "online.rounds=3")
    parts = go("parts", *settings)
    theirs = weights(whole, "discriminator")
    assert any(".self_attn." in key for key in theirs) and not any(
        ".self_attn." in key for key in weights(whole)
    )
    assert same(theirs, weights(parts, "discriminator")) and same(weights(whole), weights(parts))


@pytest.mark.parametrize("settings", [(), D2PO], ids=["opo", "d2po"])
def test_layers_split_over_devices_learn_what_one_process_learns(go, settings):
    one = go("one", *settings)
    split = go("split", *settings, "trainer=TensorParallelTrainer", "world_size=2")

    def text(folder):
        return [(row["prompt"], row["responses"]) for row in read_rows(folder / "rollouts.jsonl")]

    assert text(one) == text(split) and asked(one) == asked(split)
    for inside in ("", "discriminator") if settings else ("",):
        ours, theirs = weights(one, inside), weights(split, inside)
        assert ours.keys() == theirs.keys() and all(
            torch.allclose(ours[key], theirs[key], atol=5e-5) for key in ours
        )


@pytest.mark.parametrize(
    "settings",
    [(), D2PO, (*AHEAD, "online.budget=44"), (*AHEAD, *D2PO)],
    ids=["opo", "d2po", "opo ahead", "d2po ahead"],
)
def test_killed_between_buying_and_learning_nothing_is_bought_twice_or_lost(
    go, settings, monkeypatch
):
    whole, is_d2po = go("whole", *settings), D2PO[0] in settings
    if "online.budget=44" in settings:
        assert [row["online/labels_bought"] for row in rounds_of(whole)][-2:] == [40, 44]
    target, name = (
        (discriminator.Discriminator, "learn") if is_d2po else (rounds.OnlineTrainer, "_learn")
    )
    learn, calls = getattr(target, name), []

    def killed(self, *arguments, **more):
        calls.append(1)
        if len(calls) == (2 if is_d2po else 4):  # in round 4, whose checkpoint is that of round 2
            raise KeyboardInterrupt
        return learn(self, *arguments, **more)

    monkeypatch.setattr(target, name, killed)
    with pytest.raises(KeyboardInterrupt):
        go("killed", *settings)
    bought = read_rows(whole.parent / "killed" / "labels.jsonl")
    assert max(row["round"] for row in bought) == 4
    killed_folder = go("killed", *settings)
    assert asked(killed_folder) == asked(whole) and read_rows(
        killed_folder / "labels.jsonl"
    ) == read_rows(whole / "labels.jsonl")
    assert same(weights(whole), weights(killed_folder))
    assert [row for row in untimed_rows(whole) if row["split"] == "online"] == [
        row for row in untimed_rows(killed_folder) if row["split"] == "online"
    ]


FAILURES = {
    "raise": "RuntimeError: the oracle is asleep",
    "nan": "returned nan",
    "few": "scores for",
}


@pytest.mark.parametrize(
    "settings",
    [(), D2PO, (*D2PO, "online.measure_gold=true"), AHEAD],
    ids=["opo", "d2po", "measured", "ahead"],
)
def test_a_gold_that_fails_stops_the_run_with_a_checkpoint_and_it_continues(go, tmp_path, settings):
    """It fails in three ways, one after the other."""
    go("failing", *settings, "online.rounds=3", "online.save_every=100")
    trouble = tmp_path / "failing.asked.trouble"
    for answer, message in FAILURES.items():
        trouble.write_text(answer)
        with pytest.raises(RewardError, match=message):
            go("failing", *settings, "online.save_every=100")
        state = torch.load(tmp_path / "failing" / "LATEST" / "training_state.pt", weights_only=True)
        assert state["online"]["round"] == 3
    trouble.unlink()
    folder = go("failing", *settings, "online.save_every=100")
    whole = go("whole", *settings, "online.save_every=100")
    assert same(weights(folder), weights(whole)) and read_rows(
        folder / "labels.jsonl"
    ) == read_rows(whole / "labels.jsonl")


def test_a_ledger_torn_in_the_middle_of_a_round_is_filled_up_to_the_same_run(
    go, monkeypatch, tmp_path
):
    whole, learn = go("whole"), rounds.OnlineTrainer._learn

    def killed(self, steps, bar):
        if steps.round == 4:  # its checkpoint is that of round 2
            raise KeyboardInterrupt
        return learn(self, steps, bar)

    monkeypatch.setattr(rounds.OnlineTrainer, "_learn", killed)
    with pytest.raises(KeyboardInterrupt):
        go("torn")
    monkeypatch.undo()
    ledger = tmp_path / "torn" / "labels.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join(lines[:-5]) + lines[-5][:30])
    torn = go("torn")
    assert same(weights(whole), weights(torn)) and read_rows(torn / "rollouts.jsonl") == read_rows(
        whole / "rollouts.jsonl"
    )
    assert sorted(map(json.dumps, read_rows(ledger))) == sorted(
        map(json.dumps, read_rows(whole / "labels.jsonl"))
    )


def test_a_ledger_that_lacks_what_was_paid_for_is_not_gone_on_with(go, tmp_path):
    folder = go("run", "online.rounds=2")
    (folder / "labels.jsonl").unlink()
    with pytest.raises(DataError, match="has 0 bought labels, and there were 16 at the checkpoint"):
        go("run", "online.rounds=4")


def test_two_runs_do_not_buy_into_one_ledger(go, tmp_path):
    with (
        owned(tmp_path / "run"),
        pytest.raises(ConfigError, match=f"in use by process {os.getpid()} on"),
    ):
        go("run")
    assert not (tmp_path / "run" / "labels.jsonl").exists()
    go("run", "online.rounds=1")


def test_an_evaluation_that_fails_leaves_a_checkpoint(go, tmp_path, monkeypatch):
    evaluate = Session.evaluate

    def fails(self, **more):
        if more["round"] == 3:
            raise RewardError("asleep")
        return evaluate(self, **more)

    monkeypatch.setattr(Session, "evaluate", fails)
    with pytest.raises(RewardError, match="asleep"):
        go("run", "online.save_every=100")
    assert (
        torch.load(tmp_path / "run" / "LATEST" / "training_state.pt", weights_only=True)["online"][
            "round"
        ]
        == 3
    )
    monkeypatch.undo()
    folder = go(
        "run", "online.save_every=100", "online.rounds=3"
    )  # whose only missing part is that evaluation
    assert [row["round"] for row in read_rows(folder / "metrics.jsonl") if row["split"] == "eval"][
        -1
    ] == 3


def test_a_stop_in_the_first_evaluation_buys_nothing_before_it_is_obeyed(go, tmp_path, monkeypatch):
    whole = go("whole")
    evaluate = OnlineTrainer._evaluate

    def interrupted(self):
        evaluate(self)
        self.world.stop.received = signal.SIGTERM

    monkeypatch.setattr(OnlineTrainer, "_evaluate", interrupted)
    with pytest.raises(Stopped, match="SIGTERM"):
        go("run")
    assert asked(tmp_path / "run") == []
    monkeypatch.setattr(OnlineTrainer, "_evaluate", evaluate)
    folder = go("run")
    assert same(weights(whole), weights(folder)) and untimed_rows(whole) == untimed_rows(folder)


def test_labels_that_a_kill_left_are_not_counted_before_they_are_used(go, tmp_path, monkeypatch):
    def dies(self, *arguments, **more):
        raise RuntimeError

    initial = (*D2PO, "online.initial_labels=4", "online.rounds=1")
    with monkeypatch.context() as patch:
        patch.setattr(discriminator.Discriminator, "learn", dies)
        with pytest.raises(RuntimeError):
            go("run", *initial)
    assert len(read_rows(tmp_path / "run" / "labels.jsonl")) == 4
    rows = read_rows(go("run", *initial) / "metrics.jsonl")
    assert [row["online/labels_bought"] for row in rows if row["split"] == "eval"] == [0, 4]


@pytest.mark.parametrize("settings", [D2PO, (*AHEAD, *D2PO)], ids=["d2po", "ahead"])
def test_a_stop_in_a_round_is_obeyed_until_something_has_learned(
    go, tmp_path, monkeypatch, settings
):
    """The round is undone while it can be, and completed otherwise."""
    whole = go("whole", *settings)
    places = {
        ("preflab.online.drawing", "sample", 3): 2,
        ("preflab.online.measures", "score_responses", 7): 2,
        ("preflab.training.session.Session", "step", 6): 3,  # the second step of a round
    }
    if AHEAD[0] in settings:  # a thread samples, in no fixed moment of the round
        del places["preflab.online.drawing", "sample", 3]
    for (module, name, call), last in places.items():
        interrupted, calls = resolve_name(module), []
        function = getattr(interrupted, name)

        def with_signal(*arguments, function=function, calls=calls, call=call, **more):
            calls.append(1)
            if len(calls) == call:
                world().stop.received = signal.SIGTERM
            return function(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(interrupted, name, with_signal)
            with pytest.raises(Stopped):
                go(name, *settings)
        assert (tmp_path / name / "LATEST").resolve().name == f"step-{last}"
        folder = go(name, *settings)
        assert same(weights(whole), weights(folder)) and untimed_rows(whole) == untimed_rows(folder)


def test_a_policy_is_no_discriminator_that_is_never_taught(go):
    policy = go("policy", "online.rounds=1")
    with pytest.raises(
        ConfigError, match=r"is not a reward model, and with online\.budget=0 it would never learn"
    ):
        go("run", *D2PO, f"online.discriminator_path={policy}", "online.budget=0")


def test_a_discriminator_that_lacks_weights_names_its_own_setting(go, llama_folder, tmp_path):
    folder = tmp_path / "headless"
    shutil.copytree(llama_folder, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError) as refused:
        go("run", *D2PO, f"online.discriminator_path={folder}")
    assert f"online.discriminator_path={folder} has no weights" in str(refused.value)
    assert "model.name_or_path" not in str(refused.value)


def test_a_round_without_a_step_is_saved_too(go):
    folder = go("ties", "temperature=0", "online.rounds=4")
    state = torch.load(folder / "LATEST" / "training_state.pt", weights_only=True)
    assert state["online"]["round"] == 4 and state["counters"]["steps"] == 0


def test_how_a_reward_is_reached_may_change_and_what_it_is_may_not():
    saved, now = (
        OmegaConf.create(
            {"function": "online", "reward": {"name": "http", "url": url, "timeout": t}}
        )
        for url, t in (("a", 1), ("b", 60))
    )
    must_match(saved, now)
    now.reward.name = "lexicon"
    with pytest.raises(ConfigError, match=r"reward\.name was http and is now lexicon"):
        must_match(saved, now)


def test_a_reference_that_writes_is_that_of_the_archive_whatever_the_loss_reads(go):
    a = go("a", "lr=1e-2", "online.rounds=2")
    by_name, by_archive = (
        go(
            "name",
            "online.sampler=reference",
            f"model.reference_archive={a}",
            "loss=simpo",
            "online.rounds=1",
        ),
        go("archive", f"online.sampler={a}", "online.rounds=1"),
    )
    texts = [
        [row["responses"] for row in read_rows(folder / "rollouts.jsonl")]
        for folder in (by_name, by_archive, go("policy", "online.rounds=1"))
    ]
    assert texts[0] == texts[1] != texts[2]


def test_a_loss_of_scores_learns_nothing_from_a_pair_without_a_gap(go):
    folder = go(
        "run",
        "loss=odpo",
        *D2PO,
        "online.discriminator=dpo",
        "online.relabel_every=16",
        "online.rounds=2",
    )  # its first scores are all zero
    assert (
        next(row["online/pairs"] for row in rounds_of(folder)) == 0
        and len(read_rows(folder / "labels.jsonl")) == 8
    )


def test_responses_that_cannot_be_told_apart_end_the_run_clearly(go, monkeypatch, tmp_path):
    monkeypatch.setattr(rounds, "PATIENCE", 3)
    with pytest.raises(rounds.NothingToLearnError, match="in the last 3 rounds no two responses"):
        go("ties", "temperature=0")  # both responses of a prompt are the same
    assert (tmp_path / "ties" / "LATEST" / "hf").is_dir()


def test_a_sampler_that_stays_as_it_is_writes_the_same_whatever_the_policy_learns(go):
    a, b = (
        go(name, "online.sampler=reference", f"lr={lr}") for name, lr in (("a", 1e-3), ("b", 1e-2))
    )
    responses = [
        [row["responses"] for row in read_rows(folder / "rollouts.jsonl")] for folder in (a, b)
    ]
    assert responses[0] == responses[1] and not same(weights(a), weights(b))
    c = go("c", f"online.sampler={a}", "online.rounds=1")
    d = go("d", f"model.archive={a}", "online.rounds=1")
    assert [row["responses"] for row in read_rows(c / "rollouts.jsonl")] == [
        row["responses"] for row in read_rows(d / "rollouts.jsonl")
    ]


@pytest.mark.parametrize(
    "more",
    [
        ("loss=plackett-luce", "online.budget=90"),
        ("loss=dpo", "loss.all_pairs=true", *D2PO),
    ],
)
def test_a_round_is_learned_from_as_lists(go, more):
    folder = go("lists", "online.responses_per_prompt=4", "online.rounds=2", *more)
    rows, rollouts = rounds_of(folder), read_rows(folder / "rollouts.jsonl")
    usable = [len(set(row["scores"])) > 1 for row in rollouts if row["round"] == 1]
    assert rows[0]["online/pairs"] == sum(usable) > 0
    steps = [r for r in read_rows(folder / "metrics.jsonl") if r["split"] == "train"]
    assert all(-1 <= row["ranking_train/kendall_tau"] <= 1 for row in steps)
    # The order of four costs five comparisons, and a pair one.
    each = 5 if "online.budget=90" in more else 1
    assert {row["cost"] for row in read_rows(folder / "labels.jsonl")} == {each}
    if each == 5:
        return
    # Stopped and continued, it is the same run.
    go("half", "online.responses_per_prompt=4", "online.rounds=1", *more)
    half = go("half", "online.responses_per_prompt=4", "online.rounds=2", *more)
    assert same(weights(folder), weights(half))
    assert read_rows(half / "labels.jsonl") == read_rows(folder / "labels.jsonl")


@pytest.mark.parametrize("name", losses_to_run())
def test_every_loss_learns_online_or_says_why_not(go, name):
    options = (f"loss={name}", "online.rounds=2", "online.responses_per_prompt=3")
    weighted = "weights of tokens, which rollouts do not have"
    refusals = {
        "bradley_terry": "samples nothing",
        "kto_unpaired": "rounds give pairs",
        "tis-dpo": weighted,
        "sepo": weighted,
        "xpo": "reads the column 'from_reference', which rollouts do not have",
    }
    if name in refusals:
        with pytest.raises(ConfigError, match=refusals[name]):
            go(name, *options)
        return
    folder = go(name, *options)
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "train"]
    assert rows and all(math.isfinite(row["loss/train"]) for row in rows)


@pytest.mark.parametrize(
    "settings, message",
    [
        (("online.budget=0",), "online.budget=0 buys no label"),
        (
            ("online.budget=0", "online.discriminator=bradley_terry"),
            "knows nothing and may learn nothing",
        ),
        (("online.discriminator=odpo",), "which of two responses is better and no more"),
        (("online.discriminator=bradley_tery",), "did you mean bradley_terry"),
        (("online.discriminator_path=/x",), "name its loss"),
        (("online.select=best",), "accepted: conf, d_optimal, delta_ucb, double_thompson, rand"),
        (("online.select=delta_ucbs",), "did you mean delta_ucb"),
        (
            ("online.select={name: delta_ucb, widht: 2}",),
            "no setting widht; accepted: width, heads",
        ),
        (("online.select={name: delta_ucb, width: -1}",), "width=-1 .* must be at least 0"),
        (("online.select={name: sharpe, weighted: 1}",), "weighted=1 .* must be true or false"),
        (("online.select={name: mine, module: nowhere.py}",), "online.select.module='nowhere.py'"),
        (("online.select=rand",), "online.select=rand is set and online.discriminator is not"),
        (("online.responses_per_prompt=1",), "at least 2"),
        (("online.sampler=/nowhere",), "no such file or folder"),
        (("online.max_new_tokens=60",), "exceed max_length=64"),
        (("reference.cache=true",), "each round trains on new samples"),
        (("online.relabels=0",), "at least 1"),
        (("online.discriminator_lr=0",), "above 0"),
        ((*AHEAD, "trainer=FSDPTrainer"), "online.ahead=true samples from a copy"),
        ((*AHEAD, "compile=true"), "turns compiled blocks off"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_loads(go, settings, message):
    with pytest.raises(ConfigError, match=message):
        go("refused", *settings)


def test_another_gold_or_temperature_is_another_run(go):
    go("run", "online.rounds=1")
    with pytest.raises(ConfigError, match=r"temperature was 1\.0 and is now 0\.5"):
        go("run", "temperature=0.5")
    go("run", "online.rounds=2", "online.save_every=1")


def test_prompts_alone_are_enough_online_and_refused_offline(go, tmp_path, small_folder, imdb_dir):
    prompts = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": f"number {i}"} for i in range(40)]
    )
    folder = go("prompts", f"datasets=[{prompts}]", "online.rounds=2")
    assert {row["prompt"] for row in read_rows(folder / "rollouts.jsonl")} <= {
        f"number {i}" for i in range(40)
    }
    with pytest.raises(
        ConfigError, match="prompts and no responses: good for function=online and eval"
    ):
        run_here(
            *small_run(
                small_folder, imdb_dir, tmp_path / "offline", f"datasets=[{prompts}]", "loss=sft"
            )
        )
    run_here(
        *small_run(
            small_folder,
            imdb_dir,
            tmp_path / "eval",
            f"datasets=[{prompts}]",
            "function=eval",
            f"model.archive={folder}",
            "n_eval_examples=2",
        )
    )
    [row] = read_rows(tmp_path / "eval" / "eval.jsonl")
    assert row["samples_eval/kl"] > 0 and "loss/eval" not in row


def test_long_prompts_are_cut_like_those_of_evaluations(go, tmp_path):
    long = write_jsonl(
        tmp_path / "long.jsonl",
        [{"prompt": f"{i} " + "word " * 40 + f"end {i}"} for i in range(20)],
    )
    folder = go(
        "long", f"datasets=[{long}]", "online.rounds=1", "online.discriminator=bradley_terry"
    )
    assert all(
        len(row["prompt"]) <= 31 and "end" in row["prompt"]
        for row in read_rows(folder / "rollouts.jsonl")
    )  # bytes are tokens, and one is BOS


def test_gold_reward_over_steps_by_an_evaluation_of_all_checkpoints(
    go, tmp_path, small_folder, imdb_dir
):
    folder = go("run", "keep_checkpoints=null", "online.rounds=4")
    run_here(
        *small_run(
            small_folder,
            imdb_dir,
            tmp_path / "eval",
            "function=eval",
            f"model.archive='{folder}/step-*'",
            "reward=length",
        )
    )
    rows = read_rows(tmp_path / "eval" / "eval.jsonl")
    assert [row["step"] for row in rows] == sorted(
        int(path.name[5:]) for path in folder.glob("step-*")
    ) and len(rows) == 2
    assert all(row["samples_eval/policy_reward"] > 0 and row["samples_eval/kl"] > 0 for row in rows)
