"""Samples that the runs of a sweep share: drawn once, and equal to those of runs on their own."""

import pytest
import torch
from conftest import final_weights, make_model, read_rows, same_weights, untimed

from preflab.distributed.process_group import ALONE
from preflab.evaluation import samples as samples_module
from preflab.modeling import shared_samples
from preflab.modeling.logprobs import Scorer
from preflab.modeling.shared_samples import SharedSamples


@pytest.fixture
def draws(monkeypatch):
    """The descriptions of all draws of `sample`."""
    seen, sample = [], samples_module.sample

    def counted(*arguments, **options):
        seen.append(options["description"])
        return sample(*arguments, **options)

    monkeypatch.setattr(samples_module, "sample", counted)
    return seen


def test_runs_of_a_sweep_draw_a_common_reference_once_and_end_as_runs_on_their_own(
    run, draws, monkeypatch
):
    settings = {"a": ("lr=1e-3",), "b": ("loss=ipo", "do_first_eval=false"), "c": ("seed=1",)}
    alone = {
        name: run(f"alone-{name}", *words, "n_examples=16") for name, words in settings.items()
    }
    # Before the first step the policy's samples are the reference's.
    a = c = ["sample policy", "sample policy"]
    assert draws == [*a, "sample policy", "sample reference", *c]
    draws.clear()
    shared = SharedSamples()
    shared.is_on = True
    monkeypatch.setattr(samples_module, "SHARED", shared)
    together = {
        name: run(f"swept-{name}", *words, "n_examples=16") for name, words in settings.items()
    }
    # b, with the seed of a: after training; a, and c with another seed: before and after
    assert draws == 5 * ["sample policy"]
    for name in settings:
        for file in ("samples.jsonl", "metrics.jsonl"):
            rows = [untimed(read_rows(folder[name] / file)) for folder in (alone, together)]
            assert rows[0] == rows[1] and rows[0]
        assert same_weights(final_weights(alone[name]), final_weights(together[name]))


def test_another_question_or_other_weights_are_drawn_again(monkeypatch):
    shared, scorer, count = SharedSamples(), Scorer(make_model("llama")), iter(range(100))

    def ask(question, world=ALONE):
        return shared.draw(scorer, question, lambda: [[next(count)]], world)

    assert ask("a") != ask("a")
    shared.is_on = True
    first = ask("a")
    assert ask("a") == first != ask("b")
    ask("a")[0].append(7)
    assert ask("a") == first
    with torch.no_grad():
        weight = next(scorer.model.parameters())
        before = weight.clone()
        weight[0, 0] += 1
        assert ask("a") != first
        weight.copy_(before)
    assert ask("a") == first
    scorer.adapter_off = True
    assert ask("a") != first
    monkeypatch.setattr(shared_samples, "MOST_BYTES", 8)
    assert ask("a") != ask("a")
