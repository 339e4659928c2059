"""A weight for each pair, by a column of the data, and weighted sums of losses."""

import math

import pytest
import torch
from conftest import final_weights, read_rows, run_here, same_weights, small_run, write_jsonl

from preflab.objective.registry import bind_loss, made_up_batch
from utils import ConfigError, DataError

EXACT = ("model.policy_dtype=float64", "model.reference_dtype=float64", "sample_during_eval=false")
DPO = {"name": "dpo", "beta": 0.5}


def pairs(path, weight, n=24):
    """Pairs with the weight `weight(i)` in the column w; None leaves the column out."""
    rows = [
        {"prompt": f"p{i} ", "chosen": f"yes {i}", "rejected": f"no {i * 7}"}
        | ({} if weight(i) is None else {"w": weight(i)})
        for i in range(n)
    ]
    return write_jsonl(path, rows)


@pytest.fixture
def train(llama_folder, tmp_path):
    """Run on a file of pairs with weights; returns the run folder."""

    def train(name, weight, *more, file="pairs.jsonl"):
        data = pairs(tmp_path / file, weight)
        overrides = (f"datasets=[{data}]", "test_fraction=0.2", "do_first_eval=false", *more)
        run_here(*small_run(llama_folder, tmp_path / "data", tmp_path / name, *overrides))
        return tmp_path / name

    return train


# ------------------------------------------------------------------------------- weights of pairs


def test_the_loss_of_each_pair_is_multiplied_and_nothing_else():
    plain, weighted = bind_loss(DPO), bind_loss(DPO | {"weight": "w"})
    assert weighted.columns == {"w"} and weighted.reads == plain.reads
    data = made_up_batch(weighted, n=5)
    data.columns["w"][1] = 0.0
    a, b = plain(data), weighted(data)
    assert torch.equal(b.losses, a.losses * data.columns["w"])
    assert torch.equal(b.chosen_rewards, a.chosen_rewards)
    with_likelihood = bind_loss(DPO | {"weight": "w", "sft_weight": 0.3})(
        made_up_batch(bind_loss(DPO | {"weight": "w", "sft_weight": 0.3}), n=5)
    )
    assert with_likelihood.losses.shape == (5,)


def test_weights_scale_the_step_which_is_a_mean_over_pairs(train):
    """Weights of 1 change no bit, and weights of 2 are a learning rate twice as large."""
    sgd = ("n_examples=16", *EXACT, "optimizer=SGD", "max_grad_norm=1e9", "layout=padded")
    plain = final_weights(train("plain", lambda i: 1.0, *sgd))
    ones = train("ones", lambda i: 1, *sgd, "loss.weight=w")
    assert same_weights(plain, final_weights(ones))
    a = final_weights(train("twice", lambda i: 2.0, *sgd, "loss.weight=w", file="two.jsonl"))
    b = final_weights(train("lr", lambda i: 1.0, *sgd, "lr=2e-3"))
    assert max((a[name] - b[name]).abs().max().item() for name in a) < 1e-12
    assert not same_weights(plain, a)


def test_a_pair_of_weight_0_counts_in_the_mean_and_has_no_loss(train):
    folder = train("half", lambda i: i % 2, "loss.weight=w", "n_examples=8", "do_first_eval=true")
    held_out, first = read_rows(folder / "metrics.jsonl")[:2]
    for loss in (held_out["loss/eval"], first["loss/train"]):
        share = loss / math.log(2)  # the loss of each pair at policy = reference
        assert 0 < share < 1
    assert share == pytest.approx(round(share * 8) / 8, rel=1e-6)


@pytest.mark.parametrize(
    "weight, more, error, message",
    [
        (lambda i: None, (), DataError, r"pairs\.jsonl:1: no column 'w', which loss\.weight=w"),
        (lambda i: -1.0 if i == 3 else 1.0, (), DataError, r":4 \(example \d+\) has the weight -1"),
        (lambda i: "a", (), DataError, r":1: 'w' is str 'a', expected a number"),
        (lambda i: float("inf"), (), DataError, "Infinity|finite"),
        (lambda i: 0, (), DataError, "all weights of .* are 0"),
        (lambda i: 1.0, ("loss=kto",), ConfigError, "couples the pairs of a batch"),
        (lambda i: 1.0, ("loss=sft",), ConfigError, "columns of numbers belong to pairs"),
        (lambda i: 1.0, ("loss.weight=3",), ConfigError, "must be the name of a column"),
        (lambda i: 1.0, ("function=online",), ConfigError, "rollouts do not have"),
    ],
)
def test_weights_that_cannot_be_used_are_refused(train, weight, more, error, message):
    with pytest.raises(error, match=message):
        train("refused", weight, "loss.weight=w", *more)


def test_data_without_pairs_or_without_columns_have_no_weights(run, train, imdb_dir):
    with pytest.raises(DataError, match=r"reads the column 'w', which imdb does not have"):
        run("imdb", "loss.weight=w")
    scored = write_jsonl(
        imdb_dir / "s.jsonl", [{"prompt": "p", "text": "a", "reward": 1.0, "w": 1}]
    )
    with pytest.raises(DataError, match=r"loss\.weight=w reads a number of each pair"):
        run("scored", f"datasets=[{scored}]", "loss.weight=w")


def test_a_csv_file_and_a_renamed_column_have_weights_too(llama_folder, tmp_path):
    lines = ["prompt,chosen,rejected,w", *(f"p{i},yes {i},no {i},{i % 3}" for i in range(12))]
    (tmp_path / "pairs.csv").write_text("\n".join(lines), encoding="utf-8")
    common = ("n_examples=8", f"datasets=[{tmp_path / 'pairs.csv'}]", "loss.weight=w", *EXACT)
    folders = []
    for name, more in {"a": (), "b": ("dataset_columns.magnitude=w",)}.items():
        run_here(*small_run(llama_folder, tmp_path / "data", tmp_path / name, *common, *more))
        folders.append(tmp_path / name)
    assert same_weights(*map(final_weights, folders))
