"""The atlas: its gradients, coefficients and predictions against real steps and naive computations,
and function=atlas as a command."""

import copy
import csv
import json
import math
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, make_model, make_tokenizer, read_rows, write_jsonl
from omegaconf import OmegaConf

from preflab.atlas import geometry
from preflab.atlas.checks import SKETCH, check_atlas, sketch_of
from preflab.atlas.entries import Entry, entries_of
from preflab.atlas.gradients import Gradients, trained_parameters
from preflab.atlas.measure import has_own_gradient, measure, pairs_of
from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Layout
from preflab.batching.token_store import prepare
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.modeling.parallelism import Placement
from preflab.objective.registry import LOSSES, bind_loss
from preflab.readers.registry import open_dataset
from preflab.reports.atlas import atlas_table, map_figure, steps_figure, write_atlas_report
from preflab.reports.runs import Run
from preflab.training.compute_loss import compute_loss
from utils import ConfigError, DataError

LAYOUT = Layout("padded", 257)


def bind(name: str, **settings):
    config = OmegaConf.load(ROOT / "config" / "loss" / f"{name}.yaml")
    return bind_loss(OmegaConf.to_container(config) | settings)


def entry(name: str, label: str | None = None, **settings) -> Entry:
    return Entry(label or name, bind(name, **settings), settings)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """Policy and reference in float64, and six pairs with scores, of which two share a response."""
    folder = tmp_path_factory.mktemp("atlas")
    texts = [
        (" yes!", " no"),
        (" yes!", " well, no"),
        (" a", " bcd"),
        (" good day", " bad"),
        (" x", " yz"),
    ]
    rows = [
        {
            "prompt": f"prompt {max(i, 1)}",
            "chosen": chosen,
            "rejected": rejected,
            "score_chosen": 2.0 + i / 4,
            "score_rejected": 1.0 - i / 8,
        }
        for i, (chosen, rejected) in enumerate(texts)
    ]
    rows[1]["score_chosen"] = rows[0]["score_chosen"]
    for split in ("train", "test"):
        write_jsonl(folder / "data" / f"{split}.jsonl", rows)
    source = open_dataset(str(folder / "data"), "train")
    store = prepare(
        source, make_tokenizer(), max_length=64, max_prompt_length=16, cache_dir=folder / "cache"
    )
    data = PreferenceData([store], "pairs", "data")
    policy, reference = (Scorer(make_model("llama", seed=s, dtype=torch.float64)) for s in (0, 1))
    return SimpleNamespace(
        data=data, pairs=pairs_of(data, np.arange(len(data))), policy=policy, reference=reference
    )


def measured_with(setting, entries, sketch=None, policy=None, seed=0):
    policy = policy or setting.policy
    gradients = Gradients(trained_parameters(policy.model), sketch, seed)
    return measure(policy, setting.reference, setting.pairs, entries, LAYOUT, gradients)


COMPARED = [
    "dpo",
    "ipo",
    "simpo",
    "cal-dpo",
    "odpo",
    "orpo",
    "beta-dpo",
    "kto",
    "tdpo1",
    "tdpo2",
    "ld-dpo",
]


@pytest.fixture(scope="module")
def atlas(setting):
    return measured_with(setting, [entry(name) for name in COMPARED])


def logps_of(setting, policy) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat(
            [
                score_responses(policy, collate(setting.pairs.singles, np.array([r]), LAYOUT)).logps
                for r in setting.pairs.responses
            ]
        )


def after_a_step(setting, loss, lr: float) -> torch.Tensor:
    """How the log-probs change in a step of plain SGD on the mean loss, divided by lr: by the code
    of training, on all pairs in one batch."""
    policy = Scorer(copy.deepcopy(setting.policy.model))
    batch = collate(setting.data, setting.pairs.examples, LAYOUT)
    output, _ = compute_loss(loss, policy, setting.reference, batch, setting.data, "train")
    output.losses.mean().backward()
    before = logps_of(setting, policy)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter -= lr * parameter.grad
    return (logps_of(setting, policy) - before) / lr


def r_squared(real: torch.Tensor, predicted: torch.Tensor) -> float:
    return float(1 - (real - predicted).square().sum() / (real - real.mean()).square().sum())


@pytest.mark.parametrize("name", COMPARED)
def test_predicted_changes_are_those_of_a_real_step(setting, atlas, name):
    """The control: those of another loss are not."""
    i, n = COMPARED.index(name), atlas.n_responses
    predicted = geometry.changes(atlas.gram, atlas.coefficients)[:, :n]
    lr = 1e-4 / float(geometry.norms(atlas.gram, atlas.coefficients)[i])  # a step of length 1e-4
    real = after_a_step(setting, bind(name), lr)
    assert r_squared(real, predicted[i]) > 0.9999
    other = COMPARED.index("orpo" if name != "orpo" else "ipo")
    assert r_squared(real, predicted[other]) < 0.99


def test_cosines_are_those_of_the_gradients_of_training(setting, atlas):
    def gradient(name):
        policy = Scorer(copy.deepcopy(setting.policy.model))
        batch = collate(setting.data, setting.pairs.examples, LAYOUT)
        args = bind(name), policy, setting.reference, batch, setting.data, "train"
        compute_loss(*args)[0].losses.mean().backward()
        return torch.cat([parameter.grad.flatten() for parameter in policy.model.parameters()])

    naive = {name: gradient(name) for name in ("dpo", "simpo", "tdpo1", "ld-dpo")}
    cosine = geometry.cosines(atlas.gram, atlas.coefficients)
    for name, of_loss in naive.items():
        i = COMPARED.index(name)
        expected = of_loss @ naive["dpo"] / of_loss.norm() / naive["dpo"].norm()
        assert float(cosine[i, 0]) == pytest.approx(float(expected), abs=1e-6)
        length = geometry.norms(atlas.gram, atlas.coefficients)[i]
        assert float(length) == pytest.approx(float(of_loss.norm()), rel=1e-6)
    assert abs(float(cosine[COMPARED.index("simpo"), 0])) < 0.999


def test_a_response_of_two_pairs_has_one_gradient(setting, atlas):
    assert len(setting.data) == 5 and atlas.n_responses == 9
    n_own = sum(has_own_gradient(bind(name)) for name in COMPARED)
    assert n_own == 3 and atlas.gram.shape == (9 + n_own, 9 + n_own)


def test_single_precision_gives_the_same_inner_products(setting, atlas):
    single = Scorer(copy.deepcopy(setting.policy.model).float())
    gram = measured_with(setting, [entry("dpo")], policy=single).gram
    torch.testing.assert_close(gram, atlas.gram[:9, :9], rtol=1e-4, atol=1e-4)


def test_the_same_loss_by_another_name_and_times_a_constant(setting, tmp_path):
    module = tmp_path / "mine.py"
    module.write_text(
        "from losses import Pair, LossOutput, register_loss\n"
        "import torch.nn.functional as F\n"
        "def scaled(name, factor):\n"
        "    @register_loss(name, reads={'reference'})\n"
        "    def loss(pair: Pair, *, beta: float = 0.1) -> LossOutput:\n"
        "        gap = pair.chosen_logratio - pair.rejected_logratio\n"
        "        return LossOutput(-factor * F.logsigmoid(beta * gap))\n"
        "scaled('tenfold', 10.0)\n"
    )
    listed = [{"name": "dpo", "as": "again"}, {"name": "tenfold", "module": str(module)}]
    config = SimpleNamespace(
        atlas=SimpleNamespace(losses=listed), loss={"name": "dpo", "beta": 0.1}
    )
    try:
        entries, left_out = entries_of(config, bind("dpo"))
        assert [e.label for e in entries] == ["dpo", "again", "tenfold"] and not left_out
        measured = measured_with(setting, entries)
    finally:
        LOSSES.pop("tenfold", None)
    cosine = geometry.cosines(measured.gram, measured.coefficients)
    assert cosine.flatten().tolist() == pytest.approx([1.0] * 9, abs=1e-12)
    length = geometry.norms(measured.gram, measured.coefficients)
    assert float(length[2] / length[0]) == pytest.approx(10)
    assert geometry.clusters(cosine, 0.999) == [[0, 1, 2]]


# ----------------------------------------------------------------------------------------- sketches


def test_the_error_of_a_sketch_is_what_it_says_and_falls_with_its_size(setting, atlas):
    entries, errors = [entry("dpo"), entry("simpo"), entry("tdpo2")], {}
    exact = measured_with(setting, entries)
    norms = exact.gram.diagonal()[:9].sqrt()
    for k in (256, 4096):
        measured = measured_with(setting, entries, sketch=k)
        off = (measured.gram - exact.gram)[:9, :9] / norms[:, None] / norms
        naive = torch.cat([off.diagonal(), off[1:, 0]])
        assert measured.error.n == 17
        assert measured.error.rms == pytest.approx(float(naive.square().mean().sqrt()), rel=1e-4)
        assert measured.error.largest == pytest.approx(float(naive.abs().max()), rel=1e-4)
        errors[k] = float(off.square().mean().sqrt())
        assert errors[k] < 2.5 / math.sqrt(k)
        cosine, expected = (
            geometry.cosines(m.gram, m.coefficients)[:, 0] for m in (measured, exact)
        )
        assert (cosine - expected).abs().max() < 5 / math.sqrt(k)
    assert errors[4096] < errors[256] / 2
    assert exact.error is None


def test_a_sketch_follows_its_seed(setting):
    grams = [measured_with(setting, [entry("dpo")], sketch=64, seed=s).gram for s in (0, 0, 1)]
    assert torch.equal(grams[0], grams[1]) and not torch.allclose(grams[0], grams[2])


def test_large_gradients_are_sketched_unless_asked_otherwise():
    def chosen(sketch, n_weights):
        weights = SimpleNamespace(numel=lambda: n_weights, element_size=lambda: 4)
        return sketch_of(SimpleNamespace(atlas=SimpleNamespace(pairs=32, sketch=sketch)), [weights])

    assert [chosen("auto", n) for n in (10**6, 10**9)] == [None, SKETCH]
    assert chosen(0, 10**9) is None and chosen(100, 10) == 100


# ----------------------------------------------------------------------------------------- geometry


def test_plane_clusters_and_share_by_hand():
    """Four unit updates in a plane: two almost alike, one at a right angle, one opposite."""
    angles = torch.tensor([0.0, 0.1, math.pi / 2, math.pi], dtype=torch.float64)
    updates = torch.stack([angles.cos(), angles.sin()], dim=1)
    gram, one_each = updates @ updates.t(), torch.eye(4, dtype=torch.float64)
    cosine = geometry.cosines(gram, 3 * one_each)
    torch.testing.assert_close(cosine, updates @ updates.t())
    places, shown = geometry.plane(cosine)
    assert shown == pytest.approx(1) and places[0].tolist() == [0, 0]
    torch.testing.assert_close(torch.cdist(places, places), torch.cdist(updates, updates))
    assert geometry.clusters(cosine, 0.9) == [[0, 1], [2], [3]]
    assert geometry.clusters(cosine, math.cos(0.09)) == [[0], [1], [2], [3]]
    assert geometry.clusters(cosine, -1.0) == [[0, 1, 2, 3]]
    weights = torch.tensor([[1.0, 1, 1, 1], [2, 0, 2, 0], [0, 0, 0, 0]])
    assert geometry.carrying_share(weights).tolist() == [1.0, 0.5, 0.0]
    # along the second update the first number falls by the cosine
    assert float(geometry.changes_per_unit(gram, one_each)[1, 0]) == pytest.approx(-math.cos(0.1))


# ----------------------------------------------------------------------------------------- refusals


def config_of(losses=None):
    atlas = SimpleNamespace(losses=losses, pairs=4, sketch="auto")
    return SimpleNamespace(atlas=atlas, loss={"name": "dpo", "beta": 0.1}, trainer="T")


@pytest.mark.parametrize(
    "losses, message",
    [
        (["dppo"], "atlas.losses: 'dppo' is no loss; did you mean dpo"),
        (["ipo", "ipo"], "ipo is there twice"),
        (["dpo"], "dpo is there twice (loss=dpo always is)"),
        ([{"name": "ipo", "gamma": 1}], "atlas.losses, ipo: loss=ipo has no setting gamma"),
    ],
)
def test_losses_that_cannot_be_compared_are_refused(losses, message):
    with pytest.raises(ConfigError) as error:
        check_atlas(config_of(losses), bind("dpo"), Placement(), 1)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "name, placement, ranks, message",
    [
        ("sft", Placement(), 1, "loss=sft, which is one of targets"),
        ("bradley_terry", Placement(), 1, "loss=bradley_terry, which is one of a scalar head"),
        ("dpo", Placement(one_process_per_device=True), 1, "take trainer=BasicTrainer"),
        ("dpo", Placement(), 2, "runs in one process"),
    ],
)
def test_what_an_atlas_cannot_run_with_is_refused(name, placement, ranks, message):
    with pytest.raises(ConfigError, match=message):
        check_atlas(config_of(), bind(name), placement, ranks)


def test_losses_that_the_data_do_not_serve_are_left_out_and_named(setting):
    entries, left_out = entries_of(config_of(), bind("dpo"))
    assert {e.label for e in entries} | left_out.keys() == set(LOSSES)
    assert entries[0].label == "dpo" and "scalar head" in left_out["bradley_terry"]
    some = [
        e for e in entries if e.label in ("dpo", "sft", "lipo", "kto_unpaired", "xpo", "tis-dpo")
    ]
    more = [entry("mappo", scale=0.01), entry("kto", point="mismatched")]
    measured = measured_with(setting, [*some, *more])
    assert [e.label for e in measured.entries] == ["dpo", "kto_unpaired", "lipo", "sft"]
    assert measured.left_out["xpo"] == "reads the column from_reference, which the data do not have"
    assert "weights of tokens" in measured.left_out["tis-dpo"]
    assert any("put to other prompts" in reason for reason in measured.left_out.values())
    assert "set loss.scale" in measured.left_out["mappo"]
    with pytest.raises(DataError, match="loss=xpo: reads the column"):
        measured_with(setting, [e for e in entries if e.label == "xpo"])


# ---------------------------------------------------------------------------------------- a command


def test_an_atlas_along_a_run(run, tmp_path):
    options = "sample_during_eval=false", "keep_checkpoints=null", "eval_every=8"
    trained = run("trained", "n_examples=24", *options)
    more = ["function=atlas", "atlas.pairs=4", "atlas.losses=[ipo,tdpo2,sft,kto_unpaired]"]
    command = partial(run, "atlas", *more, f"model.archive='{trained}/step-*'")
    folder = command()
    rows = read_rows(folder / "atlas.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3] and rows[0]["baseline"] == "dpo"
    at_end = {loss["loss"]: loss for loss in rows[-1]["updates"]}
    assert list(at_end) == ["dpo", "ipo", "tdpo2", "sft", "kto_unpaired"]
    assert at_end["dpo"]["cosine"] == pytest.approx(1) and abs(at_end["ipo"]["cosine"]) < 1
    assert at_end["tdpo2"]["own_gradient"] and not at_end["ipo"]["own_gradient"]
    assert at_end["ipo"]["settings"] == {"beta": 0.1, "average_log_prob": False}
    with open(folder / "atlas.csv") as f:
        assert len(list(csv.DictReader(f))) == 15
    page = (folder / "report.html").read_text()
    assert "Along the run" in page and "dpo: chosen up, rejected down" in page
    assert all(
        (folder / f"{name}.png").stat().st_size > 10_000 for name in ("atlas", "atlas_steps")
    )
    assert map_figure(rows[0]) and steps_figure(rows) and steps_figure(rows[:1]) is None
    assert atlas_table(rows[-1]).rows[0][0] == "dpo"
    # a run that was cut short continues after its last row
    (folder / "summary.json").unlink()
    lines = (folder / "atlas.jsonl").read_text().splitlines(keepends=True)
    marked = lines[0].replace('"baseline": "dpo"', '"baseline": "marked"')
    (folder / "atlas.jsonl").write_text(marked + lines[1])
    command()
    again = read_rows(folder / "atlas.jsonl")
    assert [row["baseline"] for row in again] == ["marked", "dpo", "dpo"] and again[2] == rows[2]
    [cluster, *_], [loss, *others] = rows[0]["clusters"], rows[0]["updates"]
    for damage in (
        {"clusters": [cluster | {"center": "no loss"}]},
        {"clusters": [cluster | {"losses": None}]},
        {"updates": [loss | {"x": "0"}, *others]},
        {"updates": [loss | {"x": 10**400}, *others]},
        {"weights": "many"},
    ):
        (folder / "atlas.jsonl").write_text(json.dumps(rows[0] | damage) + "\n")
        with pytest.raises(DataError, match=r"atlas\.jsonl: not what was written there"):
            write_atlas_report(Run(folder))


def test_an_adapter_alone_is_measured_where_a_run_trains_one(run):
    common = ["function=atlas", "atlas.losses=[ipo]", "model.lora.r=2"]
    [row] = read_rows(run("adapter", *common, "atlas.pairs=4") / "atlas.jsonl")
    whole = make_model("llama").num_parameters()
    assert 0 < row["weights"] < whole / 2
    # at policy = reference the two are one direction; the adapter of a checkpoint has moved
    options = "n_examples=8", "warmup_steps=0", "sample_during_eval=false", "do_first_eval=false"
    trained = run("trained", "model.lora.r=2", *options)
    archive = f"model.archive={trained}"
    [after] = read_rows(run("after", *common, "atlas.pairs=4", archive) / "atlas.jsonl")
    at_start, at_end = (abs(of["updates"][1]["cosine"] - 1) for of in (row, after))
    assert at_start < 1e-12 and at_end > 1e-6 and after["weights"] == row["weights"]
    # the merged weights without it, with an adapter that is new
    merged = f"model.archive={trained}/copy"
    shutil.copytree(trained / "LATEST" / "hf", trained / "copy")
    [fresh] = read_rows(run("fresh", *common, "atlas.pairs=4", merged) / "atlas.jsonl")
    assert abs(fresh["updates"][1]["cosine"] - 1) > 1e-6
    with pytest.raises(DataError, match=r"atlas.pairs=1000: datasets=\[imdb\] hold"):
        run("many", *common, "atlas.pairs=1000")
