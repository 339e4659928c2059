"""A weight for each pair, by a column of the data, and weighted sums of losses."""

import math

import pytest
import torch
from conftest import final_weights, read_rows, run_here, same_weights, small_run, write_jsonl
from omegaconf import OmegaConf

from preflab.objective.registry import bind_loss, made_up_batch
from preflab.objective.types import Pair, Target
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
    sgd = ("n_examples=8", *EXACT, "optimizer=SGD", "max_grad_norm=1e9", "layout=padded")
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


# --------------------------------------------------------------------------------- sums of losses

BCO = {"name": "bco", "beta": 0.2, "momentum": 0.9}
SFT = {"name": "sft", "reduction": "mean"}
TDPO = {"name": "tdpo2", "beta": 0.1, "alpha": 0.5}
RM = {"name": "bradley_terry"}


def weighted_sum(*parts, **more):
    return bind_loss({"name": "weighted_sum", "parts": list(parts)} | more)


def alone(settings, data):
    """A loss by itself on the same examples, chosen responses where it imitates one."""
    loss = bind_loss(settings)
    if loss.examples == "targets" and isinstance(data, Pair):
        data = Target(**vars(data.chosen))
    return loss(data)


@pytest.mark.parametrize(
    "parts, weights",
    [
        ((DPO, SFT), (1.0, 0.1)),
        ((DPO, BCO, SFT), (0.8, 0.2, 1.0)),
        ((TDPO, {"name": "ipo", "beta": 0.1, "average_log_prob": False}), (0.3, 0.0)),
        ((RM, RM | {"as": "again"}), (0.5, 0.25)),
        ((SFT, SFT | {"reduction": "sum", "as": "summed"}), (1, 2)),
    ],
)
def test_a_sum_is_the_weighted_sum_of_the_single_losses_with_its_gradient(parts, weights):
    loss = weighted_sum(*({**p, "weight": w} for p, w in zip(parts, weights, strict=True)))
    data = made_up_batch(loss, n=6)
    side = data.chosen if isinstance(data, Pair) else data
    leaves = [value for value in vars(side).values() if isinstance(value, torch.Tensor)]
    for leaf in leaves:
        leaf.requires_grad_(True)
    singles = [{key: v for key, v in part.items() if key != "as"} for part in parts]
    expected = sum(w * alone(part, data).losses for part, w in zip(singles, weights, strict=True))
    assert torch.allclose(loss(data).losses, expected, rtol=0, atol=1e-12)
    of_sum, of_parts = (
        torch.autograd.grad(value.sum(), leaves, allow_unused=True)
        for value in (loss(data).losses, expected)
    )
    for a, b in zip(of_sum, of_parts, strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b, rtol=0, atol=1e-12)


def test_a_sum_logs_its_parts_and_the_rewards_of_the_first_that_has_some():
    loss = weighted_sum(SFT | {"weight": 0.5}, DPO, TDPO | {"as": "t"})
    assert loss.reads == {"lengths", "reference", "token_kl"} and not loss.couples_batch
    data = made_up_batch(loss, n=4)
    output = loss(data)
    assert torch.equal(output.chosen_rewards, alone(DPO, data).chosen_rewards)
    assert torch.equal(output.metrics["loss_{split}/sft"], alone(SFT, data).losses)
    assert torch.equal(output.metrics["loss_{split}/dpo"], alone(DPO, data).losses)
    assert "kl_{split}/chosen" in output.metrics and "loss_{split}/t" in output.metrics


def test_running_means_of_the_parts_are_kept_apart():
    """Two steps of a sum move each part's mean as the part moves it alone."""
    one, two = BCO, BCO | {"momentum": 0.5}
    loss, singles = weighted_sum(one, two | {"as": "fast"}), [bind_loss(one), bind_loss(two)]
    assert loss.couples_batch
    for seed in range(2):
        data = made_up_batch(loss, n=4, seed=seed)
        assert torch.allclose(
            loss(data).losses, sum(single(data).losses for single in singles), rtol=0, atol=1e-12
        )
        for each in (loss, *singles):
            each.keep(each(data))
    slow, fast = (next(iter(single.state_dict().values())) for single in singles)
    assert slow != fast and sorted(loss.state_dict().values()) == sorted([slow, fast])


@pytest.mark.parametrize(
    "parts, message",
    [
        ([], "must be a list of losses"),
        (["dpo"], r"loss\.parts, dpo: loss=dpo needs loss\.beta"),
        ([DPO, DPO], "has dpo twice"),
        ([DPO | {"weight": -1}], "the weight of dpo is -1 and must be at least 0"),
        ([DPO | {"weight": "w"}], "must be a finite number"),
        ([DPO | {"as": "a{b}"}], "letters and digits"),
        ([DPO | {"gamma": 1}], "has no setting gamma"),
        ([{"name": "dpp"}], "did you mean dpo"),
        ([DPO, RM], "no model is both"),
        ([DPO, {"name": "kto_unpaired", "beta": 0.1}], "kto_unpaired reads responses"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(parts, message):
    with pytest.raises(ConfigError, match=message):
        weighted_sum(*parts)


def test_a_sum_trains_as_its_config_says_and_resumes(train):
    """Names take the settings of config/loss/; config.yaml has them all."""
    parts = "loss.parts=[{name: dpo, weight: 0.5, beta: 0.3}, {name: bco, weight: 0.25}, sft]"
    more = ("loss=weighted_sum", parts, "n_epochs=2", "eval_every=8")
    whole = train("whole", lambda i: 1.0, *more, "n_examples=24")
    config = OmegaConf.load(whole / "config.yaml")
    assert [dict(part)["name"] for part in config.loss.parts] == ["dpo", "bco", "sft"]
    assert config.loss.parts[0].label_smoothing == 0 and config.loss.parts[1].beta == 0.1
    row = read_rows(whole / "metrics.jsonl")[0]
    total = 0.5 * row["loss_train/dpo"] + 0.25 * row["loss_train/bco"] + row["loss_train/sft"]
    assert row["loss/train"] == pytest.approx(total, rel=1e-9)
    train("parts", lambda i: 1.0, *more, "n_examples=16")
    parts = train("parts", lambda i: 1.0, *more, "n_examples=24")
    assert same_weights(final_weights(whole), final_weights(parts))
