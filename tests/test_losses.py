"""Losses against closed forms computed by hand, and what must hold for every registered loss and
its yaml."""

import ast
import functools
import math
import re
import runpy
import sys
from dataclasses import fields, replace
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import torch
from conftest import ROOT, make_model
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from preflab.batching import packed_models
from preflab.batching.packing import LAYOUTS, Layout, lay_out
from preflab.modeling import fused_head
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.objective import registry, types
from preflab.objective.ranges import Between, NonNegative, Positive, expected
from preflab.objective.registry import LOSSES, bind_loss, made_up_batch
from preflab.objective.types import FIELDS, NEEDS, Pair, Ranking, Side, Target
from preflab.settings.keys import CONFIG_DIR
from preflab.settings.run_folder import register_resolvers
from utils import ConfigError, DataError

LOSS_FILES = ("losses", "pair_losses", "list_losses", "token_losses")
YAMLS = sorted(path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml"))


@functools.cache
def defaults(loss) -> dict:
    return OmegaConf.to_container(OmegaConf.load(CONFIG_DIR / "loss" / f"{loss}.yaml"))


def bind(loss, **settings):
    return bind_loss(defaults(loss) | settings)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def pair(d_w=0.0, d_l=0.0, *, ref_w=-3.0, ref_l=-5.0, **more) -> Pair:
    """One pair with the given log-ratios, as leaves that take gradients."""
    fields = {
        "policy_chosen_logps": ref_w + d_w,
        "policy_rejected_logps": ref_l + d_l,
        "reference_chosen_logps": ref_w,
        "reference_rejected_logps": ref_l,
    }
    return pair_of(
        **{
            key: torch.tensor([float(value)], dtype=torch.float64, requires_grad=True)
            for key, value in (fields | more).items()
        }
    )


def pair_of(**fields) -> Pair:
    """A pair from the names by which its sides' fields can be read, such as `chosen_lengths`."""

    def of_side(side):
        return {
            name.replace(f"{side}_", ""): value
            for name, value in fields.items()
            if f"{side}_" in name
        }

    return Pair(Side(**of_side("chosen")), Side(**of_side("rejected")))


def changed(data: Pair, chosen=None, rejected=None) -> Pair:
    """The pair with other values in some fields of its sides."""
    return replace(
        data,
        chosen=replace(data.chosen, **(chosen or {})),
        rejected=replace(data.rejected, **(rejected or {})),
    )


def without_reference(data: Pair) -> Pair:
    return changed(data, {"reference_logps": None}, {"reference_logps": None})


def pairs(d_w, d_l, *, ref_w=-3.0, ref_l=-5.0) -> Pair:
    """Several pairs with the given log-ratios; the reference's log-probs are a number for all, or a
    list."""

    def column(values):
        return torch.tensor(values, dtype=torch.float64)

    ref_w, ref_l = column(ref_w).expand(len(d_w)), column(ref_l).expand(len(d_l))
    return Pair(
        Side(policy_logps=(ref_w + column(d_w)).requires_grad_(), reference_logps=ref_w),
        Side(policy_logps=(ref_l + column(d_l)).requires_grad_(), reference_logps=ref_l),
    )


def value(name, data, **settings) -> float:
    return bind(name, **settings)(data).losses.item()


def log_s(x):
    return math.log(sigmoid(x))


# ----------------------------------------------------------------------------------- values by hand
# d_w = 2, d_l = -1, so h = 3.


def test_dpo():
    assert value("dpo", pair(2, -1), beta=0.5) == pytest.approx(-math.log(sigmoid(1.5)), rel=1e-12)


def test_dpo_with_label_smoothing():
    expected = -0.9 * math.log(sigmoid(1.5)) - 0.1 * math.log(sigmoid(-1.5))
    assert value("dpo", pair(2, -1), beta=0.5, label_smoothing=0.1) == pytest.approx(
        expected, rel=1e-12
    )


def test_dpo_without_reference_sees_log_probs_alone():
    loss = bind("dpo", beta=0.5, reference_free=True)
    data = without_reference(pair(2, -1))  # log-probs -1 and -6
    output = loss(data)
    assert loss.reads == frozenset()
    assert output.losses.item() == pytest.approx(-math.log(sigmoid(0.5 * 5)), rel=1e-12)
    assert output.chosen_rewards.item() == pytest.approx(-0.5)


def test_ipo():
    assert value("ipo", pair(2, -1), beta=0.1) == pytest.approx((3 - 5) ** 2)


def test_ipo_averaged_over_lengths_keeps_rewards_of_sums():
    output = bind("ipo", beta=0.1, average_log_prob=True)(
        pair(2, -1, chosen_lengths=4, rejected_lengths=2)
    )
    assert output.losses.item() == pytest.approx((2 / 4 + 1 / 2 - 5) ** 2)
    assert output.chosen_rewards.item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    "settings, f",
    [
        ({}, math.log(1.6 - 0.4)),
        ({"offset": "ratio"}, math.log(1.6 / 0.4)),
        ({"ratio": True}, math.log(1.6 / 0.4)),
        ({"offset": "identity"}, 1.2),
        ({"offset": "log1p"}, math.log(2.2)),
        ({"offset": "none"}, 0.0),
    ],
)
def test_odpo(settings, f):
    data = pair(2, -1, chosen_scores=1.6, rejected_scores=0.4)
    assert value("odpo", data, beta=0.5, alpha=0.7, **settings) == pytest.approx(
        -math.log(sigmoid(1.5 - 0.7 * f)), rel=1e-12
    )


def test_soft_label():
    p = sigmoid(2 * (1.6 - 0.4))
    expected = -p * math.log(sigmoid(1.5)) - (1 - p) * math.log(sigmoid(-1.5))
    data = pair(2, -1, chosen_scores=1.6, rejected_scores=0.4)
    assert value("soft-label", data, beta=0.5, gamma=2.0) == pytest.approx(expected, rel=1e-12)
    sure = pair(2, -1, chosen_scores=100.0, rejected_scores=0.0)
    assert value("soft-label", sure, beta=0.5, gamma=2.0) == pytest.approx(
        value("dpo", sure, beta=0.5), rel=1e-12
    )


def test_cal_dpo_has_no_beta_in_the_sigmoid():
    expected = -math.log(sigmoid(3)) + 0.5 * ((2 - 5) ** 2 + (-1 + 5) ** 2)
    assert value("cal-dpo", pair(2, -1), beta=0.1, cal_weight=0.5) == pytest.approx(
        expected, rel=1e-12
    )


def test_tdpo():
    data = pair(2, -1, chosen_kl=0.3, rejected_kl=0.8)
    one = -math.log(sigmoid(0.5 * (3 - (0.8 - 0.3))))
    two = -math.log(sigmoid(0.5 * (3 - 0.7 * (0.8 - 0.3))))
    assert value("tdpo1", data, beta=0.5) == pytest.approx(one, rel=1e-12)
    assert value("tdpo", data, beta=0.5, if_tdpo2=False) == pytest.approx(one, rel=1e-12)
    assert value("tdpo2", data, beta=0.5, alpha=0.7) == pytest.approx(two, rel=1e-12)
    assert value("tdpo", data, beta=0.5, alpha=0.7) == pytest.approx(two, rel=1e-12)


def test_sft():
    target = Target(policy_logps=torch.tensor([-6.0, -9.0]), lengths=torch.tensor([2.0, 3.0]))
    assert bind("sft")(target).losses.tolist() == [6.0, 9.0]
    assert bind("sft", reduction="mean")(target).losses.tolist() == [3.0, 3.0]


def test_bradley_terry_subtracts_the_margin_column():
    data = Pair(
        Side(values=torch.tensor([1.5])),
        Side(values=torch.tensor([0.25])),
        columns={"magnitude": torch.tensor([0.5])},
    )
    assert value("bradley_terry", data) == pytest.approx(-math.log(sigmoid(1.25)), rel=1e-6)
    loss = bind("bradley_terry", margin="magnitude")
    assert loss.columns == {"magnitude"}
    assert loss(data).losses.item() == pytest.approx(-math.log(sigmoid(0.75)), rel=1e-6)


def test_sft_weight_adds_the_mean_token_loss_of_the_chosen_response():
    data = pair(2, -1, chosen_lengths=4, rejected_lengths=2)  # log-prob of chosen: -1
    assert value("dpo", data, beta=0.5, sft_weight=0.3) == pytest.approx(
        -math.log(sigmoid(1.5)) + 0.3 * 1 / 4, rel=1e-12
    )


# The same pair, d_w = 2, d_l = -1, log-probs -1 and -6, with 4 and 2 tokens.
P_W, P_L = -1 / 4, -6 / 2
LENGTHS = {"chosen_lengths": 4, "rejected_lengths": 2}


@pytest.mark.parametrize(
    "name, settings, more, expected",
    [
        (
            "robust",
            {"beta": 0.5, "label_smoothing": 0.1},
            {},
            (-0.9 * log_s(1.5) + 0.1 * log_s(-1.5)) / 0.8,
        ),
        ("hinge", {"beta": 0.5, "margin": 2.0}, {}, 0.5),
        ("hinge", {"beta": 0.5, "margin": 1.0}, {}, 0.0),
        (
            "exo",
            {"beta": 0.5, "label_smoothing": 0.01},
            {},
            sigmoid(1.5) * math.log(sigmoid(1.5) / 0.99)
            + sigmoid(-1.5) * math.log(sigmoid(-1.5) / 0.01),
        ),
        (
            "discopop",
            {"beta": 0.5, "tau": 0.5},
            {},
            -(1 - sigmoid(3)) * log_s(1.5) + sigmoid(3) * math.exp(-1.5),
        ),
        ("sppo", {"beta": 0.1}, {}, 9.0 + 16.0),
        ("nca", {"beta": 0.5}, {}, -log_s(1) - (log_s(-1) + log_s(0.5)) / 2),
        ("apo_zero", {"beta": 0.5}, {}, 1 - sigmoid(1) + sigmoid(-0.5)),
        ("apo_down", {"beta": 0.5}, {}, sigmoid(1) + 1 - sigmoid(1.5)),
        ("rdpo", {"beta": 0.5, "alpha": 0.1}, LENGTHS, -log_s(1.5 + 0.1 * 2)),
        ("sigmoid_norm", {"beta": 2.0}, LENGTHS, -log_s(2 * (0.5 + 0.5))),
        (
            "dpop",
            {"beta": 0.5, "penalty_weight": 3.0},
            {},
            -log_s(1.5),
        ),  # the chosen response gained
        (
            "wpo",
            {"beta": 0.5},
            LENGTHS | {"chosen_collision": -3, "rejected_collision": -1},
            -math.exp(2 / 4 - 5 / 2) * log_s(1.5),
        ),
        (
            "wpo",
            {"beta": 0.5},
            LENGTHS | {"chosen_collision": -3, "rejected_collision": -6},
            -log_s(1.5),
        ),  # e^0.5 is cut to 1
        ("simpo", {"beta": 2.0, "gamma": 0.5}, LENGTHS, -log_s(2 * (P_W - P_L) - 0.5)),
        ("cpo", {"beta": 0.5, "nll_weight": 0.3}, {}, -log_s(0.5 * 5) + 0.3 * 1),
        ("slic", {"delta": 7.0, "nll_weight": 0.1}, LENGTHS, (7 + 1 - 6) + 0.1 / 4),
        ("slic", {"delta": 4.0, "nll_weight": 0.1}, LENGTHS, 0.1 / 4),
        (
            "kto",
            {"beta": 0.5, "desirable_weight": 2.0, "undesirable_weight": 3.0},
            {},
            (2 * (1 - sigmoid(0.75)) + 3 * (1 - sigmoid(0.75))) / 2,
        ),  # z = 1/2
    ],
)
def test_further_losses_by_hand(name, settings, more, expected):
    assert value(name, pair(2, -1, **more), **settings) == pytest.approx(
        expected, rel=1e-12, abs=1e-15
    )


def test_dpop_where_the_chosen_response_lost():
    assert value("dpop", pair(-0.5, -1), beta=0.5, penalty_weight=3.0) == pytest.approx(
        -log_s(0.5 * (0.5 - 3 * 0.5)), rel=1e-12
    )


def test_orpo_from_odds_as_the_paper_has_them():
    def odds(p):
        return math.exp(p) / (1 - math.exp(p))

    expected = 1 / 4 - 0.3 * log_s(math.log(odds(P_W) / odds(P_L)))
    assert value("orpo", pair(2, -1, **LENGTHS), or_weight=0.3) == pytest.approx(
        expected, rel=1e-12
    )


@pytest.mark.parametrize(
    "name, chosen, rejected",
    [
        ("simpo", 2 * P_W, 2 * P_L),
        ("cpo", -0.1, -0.6),
        ("slic", -1, -6),
        ("orpo", P_W - math.log(1 - math.exp(P_W)), P_L - math.log(1 - math.exp(P_L))),
    ],
)
def test_without_a_reference_the_logged_rewards_are_those_of_the_paper(name, chosen, rejected):
    loss = bind(name)
    output = loss(without_reference(pair(2, -1, **LENGTHS)))
    assert "reference" not in loss.reads
    assert (output.chosen_rewards.item(), output.rejected_rewards.item()) == pytest.approx(
        (chosen, rejected), rel=1e-12
    )


def test_orpo_is_finite_where_a_probability_is_one():
    """A response that float32 gives a log-prob of 0: its odds are infinite."""
    for d_w, d_l in ((3.0, 0.0), (0.0, 5.0), (3.0, 5.0)):
        data = pair(d_w, d_l, **LENGTHS)  # the reference has -3 and -5
        output = bind("orpo")(data)
        output.losses.backward()
        assert (
            torch.isfinite(output.losses).all()
            and torch.isfinite(data.policy_chosen_logps.grad).all()
            and torch.isfinite(data.policy_rejected_logps.grad).all()
        )


# ---------------------------------------------------------------------------- over a batch, by hand


def test_bco_shifts_by_the_mean_reward_of_both_sides_and_keeps_it():
    loss = bind("bco", beta=0.5, momentum=0.75)
    output = loss(pairs([2, 0], [-1, -3]))  # rewards 1, 0 and -1/2, -3/2: mean -1/4

    def by_hand(chosen, rejected, delta):
        return -log_s(chosen - delta) - log_s(delta - rejected)

    assert output.losses.tolist() == pytest.approx(
        [by_hand(1, -0.5, -0.25), by_hand(0, -1.5, -0.25)], rel=1e-12
    )
    loss.keep(output)
    second = loss(
        pairs([2, 4], [2, 0])
    )  # rewards 1, 2 and 1, 0: mean 1, so delta = 3/4 * -1/4 + 1/4 * 1 = 1/16
    assert second.losses.tolist() == pytest.approx(
        [by_hand(1, 1, 0.0625), by_hand(2, 0, 0.0625)], rel=1e-12
    )
    assert second.metrics["shift_{split}/mean"].tolist() == [0.0625, 0.0625]


def test_beta_dpo_grows_with_the_gap_of_a_batch_beyond_the_usual():
    loss = bind("beta-dpo", beta=0.5, alpha=0.6, momentum=0.5)
    first = loss(
        pairs([2, 0.5], [-1, -0.5])
    )  # gaps 3 and 1: mean 2, the first, so it is the usual one
    assert first.losses.tolist() == pytest.approx([-log_s(1.5), -log_s(0.5)], rel=1e-12)
    loss.keep(first)
    wide = loss(pairs([4, 0], [-2, -2]))  # gaps 6 and 2: mean 4, M = (2 + 4) / 2
    b = 0.5 * (1 + 0.6 * (4 - 3))
    assert wide.losses.tolist() == pytest.approx([-log_s(b * 6), -log_s(b * 2)], rel=1e-12)
    assert wide.chosen_rewards.tolist() == [2.0, 0.0]  # of beta, so that runs can be compared
    narrow = loss(pairs([-4, -4], [4, 4]))  # mean -8, M = -3: beta (1 - 3) is below the floor
    assert narrow.losses.tolist() == pytest.approx([-log_s(-8 * 1e-3)] * 2, rel=1e-12)


def test_aot_compares_margins_of_equal_rank():
    # margins of the policy 1 and 5, of the reference 2 and 1/2: sorted, 1 meets 1/2 and 5 meets 2
    data = pairs([-1, 4.5], [0, 0], ref_w=[2, 0.5], ref_l=0.0)
    assert bind("aot", beta=0.5)(data).losses.tolist() == pytest.approx(
        [-log_s(0.25), -log_s(1.5)], rel=1e-12
    )
    assert bind("dpo", beta=0.5)(data).losses.tolist() == pytest.approx(
        [-log_s(-0.5), -log_s(2.25)], rel=1e-12
    )


def test_aot_does_not_care_which_pair_a_reference_margin_belongs_to():
    data = pairs([1, -2, 3], [0, 1, -1], ref_w=[-3, -1, -2], ref_l=[-5, -2, -9])
    others = [2, 0, 1]
    swapped = changed(
        data,
        {"reference_logps": data.reference_chosen_logps[others]},
        {"reference_logps": data.reference_rejected_logps[others]},
    )
    assert bind("aot")(swapped).losses.tolist() == pytest.approx(
        bind("aot")(data).losses.tolist(), rel=1e-12
    )
    assert bind("dpo")(swapped).losses.sum().item() != pytest.approx(
        bind("dpo")(data).losses.sum().item(), rel=1e-3
    )


def test_kto_measures_against_the_mean_log_ratio_but_never_below_zero():
    loss = bind("kto", beta=0.5)
    losses = loss(pairs([2, 4], [-1, 3])).losses.tolist()  # z = (2 + 4 - 1 + 3) / 4 = 2

    def side(x):
        return 1 - sigmoid(x)

    assert losses == pytest.approx(
        [(side(0) + side(0.5 * 3)) / 2, (side(0.5 * 2) + side(0.5 * -1)) / 2], rel=1e-12
    )
    assert loss(pairs([1], [-4])).losses.item() == pytest.approx(
        (side(0.5) + side(2)) / 2, rel=1e-12
    )


def responses(data: Pair, scores) -> Target:
    """Chosen, then rejected responses as examples of their own."""

    def both(side):
        return (
            torch.cat(
                [getattr(data, f"{side}_chosen_logps"), getattr(data, f"{side}_rejected_logps")]
            )
            .detach()
            .requires_grad_()
        )

    return Target(
        policy_logps=both("policy"),
        reference_logps=both("reference"),
        scores=torch.tensor(scores, dtype=torch.float64),
    )


def test_kto_of_single_responses_is_that_of_the_pairs_they_make():
    weights = {"beta": 0.3, "desirable_weight": 1.3, "undesirable_weight": 0.7}
    data = pairs([2, -1, 4], [1, -3, 0.5])
    paired, single = (
        bind("kto", **weights)(data),
        bind("kto_unpaired", **weights)(responses(data, [1, 1, 1, 0, 0, 0])),
    )
    assert single.losses.mean().item() == pytest.approx(paired.losses.mean().item(), rel=1e-12)
    assert (single.losses[:3] + single.losses[3:]).tolist() == pytest.approx(
        (2 * paired.losses).tolist(), rel=1e-12
    )
    assert single.metrics["rewards_{split}/all"].tolist() == pytest.approx(
        [0.6, -0.3, 1.2, 0.3, -0.9, 0.15], rel=1e-12
    )


def test_kto_unpaired_takes_scores_above_the_threshold_for_desirable():
    data = responses(
        pairs([2, -1], [1, -3]), [0.3, 2.0, -1.0, 1.5]
    )  # z = 0: the mean of 2, -1, 1, -3 is negative
    output = bind("kto_unpaired", beta=0.5, threshold=1.0)(data)
    desirable, not_so = (lambda d: 1 - sigmoid(0.5 * d)), (lambda d: sigmoid(0.5 * d))
    assert output.losses.tolist() == pytest.approx(
        [not_so(2), desirable(-1), not_so(1), desirable(-3)], rel=1e-12
    )
    assert output.metrics["rewards_{split}/accuracies"].tolist() == [0.0, 0.0, 0.0, 0.0]
    assert output.metrics["desirable_{split}/share"].tolist() == [0.0, 1.0, 0.0, 1.0]


# ------------------------------------------------------------------------------------ running means


@pytest.mark.parametrize("name", ["bco", "beta-dpo"])
def test_running_means_move_by_keep_alone_and_survive_a_checkpoint_bit_for_bit(name, tmp_path):
    batches = [made_up_batch(bind(name), n=5, seed=seed) for seed in range(4)]
    loss = bind(name)
    for batch in batches[:2]:
        loss.keep(loss(batch))
    before = loss(batches[2]).losses
    loss(batches[3])  # an evaluation
    assert torch.equal(loss(batches[2]).losses, before)
    torch.save(loss.state_dict(), tmp_path / "state.pt")
    resumed = bind(name)
    assert not torch.equal(resumed(batches[2]).losses, before)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for batch in batches[2:]:
        ours, theirs = resumed(batch), loss(batch)
        assert torch.equal(ours.losses, theirs.losses)
        resumed.keep(ours), loss.keep(theirs)
    assert resumed.state_dict() == loss.state_dict() != {}


def test_a_loss_without_running_means_has_no_state():
    loss = bind("dpo")
    loss.keep(loss(pair(2, -1)))
    assert loss.state_dict() == {}


def test_running_means_over_parts_of_a_batch_are_refused():
    @registry.register_loss("drifting", reads={"reference"})
    def drifting(pair, *, beta: float):
        return types.LossOutput(pair.chosen_logratio, running={"mean": pair.chosen_logratio.mean()})

    try:
        with pytest.raises(ConfigError, match="couples_batch=True"):
            bind_loss({"name": "drifting", "beta": 0.1})
    finally:
        del LOSSES["drifting"]


# ---------------------------------------------------------------------------- at policy = reference


@pytest.mark.parametrize(
    "name, settings, expected",
    [
        ("dpo", {}, math.log(2)),
        ("tdpo1", {}, math.log(2)),
        ("tdpo2", {}, math.log(2)),
        ("ipo", {"beta": 0.1}, 25.0),
        ("cal-dpo", {"beta": 0.1, "cal_weight": 1.0}, math.log(2) + 50.0),
        ("odpo", {"alpha": 0.5}, -math.log(sigmoid(-0.5 * math.log(1.2)))),
        ("soft-label", {"gamma": 3.0}, math.log(2)),
        ("bradley_terry", {}, math.log(2)),
        ("robust", {"label_smoothing": 0.2}, math.log(2)),
        ("hinge", {"margin": 1.5}, 1.5),
        ("exo", {"label_smoothing": 0.01}, (math.log(0.5 / 0.99) + math.log(0.5 / 0.01)) / 2),
        ("discopop", {}, math.log(2) / 2 + 0.5),
        ("sppo", {"beta": 0.1}, 50.0),
        ("nca", {}, 2 * math.log(2)),
        ("apo_zero", {}, 1.0),
        ("apo_down", {}, 1.0),
        ("dpop", {}, math.log(2)),
        ("rdpo", {"alpha": 0.1}, -log_s(0.2)),
        ("sigmoid_norm", {}, math.log(2)),
        ("bco", {}, 2 * math.log(2)),
        ("beta-dpo", {}, math.log(2)),
        ("aot", {}, math.log(2)),
        ("kto", {}, 0.5),
    ],
)
def test_value_at_policy_equals_reference(name, settings, expected):
    data = pair(
        chosen_kl=0,
        rejected_kl=0,
        chosen_scores=1.6,
        rejected_scores=0.4,
        chosen_values=0.7,
        rejected_values=0.7,
        **LENGTHS,
    )
    assert value(name, data, **settings) == pytest.approx(expected, rel=1e-12)


# ---------------------------------------------------------------------------------------- gradients


def gradients(name, data, **settings):
    output = bind(name, **settings)(data)
    leaves = {
        key: getattr(data, key)
        for key in ("policy_chosen_logps", "policy_rejected_logps", "chosen_kl", "rejected_kl")
    }
    leaves = {key: leaf for key, leaf in leaves.items() if leaf is not None}
    gradient = torch.autograd.grad(output.losses.sum(), list(leaves.values()), allow_unused=True)
    return {key: None if g is None else g.item() for key, g in zip(leaves, gradient, strict=True)}


def test_tdpo2_sends_no_gradient_through_the_chosen_kl_and_tdpo1_does():
    data = pair(2, -1, chosen_kl=0.3, rejected_kl=0.8)
    two, one = gradients("tdpo2", data, alpha=1.0), gradients("tdpo1", data)
    assert two["chosen_kl"] is None and two["rejected_kl"] > 0
    assert one["chosen_kl"] < 0 and one["rejected_kl"] == pytest.approx(two["rejected_kl"])
    assert value("tdpo2", data, alpha=1.0) == pytest.approx(value("tdpo1", data), rel=1e-12)


def test_odpo_gradient_grows_with_the_score_gap():
    pulls = [
        -gradients("odpo", pair(chosen_scores=1 + gap, rejected_scores=1))["policy_chosen_logps"]
        for gap in (0.1, 0.5, 0.9)
    ]
    assert pulls[0] < pulls[1] < pulls[2]


def test_cal_dpo_calibration_pulls_each_log_ratio_to_its_own_target():
    for d_w, d_l, up, down in ((4, -4, 1, 1), (6, -6, -1, -1)):
        pulls = gradients("cal-dpo", pair(d_w, d_l), beta=0.1, cal_weight=1.0)  # targets +5 and -5
        assert math.copysign(1, -pulls["policy_chosen_logps"]) == up
        assert math.copysign(1, pulls["policy_rejected_logps"]) == down


def everything(d_w=0.0, d_l=0.0) -> Pair:
    """A pair with all that a loss may read."""
    kl, scores, collision = (
        {"chosen_kl": 0.3, "rejected_kl": 0.8},
        {"chosen_scores": 1.6, "rejected_scores": 0.4},
        {"chosen_collision": -3, "rejected_collision": -1},
    )
    data = pair(d_w, d_l, **kl, **scores, **collision, **LENGTHS)
    columns = {"from_reference": torch.zeros(1, dtype=torch.float64)}
    chosen, rejected = with_tokens(data.chosen), with_tokens(data.rejected)
    return replace(data, chosen=chosen, rejected=rejected, columns=columns)


def with_tokens(side: Side) -> Side:
    """The response with its log-probs spread over its tokens, so that gradients reach them."""
    n = int(side.lengths.item())
    shares = torch.arange(1.0, n + 1, dtype=torch.float64)[None] / (n * (n + 1) / 2)
    longest = [torch.zeros(1, max(map(int, LENGTHS.values())) - n, dtype=torch.float64)]
    return replace(
        side,
        token_logps=torch.cat([side.policy_logps[:, None] * shares, *longest], 1),
        reference_token_logps=torch.cat([side.reference_logps[:, None] * shares, *longest], 1),
        token_weights=torch.cat([1 + shares.detach(), *longest], 1),
        tokens=torch.cat([torch.arange(1, n + 1)[None], longest[0].long()], 1),
    )


PAIRWISE = [name for name in YAMLS if LOSSES[name].examples == "pairs" and name != "bradley_terry"]


# Where to look for losses that do not pull at policy = reference, with their defaults.
PULLS_AT = {"slic": (-3, 0), "apo_down": (0, -1), "discopop": (-5, 0), "repo": (-10, 0)}


@pytest.mark.parametrize("name", PAIRWISE)
def test_every_loss_pulls_chosen_up_and_rejected_down_near_the_reference(name):
    pulls = gradients(name, everything(*PULLS_AT.get(name, (0, 0))))
    sign = -1 if name == "apo_down" else 1  # both down: the chosen one follows the rejected one
    assert pulls["policy_chosen_logps"] * sign < 0 < pulls["policy_rejected_logps"]


def test_discopop_pulls_the_wrong_way_on_its_hump_at_the_reference():
    assert gradients("discopop", pair(0, 0))["policy_chosen_logps"] == pytest.approx(
        0.1 * (-0.25 - 0.5 + 5 * (1 - math.log(2)))
    )  # > 0
    assert gradients("apo_down", pair(0, 0))["policy_chosen_logps"] == 0.0


def test_nca_pulls_the_chosen_reward_to_log_2_and_sppo_each_log_ratio_to_its_target():
    at = math.log(2) / 0.5
    assert gradients("nca", pair(at, -1), beta=0.5)["policy_chosen_logps"] == pytest.approx(
        0, abs=1e-12
    )
    assert (
        gradients("nca", pair(at - 1, -1), beta=0.5)["policy_chosen_logps"]
        < 0
        < gradients("nca", pair(at + 1, -1), beta=0.5)["policy_chosen_logps"]
    )
    assert list(gradients("sppo", pair(5, -5), beta=0.1).values()) == pytest.approx(
        [0, 0], abs=1e-12
    )


def test_hinge_gives_the_same_gradient_up_to_the_margin_and_none_beyond():
    pulls = [
        gradients("hinge", pair(d_w, 0), beta=0.5, margin=1.0)["policy_chosen_logps"]
        for d_w in (-20, 0, 1.9, 2.1, 20)
    ]
    assert pulls == [-0.5, -0.5, -0.5, 0.0, 0.0]


def test_exo_lets_go_of_pairs_that_are_far_wrong_and_dpo_does_not():
    exo, dpo = (
        gradients(name, pair(-200, 0), beta=0.1)["policy_chosen_logps"] for name in ("exo", "dpo")
    )
    assert abs(exo) < 1e-6 < 0.09 < abs(dpo)


def test_dpop_pulls_harder_on_a_chosen_response_that_lost():
    lost, gained = (
        gradients("dpop", pair(d_w, d_w - 1), penalty_weight=5.0)["policy_chosen_logps"]
        for d_w in (-1, 1)
    )
    assert lost < 6 * gained < 0


def by_hand_bco(delta):
    return [-0.5 * sigmoid(-(1 - delta)), 0.5 * sigmoid(-0.5 - delta)]


@pytest.mark.parametrize(
    "name, expected",
    [
        ("bco", by_hand_bco(0.25)),  # rewards 1 and -1/2
        ("beta-dpo", [-0.5 * sigmoid(-1.5), 0.5 * sigmoid(-1.5)]),
        (
            "kto",
            [-0.25 * sigmoid(0.75) * sigmoid(-0.75), 0.25 * sigmoid(0.75) * sigmoid(-0.75)],
        ),  # z = 1/2
        ("wpo", [-math.exp(-2) * 0.5 * sigmoid(-1.5), math.exp(-2) * 0.5 * sigmoid(-1.5)]),
    ],
)
def test_no_gradient_goes_through_what_is_taken_from_the_batch_or_the_distribution(name, expected):
    assert list(gradients(name, everything(2, -1), beta=0.5).values())[:2] == pytest.approx(
        expected, rel=1e-12
    )


def test_tdpo1_and_tdpo2_at_alpha_1_differ_in_their_gradient_alone():
    data = everything(2, -1)
    assert value("tdpo1", data) == value("tdpo2", data, alpha=1.0)
    assert gradients("tdpo1", data) != gradients("tdpo2", data, alpha=1.0)


# --------------------------------------------------------------------------------------- identities

log_ratios, betas = st.floats(-30, 30), st.floats(0.01, 2)
DPO_AGAIN = [
    ("dpo", {"label_smoothing": 0.0}),
    ("robust", {"label_smoothing": 0.0}),
    ("odpo", {"alpha": 0.0}),
    ("tdpo2", {"alpha": 0.0}),
    ("dpop", {"penalty_weight": 0.0}),
    ("rdpo", {"alpha": 0.0}),
    ("beta-dpo", {"alpha": 0.0}),
    ("beta-dpo", {"momentum": 0.0}),
    ("aot", {}),
]


@pytest.mark.parametrize("name, at", DPO_AGAIN)
@settings(deadline=None, max_examples=10)
@given(d_w=log_ratios, d_l=log_ratios, beta=betas)
def test_equals_dpo(name, at, d_w, d_l, beta):
    data = everything(d_w, d_l)
    expected = value("dpo", data, beta=beta)
    assert expected == pytest.approx(math.log1p(math.exp(-beta * (d_w - d_l))), rel=1e-12)
    assert value(name, data, beta=beta, **at) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    "name, settings",
    [("robust", {"label_smoothing": 0.2}), ("odpo", {}), ("tdpo2", {}), ("dpop", {}), ("rdpo", {})],
)
def test_and_differs_from_dpo_elsewhere(name, settings):
    data = everything(-1, -4)
    assert value(name, data, **settings) != pytest.approx(value("dpo", data), rel=1e-3)


@settings(deadline=None, max_examples=10)
@given(d_w=log_ratios, d_l=log_ratios, beta=betas)
def test_the_calibration_of_cal_dpo_is_sppo(d_w, d_l, beta):
    with_it, without = (
        value("cal-dpo", pair(d_w, d_l), beta=beta, cal_weight=weight) for weight in (1.0, 0.0)
    )
    assert with_it - without == pytest.approx(value("sppo", pair(d_w, d_l), beta=beta), rel=1e-9)


@settings(deadline=None, max_examples=10)
@given(gap=log_ratios, e=st.floats(0, 0.45))
def test_robust_is_dpo_on_average_over_flipped_labels(gap, e):
    right, flipped = (value("robust", pair(h, 0), beta=0.3, label_smoothing=e) for h in (gap, -gap))
    assert (1 - e) * right + e * flipped == pytest.approx(
        value("dpo", pair(gap, 0), beta=0.3), rel=1e-9, abs=1e-12
    )


@settings(deadline=None, max_examples=10)
@given(d_w=log_ratios, d_l=log_ratios, beta=betas)
def test_losses_that_are_bounded_stay_in_their_bounds(d_w, d_l, beta):
    data = everything(d_w, d_l)
    assert all(0 <= value(name, data, beta=beta) <= 2 for name in ("apo_zero", "apo_down"))
    assert 0 <= value("kto", data, beta=beta) <= 1
    assert value("exo", data, beta=beta) >= -1e-12  # a KL
    assert value("wpo", data, beta=beta) <= value("dpo", data, beta=beta)


@settings(deadline=None, max_examples=10)
@given(d_w=log_ratios, d_l=log_ratios)
def test_cpo_and_slic_without_their_likelihood_are_reference_free_dpo_and_a_hinge(d_w, d_l):
    data = everything(d_w, d_l)
    assert value("cpo", data, beta=0.3, nll_weight=0.0) == pytest.approx(
        value("dpo", data, beta=0.3, reference_free=True), rel=1e-12
    )
    assert value("slic", data, delta=2.0, nll_weight=0.0) == pytest.approx(
        max(0, 2 - (d_w - 3) + (d_l - 5)), rel=1e-12, abs=1e-12
    )


# --------------------------------------------------------------------------------------- every loss


def test_every_registered_loss_has_a_yaml_of_its_name_and_every_yaml_a_loss():
    modules = (*LOSS_FILES, "preflab.objective.sums")
    own = {name for name, spec in LOSSES.items() if spec.function.__module__ in modules}
    assert own == set(YAMLS)


# Code outside losses.py that names a loss, and the reason. Experiments and benchmarks compare
# losses and are free to name them.
NAMED_ON_PURPOSE = {
    "preflab/objective/sums.py": {"weighted_sum"},  # where it is defined
    "generate.py": {"sft"},  # sampling needs prompts, and sft accepts all data
    "scripts/inspect_data.py": {"sft"},  # it counts all data, with pairs and without
    "scripts/token_weights.py": {"dpo"},  # it reads pairs, and dpo no more than that
    "scripts/draw_losses.py": {"dpo"},  # a curve of dpo with label smoothing
    "train_risk_preferences.py": {"dpo"},  # the command whose flags it takes trains DPO
}


def losses_named_in(code: str) -> set[str]:
    """Losses that are a string of their own, or the value of an override such as "loss=sft".

    A sentence may name a loss: docstrings, help and messages advise.
    """
    named = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            override = re.fullmatch(r"\s*(?:[\w.+]+=)?([\w,-]+)\s*", node.value)
            named |= set(override[1].split(",") if override else ()) & set(YAMLS)
    return named


def test_no_other_file_names_a_loss():
    files = [*ROOT.glob("*.py"), *ROOT.glob("preflab/**/*.py"), *ROOT.glob("scripts/**/*.py")]
    named = {
        path.relative_to(ROOT).as_posix(): losses_named_in(path.read_text(encoding="utf-8"))
        for path in files
        if path.stem not in LOSS_FILES
    }
    assert {path: names for path, names in named.items() if names} == NAMED_ON_PURPOSE


@pytest.mark.parametrize(
    "code, names",
    [
        ("if loss.name == 'tdpo2': pass", {"tdpo2"}),
        ("run(['loss=sft', *more])", {"sft"}),
        ("run(f'online.discriminator=bradley_terry {more}')", {"bradley_terry"}),
        ("run('+loss=dpo,soft-label')", {"dpo", "soft-label"}),
        ("raise ValueError('take loss=dpo')", set()),
        ("run(f'loss={name}', 'losses', 'loss=my_dpo')", set()),
    ],
)
def test_a_named_loss_is_seen(code, names):
    assert losses_named_in(code) == names


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_composes_and_binds(name):
    register_resolvers()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("config", overrides=[f"loss={name}"])
    loss = bind_loss(OmegaConf.to_container(config.loss, resolve=True))
    assert loss.name == name


@pytest.mark.parametrize("name", YAMLS)
def test_docstring_says_where_it_comes_from(name):
    text = LOSSES[name].function.__doc__
    assert text and (name == "sft" or "arXiv:" in text)


@pytest.mark.parametrize("name", YAMLS)
@pytest.mark.parametrize("gap", [0.0, 100.0, -100.0, 1e4, -1e4])
def test_loss_and_gradient_are_finite_and_inputs_untouched(name, gap):
    loss = bind(name)
    data = shifted(made_up_batch(loss), gap)
    sides = {"w": data.chosen, "l": data.rejected} if isinstance(data, Pair) else {"": data}
    tensors = {
        (side, f): value
        for side, values in sides.items()
        for f in FIELDS
        if (value := getattr(values, f)) is not None
    }
    for t in tensors.values():
        t.requires_grad_(t.is_floating_point())
    before = {key: t.detach().clone() for key, t in tensors.items()}
    contents = [(thing, dict(vars(thing))) for thing in (data, *sides.values())]
    output = loss(data)
    output.losses.sum().backward()
    assert output.losses.shape == (3,)
    assert torch.isfinite(output.losses).all()
    models = ("policy_logps", "values", "token_logps")
    trained = [t for (_, f), t in tensors.items() if f in models and t.grad is not None]
    assert trained and all(torch.isfinite(t.grad).all() for t in trained)
    assert gap != 0 or any(t.grad.abs().sum() > 0 for t in trained)
    for key, t in tensors.items():
        assert torch.equal(t, before[key]), f"{name} wrote to {key}"
    for thing, content in contents:
        assert all(vars(thing)[key] is value for key, value in content.items())


def shifted(data: Pair | Target | Ranking, gap: float) -> Pair | Target | Ranking:
    """The examples with this log-ratio, gap of values, or change of a log-prob; of lists the first
    response."""
    if isinstance(data, Ranking):
        first = torch.tensor([gap, 0, 0, 0], dtype=torch.float64)
        if data.reference_logps is None:
            return replace(data, policy_logps=data.policy_logps - first.abs())
        return replace(data, policy_logps=data.reference_logps + first)
    if isinstance(data, Target):
        base, by = data.policy_logps, -abs(gap)  # a log-prob is never positive
        if data.reference_logps is not None:
            base, by = data.reference_logps, gap
        return replace(data, policy_logps=base + by)
    if data.chosen.values is not None:
        return changed(data, {"values": data.chosen.values + gap})
    if data.chosen.token_logps is not None:  # a log-prob is never positive
        side = "chosen" if gap < 0 else "rejected"
        tokens = getattr(data, side).token_logps.clone()
        tokens[:, 0] -= abs(gap)
        data = changed(data, **{side: {"token_logps": tokens}})
    if data.chosen.reference_logps is not None:
        return changed(
            data,
            {"policy_logps": data.chosen.reference_logps + gap},
            {"policy_logps": data.rejected.reference_logps.clone()},
        )
    if gap > 0:
        return changed(data, rejected={"policy_logps": data.rejected.policy_logps - gap})
    return changed(data, {"policy_logps": data.chosen.policy_logps + gap})


@pytest.mark.parametrize("name", [n for n in YAMLS if "beta" in LOSSES[n].settings])
def test_logged_rewards_are_beta_times_log_ratios_whatever_is_optimised(name):
    loss = bind(name, beta=0.25)
    if "reference" not in loss.reads or loss.examples != "pairs":
        pytest.skip(
            "without a reference there is no log-ratio, and without pairs no chosen response"
        )
    output = loss(everything(2, -1))
    assert (output.chosen_rewards.item(), output.rejected_rewards.item()) == pytest.approx(
        (0.5, -0.25)
    )


def some_of(data, rows):
    """These examples of a batch."""
    if isinstance(data, torch.Tensor):
        return data[rows]
    if isinstance(data, dict):
        return {key: some_of(value, rows) for key, value in data.items()}
    if isinstance(data, Pair | Side):
        return replace(data, **{f.name: some_of(getattr(data, f.name), rows) for f in fields(data)})
    return data


@pytest.mark.parametrize("name", YAMLS)
def test_a_loss_that_couples_examples_says_so_and_no_other_does(name):
    loss = bind(name)
    loss.keep(
        loss(made_up_batch(loss, seed=1))
    )  # a running mean makes no difference as long as it is the batch's own
    data = made_up_batch(loss, n=6)
    alone = torch.cat([loss(some_of(data, [i])).losses for i in range(6)])
    assert torch.allclose(loss(data).losses, alone, rtol=1e-12) != loss.couples_batch


@pytest.mark.parametrize("name", YAMLS)
def test_the_order_of_the_examples_changes_nothing(name):
    loss, order = bind(name), [3, 0, 5, 1, 4, 2]
    data = made_up_batch(loss, n=6)
    assert torch.allclose(loss(some_of(data, order)).losses, loss(data).losses[order], rtol=1e-12)


# ---------------------------------------------------------------------- what a loss can read


def test_a_side_holds_exactly_what_is_read():
    @registry.register_loss("curious", reads=lambda settings: {settings["need"]})
    def curious(pair, *, need: str):
        return types.LossOutput(torch.ones(3))

    try:
        for name, need in NEEDS.items():
            data = made_up_batch(bind_loss({"name": "curious", "need": name}))
            always = set() if need.source == "head" else {"policy_logps"}
            for side in (data.chosen, data.rejected):
                filled = {f for f in FIELDS if getattr(side, f) is not None}
                assert {FIELDS[f].name for f in filled - always} == {name} and always <= filled
                assert all(len(getattr(side, f)) == 3 for f in filled)
        with pytest.raises(ConfigError, match=r"reads .'weather'.; accepted: .*token_kl"):
            bind_loss({"name": "curious", "need": "weather"})
    finally:
        del LOSSES["curious"]


def test_log_probs_are_not_read_from_a_model_with_a_scalar_head():
    @registry.register_loss("greedy", reads={"scalar_head", "reference", "lengths"})
    def greedy(pair):
        return types.LossOutput(pair.chosen_values)

    try:
        with pytest.raises(ConfigError, match="reads reference, and scalar_head"):
            bind_loss({"name": "greedy"})
    finally:
        del LOSSES["greedy"]


def test_the_fields_of_both_sides_have_a_name_in_the_pair_and_cannot_be_written():
    data = everything(2, -1)
    names = {
        "policy_chosen_logps": data.chosen.policy_logps,
        "reference_rejected_logps": data.rejected.reference_logps,
        "chosen_lengths": data.chosen.lengths,
        "rejected_scores": data.rejected.scores,
        "rejected_kl": data.rejected.kl,
        "chosen_token_logps": data.chosen.token_logps,
        "rejected_collision": data.rejected.collision,
        "chosen_values": data.chosen.values,
    }
    assert all(getattr(data, name) is value for name, value in names.items())
    assert data.chosen_logratio.item() == pytest.approx(2.0)
    assert data.rejected_logratio.item() == data.rejected.logratio.item() == pytest.approx(-1.0)
    for name in (*names, "chosen_logratio", "chosen"):
        with pytest.raises(AttributeError):
            setattr(data, name, None)
    with pytest.raises(AttributeError):
        data.chosen.lengths = None


def test_token_log_probs_are_padded_with_zeros_to_the_longest_response():
    scores = SimpleNamespace(token_logps=torch.tensor([-1.0, -2.0, -3.0, -4.0]))
    padded = NEEDS["token_logps"].take(scores, SimpleNamespace(lengths=torch.tensor([1, 3])))
    assert padded.tolist() == [[-1.0, 0.0, 0.0], [-2.0, -3.0, -4.0]]
    assert padded.dtype == torch.float64


# ----------------------------------------------------------------------------------- what wpo reads

TREES = [([5, 6], [[7, 8, 9, 200, 3], [1]]), ([11] * 9, [[250, 1, 2], [3, 4, 5, 6, 7, 8, 9, 10]])]


@pytest.mark.parametrize(
    "layout, head, kl",
    [
        *((layout, "plain", None) for layout in LAYOUTS),
        ("packed", "any", None),
        ("prefix_shared", "plain", "reference||policy"),
        ("packed", "plain", "policy||reference"),
        ("padded", "any", "reference||policy"),
    ],
)
def test_collision_is_that_of_a_naive_float64_softmax_in_every_layout(
    layout, head, kl, monkeypatch
):
    # several chunks and a shorter last one
    monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", 5 * 258)
    model, reference = (make_model("llama", seed=seed, dtype=torch.float64) for seed in (0, 1))
    expected = []
    for prompt, of_prompt in TREES:
        for response in of_prompt:
            p = (
                model(input_ids=torch.tensor([prompt + response]), use_cache=False)
                .logits[0, len(prompt) - 1 : -1]
                .softmax(-1)
            )
            expected.append((p**2).sum(-1).log().sum().item())
    for m in (model, reference):
        packed_models.enable(m)
    if head != "plain":
        model.lm_head.base_layer = None
    batch = lay_out(TREES, Layout(layout, 257))
    scores = score_responses(
        Scorer(model), batch, reference=Scorer(reference), kl=kl, collision=True
    )
    assert scores.collision.tolist() == pytest.approx(expected, rel=1e-9)
    assert not scores.collision.requires_grad and scores.logps.requires_grad
    assert (
        max(expected) < -0.01 and min(expected) < -1
    )  # neither sure nor uniform, or this would say little

    def gradient(collision):
        return torch.autograd.grad(
            score_responses(
                Scorer(model), batch, reference=Scorer(reference), kl=kl, collision=collision
            ).logps.sum(),
            model.lm_head.weight,
        )[0]

    assert torch.equal(gradient(True), gradient(False))


def test_collision_does_not_underflow_where_a_distribution_is_wide():
    hidden, weight = torch.zeros(1, 1), torch.zeros(100_000, 1)
    collision = fused_head.LinearLogProbs.apply(
        hidden, weight, None, torch.tensor([1]), None, None, None, None, False, True, True
    )[4]
    assert collision.item() == pytest.approx(-math.log(100_000), rel=1e-5)


# ----------------------------------------------------------------------------------- docs/losses.md

DOCS = ROOT / "docs" / "losses.md"


def section(name: str) -> str:
    """What docs/losses.md says under the heading of a loss."""
    parts = re.split(r"(?m)^### (.+)$", DOCS.read_text(encoding="utf-8"))
    bodies = [
        body
        for heading, body in zip(parts[1::2], parts[2::2], strict=True)
        if f"`{name}`" in heading
    ]
    assert len(bodies) == 1, f"{len(bodies)} sections of {name}"
    return bodies[0]


@pytest.mark.parametrize("name", YAMLS)
def test_the_documentation_has_every_loss_with_its_settings_and_what_it_reads(name):
    text = section(name)
    for key, default in defaults(name).items():
        if key != "name":
            shown = (
                {True: "true", False: "false", None: "null"}.get(default, default)
                if isinstance(default, (bool, type(None)))
                else default
            )
            assert f"`{key}` ({shown})" in text, (
                f"{key} ({shown}) is missing from the section of {name}"
            )
    reads = ", ".join(sorted(bind(name).reads)) or "nothing beside the policy"
    assert f"Reads: {reads}" in text
    assert ("batch" in text) or not LOSSES[name].couples_batch


def test_the_picture_of_the_losses_is_drawn_from_the_functions(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["draw_losses.py", str(tmp_path / "losses.png")])
    runpy.run_path(str(ROOT / "scripts" / "draw_losses.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert (tmp_path / "losses.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    for name in ("dpo", "ipo", "robust", "hinge", "exo", "discopop"):
        assert re.search(rf"\b{name}\b", printed)
    # These depend on more than the gap.
    assert not re.search(r"\b(nca|simpo|sppo|cal-dpo)\b", printed)


# ------------------------------------------------------------------------------------- bad settings


@pytest.mark.parametrize(
    "name, settings, message",
    [
        (
            "dpo",
            {"alpha": 1.0},
            "no setting alpha; accepted: beta, label_smoothing, reference_free",
        ),
        ("dpo", {"beta": None}, "needs loss.beta"),
        ("dpo", {"beta": 0.0}, "greater than 0"),
        ("dpo", {"beta": "high"}, "finite number"),
        ("dpo", {"reference_free": "yes"}, "true or false"),
        ("dpo", {"sft_weight": -0.1}, "loss.sft_weight=-0.1 of loss=dpo must be at least 0"),
        ("robust", {"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ("exo", {"label_smoothing": 0.0}, r"\(0, 0.5\)"),
        ("hinge", {"margin": -1.0}, "must be at least 0"),
        ("hinge", {"margin": "wide"}, "finite number"),
        ("discopop", {"tau": 0.0}, r"\(0, 1\]"),
        ("discopop", {"tau": 1.5}, "outgrows"),
        ("dpop", {"penalty_weight": -1.0}, "must be at least 0"),
        ("dpop", {"penalty_weight": None}, "finite number"),
        ("bco", {"momentum": 1.0}, r"\[0, 1\)"),
        ("beta-dpo", {"smallest": 0.0}, "greater than 0"),
        ("slic", {"delta": float("inf")}, "finite number"),
        ("kto", {"undesirable_weight": -1}, "must be at least 0"),
        ("kto_unpaired", {"sft_weight": 0.1}, "set it to 0"),
        ("dpo", {"label_smoothing": 0.5}, r"\[0, 0.5\)"),
        ("odpo", {"offset": "lgo"}, "must be one of log, ratio, identity, log1p, none"),
        ("odpo", {"offset": "identity", "ratio": True}, "contradict"),
        ("odpo", {"alpha": -1.0}, "must be at least 0"),
        ("sft", {"reduction": "max"}, "must be one of sum, mean"),
        ("sft", {"sft_weight": 0.1}, "set it to 0"),
        ("dpo", {"name": "dop"}, "did you mean dpo"),
    ],
)
def test_bad_settings_are_refused(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        bind(name, **settings)


@pytest.mark.parametrize(
    "annotation, accepted, refused, text",
    [
        (float, [1, -2.5, 0], ["1", True, None, math.nan, math.inf], "a finite number"),
        (int, [3, -3], [3.0, True, "3"], "a whole number"),
        (bool, [True, False], [0, 1, "no"], "true or false"),
        (str, ["x"], [1, None, False], "text"),
        (str | None, ["x", None], [1], "text or null"),
        (Literal["a", "b"], ["a", "b"], ["c", None], "one of a, b"),
        (Annotated[float, Positive], [1e-9, 5], [0.0, -1], "greater than 0"),
        (Annotated[float, NonNegative], [0, 7], [-1e-9], "at least 0"),
        (Annotated[float, NonNegative], [], ["1", None], "a finite number"),
        (Annotated[float, Between(-1, 2)], [-1, 0, 1.9], [2, -1.1], "in [-1, 2)"),
        (Annotated[float, Between(0, 1, "(]", "so")], [1, 0.1], [0, 1.1], "in (0, 1]: so"),
        (Annotated[float | None, Positive], [None, 1.0], [0.0], "greater than 0"),
        (list, [[1], "anything"], [], None),
        (None, [[1], "anything"], [], None),
    ],
)
def test_what_an_annotation_accepts(annotation, accepted, refused, text):
    assert [expected(annotation, value) for value in accepted] == [None] * len(accepted)
    assert [expected(annotation, value) for value in refused] == [text] * len(refused)


def test_ranges_have_ends_that_exist():
    with pytest.raises(ValueError, match=r"accepted: '\[\]'"):
        Between(0, 1, "))")


def test_a_setting_has_the_range_of_its_annotation_whatever_its_name():
    @registry.register_loss("free", reads={"reference"})
    def free(pair, *, alpha: float, beta, momentum: "Annotated[float, Between(-3, -1)]" = -2.0):
        return types.LossOutput(alpha * pair.chosen_logratio)

    try:
        assert bind_loss({"name": "free", "alpha": -1.0, "beta": -1}).settings["alpha"] == -1.0
        with pytest.raises(
            ConfigError, match=r"loss.momentum=0.5 of loss=free must be in \[-3, -1"
        ):
            bind_loss({"name": "free", "alpha": -1.0, "beta": "x", "momentum": 0.5})
    finally:
        del LOSSES["free"]


def test_an_annotation_that_cannot_be_evaluated_is_named():
    @registry.register_loss("hidden", reads={"reference"})
    def hidden(pair, *, alpha: "Missing" = 1.0):  # noqa: F821
        return types.LossOutput(pair.chosen_logratio)

    try:
        with pytest.raises(ConfigError, match=r"test_losses.py have an annotation .*'Missing'"):
            bind_loss({"name": "hidden"})
    finally:
        del LOSSES["hidden"]


@pytest.mark.parametrize(
    "offset, scores",
    [("log", (1.0, 1.0)), ("log", (0.5, 1.0)), ("ratio", (1.0, 0.0)), ("ratio", (1.0, -2.0))],
)
def test_odpo_names_the_example_with_unusable_scores(offset, scores):
    data = replace(
        pair(chosen_scores=scores[0], rejected_scores=scores[1]), names=["imdb.jsonl:12"]
    )
    with pytest.raises(DataError, match=r"imdb\.jsonl:12"):
        bind("odpo", offset=offset)(data)


def test_odpo_tells_the_offsets_of_the_data():
    line = bind("odpo", alpha=1.0).inspect_scores(
        torch.tensor([2.0, 1.5, 4.0]), torch.tensor([1.0, 1.0, 1.0]), []
    )
    assert "median 0" in line and "33% are negative" in line


def test_a_loss_that_reads_more_than_it_declares_is_refused_before_it_trains():
    @registry.register_loss("careless", reads={"reference"})
    def careless(pair, *, beta: float):
        return types.LossOutput(pair.chosen_logratio * pair.chosen_scores)

    try:
        with pytest.raises(ConfigError, match=r"declares to read .reference."):
            bind_loss({"name": "careless", "beta": 0.1})
    finally:
        del LOSSES["careless"]


def test_a_loss_in_a_users_own_file(tmp_path):
    (tmp_path / "my_losses.py").write_text(
        "from losses import LossOutput, register_loss\n"
        "@register_loss('mine', reads={'reference'})\n"
        "def mine(pair, *, beta: float):\n"
        "    '''Squared gap.'''\n"
        "    return LossOutput((beta * (pair.chosen_logratio - pair.rejected_logratio)) ** 2)\n"
    )
    config = {"name": "mine", "module": str(tmp_path / "my_losses.py"), "beta": 2.0}
    try:
        assert bind_loss(config)(pair(2, -1)).losses.item() == pytest.approx(36.0)
        assert bind_loss(config).name == "mine"  # a second run in the same process imports it again
    finally:
        LOSSES.pop("mine", None)
    with pytest.raises(ConfigError, match="no such file"):
        bind_loss(config | {"module": "nowhere/my_losses.py"})
