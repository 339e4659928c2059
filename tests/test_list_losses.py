"""Losses of lists against their formulas in plain loops, the pairwise losses that they are for two
responses, numbers of published code, and what must hold for every loss of lists: ties, padding."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import LOSS_FILES, YAMLS, bind, defaults

from preflab.objective import ranks
from preflab.objective.registry import LOSSES, bind_loss, made_up_batch
from preflab.objective.types import FIELDS, Pair, Ranking, Side
from utils import ConfigError, DataError

LISTWISE = [name for name in YAMLS if LOSSES[name].examples == "lists"]
PAIRWISE = [
    name
    for name in YAMLS
    if LOSSES[name].examples == "pairs" and not LOSSES[name].columns(defaults(name))
]


def ranking(*lists: list[tuple]) -> Ranking:
    """Lists of (score, log-prob, reference's log-prob, length), with padding behind short ones."""
    longest = max(map(len, lists))
    rows = [[*items, *[items[0]] * (longest - len(items))] for items in lists]
    scores, policy, reference, lengths = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    sizes = torch.tensor([len(items) for items in lists])
    return Ranking(
        scores=scores,
        policy_logps=policy.clone().requires_grad_(),
        reference_logps=reference,
        lengths=lengths,
        mask=torch.arange(longest) < sizes[:, None],
    )


ONE = [
    (0.7, -12.0, -13.0, 4),
    (1.5, -9.5, -9.0, 5),
    (-0.25, -14.25, -12.75, 3),
    (1.0, -11, -11.5, 6),
]
TIED = [(1.0, -7.0, -8.0, 4), (0.5, -9.0, -8.5, 3), (1.0, -6.75, -6.0, 5), (0.5, -9, -9.75, 2)]
SHORT = [(2.0, -5.0, -4.0, 2), (1.5, -6.0, -6.25, 3)]


# -------------------------------------------------------------------------- formulas in plain loops


def log_s(x):
    return -torch.log(1 + torch.exp(-x))


def shares(values):
    exps = [torch.exp(v) for v in values]
    return [e / sum(exps) for e in exps]


def plain_plackett_luce(s, x, **_):
    n = range(len(s))
    return -sum(
        torch.log(x[i].exp() / (x[i].exp() + sum(x[j].exp() for j in n if s[j] < s[i]))) for i in n
    )


def plain_lipo(s, x, **_):
    n = range(len(s))
    place = [1 + sum(x[j].item() > x[i].item() for j in n) for i in n]
    return -sum(
        (2 ** s[i] - 2 ** s[j])
        * abs(1 / math.log(1 + place[i]) - 1 / math.log(1 + place[j]))
        * log_s(x[i] - x[j])
        for i in n
        for j in n
        if s[i] > s[j]
    )


def plain_info_nca(s, x, alpha, **_):
    p = shares([v / alpha for v in s])
    return -sum(a * torch.log(b) for a, b in zip(p, shares(x), strict=True))


def plain_nca(s, x, alpha, **_):
    p = shares([v / alpha for v in s])
    return -sum(a * log_s(v) + log_s(-v) / len(s) for a, v in zip(p, x, strict=True))


def plain_exo(s, x, alpha, **_):
    p = shares([v / alpha for v in s])
    return sum(q * torch.log(q / a) for a, q in zip(p, shares(x), strict=True))


def plain_swepo(s, x, alpha, **_):
    mean = sum(s) / len(s)
    terms = [torch.exp(alpha * abs(a - mean) + v) for a, v in zip(s, x, strict=True)]
    return -torch.log(sum(t for t, a in zip(terms, s, strict=True) if a > mean) / sum(terms))


def plain_rrhf(s, x, policy, lengths, nll_weight, **_):
    n, p = range(len(s)), [a / b for a, b in zip(policy, lengths, strict=True)]
    hinges = [torch.clamp(p[j] - p[i], min=0) for i in n for j in n if s[i] > s[j]]
    best = [policy[i] for i in n if s[i] == max(s)]
    return sum(hinges) - nll_weight * sum(best) / len(best)


PLAIN = {
    "plackett-luce": plain_plackett_luce,
    "lipo": plain_lipo,
    "info-nca": plain_info_nca,
    "nca-list": plain_nca,
    "exo-list": plain_exo,
    "swepo": plain_swepo,
    "rrhf": plain_rrhf,
}
SETTINGS = {
    name: {k: v for k, v in {"beta": 0.3, "alpha": 0.5, "nll_weight": 0.25}.items() if k in d}
    for name, d in ((name, defaults(name)) for name in LISTWISE)
}


@pytest.mark.parametrize("name", LISTWISE)
def test_value_and_gradient_are_those_of_the_formula_in_plain_loops(name):
    lists = [ONE, SHORT, TIED]
    data = ranking(*lists)
    losses = bind(name, **SETTINGS[name])(data).losses
    gradient = torch.autograd.grad(losses.sum(), data.policy_logps)[0]
    for row, items in enumerate(lists):
        s, policy, reference, lengths = torch.tensor(items, dtype=torch.float64).unbind(1)
        policy.requires_grad_()
        x = SETTINGS[name].get("beta", 1) * (policy - reference)
        plain = PLAIN[name](s, x, policy=policy, lengths=lengths, **SETTINGS[name])
        assert losses[row].item() == pytest.approx(plain.item(), rel=1e-12)
        expected = torch.autograd.grad(plain, policy)[0]
        torch.testing.assert_close(gradient[row, : len(items)], expected, rtol=1e-11, atol=1e-13)
    assert not gradient[1, 2:].any()


def test_plackett_luce_is_the_chance_of_the_order_by_scores():
    data = ranking(ONE)
    x = (0.3 * data.logratio[0]).tolist()
    chance = 1.0
    remaining = sorted(range(4), key=lambda i: -ONE[i][0])
    while remaining:
        chance *= math.exp(x[remaining[0]]) / sum(math.exp(x[i]) for i in remaining)
        remaining = remaining[1:]
    loss = bind("plackett-luce", beta=0.3)(data).losses.item()
    assert loss == pytest.approx(-math.log(chance), rel=1e-12)


def test_lipo_takes_the_mean_over_the_orders_of_tied_rewards():
    items = [(s, -5.0 + d, -5.0, 3) for s, d in zip((1, 0.5, 0, 0.2), (1, 1, 0, 1), strict=True)]
    of_orders = []
    for noise in itertools.permutations((1e-9, 2e-9, 3e-9, 4e-9)):
        moved = [(s, pi + e, ref, n) for (s, pi, ref, n), e in zip(items, noise, strict=True)]
        of_orders.append(bind("lipo")(ranking(moved)).losses.item())
    exact = bind("lipo")(ranking(items)).losses.item()
    assert exact == pytest.approx(sum(of_orders) / len(of_orders), rel=1e-8)


# ------------------------------------------------------- published code, and pairs as lists of two

# github.com/thu-ml/Noise-Contrastive-Alignment at cbb9248 (without the 0.01 that it adds to the
# first score), github.com/haozheji/exact-optimization at a8ab360, github.com/GanjinZero/RRHF at
# e1a2b61 (its ranking term), run on ONE with beta 0.3 and scores divided by 0.5.
PUBLISHED = [
    ("info-nca", {"beta": 0.3, "alpha": 0.5}, 1.4186977351898404),
    ("nca-list", {"beta": 0.3, "alpha": 0.5}, 1.3972667050075696),
    ("exo-list", {"beta": 0.3, "alpha": 0.5}, 0.5067393693113053),
    ("rrhf", {"nll_weight": 0.0}, 0.06666666666666665),
]


@pytest.mark.parametrize("name, given, expected", PUBLISHED, ids=[case[0] for case in PUBLISHED])
def test_numbers_of_the_authors_code(name, given, expected):
    assert bind(name, **given)(ranking(ONE)).losses.item() == pytest.approx(expected, rel=1e-14)


def as_pair(data: Ranking) -> Pair:
    """A list of two as a pair, the higher score chosen."""
    order = data.scores[0].argsort(descending=True)

    def side(i):
        return Side(**{f: v[:, i] for f in FIELDS if (v := getattr(data, f)) is not None})

    return Pair(side(order[0]), side(order[1]))


LIPO_FACTOR = 1 / math.log(2) - 1 / math.log(3)
AS_PAIRS = {  # by the gap of the scores: the pairwise loss, and a factor
    "plackett-luce": lambda gap: ("dpo", {"beta": 0.3}, 1),
    "swepo": lambda gap: ("dpo", {"beta": 0.3}, 1),
    "info-nca": lambda gap: ("soft-label", {"beta": 0.3, "gamma": 1 / 0.5}, 1),
    "exo-list": lambda gap: (
        "exo",
        {"beta": 0.3, "label_smoothing": 1 / (1 + math.exp(gap / 0.5))},
        1,
    ),
    "lipo": lambda gap: ("dpo", {"beta": 0.3}, (2**1.25 - 2 ** (1.25 - gap)) * LIPO_FACTOR),
}


@pytest.mark.parametrize("name", sorted(AS_PAIRS))
@settings(max_examples=20, deadline=None)
@given(d=st.tuples(st.floats(-9, 9), st.floats(-9, 9)), gap=st.floats(0.05, 2), first=st.booleans())
def test_for_two_responses_it_is_the_loss_of_the_pair(name, d, gap, first):
    items = [(1.25, -20 + d[0], -20.0, 4), (1.25 - gap, -22 + d[1], -22.0, 7)]
    data = ranking(items if first else items[::-1])
    pairwise, given_, factor = AS_PAIRS[name](gap)
    ours = bind(name, **SETTINGS[name])(data).losses.item()
    theirs = factor * bind(pairwise, **given_)(as_pair(data)).losses.item()
    assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12)


def test_nca_of_two_responses_at_a_small_temperature_is_nca_of_the_pair():
    data = ranking(SHORT)
    ours = bind("nca-list", beta=0.3, alpha=0.01)(data).losses.item()
    theirs = bind("nca", beta=0.3)(as_pair(data)).losses.item()
    assert ours == pytest.approx(theirs, rel=1e-12)


def test_rrhf_of_two_responses_of_one_token_is_slic_without_a_margin():
    for items in (SHORT, SHORT[::-1], [(1.0, -3.0, 0, 1), (2.0, -4.0, 0, 1)]):
        data = ranking([(s, pi, ref, 1) for s, pi, ref, _ in items])
        ours = bind("rrhf", nll_weight=0.25)(data).losses.item()
        theirs = bind("slic", delta=0.0, nll_weight=0.25)(as_pair(data)).losses.item()
        assert ours == pytest.approx(theirs, rel=1e-12)


@pytest.mark.parametrize("name", PAIRWISE)
def test_all_pairs_is_the_loss_of_a_pair_for_two_responses_and_the_mean_for_more(name):
    loss, alone = bind(name, all_pairs=True), bind(name)
    data = made_up_batch(loss, n=3)
    two = {f: v[:, :2] for f in FIELDS if (v := getattr(data, f)) is not None}
    couple = replace(data, **two, mask=data.mask[:, :2])
    swap = couple.scores[:, 0] < couple.scores[:, 1]

    def side(i):
        return Side(**{f: v[torch.arange(3), (swap ^ bool(i)).long()] for f, v in two.items()})

    pairs = alone(Pair(side(0), side(1)))
    torch.testing.assert_close(loss(couple).losses, pairs.losses, rtol=1e-12, atol=1e-12)
    if loss.couples_batch:
        return  # more pairs of a batch change each other's loss
    output, (pair, lists) = loss(data), data.pairs()
    each = alone(pair)
    for row, n in enumerate([3, 6, 3]):
        own = lists == row
        assert own.sum() == n
        assert output.losses[row].item() == pytest.approx(each.losses[own].mean().item(), rel=1e-12)
        _, i, j = data.better.nonzero(as_tuple=True)
        of_pairs = each.chosen_rewards - each.rejected_rewards
        gaps = output.rewards[row, i[own]] - output.rewards[row, j[own]]
        torch.testing.assert_close(gaps, of_pairs[own].detach())
    for metric, values in output.metrics.items():
        assert values.shape == (3,), metric


def test_all_pairs_names_the_list_with_unusable_scores():
    loss = bind("odpo", offset="ratio", all_pairs=True)
    data = replace(ranking(ONE, TIED), names=["first", "second"])
    with pytest.raises(DataError, match=r"loss=odpo with offset=ratio .* but first has"):
        loss(data)


def test_bad_uses_of_all_pairs_are_refused():
    with pytest.raises(ConfigError, match="loss=plackett-luce is one of lists"):
        bind("plackett-luce", all_pairs=True)
    with pytest.raises(ConfigError, match="reads a column"):
        bind("bradley_terry", all_pairs=True, margin="magnitude")
    with pytest.raises(ConfigError, match=r"loss\.all_pairs='yes' of loss=dpo must be true or"):
        bind("dpo", all_pairs="yes")


# ---------------------------------------------------------------------------- every loss of lists

OF_LISTS = [(name, {}) for name in LISTWISE] + [
    (name, {"all_pairs": True}) for name in PAIRWISE if not LOSSES[name].couples_batch
]


@pytest.mark.parametrize("name, more", OF_LISTS, ids=[n + "-all" * bool(m) for n, m in OF_LISTS])
def test_neither_padding_nor_the_order_of_responses_or_of_ties_matters(name, more):
    loss = bind(name, **more)
    data = made_up_batch(loss, n=2)
    data = replace(data, scores=data.scores.round())  # 2 and 3, tied
    fields = {f: v for f in FIELDS if (v := getattr(data, f)) is not None}
    for v in fields.values():
        v.requires_grad_(v.is_floating_point())

    def changed(columns, mask):
        return loss(replace(data, **{f: v[:, columns] for f, v in fields.items()}, mask=mask))

    expected = loss(data)
    long = torch.cat([data.mask, torch.zeros(2, 2, dtype=torch.bool)], dim=1)
    cases = [changed([0, 1, 2, 3, 1, 0], long)]
    for order in ([1, 0, 2, 3], [3, 2, 1, 0], [2, 3, 0, 1]):
        cases.append(changed(order, data.mask[:, order]))
    trained = "values" if "scalar_head" in loss.reads else "policy_logps"
    trained = "token_logps" if "token_logps" in loss.reads else trained
    gradient = torch.autograd.grad(expected.losses.sum(), fields[trained])[0]
    assert not gradient[0, 3].any()  # the padding
    for output in cases:
        torch.testing.assert_close(output.losses, expected.losses, rtol=1e-12, atol=1e-12)
        g = torch.autograd.grad(output.losses.sum(), fields[trained])[0]
        torch.testing.assert_close(g, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LISTWISE)
def test_the_best_response_rises_and_the_worst_falls(name):
    data = ranking([(s, -5.0, -5.0, 3) for s in (0.2, 0.9, 0.5, 0.1)])
    if name == "rrhf":  # its hinge is 0 where all are equally likely
        data = ranking([(s, -5.0 - s, -5.0, 3) for s in (0.2, 0.9, 0.5, 0.1)])
    loss = bind(name, **({"alpha": 0.2} if "alpha" in SETTINGS[name] else {}))
    [gradient] = torch.autograd.grad(loss(data).losses.sum(), data.policy_logps)
    assert gradient[0, 1] < 0 < gradient[0, 3]


def test_likelihood_of_the_best_is_mixed_in():
    data = ranking(ONE, TIED)
    plain, mixed = bind("plackett-luce"), bind("plackett-luce", sft_weight=0.5)
    added = (mixed(data).losses - plain(data).losses).tolist()
    assert added == pytest.approx([0.5 * 9.5 / 5, 0.5 * (7 / 4 + 6.75 / 5) / 2])


def test_lipo_says_which_scores_its_gains_have_and_refuses_large_ones():
    loss, names = bind("lipo"), ["the row"]
    ones = torch.ones(1, dtype=torch.float64)
    assert "gains of 1 pairs: 5% 2" in loss.inspect_scores(2 * ones, ones, names)
    with pytest.raises(DataError, match=r"2\^score, and the row has a score of 300; .* scale them"):
        loss.inspect_scores(300 * ones, ones, names)


def test_what_lists_may_not_be_used_for():
    assert LOSS_FILES == ("losses", "pair_losses", "list_losses", "token_losses")
    with pytest.raises(ConfigError, match="set it to 0"):
        bind_loss(defaults("bradley_terry") | {"all_pairs": True, "sft_weight": 0.1})


# --------------------------------------------------------------------------------------- measures


def tau_b(a, b) -> float:
    """Kendall's tau-b by counting, as its definition has it."""
    pairs = list(itertools.combinations(range(len(a)), 2))
    sign = lambda v, i, j: (v[i] > v[j]) - (v[i] < v[j])  # noqa: E731
    agree = sum(sign(a, i, j) * sign(b, i, j) for i, j in pairs)
    n_a = sum(sign(a, i, j) != 0 for i, j in pairs)
    n_b = sum(sign(b, i, j) != 0 for i, j in pairs)
    return agree / math.sqrt(n_a * n_b) if n_a and n_b else 0.0


def ndcg_by_orders(rewards, scores) -> float:
    """The mean of NDCG over all orders of tied rewards."""
    gains = [s - min(scores) for s in scores]

    def dcg(order):
        return sum(gains[i] / math.log2(place + 2) for place, i in enumerate(order))

    orders = [
        o
        for o in itertools.permutations(range(len(scores)))
        if all(rewards[a] >= rewards[b] for a, b in itertools.pairwise(o))
    ]
    ideal = dcg(sorted(range(len(scores)), key=lambda i: -scores[i]))
    return sum(map(dcg, orders)) / len(orders) / ideal


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(-2, 2)), min_size=2, max_size=5))
def test_measures_of_an_order_are_those_of_their_definitions(items):
    rewards, scores = zip(*items, strict=True)
    pad = ((9, 9),) * (6 - len(items))
    padded = torch.tensor([[*items, *pad]], dtype=torch.float64)
    mask = torch.arange(6)[None] < len(items)
    order = ranks.order_of(padded[..., 0], mask)
    truth = ranks.order_of(padded[..., 1], mask)
    assert ranks.kendall_tau(order, truth).item() == pytest.approx(tau_b(rewards, scores))
    pairs = [(i, j) for i, j in itertools.permutations(range(len(items)), 2)]
    pairs = [(i, j) for i, j in pairs if scores[i] > scores[j]]
    right = [(rewards[i] > rewards[j]) + (rewards[i] == rewards[j]) / 2 for i, j in pairs]
    expected = sum(right) / len(right) if right else 0
    assert ranks.pair_accuracy(order, truth).item() == pytest.approx(expected)
    if pairs:
        value = ranks.ndcg(order, padded[..., 1], mask).item()
        assert value == pytest.approx(ndcg_by_orders(rewards, scores))
