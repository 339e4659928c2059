"""Pushes of losses, and what a report says of them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, write_jsonl
from omegaconf import OmegaConf

from preflab.batching import packed_models
from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Layout
from preflab.distributed.process_group import ALONE
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.objective.pushes import push_metrics, slope_of_logps, slopes_of, with_leaves
from preflab.objective.registry import bind_loss, made_up_batch
from preflab.objective.types import Pair
from preflab.reports.run import write_report
from preflab.reports.runs import Run, group_runs
from preflab.reports.why import displacement, why, why_figure, why_of_groups, why_table
from preflab.training import compute_loss as module
from preflab.training.compute_loss import compute_loss
from preflab.training.metrics import Sums


def bind(name: str, **settings):
    config = OmegaConf.load(ROOT / "config" / "loss" / f"{name}.yaml")
    return bind_loss(OmegaConf.to_container(config) | settings)


def metrics_of(loss, batch, split: str = "train") -> dict:
    batch = with_leaves(batch)
    return push_metrics(batch, loss(batch).losses, split)


# Losses of each form of input whose gradient is that of their value: nothing in them is held back.
SMOOTH = [
    ("dpo", {}),
    ("dpo", {"sft_weight": 0.3}),
    ("dpo", {"divergence": "js"}),
    ("cal-dpo", {}),
    ("simpo", {}),
    ("orpo", {}),
    ("tdpo1", {}),
    ("ld-dpo", {}),
    ("dr-dpo", {}),
    ("aot", {}),
    ("bradley_terry", {}),
    ("sft", {}),
    ("plackett-luce", {}),
    ("dpo", {"all_pairs": True}),
]


@pytest.mark.parametrize("name, settings", SMOOTH)
def test_slopes_are_those_of_finite_differences(name, settings):
    """A log-prob is changed by equal parts at all tokens of its response."""
    loss, step = bind(name, **settings), 1e-5
    batch = made_up_batch(loss, n=3)
    sides = ("chosen", "rejected") if isinstance(batch, Pair) else (None,)
    leaves = with_leaves(batch)
    of = [getattr(leaves, side) if side else leaves for side in sides]
    slopes = slopes_of(of, loss(leaves).losses)

    def moved(side: str | None, place: tuple, by: float):
        data = getattr(batch, side) if side else batch
        changed = {}
        for field in ("policy_logps", "token_logps", "values"):
            if (values := getattr(data, field)) is None:
                continue
            values = values.clone()
            if field == "token_logps":
                n = int(data.lengths[place])
                values[(*place, slice(n))] += by / n
            else:
                values[place] += by
            changed[field] = values
        data = replace(data, **changed)
        return replace(batch, **{side: data}) if side else data

    for side, data, of_side in zip(sides, of, slopes, strict=True):
        slope = slope_of_logps(data, of_side)
        for place in np.ndindex(*slope.shape):
            up, down = (loss(moved(side, place, by)).losses.sum() for by in (step, -step))
            expected = float(up - down) / (2 * step)
            assert slope[place].item() == pytest.approx(expected, rel=1e-6, abs=1e-7)


def pair(d_w: list[float], d_l: list[float]) -> Pair:
    batch = made_up_batch(bind("rdpo"), n=len(d_w))

    def side(given, d):
        return replace(given, policy_logps=given.reference_logps + torch.tensor(d).double())

    return Pair(side(batch.chosen, d_w), side(batch.rejected, d_l))


def means(*parts) -> dict:
    sums = Sums()
    for metrics, n in parts:
        sums.add(metrics, n)
    return sums.flush(ALONE)


def test_pushes_ratio_and_share_by_hand():
    batch = pair([1.0, 20.0, 2.0, 30.0], [0.0, 0.0, -1.0, -4.0])
    # beta h is 0.1, 2, 0.3, 3.4: two pairs are within the margin of 1
    hinge = means((metrics_of(bind("hinge"), batch), 4))
    assert hinge["push_train/chosen"] == pytest.approx(0.05)
    assert hinge["push_train/rejected"] == pytest.approx(-0.05)
    assert hinge["push_train/share"] == pytest.approx(0.5)
    assert means((metrics_of(bind("dpo-shift"), batch), 4))["push_train/ratio"] == pytest.approx(
        0.75
    )
    dpo = means((metrics_of(bind("dpo"), batch), 4))
    each = [0.1 / (1 + math.exp(x)) for x in (0.1, 2.0, 0.3, 3.4)]
    assert dpo["push_train/chosen"] == pytest.approx(sum(each) / 4)
    assert dpo["push_train/share"] == pytest.approx(sum(each) ** 2 / 4 / sum(x**2 for x in each))
    names = {name.removeprefix("push_train/") for name in dpo}
    assert names == {"chosen", "rejected", "ratio", "share"}
    # the ratio is that of sizes, though the signed pushes of ipo cancel
    ipo = means((metrics_of(bind("ipo"), pair([4.0, 6.0], [0.0, 0.0])), 2))
    assert ipo["push_train/chosen"] == pytest.approx(0) and ipo["push_train/ratio"] == 1


def test_what_is_not_there_is_left_out():
    sft = means((metrics_of(bind("sft"), made_up_batch(bind("sft"))), 3))
    assert sft == {"push_train/chosen": 1.0, "push_train/share": 1.0}
    saturated = means((metrics_of(bind("hinge"), pair([50.0], [0.0])), 1))
    assert "push_train/ratio" not in saturated and saturated["push_train/share"] == 0
    kto = means((metrics_of(bind("kto_unpaired"), made_up_batch(bind("kto_unpaired"))), 3))
    assert {name.removeprefix("push_train/") for name in kto} == {"all", "ratio", "share"}
    of_tdpo = metrics_of(bind("tdpo2"), made_up_batch(bind("tdpo2")))
    assert not of_tdpo["push_train/chosen_kl"].any() and of_tdpo["push_train/rejected_kl"].all()


@pytest.fixture
def data(tmp_path):
    from test_token_losses import opened, stored

    source = opened(tmp_path, token_weights=True)
    return PreferenceData([stored(source, tmp_path)], "pairs", "data")


@pytest.mark.parametrize("name", ["dpo", "tdpo1", "simpo"])
def test_pushes_do_not_depend_on_layout_parts_or_gradients(data, name):
    policy, reference = (Scorer(make_model("llama", seed=s, dtype=torch.float64)) for s in (0, 1))
    for scorer in (policy, reference):
        packed_models.enable(scorer.model)
    loss = bind(name)

    def row(parts, layout="prefix_shared", split="train"):
        sums = Sums()
        for examples in parts:
            batch = collate(data, np.array(examples), Layout(layout, 257))
            _, metrics = compute_loss(loss, policy, reference, batch, data, split)
            sums.add(metrics, len(examples))
        return {k: v for k, v in sums.flush(ALONE).items() if k.startswith("push")}

    whole = row([[0, 1, 2, 3]])
    for other in (row([[0, 1, 2, 3]], "padded"), row([[3, 1], [0], [2]], "packed")):
        assert other == pytest.approx(whole, rel=1e-5)
    with torch.no_grad():
        evaluated = row([[0, 1], [2, 3]], split="eval")
    assert list(evaluated.values()) == pytest.approx(list(whole.values()), rel=1e-5)
    assert row([[0, 1]]) != pytest.approx(whole, rel=1e-5)  # the control


def test_gradients_are_bit_identical_with_and_without_pushes(data, monkeypatch):
    policy, reference = (Scorer(make_model("llama", seed=s)) for s in (0, 1))
    batch = collate(data, np.arange(4), Layout("padded", 257))

    def gradients():
        policy.model.zero_grad()
        compute_loss(bind("dpo"), policy, reference, batch, data, "train")[
            0
        ].losses.sum().backward()
        return [parameter.grad.clone() for parameter in policy.model.parameters()]

    with_pushes = gradients()
    monkeypatch.setattr(module, "push_metrics", lambda *_: {})
    assert all(map(torch.equal, with_pushes, gradients()))


def test_entropy_of_an_evaluation_is_that_of_a_naive_softmax(data):
    policy, reference = (Scorer(make_model("llama", seed=s, dtype=torch.float64)) for s in (0, 1))
    batch = collate(data, np.arange(4), Layout("padded", 257))
    with torch.no_grad():
        args = bind("dpo"), policy, reference, batch, data, "eval"
        _, metrics = compute_loss(*args, entropy=True)
        logps = policy.model(batch.input_ids, batch.attention_mask).logits.log_softmax(-1)
        of_tokens = -(logps.exp() * logps).sum(-1).flatten()[batch.positions]
    expected = torch.stack([of_tokens[batch.owners == r].mean() for r in batch.rejected])
    torch.testing.assert_close(metrics["entropy_eval/rejected"], expected, rtol=1e-6, atol=1e-7)
    plain = compute_loss(*args)[1]
    assert not any(name.startswith("entropy") for name in plain)
    assert score_responses(policy, batch).token_entropy is None


# ------------------------------------------------------------------------------------------ reports


def make_run(folder, *, push, ratio, moved, metric="logratios", shares=(1.0, 0.5)) -> Run:
    """Ten steps whose pushes halve, and two evaluations between which responses move."""
    folder.mkdir(parents=True)
    config = {"exp_name": "exp", "seed": 0, "loss": {"name": "l"}, "local_run_dir": str(folder)}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    rows = []
    for i in range(2):
        sides = zip(("chosen", "rejected"), moved, strict=False)
        values = {f"{metric}_eval/{side}": -20.0 + i * by for side, by in sides}
        if metric == "logratios":
            values = {name: value + 20 for name, value in values.items()}
        rows.append({"examples": 80 * i, "step": 10 * i, "split": "eval"} | values)
    for i in range(10):
        sides = zip(("chosen", "rejected"), push, strict=False)
        row = {f"push_train/{side}": value * (1 - i / 18) for side, value in sides}
        row["push_train/share"] = shares[0] + (shares[1] - shares[0]) * i / 9
        if ratio is not None:
            row["push_train/ratio"] = ratio
        rows.insert(i + 1, {"examples": 8 * i + 8, "step": i + 1, "split": "train"} | row)
    write_jsonl(folder / "metrics.jsonl", rows)
    return Run(folder)


END = "; at the end 50% of the first push is there, on 50% of pairs."
AGAINST = " responses move against theirs because they share tokens and weights with the others"


@pytest.mark.parametrize(
    "push, ratio, moved, expected",
    [
        (
            (0.1, -0.3),
            3.0,
            (-16.6, -28.5),
            "Both log-ratios fall (chosen -16.60, rejected -28.50 nats): the rejected side gets 3"
            f" times the push, and chosen{AGAINST}",
        ),
        (
            (0.1, -0.1),
            1.0,
            (1.2, -16.2),
            "The chosen log-ratio rises and the rejected one falls (chosen +1.20, rejected -16.20"
            " nats): both sides get the same push",
        ),
        (
            (0.4, 0.1),
            0.25,
            (2.0, 1.0),
            "Both log-ratios rise (chosen +2.00, rejected +1.00 nats): the chosen side gets 4 times"
            " the push, and both are pushed up",
        ),
        (
            (0.4, -0.1),
            0.0,
            (2.0, -1.0),
            "The chosen log-ratio rises and the rejected one falls (chosen +2.00, rejected -1.00"
            " nats): in most steps the chosen side alone is pushed",
        ),
        (
            (0.1, -0.1),
            1.0,
            (0.01, -0.01),
            "Both log-ratios hardly move (chosen +0.01, rejected -0.01 nats): both sides get the"
            " same push",
        ),
    ],
)
def test_a_sentence_says_what_moved_and_what_the_loss_did(tmp_path, push, ratio, moved, expected):
    run = make_run(tmp_path / "run", push=push, ratio=ratio, moved=moved)
    assert why(run) == expected + END


def test_without_a_reference_displacement_is_since_the_first_evaluation(tmp_path):
    run = make_run(tmp_path / "run", push=(0.1, -0.1), ratio=1.0, moved=(3.0, -2.0), metric="logps")
    name, series = displacement(run)
    assert name == "log-prob" and series["rejected"] == ([0, 80], [0.0, -2.0])
    one_side = make_run(tmp_path / "one", push=(1.0,), ratio=None, moved=(3.0,), metric="logps")
    assert why(one_side).startswith(
        "The log-prob of chosen responses rises (+3.00 nats): the loss pushes chosen responses up"
        " and no others"
    )


def test_the_report_has_the_sentence_the_table_and_the_figure(tmp_path):
    run = make_run(tmp_path / "a", push=(0.1, -0.3), ratio=3.0, moved=(-16.6, -28.5))
    text = write_report(run.folder)
    page = (run.folder / "report.html").read_text()
    assert why(run) in text and "the rejected side gets 3 times the push" in page
    assert (run.folder / "why.png").stat().st_size > 10_000
    rows = {row[0]: row[1:] for row in why_table(run).rows}
    assert rows["rejected log-ratio"] == ["0.000", "-28.500"]
    assert rows["share of the examples that carry it"] == ["1.000", "0.500"]
    table = why_of_groups(group_runs([run], ["loss.name"]))
    cells = dict(zip(table.head, table.rows[0], strict=True))
    assert cells["chosen displacement (nats)"] == "-16.600"
    assert cells["push on the chosen response"] == "0.050"


def test_a_run_of_before_has_no_why(tmp_path):
    run = make_run(tmp_path / "a", push=(), ratio=None, moved=(1.0, -1.0), shares=(1.0, 1.0))
    assert why(run) is None and why_table(run) is None
    assert why_of_groups(group_runs([run], ["loss.name"])) is None
    assert why_figure(run) is None
