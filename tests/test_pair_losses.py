"""The losses of pair_losses.py against their formulas in plain loops, the losses that they vary,
and what they refuse."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_losses import bind, changed, everything, pairs, value
from test_weights_and_sums import pairs as pairs_with_column

from preflab.objective.registry import LOSSES, made_up_batch
from preflab.objective.types import Pair, Side
from utils import ConfigError, DataError

NAMES = sorted(n for n, spec in LOSSES.items() if spec.function.__module__ == "pair_losses")


def four_pairs(**columns) -> tuple[Pair, torch.Tensor]:
    """Four pairs of different lengths and scores, and the log-probs of the policy, (2, pairs)."""
    policy = torch.tensor([[-6.5, -9.0, -4.25, -12.0], [-8.0, -7.5, -5.0, -10.5]]).double()
    reference = torch.tensor([[-7.0, -8.0, -4.5, -12.5], [-7.25, -8.5, -3.5, -11.0]]).double()
    lengths = torch.tensor([[4.0, 5, 2, 7], [3, 6, 2, 9]]).double()
    scores = torch.tensor([[0.9, 0.75, 0.5, 1.0], [0.25, 0.5, 0.125, 0.875]]).double()
    policy.requires_grad_()
    chosen, rejected = (
        Side(policy_logps=policy[i], reference_logps=reference[i], lengths=lengths[i], scores=s)
        for i, s in enumerate(scores)
    )
    return Pair(chosen, rejected, {k: torch.tensor(v).double() for k, v in columns.items()}), policy


# -------------------------------------------------------------------------- formulas in plain loops


def log_s(x):
    return -torch.log(1 + torch.exp(-x))


def clip(x, low, high):
    return x if low < x.item() < high else torch.tensor(low if x.item() <= low else high).double()


def phi(d):
    return torch.exp(d) + d


class Row:
    """One pair: pi, ref, n and s of both responses, their log-ratios d and mean log-probs p."""

    def __init__(self, pair, i, policy):
        self.pi = policy[0, i], policy[1, i]
        self.ref, self.n, self.s = (
            (getattr(pair.chosen, f)[i].item(), getattr(pair.rejected, f)[i].item())
            for f in ("reference_logps", "lengths", "scores")
        )
        self.d = self.pi[0] - self.ref[0], self.pi[1] - self.ref[1]
        self.p = self.pi[0] / self.n[0], self.pi[1] / self.n[1]
        self.h, self.gap = self.d[0] - self.d[1], self.p[0] - self.p[1]
        self.ref_gap = self.ref[0] - self.ref[1]


def each(formula):
    return lambda rows, **settings: [formula(r, **settings) for r in rows]


def plain_qrpo(r, beta, transform):
    def term(d, q):
        z = beta * (math.exp(1 / beta) - 1) if transform == "identity" else beta / (1 + beta)
        target = q if transform == "identity" else math.log(q)
        return (target - beta * math.log(z) - beta * d) ** 2

    return (term(r.d[0], r.s[0]) + term(r.d[1], r.s[1])) / 2


def plain_alphapo(r, beta, gamma, alpha):
    chosen, rejected = (beta * (1 - torch.exp(p) ** -alpha) / alpha for p in r.p)
    return -log_s(chosen - rejected - gamma)


def plain_dr_dpo(rows, beta, beta_prime):
    terms = [torch.exp(log_s(beta * r.h) / beta_prime) for r in rows]
    return [-beta_prime * torch.log(sum(terms) / len(terms))] * len(rows)


def plain_kldpo(rows, beta, tau, largest):
    losses = [-log_s(beta * r.h) for r in rows]
    mean = sum(loss.item() for loss in losses) / len(losses)
    return [min(largest, math.exp((loss.item() - mean) / tau)) * loss for loss in losses]


def plain_alpha_dpo(rows, beta, gamma, alpha, momentum):
    g = [(r.d[0] / r.n[0] - r.d[1] / r.n[1]).item() for r in rows]
    mean = sum(g) / len(g)
    spread = math.sqrt(sum((x - mean) ** 2 for x in g) / (len(g) - 1))
    margins = [gamma + beta * alpha * (x - mean) / spread for x in g]
    return [-log_s(beta * r.gap - m) for r, m in zip(rows, margins, strict=True)]


PLAIN = {
    "chi-po": each(
        lambda r, beta, r_max: (
            -log_s(clip(beta * (phi(r.d[0]) - phi(r.d[1])), -2 * r_max, 2 * r_max))
        )
    ),
    "h-dpo": each(lambda r, beta, alpha: -log_s(beta * (alpha * (r.pi[0] - r.pi[1]) - r.ref_gap))),
    "hypo": each(lambda r, beta: -log_s(beta * (r.pi[0] - r.pi[1] - max(0, r.ref_gap)))),
    "focal-po": each(
        lambda r, beta, gamma: -(torch.exp(log_s(beta * r.h)) ** gamma) * log_s(beta * r.h)
    ),
    "bpo": each(lambda r, beta, alpha: -log_s(beta * min(r.d[0], -alpha * r.d[1]))),
    "dpo-shift": each(lambda r, beta, shift: -log_s(beta * r.d[0] - shift * beta * r.d[1])),
    "c2-dpo": each(
        lambda r, beta, constraint_weight: (
            -log_s(beta * r.h) + constraint_weight * (r.d[0] + r.d[1]) ** 2
        )
    ),
    "mappo": each(
        lambda r, beta, scale: -log_s(beta * (r.d[0] - (r.s[0] - r.s[1]) / scale * r.d[1]))
    ),
    "rebel": each(lambda r, eta: (r.h - eta * (r.s[0] - r.s[1])) ** 2),
    "qrpo": each(plain_qrpo),
    "xpo": lambda rows, beta, alpha, reference_chosen: [
        -log_s(beta * r.h) + alpha * r.pi[0 if chosen else 1]
        for r, chosen in zip(rows, WRITTEN["drawn"], strict=True)
    ],
    "simper": each(lambda r: torch.exp(r.p[1]) - torch.exp(r.p[0])),
    "repo": each(lambda r, gamma: torch.clamp(gamma - r.gap, min=0)),
    "alphapo": each(plain_alphapo),
    "dr-dpo": plain_dr_dpo,
    "kldpo": plain_kldpo,
    "alpha-dpo": plain_alpha_dpo,
}
WRITTEN = {"drawn": [1.0, 0.0, 0.0, 1.0]}
CASES = [
    ("chi-po", {"beta": 0.3, "r_max": 10.0}),
    ("chi-po", {"beta": 0.9, "r_max": 0.75}),  # two of the pairs are clipped
    ("h-dpo", {"beta": 0.3, "alpha": 0.8}),
    ("hypo", {"beta": 0.3}),
    ("focal-po", {"beta": 0.3, "gamma": 0.25}),
    ("bpo", {"beta": 0.3, "alpha": 0.6}),
    ("dpo-shift", {"beta": 0.3, "shift": 0.7}),
    ("c2-dpo", {"beta": 0.3, "constraint_weight": 0.05}),
    ("mappo", {"beta": 0.3, "scale": 2.0}),
    ("rebel", {"eta": 1.5}),
    ("qrpo", {"beta": 0.3, "transform": "identity"}),
    ("qrpo", {"beta": 0.3, "transform": "log"}),
    ("xpo", {"beta": 0.3, "alpha": 0.02, "reference_chosen": "drawn"}),
    ("simper", {}),
    ("repo", {"gamma": 0.5}),
    ("alphapo", {"beta": 2.0, "gamma": 0.4, "alpha": 0.25}),
    ("alphapo", {"beta": 2.0, "gamma": 0.4, "alpha": -0.5}),
    ("dr-dpo", {"beta": 0.3, "beta_prime": 0.5}),
    ("kldpo", {"beta": 0.3, "tau": 0.1, "largest": 2.0}),
    ("alpha-dpo", {"beta": 2.5, "gamma": 0.4, "alpha": 0.2, "momentum": 0.9}),
]


def test_every_loss_of_the_file_has_a_plain_formula():
    by_hand = {"gamma-po", "aot"}  # below, and in test_losses.py
    assert {*PLAIN, *by_hand} == set(NAMES) and {name for name, _ in CASES} == set(PLAIN)


@pytest.mark.parametrize("name, given_", CASES)
def test_value_and_gradient_are_those_of_the_formula_in_plain_loops(name, given_):
    pair, policy = four_pairs(**WRITTEN)
    losses = bind(name, **given_)(pair).losses
    plain = PLAIN[name]([Row(pair, i, policy) for i in range(4)], **given_)
    assert losses.tolist() == pytest.approx([x.item() for x in plain], rel=1e-12)
    weights = torch.tensor([1.0, 2, 3, 4]).double()  # so that no pair's gradient hides in another's
    ours, theirs = (
        torch.autograd.grad((weights * torch.stack(list(x))).sum(), policy, retain_graph=True)[0]
        for x in (losses, plain)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-13)
    assert ours.abs().sum() > 0


def test_the_margins_of_gamma_po_minimise_what_they_must_and_average_to_gamma():
    pair, policy = four_pairs()
    beta, gamma, tau = 2.0, 0.8, 3.0
    output = bind("gamma-po", beta=beta, gamma=gamma, tau=tau)(pair)
    margins = output.metrics["margin_{split}/mean"]
    gaps = torch.stack([beta * Row(pair, i, policy).gap for i in range(4)]).detach()
    assert margins.mean().item() == pytest.approx(gamma, rel=1e-12)
    assert margins.argsort().tolist() == gaps.argsort().tolist()
    # Where the objective is smallest on the simplex, its slope is the same in all directions.
    p = (margins / gamma / 4).requires_grad_()
    kl = (p * torch.log(4 * p)).sum()
    objective = -torch.stack([log_s(g - gamma * 4 * q) for g, q in zip(gaps, p, strict=True)])
    [slope] = torch.autograd.grad(objective.mean() + tau * kl, p)
    # 20 steps are close to it, and the uniform start is not
    assert (slope - slope.mean()).abs().max() < 1e-4
    assert output.losses.tolist() == pytest.approx((-log_s(gaps - margins)).tolist(), rel=1e-12)
    [gradient] = torch.autograd.grad(output.losses.sum(), policy)
    expected = -beta * torch.sigmoid(margins - gaps) / pair.chosen_lengths
    torch.testing.assert_close(gradient[0], expected, rtol=1e-11, atol=1e-13)


# ------------------------------------------------------------------------------------- identities

AGAIN = [
    ("h-dpo", {"alpha": 1.0}, "dpo", {}),
    ("focal-po", {"gamma": 0.0}, "dpo", {}),
    ("dpo-shift", {"shift": 1.0}, "dpo", {}),
    ("c2-dpo", {"constraint_weight": 0.0}, "dpo", {}),
    ("mappo", {"scale": 1.2}, "dpo", {}),  # the gap of the scores in `everything`
    ("dr-dpo", {}, "dpo", {}),  # of one pair
    ("kldpo", {}, "dpo", {}),  # of one pair
    ("alphapo", {"gamma": 0.4, "alpha": 0.0}, "simpo", {"gamma": 0.4}),
    ("alpha-dpo", {"gamma": 0.4, "alpha": 0.0}, "simpo", {"gamma": 0.4}),
    ("gamma-po", {"gamma": 0.4}, "simpo", {"gamma": 0.4}),  # of one pair
]


@pytest.mark.parametrize("name, at, other, of_other", AGAIN, ids=[case[0] for case in AGAIN])
@settings(deadline=None, max_examples=10)
@given(d_w=st.floats(-30, 3), d_l=st.floats(-30, 5), beta=st.floats(0.01, 2))
def test_it_is_the_loss_that_it_varies(name, at, other, of_other, d_w, d_l, beta):
    data = everything(d_w, d_l)
    expected = value(other, data, beta=beta, **of_other)
    assert value(name, data, beta=beta, **at) == pytest.approx(expected, rel=1e-12)


def test_rebel_is_ipo_where_the_scores_differ_by_its_target():
    data = changed(everything(1.5, -0.5), {"scores": torch.tensor([6.0]).double()})
    data = changed(data, rejected={"scores": torch.tensor([1.0]).double()})
    assert value("rebel", data, eta=1.0) == pytest.approx(value("ipo", data, beta=0.1), rel=1e-12)


def test_hypo_is_dpo_where_the_reference_is_right_and_has_no_reference_elsewhere():
    right, wrong = pairs([1.0], [2.0]), pairs([1.0], [2.0], ref_w=-9.0, ref_l=-5.0)
    assert value("hypo", right, beta=0.3) == pytest.approx(value("dpo", right, beta=0.3))
    free = value("dpo", wrong, beta=0.3, reference_free=True)
    assert value("hypo", wrong, beta=0.3) == pytest.approx(free) != value("dpo", wrong, beta=0.3)


def test_dr_dpo_trusts_large_losses_less_and_kldpo_more():
    data = pairs([3.0, -4.0], [-1.0, 2.0])  # the second pair is in the wrong order

    def share_of_wrong(name, **given_):
        losses = bind(name, beta=0.5, **given_)(data).losses
        [g] = torch.autograd.grad(losses.sum(), data.policy_chosen_logps)
        return (g[1] / g.sum()).item()

    dpo = share_of_wrong("dpo")
    assert share_of_wrong("dr-dpo", beta_prime=1.0) < dpo < share_of_wrong("kldpo", tau=1.0)


def test_alpha_dpo_keeps_the_mean_and_the_spread_of_the_gap():
    loss = bind("alpha-dpo", momentum=0.75)
    batches = [made_up_batch(loss, n=5, seed=seed) for seed in (1, 2)]
    stats = []
    for batch in batches:
        g = batch.chosen_logratio / batch.chosen_lengths
        g = g - batch.rejected_logratio / batch.rejected_lengths
        stats.append((g.mean().item(), g.std().item()))
        loss.keep(loss(batch))
    expected = [0.75 * a + 0.25 * b for a, b in zip(*stats, strict=True)]
    assert list(loss.state_dict().values()) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------------------------- refusals


def test_scores_that_are_no_prior_and_no_quantiles_are_refused_before_a_run():
    high, low = torch.tensor([0.9, 2.5]).double(), torch.tensor([0.4, 0.5]).double()
    names = ["a.jsonl:1", "a.jsonl:2"]
    with pytest.raises(DataError, match=r"a.jsonl:2 has 2 .*set loss.scale to the largest gap"):
        bind("mappo").inspect_scores(high, low, names)
    line = bind("mappo", scale=2.0).inspect_scores(high, low, names)
    assert line == "mappo weights of 2 rejected responses: 5% 0.287, median 0.625, 95% 0.962"
    with pytest.raises(DataError, match=r"reads quantiles .*a.jsonl:2 has 2.5; replace the scores"):
        bind("qrpo").inspect_scores(high, low, names)
    zero = torch.tensor([0.0]).double()
    assert "of 2 responses" in bind("qrpo").inspect_scores(zero + 1, zero, names)
    with pytest.raises(DataError, match=r"a.jsonl:1 has 0; replace"):
        bind("qrpo", transform="log").inspect_scores(zero + 1, zero, names)


def test_xpo_needs_to_know_which_response_is_the_references():
    assert bind("xpo").columns == {"from_reference"}
    with pytest.raises(ConfigError, match=r"names the column that is 1 where that is the chosen"):
        bind("xpo", reference_chosen=None)
    with pytest.raises(ConfigError, match="reads a column"):
        bind("xpo", all_pairs=True)


def test_xpo_trains_on_a_column_of_the_data_and_names_it_where_it_is_missing(run, tmp_path):
    data = pairs_with_column(tmp_path / "pairs.jsonl", lambda i: float(i % 2), n=16)
    options = ("loss=xpo", "test_fraction=0.25", "do_first_eval=false", "sample_during_eval=false")
    folder = run("xpo", *options, f"datasets=[{data}]", "loss.reference_chosen=w")
    assert (folder / "LATEST").exists()
    with pytest.raises((ConfigError, DataError), match="from_reference"):
        run("missing", *options, f"datasets=[{data}]")
