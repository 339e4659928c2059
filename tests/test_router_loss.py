"""The load-balancing loss of mixtures of experts: against transformers' own, in every layout."""

import json

import pytest
import torch
from conftest import make_model, read_rows, run_here, save_model, small_run
from test_layouts import draw, gradients, largest_difference, objective

from preflab.batching.packed_models import enable
from preflab.batching.packing import LAYOUTS, Layout, lay_out
from preflab.distributed.process_group import ALONE
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.modeling.router_loss import RouterLoss, token_weights
from utils import ConfigError

MIXTURES = ["gpt_oss", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"]
LENGTHS = [(12, (3, 9)), (5, (20, 2)), (2, (1, 8))]


def mixture(architecture, coefficient=0.3):
    model = make_model(architecture, dtype=torch.float64)
    model.config.output_router_logits = True
    model.config.router_aux_loss_coef = coefficient
    return model


def pairs(trees, layout):
    """The two responses of each prompt as a pair."""
    batch = lay_out(trees, Layout(layout))
    batch.chosen, batch.rejected = batch.chosen[::2], batch.chosen[1::2]
    return batch


def theirs(model, trees):
    """transformers' loss of padded rows, a row for each response."""
    batch = lay_out(trees, Layout("padded"))
    return model(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False).aux_loss


def step(model, batches, weight=0.0):
    """The loss of a step of microbatches, and the gradients of it times its coefficient, plus
    those of an objective on the log-probs."""
    router_loss = RouterLoss.of(Scorer(model))
    router_loss.begin([(batch, len(batch.chosen)) for batch in batches], ALONE)
    total = 0.0
    for batch in batches:
        scores = score_responses(router_loss.policy, batch)
        total = total + weight * objective(scores.token_logps)
        total = total + router_loss.part(batch, len(batch.chosen))
    return router_loss.total(), gradients(model, total)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", MIXTURES)
def test_the_loss_is_that_of_transformers_in_every_layout(architecture, layout):
    plain, model = mixture(architecture), mixture(architecture)
    expected = theirs(plain, draw(LENGTHS))
    expected_gradients = gradients(plain, 0.3 * expected)
    enable(model)
    value, ours = step(model, [pairs(draw(LENGTHS), layout)])
    # Theirs sums in float32.
    assert value == pytest.approx(expected.item(), rel=1e-6)
    assert largest_difference(ours, ours | expected_gradients) < 1e-5
    assert expected_gradients  # zero elsewhere: the head has none
    # Padding and prompts counted once are mistakes that are seen.
    batch = lay_out(draw(LENGTHS), Layout("padded"))
    wrong = plain(batch.input_ids, use_cache=False).aux_loss
    assert abs(wrong.item() - value) > 1e-3


@pytest.mark.parametrize("layout", LAYOUTS)
def test_microbatches_and_what_pairs_share_change_nothing(layout):
    model = mixture("qwen3_moe")
    enable(model)
    trees = draw(LENGTHS)
    whole, of_whole = step(model, [pairs(trees, layout)])
    parts, of_parts = step(model, [pairs(trees[:1], layout), pairs(trees[1:], layout)])
    assert parts == pytest.approx(whole, rel=1e-12)
    assert largest_difference(of_parts, of_whole) < 1e-6
    # A response in two pairs of a batch counts twice, as it does in two batches.
    [(prompt, (a, b))] = draw([(12, (3, 9))])
    [(_, (c,))] = draw([(1, (6,))], seed=1)
    together = lay_out([(prompt, [a, b, c])], Layout(layout))
    together.chosen, together.rejected = torch.tensor([0, 0]), torch.tensor([1, 2])
    apart = [pairs([(prompt, [a, b])], layout), pairs([(prompt, [a, c])], layout)]
    assert step(model, [together])[0] == pytest.approx(step(model, apart)[0], rel=1e-12)


def test_a_batch_that_stands_in_has_no_weight():
    for layout in LAYOUTS:
        batch = pairs(draw(LENGTHS), layout)
        assert token_weights(batch, 0).sum() == 0
        texts = sum(2 * prompt + sum(responses) - 2 for prompt, responses in LENGTHS)
        assert token_weights(batch, 3).sum() == texts


def test_the_loss_is_added_where_the_config_asks_for_it():
    assert RouterLoss.of(Scorer(make_model("llama"))) is None
    assert RouterLoss.of(Scorer(make_model("mixtral"))) is None
    assert RouterLoss.of(Scorer(mixture("mixtral", 0.0))) is None
    llama = make_model("llama")
    llama.config.output_router_logits = True
    with pytest.raises(ConfigError, match="llama has no router_aux_loss_coef"):
        RouterLoss.of(Scorer(llama))


def test_gradients_reach_the_router_through_recomputed_blocks():
    model = mixture("mixtral")
    enable(model)
    batch = pairs(draw(LENGTHS), "prefix_shared")
    value, plain = step(model, [batch], weight=1.0)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    again, recomputed = step(model, [batch], weight=1.0)
    assert again == value
    assert largest_difference(recomputed, plain) < 1e-9


def test_a_run_adds_the_loss_and_does_not_depend_on_its_layout(imdb_dir, tmp_path):
    folder = save_model(tmp_path / "model", "mixtral", scale=2.0)
    config = json.loads((folder / "config.json").read_text())
    losses = {}
    for name, coefficient, more in (
        ("off", 0.0, []),
        ("padded", 0.5, ["layout=padded", "microbatch_tokens=300"]),
        ("prefix_shared", 0.5, ["layout=prefix_shared", "activation_checkpointing=true"]),
    ):
        config |= {"output_router_logits": True, "router_aux_loss_coef": coefficient}
        (folder / "config.json").write_text(json.dumps(config))
        options = ["n_examples=24", "sample_during_eval=true", "loss=dpo", "loss.beta=0.1"]
        run_here(*small_run(folder, imdb_dir, tmp_path / name, *options, *more))
        rows = read_rows(tmp_path / name / "metrics.jsonl")
        losses[name] = [
            (row["loss/train"], row.get("router_loss/train"), row["grad_norm"])
            for row in rows
            if row["split"] == "train"
        ]
    for packed, padded in zip(losses["prefix_shared"], losses["padded"], strict=True):
        assert packed == pytest.approx(padded, rel=1e-4)
    assert all(value is None for _, value, _ in losses["off"])
    # It has a gradient, and the loss of the responses is reported without it.
    (off, _, off_norm), (on, _, on_norm) = losses["off"][0], losses["padded"][0]
    assert off == pytest.approx(on, rel=1e-6) and off_norm != pytest.approx(on_norm, rel=0.01)
