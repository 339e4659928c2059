"""Other divergences from the reference: their links by numerical derivatives of the divergence,
every loss of log-ratios under them, and the losses that have no place for them."""

import math

import pytest
import torch
from test_losses import YAMLS, bind, pairs

from preflab.objective.divergences import link_of, through_link
from preflab.objective.registry import made_up_batch
from preflab.objective.types import Ranking
from utils import ConfigError

# f of each divergence, as the paper has it, up to what is linear in u.
F = {
    "reverse_kl": lambda u, alpha: u * math.log(u),
    "forward_kl": lambda u, alpha: -math.log(u),
    "js": lambda u, alpha: u * math.log(u) - (u + 1) * math.log((u + 1) / 2),
    "alpha": lambda u, alpha: (u ** (1 - alpha) - (1 - alpha) * u - alpha) / (alpha * (alpha - 1)),
}
OTHERS = [("forward_kl", None), ("js", None), ("alpha", 0.3), ("alpha", 0.8)]


@pytest.mark.parametrize("name, alpha", [("reverse_kl", None), *OTHERS])
def test_a_link_is_the_slope_of_the_divergence_and_0_at_the_reference(name, alpha):
    link = link_of(name, alpha)
    assert link(torch.zeros(1).double()).item() == 0

    def slope(u):
        step = 1e-6 * u
        return (F[name](u + step, alpha) - F[name](u - step, alpha)) / (2 * step)

    for d in (-2.0, -0.5, 0.3, 1.5):
        value = link(torch.tensor([d], dtype=torch.float64)).item()
        assert value == pytest.approx(slope(math.exp(d)) - slope(1.0), rel=1e-6, abs=1e-7)


def test_alpha_goes_from_the_reverse_to_the_forward_kl():
    d = torch.linspace(-3, 3, 7).double()
    torch.testing.assert_close(link_of("alpha", 1e-9)(d), d, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(link_of("alpha", 1.0)(d), link_of("forward_kl", None)(d))


@pytest.mark.parametrize("name, alpha", OTHERS)
def test_dpo_and_its_logged_rewards(name, alpha):
    data = pairs([1.5, -2.0], [-0.5, 1.0])
    output = bind("dpo", beta=0.3, divergence=name, divergence_alpha=alpha)(data)
    link = link_of(name, alpha)
    chosen, rejected = (0.3 * link(torch.tensor(d).double()) for d in ([1.5, -2.0], [-0.5, 1.0]))
    expected = torch.log(1 + torch.exp(rejected - chosen))
    torch.testing.assert_close(output.losses, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.chosen_rewards, chosen, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(output.rejected_rewards, rejected, rtol=1e-12, atol=1e-15)


def reads_more(name) -> bool:
    """Losses that read the models otherwise than through log-ratios."""
    loss = bind(name)
    return "reference" not in loss.reads or name in {
        *("tdpo", "tdpo1", "tdpo2", "wpo", "aot", "hypo", "h-dpo", "alpha-dpo", "xpo"),
        *("weighted_sum", "ld-dpo", "sampo", "confpo", "tis-dpo", "sepo"),
    }


@pytest.mark.parametrize("name", YAMLS)
def test_every_loss_of_log_ratios_has_it_and_every_other_says_why_not(name):
    if reads_more(name):
        with pytest.raises(ConfigError, match=f"loss={name} reads .*; set it to reverse_kl"):
            bind(name, divergence="js")
        return
    loss, plain = bind(name, divergence="js"), bind(name)
    data = made_up_batch(loss, n=4)
    link = link_of("js", None)
    # The same log-ratios as log-probs of a policy whose reference is certain of everything.
    linked = through_link(data, link)
    ours = loss(data).losses
    torch.testing.assert_close(ours, plain(linked).losses, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(ours, plain(data).losses, rtol=1e-6)


def test_a_list_and_a_likelihood_beside_it_read_their_own():
    loss = bind("plackett-luce", divergence="forward_kl")
    data = made_up_batch(loss, n=2)
    assert isinstance(data, Ranking)
    mixed = bind("dpo", divergence="js", sft_weight=0.5)
    pair = made_up_batch(mixed, n=3)
    added = mixed(pair).losses - bind("dpo", divergence="js")(pair).losses
    expected = -0.5 * pair.policy_chosen_logps / pair.chosen_lengths
    torch.testing.assert_close(added, expected, rtol=1e-12, atol=1e-12)


def test_bad_settings_are_refused():
    with pytest.raises(ConfigError, match=r"loss\.divergence='kl' of loss=dpo must be one of"):
        bind("dpo", divergence="kl")
    with pytest.raises(ConfigError, match=r"divergence_alpha=1.0 of loss=dpo must be .*\(0, 1\)"):
        bind("dpo", divergence="alpha", divergence_alpha=1.0)
    for settings in ({"divergence": "alpha"}, {"divergence_alpha": 0.5}):
        with pytest.raises(ConfigError, match="set both, or none"):
            bind("dpo", **settings)


def test_the_gradient_is_finite_where_the_exponent_is_not():
    data = pairs([-1e4, 1e4], [1e4, -1e4])
    for name, alpha in OTHERS:
        output = bind("dpo", divergence=name, divergence_alpha=alpha)(data)
        [gradient] = torch.autograd.grad(output.losses.sum(), data.policy_chosen_logps)
        assert torch.isfinite(output.losses).all() and torch.isfinite(gradient).all()
