"""Reward calibration: values stay, gradients are rebalanced by running means, and the norms are
those of autograd through a whole model in every layout."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import make_model, tokenised
from test_losses import YAMLS, bind, pairs

from preflab.batching import packed_models
from preflab.batching.collate import collate
from preflab.batching.packing import LAYOUTS, Layout
from preflab.checks import check_config
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.objective.calibration import NAMES
from preflab.objective.registry import made_up_batch
from preflab.settings.compose import compose
from preflab.training.compute_loss import compute_loss
from utils import ConfigError

NORMS = torch.tensor([0.5, 2.0], dtype=torch.float64)


def slopes(loss, data, running=None):
    output = loss.after(data, running or {})
    sides = data.chosen.policy_logps, data.rejected.policy_logps
    gradients = torch.autograd.grad(output.losses.sum(), sides, allow_unused=True)
    return output, [torch.zeros(len(sides[0])) if g is None else g for g in gradients]


def test_two_steps_by_hand():
    beta, decay = 0.3, 0.75
    loss = bind("cpo", beta=beta, nll_weight=0.5, calibration=True, calibration_decay=decay)
    means, running = None, {}
    for d_w, d_l, norms in (
        ([1.0, -2.0], [0.5, 0.0], [0.5, 2.0]),
        ([3.0, 1.0], [-1.0, 0.5], [3, 1]),
    ):
        data = replace(pairs(d_w, d_l), head_norms=torch.tensor(norms, dtype=torch.float64))
        output, (chosen, rejected) = slopes(loss, data, running)
        gaps = [(-3 + up) - (-5 + down) for up, down in zip(d_w, d_l, strict=True)]
        push = [beta / (1 + math.exp(beta * gap)) for gap in gaps]
        now = [math.log(sum(push) / 2 + 0.5), math.log(sum(push) / 2), *map(math.log, norms)]
        means = (
            now
            if means is None
            else [decay * old + (1 - decay) * new for old, new in zip(means, now, strict=True)]
        )
        factor = math.exp((means[3] - means[2] - means[0] + means[1]) / 2)
        assert chosen.tolist() == pytest.approx([-factor * (p + 0.5) for p in push], rel=1e-12)
        assert rejected.tolist() == pytest.approx([p / factor for p in push], rel=1e-12)
        assert [output.running[name].item() for name in NAMES] == pytest.approx(means, rel=1e-12)
        assert output.metrics["calibration_{split}/factor"].tolist() == pytest.approx([factor] * 2)
        loss.keep(output)
        resumed = bind("cpo", beta=beta, nll_weight=0.5, calibration=True)
        resumed.load_state_dict(loss.state_dict())
        running = resumed.running  # as a checkpoint has them


@pytest.mark.parametrize("name", YAMLS)
def test_every_loss_of_pairs_has_it_and_every_other_says_why_not(name):
    plain = bind(name)
    trained = {"token_kl", "token_logps", "scalar_head"}
    if plain.examples != "pairs" or plain.reads & trained:
        with pytest.raises(ConfigError, match=f"loss={name} (is one of|trains .* through) .*; set"):
            bind(name, calibration=True)
        return
    loss = bind(name, calibration=True)
    assert loss.couples_batch
    data = made_up_batch(loss, n=8)
    sides = [
        replace(side, policy_logps=side.policy_logps.requires_grad_())
        for side in (data.chosen, data.rejected)
    ]
    data = replace(data, chosen=sides[0], rejected=sides[1], head_norms=NORMS)
    before, (up, down) = slopes(plain, data)
    output, (chosen, rejected) = slopes(loss, data)
    assert torch.equal(output.losses, before.losses)
    incentives = -up.mean(), down.mean()
    factor = 1.0
    if min(incentives) > 0:
        factor = (NORMS[1] / NORMS[0] * incentives[1] / incentives[0]).sqrt().item()
        assert factor != pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(chosen, factor * up, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(rejected, down / factor, rtol=1e-9, atol=1e-12)


def test_a_batch_that_pulls_a_side_the_wrong_way_is_not_calibrated():
    loss, plain = bind("sppo", beta=0.1, calibration=True), bind("sppo", beta=0.1)
    data = replace(pairs([9.0, 8.0], [-1.0, 1.0]), head_norms=NORMS)  # the target of d_w is 5
    running = {name: torch.tensor(float(i)).double() for i, name in enumerate(NAMES)}
    output, ours = slopes(loss, data, running)
    assert torch.equal(torch.stack(ours), torch.stack(slopes(plain, data)[1]))
    assert output.running == running and not slopes(loss, data)[0].running


def test_what_it_does_not_go_with():
    with pytest.raises(ConfigError, match=r"parts, dpo: calibration: true is of the whole sum"):
        bind("weighted_sum", parts=[{"name": "dpo", "beta": 0.1, "calibration": True}])
    with pytest.raises(ConfigError, match="loss=dpo is one of lists; set it to false"):
        bind("dpo", calibration=True, all_pairs=True)
    with pytest.raises(ConfigError, match=r"calibration_decay=1 of loss=dpo must be .* \[0, 1\)"):
        bind("dpo", calibration=True, calibration_decay=1)
    assert bind("dpo", calibration=True, weight="w").weight == "w"  # each pair has its own loss
    with pytest.raises(
        ConfigError, match=r"loss=dpo with loss\.calibration=true couples .* must not be split"
    ):
        check_config(compose(["loss.calibration=true", "gradient_accumulation_steps=2"]))


ROWS = [
    {"prompt": "the soup was", "chosen": " hot and good", "rejected": " cold"},
    {"prompt": "the soup was", "chosen": " hot and good", "rejected": " a long story"},
    {"prompt": "we sat", "chosen": " down", "rejected": " outside in the rain"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three pairs, two of which have a response in common."""
    return tokenised(tmp_path_factory.mktemp("calibration"), ROWS)


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])  # gemma2 caps its logits
@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_and_gradients_of_a_model(data, architecture, layout):
    policy, reference = (
        Scorer(make_model(architecture, seed=s, dtype=torch.float64, scale=2.0)) for s in (0, 1)
    )
    model = policy.model
    # Untied, so that autograd has the gradient of the head alone.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    for scorer in (policy, reference):
        packed_models.enable(scorer.model)
    batch = collate(data, np.array([2, 0, 1]), Layout(layout, 257))
    beta, loss = 0.5, bind("dpo", beta=0.5, calibration=True)

    def gradients(total):
        return torch.autograd.grad(total, list(model.parameters()), retain_graph=True)

    output, _ = compute_loss(loss, policy, reference, batch, data, "train")
    ours = gradients(output.losses.mean())
    held_out, _ = compute_loss(loss, policy, reference, batch, data, "eval")
    assert torch.equal(held_out.losses, output.losses) and not held_out.running

    logps = score_responses(policy, batch).logps
    ratios = logps - reference_logps(reference, batch)
    chosen, rejected = ratios[batch.chosen], ratios[batch.rejected]
    norms = []
    for side in (batch.chosen, batch.rejected):
        [gradient] = torch.autograd.grad(
            logps[side].mean(), model.lm_head.weight, retain_graph=True
        )
        norms.append(gradient.norm().log().item())
    assert [output.running[name].item() for name in NAMES[2:]] == pytest.approx(norms, rel=1e-9)
    factor = math.exp((norms[1] - norms[0]) / 2)
    assert factor != pytest.approx(1, rel=1e-2)
    of_chosen, of_rejected = (
        gradients(-torch.nn.functional.logsigmoid(beta * gap).mean())
        for gap in (chosen - rejected.detach(), chosen.detach() - rejected)
    )
    for gradient, up, down in zip(ours, of_chosen, of_rejected, strict=True):
        expected = factor * up + down / factor
        # The norms of these models compute in float32.
        assert (gradient - expected).norm() < 1e-5 * expected.norm()
        assert (gradient - up - down).norm() > 1e-3 * expected.norm()


@torch.no_grad()
def reference_logps(reference, batch):
    return score_responses(reference, batch).logps
