"""KTO's z from responses put to other prompts: which tokens the models see, and its value against
rows that are scored one by one."""

import numpy as np
import pytest
import torch
from conftest import make_model, make_tokenizer, tokenised
from test_losses import bind

from preflab.batching import packed_models
from preflab.batching.collate import collate
from preflab.batching.packing import LAYOUTS, Layout, lay_out
from preflab.checks import check_config
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.objective.registry import made_up_batch
from preflab.settings.compose import compose
from preflab.training.compute_loss import compute_loss
from utils import ConfigError

ROWS = [
    {"prompt": "the soup was", "chosen": " hot", "rejected": " cold and old"},
    {"prompt": "the soup was", "chosen": " hot", "rejected": " a long story"},
    {"prompt": "we sat", "chosen": " down at a table by the window", "rejected": " outside"},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Three pairs of two prompts, two of which have a response in common."""
    return tokenised(tmp_path_factory.mktemp("point"), ROWS)


def tokens(text):
    return make_tokenizer()(text)["input_ids"]


def expected_rows():
    """(prompt, response) of each response of the batch [2, 0, 1]: its own prompt with the responses
    of the other one in turn, cut to the longest row."""
    soup, sat = ([256, *tokens(text)] for text in ("the soup was", "we sat"))  # BOS in front
    of_soup = [[*tokens(text), 256] for text in (" hot", " cold and old", " a long story")]
    of_sat = [[*tokens(text), 256] for text in (" down at a table by the window", " outside")]
    limit = max(len(sat) + len(of_sat[0]), len(soup) + max(map(len, of_soup)))
    rows = [(sat, of_soup[0]), (sat, of_soup[1])]
    rows += [(soup, of_sat[i]) for i in (0, 1, 0)]
    assert any(len(prompt) + len(response) > limit for prompt, response in rows)
    return [(prompt, response[: limit - len(prompt)]) for prompt, response in rows]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_z_is_the_mean_over_rows_that_are_scored_one_by_one(data, layout):
    policy, reference = (Scorer(make_model("llama", seed=s, dtype=torch.float64)) for s in (0, 1))
    for scorer in (policy, reference):
        packed_models.enable(scorer.model)
    batch = collate(data, np.array([2, 0, 1]), Layout(layout, 257), mismatched=True)
    alone = []
    for prompt, response in expected_rows():
        row = lay_out([(np.array(prompt), [np.array(response)])], Layout("padded", 257))
        logps = [score_responses(scorer, row).logps.item() for scorer in (policy, reference)]
        alone.append(logps[0] - logps[1])
    loss = bind("kto", beta=0.3, point="mismatched")
    output, metrics = compute_loss(loss, policy, reference, batch, data, "train")
    used = [alone[r] for side in (batch.chosen, batch.rejected) for r in side.tolist()]
    z = max(0.0, sum(used) / len(used))
    assert metrics["kl_train/estimate"].tolist() == pytest.approx([z] * 3, rel=1e-6)
    d_w, d_l = (metrics[f"logratios_train/{side}"] for side in ("chosen", "rejected"))
    expected = (torch.sigmoid(0.3 * (z - d_w)) + torch.sigmoid(0.3 * (d_l - z))) / 2
    torch.testing.assert_close(output.losses.detach(), expected, rtol=1e-6, atol=1e-9)
    # of the batch's own responses it would be another
    own = compute_loss(bind("kto", beta=0.3), policy, reference, batch, data, "train")[1]
    assert own["kl_train/estimate"][0].item() != pytest.approx(z, rel=1e-2, abs=1e-2)


def test_one_prompt_alone_keeps_its_own_responses(data):
    batch = collate(data, np.array([0, 1]), Layout("padded", 257), mismatched=True)
    assert torch.equal(batch.mismatched.targets, batch.targets)
    assert collate(data, np.array([0, 1]), Layout("padded", 257)).mismatched is None


def test_pairs_and_single_responses_have_the_same_z():
    pair = made_up_batch(bind("kto", point="mismatched"), n=4)
    z = torch.cat([pair.chosen.mismatched, pair.rejected.mismatched]).mean().clamp(min=0)
    output = bind("kto", point="mismatched")(pair)
    assert output.metrics["kl_{split}/estimate"].tolist() == [z.item()] * 4
    target = made_up_batch(bind("kto_unpaired", point="mismatched"), n=4)
    output = bind("kto_unpaired", point="mismatched")(target)
    expected = target.mismatched.mean().clamp(min=0).item()
    assert output.metrics["kl_{split}/estimate"].tolist() == [expected] * 4


def test_the_reference_runs_in_the_steps_and_other_words_are_refused():
    with pytest.raises(ConfigError, match=r"reads log-probs of responses to other prompts .*auto"):
        check_config(compose(["loss=kto", "loss.point=mismatched", "reference.cache=true"]))
    with pytest.raises(ConfigError, match=r"loss\.point='other' of loss=kto must be"):
        bind("kto", point="other")
