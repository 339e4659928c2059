"""Data sets mixed by weights: their shares, their order, and its resumption."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import final_weights, read_rows, run_here, same_weights, small_run, write_jsonl

import trainers
from preflab.batching.loader import Loader, Mixture
from utils import ConfigError, DataError

SIZES = (10, 25, 5)


def loader(weights, *, sizes=SIZES, groups=None, **options):
    begins = np.cumsum([0, *sizes])
    groups = np.arange(begins[-1]) if groups is None else groups
    defaults = {"batch_size": 8, "seed": 0, "n_epochs": 1, "n_examples": None}
    mixture = Mixture(begins, np.array(weights, dtype=float))
    return Loader(groups, mixture=mixture, **(defaults | options))


def sets_of(examples, sizes=SIZES):
    return np.searchsorted(np.cumsum(sizes), examples, side="right")


def drawn(loader):
    return np.concatenate(list(loader))


def test_an_epoch_has_the_shares_of_the_weights_and_so_has_each_part_of_it():
    order = drawn(loader([0.5, 0.2, 0.3]))
    assert len(order) == 40 and Counter(sets_of(order).tolist()) == {0: 20, 1: 8, 2: 12}
    for n in range(1, 41):
        counts = np.bincount(sets_of(order[:n]), minlength=3)
        assert np.all(np.abs(counts - n * np.array([0.5, 0.2, 0.3])) <= 1)
    same = drawn(loader([5, 2, 3]))
    assert order.tolist() == same.tolist()
    assert order.tolist() != drawn(loader([0.5, 0.2, 0.3], seed=1)).tolist()


def test_rounding_leaves_no_example_over():
    assert Mixture(np.array([0, 3, 10]), np.array([1.0, 2.0])).quotas().tolist() == [3, 7]
    assert Mixture(np.array([0, 4, 8, 11]), np.ones(3)).quotas().tolist() == [4, 4, 3]


def test_no_example_of_a_set_comes_again_before_all_of_it_have_come():
    order = drawn(loader([0.5, 0.2, 0.3], n_epochs=5))
    for number, (begin, size) in enumerate(zip((0, 10, 35), SIZES, strict=True)):
        own = order[sets_of(order) == number]
        for i in range(0, len(own) - size + 1, size):
            assert sorted(own[i : i + size]) == list(range(begin, begin + size))
    firsts = [order[sets_of(order) == 0][i : i + 10].tolist() for i in (0, 10)]
    assert firsts[0] != firsts[1]


def test_sets_of_one_size_have_orders_of_their_own():
    order = drawn(loader([1, 1], sizes=(20, 20)))
    one, two = (order[sets_of(order, (20, 20)) == number] for number in (0, 1))
    assert one.tolist() != (two - 20).tolist()


def test_pairs_of_a_prompt_stay_together_where_the_order_asks_for_it():
    groups = np.concatenate([np.repeat(np.arange(5), 2), 5 + np.repeat(np.arange(5), 5), [10] * 5])
    order = drawn(loader([0.25, 0.5, 0.25], groups=groups, order="prompts"))
    changes = int((np.diff(groups[order]) != 0).sum())
    runs_of = Counter(groups[order].tolist())
    assert changes < 2 * len(runs_of)
    assert len(set(sets_of(order[:20]).tolist())) > 1  # and the sets are still mixed


@pytest.mark.parametrize("stop", [0, 3, 7, 12])
def test_a_position_of_two_integers_resumes_anywhere(stop):
    options = {"n_epochs": 3, "n_examples": 101}
    whole, first, second = (loader([1, 2, 3], **options) for _ in range(3))
    before = [next(first).tolist() for _ in range(stop)]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [b.tolist() for b in second] == [b.tolist() for b in whole]


def test_the_distinct_examples_of_a_run_are_those_that_it_draws():
    for options in ({"n_epochs": 2}, {"n_epochs": None, "n_examples": 30}):
        order = drawn(loader([0.5, 0.2, 0.3], **options))
        distinct = loader([0.5, 0.2, 0.3], **options).distinct()
        assert distinct.tolist() == list(dict.fromkeys(order.tolist()))
    plain = Loader(np.arange(9), batch_size=2, seed=0, n_epochs=2, n_examples=None)
    assert plain.distinct().tolist() == np.concatenate(list(plain))[:9].tolist()


# ------------------------------------------------------------------------------------------- runs


@pytest.fixture
def train(llama_folder, tmp_path):
    """Run on two files, `big` of 20 prompts and `small` of 5; returns the run folder."""
    for name, n in {"big": 20, "small": 5}.items():
        rows = [
            {"prompt": f"{name} {i} ", "chosen": f"yes {i}", "rejected": f"no {i}"}
            for i in range(n)
        ]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)

    def train(name, datasets, *more):
        datasets = datasets.format(big=tmp_path / "big.jsonl", small=tmp_path / "small.jsonl")
        more = (f"datasets={datasets}", "test_fraction=0.2", "sample_during_eval=false", *more)
        run_here(*small_run(llama_folder, tmp_path / "data", tmp_path / name, *more))
        return tmp_path / name

    return train


MIXED = "[{{name: {big}, weight: 0.25}}, {{name: {small}, weight: 0.75}}]"


def test_a_mixed_run_says_its_shares_and_resumes_bit_for_bit(train, capsys, monkeypatch):
    whole = train("whole", MIXED, "n_epochs=3", "n_examples=48")
    out = capsys.readouterr().out
    assert "times its size" in out and "big.jsonl: " in out
    step = trainers.BasicTrainer.train_step

    def crash(self, *arguments):
        if self.learner.counters.steps == 4:  # in the second epoch, after a checkpoint
            raise KeyboardInterrupt
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.BasicTrainer, "train_step", crash)
        with pytest.raises(KeyboardInterrupt):
            train("parts", MIXED, "n_epochs=3", "n_examples=48")
    parts = train("parts", MIXED, "n_epochs=3", "n_examples=48")
    assert same_weights(final_weights(whole), final_weights(parts))
    by_set = [key for key in read_rows(whole / "metrics.jsonl")[0] if key.startswith("loss/eval@")]
    assert len(by_set) == 2
    with pytest.raises(ConfigError, match="datasets was"):
        train("parts", MIXED.replace("0.25", "0.5"), "n_epochs=3", "n_examples=56")


@pytest.mark.parametrize(
    "datasets, error, message",
    [
        ("[{{name: {big}, weight: 0.5}}, {small}]", ConfigError, "without a weight beside"),
        ("[{{name: {big}, weight: 0}}]", ConfigError, "weight above 0"),
        ("[{{name: {big}}}]", ConfigError, r"\{name: NAME, weight: NUMBER\}"),
        ("[{{name: {big}, share: 1}}]", ConfigError, r"\{name: NAME, weight: NUMBER\}"),
        (
            "[{{name: {big}, weight: 1}}, {{name: {small}, weight: 0.001}}]",
            DataError,
            r"the weight of .*small\.jsonl is less than one",
        ),
    ],
)
def test_weights_that_make_no_mixture_are_refused(train, datasets, error, message):
    with pytest.raises(error, match=message):
        train("refused", datasets)
