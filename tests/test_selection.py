"""Which pairs of the pool get a gold label: the selections against what they claim, computed here
in another way, and a selection of the user's own."""

import json
import math
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_online import Longest, Settings, rollouts, shortest

from preflab.online.heads import fit_heads
from preflab.online.labelers import DiscriminatorLabels
from preflab.online.ledger import Ledger
from preflab.online.selection import (
    SELECTIONS,
    Past,
    SelectionError,
    bind_selection,
    made_up_pool,
    pool_of,
)
from utils import ConfigError

NOTHING = Past(np.zeros((0, 2)), np.zeros(0), np.zeros(0, bool))


def selected(given, pool, n: int, seed=(0, 1)) -> list[int]:
    return bind_selection(given)(pool, n, list(seed))


def pool_with_features(seed: int = 0, n: int = 12, k: int = 2, width: int = 5, labels: int = 9):
    rng = np.random.default_rng(seed)
    scores = [rng.normal(size=k).tolist() for _ in range(n)]
    features = [rng.normal(size=(k, width)) for _ in range(n)]
    past = Past(rng.normal(size=(labels, width)), rng.normal(size=labels), np.zeros(labels, bool))
    return pool_of(scores, features, past)


def test_conf_takes_the_closest_of_the_whole_pool_and_rand_any():
    gaps = (0.9, 0.05, 0.4, -0.01, 2.0, 0.3)
    pool = pool_of([[gap, 0.0] for gap in gaps])
    assert selected("conf", pool, 3) == [3, 1, 5] and selected("conf", pool, 10) == [
        *(3, 1, 5, 2, 0, 4)
    ]
    drawn = [tuple(selected("rand", pool, 3, (0, number))) for number in range(200)]
    assert drawn[7] == tuple(sorted(np.random.default_rng([0, 7]).permutation(6)[:3].tolist()))
    share = np.bincount([i for draw in drawn for i in draw], minlength=6) / 200
    assert abs(share - 0.5).max() < 0.15  # three of six are drawn each time: 4 standard errors


def test_a_pool_has_all_pairs_of_a_prompt_the_higher_score_first():
    pool = pool_of([[1.0, 3.0, 2.0], [5.0, 5.0]])
    assert pool.pairs.tolist() == [[1, 0], [2, 0], [1, 2], [3, 4]]
    assert pool.gaps.tolist() == [2.0, 1.0, 1.0, 0.0]
    assert pool.prompts_of_pairs.tolist() == [0, 0, 0, 1]


def test_heads_are_the_minimum_of_their_loss():
    rng = np.random.default_rng(3)
    features, gaps = rng.normal(size=(6, 9)), rng.normal(size=6)  # fewer labels than features
    weights = fit_heads(features, gaps, 3, 0.7, np.random.default_rng(5))
    again = np.random.default_rng(5)
    starts, counts = 0.7 * again.normal(size=(3, 9)), again.exponential(size=(3, 6))
    for head in range(3):
        w = torch.zeros(9, dtype=torch.float64, requires_grad=True)
        x, g, c, start = map(torch.tensor, (features, gaps, counts[head], starts[head]))

        def loss(w, x=x, g=g, c=c, start=start):
            fit = (c * torch.nn.functional.softplus(-(g + x @ w))).sum()
            return fit + ((w - start) ** 2).sum() / (2 * 0.7**2)

        solver = torch.optim.LBFGS(
            [w],
            max_iter=500,
            tolerance_grad=1e-12,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure(w=w, loss=loss, solver=solver):
            solver.zero_grad()
            value = loss(w)
            value.backward()
            return value

        solver.step(closure)
        assert np.abs(weights[head] - w.detach().numpy()).max() < 1e-7
    none = fit_heads(np.zeros((0, 9)), np.zeros(0), 4000, 0.7, np.random.default_rng(5))
    assert abs(none.std() - 0.7) < 0.02  # without labels the prior


def test_heads_agree_where_there_are_labels_and_nowhere_else():
    rng = np.random.default_rng(0)
    axis = np.eye(4)
    labelled = np.repeat(axis[:1], 60, axis=0)  # sixty labels along the first axis
    past = Past(labelled, np.zeros(60), np.zeros(60, bool))
    features = [np.stack([axis[i], 0 * axis[i]]) for i in range(4)]
    pool = pool_of([[0.0, 0.0]] * 4, features, past)
    spread = pool.of_pairs(pool.heads(400, 1.0, rng)).std(1)
    assert spread[0] < 0.6 * spread[1:].min() and np.allclose(spread[1:], 1, atol=0.15)
    # a tie says nothing of the order, and heads do not learn from it
    ties = pool_of([[0.0, 0.0]] * 4, features, Past(labelled, np.zeros(60), np.ones(60, bool)))
    assert np.allclose(ties.of_pairs(ties.heads(400, 1.0, rng)).std(1), 1, atol=0.15)


def test_delta_ucb_is_the_mean_gap_and_its_spread_over_heads():
    pool = pool_with_features(k=3)
    heads = pool.heads(16, 1.0, np.random.default_rng([0, 1]))
    bounds = {}
    for number, (i, j) in enumerate(pool.pairs.tolist()):
        gaps = [heads[i, h] - heads[j, h] for h in range(16)]
        bounds[number] = abs(np.mean(gaps)) + 2 * np.std(gaps, ddof=1)
    order = sorted(bounds, key=bounds.get, reverse=True)
    expected, seen = [], set()
    for number in order:
        if pool.prompts_of_pairs[number] not in seen:
            expected.append(number)
            seen.add(pool.prompts_of_pairs[number])
    assert selected({"name": "delta_ucb", "width": 2.0}, pool, 5) == expected[:5]
    assert selected({"name": "delta_ucb", "width": 0}, pool, 5) != expected[:5]


def test_double_thompson_asks_about_what_the_heads_disagree_about():
    rng = np.random.default_rng(0)
    # of the first half nobody knows the order; of the second the gap is 50 standard deviations
    sure = [[0.0, 0.0]] * 5 + [[50.0, 0.0]] * 5
    pool = pool_of(sure, [rng.normal(size=(2, 2)) for _ in sure], NOTHING)
    drawn = [selected("double_thompson", pool, 3, (0, number)) for number in range(40)]
    assert max(map(max, drawn)) < 5 and {i for draw in drawn for i in draw} == set(range(5))
    # best against worst of three, which is the pair of the largest gap
    scores = [[0.0, 50.0, 100.0]] * 4
    pool = pool_of(scores, [rng.normal(size=(3, 2)) for _ in scores], NOTHING)
    pairs = pool.pairs[selected({"name": "double_thompson", "reverse": True}, pool, 4)]
    assert sorted(map(tuple, (pairs % 3).tolist())) == [(2, 0)] * 4
    # two best of three with equal chances: the third is never asked about
    scores = [[100.0, 0.0, 100.0]] * 4
    pool = pool_of(scores, [rng.normal(size=(3, 2)) for _ in scores], NOTHING)
    pairs = pool.pairs[selected("double_thompson", pool, 4)]
    assert {frozenset(pair) for pair in (pairs % 3).tolist()} == {frozenset({0, 2})}


def test_d_optimal_takes_at_each_step_the_largest_determinant():
    pool = pool_with_features(seed=4, n=7, k=3, width=4)
    scale = math.sqrt(
        np.mean([((pool.features[i] - pool.features[j]) ** 2).sum() for i, j in pool.pairs])
    )

    def information(x, gap):
        p = 1 / (1 + math.exp(-gap))
        return p * (1 - p) * np.outer(x, x) / scale**2

    total = np.eye(4) / 0.5**2
    for x, gap in zip(pool.past.features, pool.past.gaps, strict=True):
        total = total + information(x, gap)
    expected, prompts = [], set()
    for _ in range(5):
        best, best_value = None, -math.inf
        for number, (i, j) in enumerate(pool.pairs.tolist()):
            if pool.prompts[i] in prompts:
                continue
            x = pool.features[i] - pool.features[j]
            value = np.linalg.slogdet(total + information(x, pool.scores[i] - pool.scores[j]))[1]
            if value > best_value:
                best, best_value, chosen = number, value, (i, j)
        i, j = chosen
        total = total + information(
            pool.features[i] - pool.features[j], pool.scores[i] - pool.scores[j]
        )
        expected.append(best)
        prompts.add(pool.prompts[i])
    assert selected({"name": "d_optimal", "prior": 0.5}, pool, 5) == expected


@pytest.mark.parametrize("weighted", [True, False])
def test_sharpe_is_mean_over_deviation_of_the_two_gradients(weighted):
    """The norms of the gradient of -log S(x) and of -log S(-x), by finite differences."""
    pool = pool_of([[float(gap), 0.0] for gap in (0.3, -1.7, 2.9, 0.02, -0.6)])
    ratios = []
    for x in pool.gaps:
        step = 1e-6
        norms = [
            abs(np.logaddexp(0, -s * (x + step)) - np.logaddexp(0, -s * (x - step))) / (2 * step)
            for s in (1, -1)
        ]
        p = 1 / (1 + math.exp(-x)) if weighted else 0.5
        mean = p * norms[0] + (1 - p) * norms[1]
        variance = p * (norms[0] - mean) ** 2 + (1 - p) * (norms[1] - mean) ** 2
        closed = 1 / math.sinh(x / 2) if weighted else 1 / math.tanh(x / 2)
        assert abs(mean / math.sqrt(variance) / closed - 1) < 1e-4
        ratios.append(mean / math.sqrt(variance))
    order = sorted(range(5), key=lambda i: -ratios[i])
    assert selected({"name": "sharpe", "weighted": weighted}, pool, 5) == order
    assert order == selected("conf", pool, 5)
    far = pool_of([[gap, 0.0] for gap in (60.0, 300.0, 2.0)])
    assert selected({"name": "sharpe", "weighted": True}, far, 3) == [2, 0, 1]
    heads = pool_with_features()
    with_heads = selected({"name": "sharpe", "heads": 16, "weighted": weighted}, heads, 12)
    assert sorted(with_heads) == list(range(12)) and with_heads != selected("conf", heads, 12)


@pytest.mark.parametrize("name", sorted(SELECTIONS))
def test_every_selection_buys_each_prompt_once_and_the_same_again(name):
    selection = bind_selection(name)
    pool = made_up_pool(selection.reads, n=6)
    for n in (1, 3, 9):
        chosen = selection(pool, n, [1, 2])
        prompts = pool.prompts_of_pairs[chosen].tolist()
        assert len(chosen) == min(n, 6) == len(set(prompts))
        assert chosen == selection(pool, n, [1, 2])
    assert selection(pool_of([]), 3, [0]) == []


OWN = """
from preflab.online import Pool, register_selection

@register_selection("widest", reads=["responses"])
def widest(pool: Pool, n: int, rng, *, trouble: str = ""):
    if trouble == "raise":
        raise ValueError("asleep")
    if trouble == "far":
        return [99]
    if trouble == "mask":
        return pool.gaps > 0
    return (-pool.gaps).argsort()
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    path = tmp_path_factory.mktemp("own") / "my_selection.py"
    path.write_text(OWN)
    return lambda **more: {"name": "widest", "module": str(path), **more}


class Featured(Longest):
    """Its features are the numbers of each letter from a to d."""

    def features(self, prompts, responses):
        return [np.array([[float(r.count(c)) for c in "abcd"] for r in of]) for of in responses]


def labeller(path, discriminator=None, **settings):
    ledger = Ledger(path, None)
    return DiscriminatorLabels(
        shortest, ledger, discriminator or Featured(), Settings(**settings), 0
    )


ROUND = [["aaaa", "a", "aaaaaa"], ["bb", "bbb", "bb"], ["cc", "cc", "cc"], ["d", "ddd", "dd"]]


def test_a_selection_of_ones_own_chooses_among_all_responses(tmp_path, own):
    labels = labeller(tmp_path / "l", select=own(), relabel_every=12, relabels=2)
    labels.label(rollouts(1, ROUND))
    assert [row["responses"] for row in labels.ledger.rows] == [["aaaaaa", "a"], ["ddd", "d"]]
    assert all("scored" not in row and len(row["tokens"]) == 2 for row in labels.ledger.rows)
    assert labels.pool == [] and json.dumps(labels.state_dict())
    waiting = labeller(tmp_path / "w", select=own(), relabel_every=99)
    waiting.label(rollouts(1, ROUND))
    # different texts only, and no prompt whose responses are all the same
    assert [row["responses"] for row in waiting.pool] == [ROUND[0], ["bb", "bbb"], ROUND[3]]


@pytest.mark.parametrize(
    "trouble, message",
    [("raise", "ValueError: asleep"), ("far", "returned 99"), ("mask", "is no position of a pair")],
)
def test_a_selection_that_fails_is_named_before_models_load(own, trouble, message):
    with pytest.raises(ConfigError, match=f"online.select=widest .*{message}.*made-up pool"):
        bind_selection(own(trouble=trouble))


def test_the_selection_of_the_documentation_takes_what_heads_call_equal(tmp_path):
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    [code] = [b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "likely_ties" in b]
    (tmp_path / "my_selections.py").write_text(code)
    given = {"name": "likely_ties", "module": str(tmp_path / "my_selections.py")}
    pool = pool_of([[9.0, 0.0], [0.1, 0.0], [0.0, 7.0]], [np.eye(2) * 0.01] * 3, NOTHING)
    assert selected(given, pool, 2) == [1, 2]


def test_a_selection_that_fails_in_a_round_buys_nothing(tmp_path, own):
    labels = labeller(tmp_path / "l", select=own(), relabel_every=12)
    labels.selection.settings["trouble"] = "raise"
    with pytest.raises(SelectionError, match="failed on 7 pairs: ValueError: asleep"):
        labels.label(rollouts(1, ROUND))
    assert labels.ledger.rows == [] and labels.pool == [] and labels.discriminator.learnt == []


@pytest.mark.parametrize("select", ["rand", "delta_ucb", "double_thompson", "d_optimal"])
def test_a_purchase_cut_short_is_completed_to_the_same_one(tmp_path, select):
    """A kill in the middle of writing the ledger: the labels that are there are used, and the rest
    is what the whole purchase would have had."""

    def rounds_of(path):
        labels = labeller(path, select=select, relabel_every=12, relabels=3)
        for number in (1, 2, 3):
            labels.label(rollouts(number, ROUND))
        return labels

    whole = rounds_of(tmp_path / "whole").ledger.rows
    assert len(whole) == 9
    lines = (tmp_path / "whole").read_text().splitlines(keepends=True)
    (tmp_path / "torn").write_text("".join(lines[:4]))
    assert rounds_of(tmp_path / "torn").ledger.rows == whole


def test_past_labels_are_seen_by_todays_discriminator(tmp_path):
    labels = labeller(tmp_path / "l", select="d_optimal", relabel_every=12, relabels=2)
    labels.label(rollouts(1, ROUND))
    rows = labels._candidates(rollouts(2, ROUND), labels.label(rollouts(2, ROUND)))
    pool = labels._pool_of(rows, 2)
    bought = labels.ledger.of_round(1)
    for i, row in enumerate(bought):
        better, worse = sorted(row["responses"], key=len)  # gold prefers the shorter one
        expected = [better.count(c) - worse.count(c) for c in "abcd"]
        assert pool.past.features[i].tolist() == expected
        assert pool.past.gaps[i] == len(better) - len(worse)  # the discriminator the longer one
    assert len(pool.past.gaps) == len(bought) == 2 and not pool.past.ties.any()
