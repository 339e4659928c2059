"""Lists of scored responses: how they are read and chosen, laid out, trained on and evaluated."""

import json
import random

import numpy as np
import pytest
import torch
from conftest import (
    final_weights,
    make_model,
    make_tokenizer,
    read_rows,
    run_here,
    same_weights,
    small_run,
    tokenised,
    untimed,
    write_jsonl,
)

from preflab.batching import packed_models
from preflab.batching.collate import collate
from preflab.batching.examples import prompts_to_sample
from preflab.batching.packing import LAYOUTS, Layout
from preflab.modeling.logprobs import Scorer
from preflab.modeling.router_loss import token_weights
from preflab.objective.registry import LOSSES, bind_loss
from preflab.readers.records import Options, Record, choose_responses
from preflab.readers.registry import open_dataset
from preflab.training.compute_loss import compute_loss
from utils import ConfigError, DataError

LISTWISE = sorted(name for name, spec in LOSSES.items() if spec.examples == "lists")


def loss_of(name="plackett-luce", **settings):
    return bind_loss({"name": name, "beta": 0.1} | settings)


def lists_of(name, split="train", **options):
    source = open_dataset(str(name), split, lists=True, **options)
    return [(r.prompt, r.responses, r.scores) for r in source.records()], source.counts


# --------------------------------------------------------------------------------------- reading

# The same lists, in every form of data that has scores.
LISTS = {"one": [(" a", 1.0), (" b", 3.0), (" c", 1.0)], "two": [(" d", -2.0), (" e", 0.5)]}
UNUSABLE = {"three": [(" f", 1.0)], "four": [(" g", 2.0), (" h", 2.0)]}
ALL = LISTS | UNUSABLE


def as_rows(form: str) -> list[dict]:
    columns = {"imdb": ("prompt", "text", "reward"), "text": ("prompt", "text", "reward")}
    if form in columns:
        return [
            dict(zip(columns[form], (prompt, *entry), strict=True))
            for prompt, entries in ALL.items()
            for entry in entries
        ]
    if form == "lists":
        return [
            {"prompt": p, "responses": [t for t, _ in e], "scores": [s for _, s in e]}
            for p, e in ALL.items()
        ]
    return [
        {
            "instruction": p,
            "completions": [
                {"response": t, "overall_score": s, "fine-grained_score": -s} for t, s in entries
            ],
        }
        for p, entries in ALL.items()
    ]


@pytest.mark.parametrize("form", ["imdb", "text", "lists", "completions"])
def test_every_form_of_scored_data_is_read_as_lists(form, tmp_path):
    file = "imdb-sft-{}.jsonl" if form == "imdb" else "{}.jsonl"
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / file.format(split), as_rows(form))
    name = "imdb" if form == "imdb" else tmp_path / "data"
    lists, counts = lists_of(name, data_dir=str(tmp_path / "data"))
    expected = [(p, [t for t, _ in e], [s for _, s in e]) for p, e in LISTS.items()]
    assert lists == expected  # imdb: all of them, not the two of its published pairs
    assert counts["skipped"] == {
        "prompts with one response": 1,
        "prompts whose responses all have the same score": 1,
    }
    assert counts["responses"] == 5 and "pairs" not in counts


def test_rated_posts_are_read_as_lists(tmp_path):
    posts = {
        p: {"responses": [t for t, _ in e], "rewards": [s for _, s in e]} for p, e in ALL.items()
    }
    posts["one"]["responses"][0] += "<|endoftext|>"
    (tmp_path / "tldr-sft-train-rel.json").write_text(json.dumps(posts), encoding="utf-8")
    lists, counts = lists_of("tldr", data_dir=str(tmp_path))
    assert lists[0] == ("one\n\nTL;DR:", [" b", " c"], [3.0, 1.0]) and len(lists) == 2
    assert counts["skipped"]["responses that contain <|endoftext|>"] == 1


def test_pairs_with_scores_of_a_prompt_are_one_list(tmp_path):
    rows = [
        {"prompt": "p", "chosen": c, "rejected": r, "score_chosen": x, "score_rejected": y}
        for c, r, x, y in [(" a", " b", 3, 1), (" a", " c", 3, 2), (" d", " b", 0, 1)]
    ]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    [(_, responses, scores)], _ = lists_of(tmp_path / "data")
    assert (responses, scores) == ([" a", " b", " c", " d"], [3, 1, 2, 0])


def test_completions_make_pairs_too_and_another_score_can_be_chosen(tmp_path):
    path = write_jsonl(tmp_path / "data" / "train.jsonl", as_rows("completions"))
    write_jsonl(tmp_path / "data" / "test.jsonl", as_rows("completions"))
    pairs = [r.pairs for r in open_dataset(str(path.parent), "train").records()]
    assert pairs == [[(1, 0), (1, 2)], [(1, 0)], [], []]
    lists, _ = lists_of(path.parent, columns={"scores": "fine-grained_score"})
    assert lists[0][2] == [-1.0, -3.0, -1.0]
    with pytest.raises(DataError, match=r"train\.jsonl:1, completion 1: no 'score'"):
        lists_of(path.parent, columns={"scores": "score"})


def a_record(n=9, seed=0) -> Record:
    rng = random.Random(seed)
    scores = [float(rng.randrange(4)) for _ in range(n - 2)] + [-1.0, 9.0]
    return Record("p", [f" {i}" for i in range(n)], [], 0, scores, {}, "here")


@pytest.mark.parametrize("choice", ["best_worst", "stratified"])
@pytest.mark.parametrize("k", [2, 3, 5, 9, 20])
def test_responses_are_chosen_by_seed_and_not_by_their_order(choice, k):
    record, order = a_record(), random.Random(1).sample(range(9), 9)
    shuffled = Record(
        "p",
        [record.responses[i] for i in order],
        [],
        0,
        [record.scores[i] for i in order],
        {},
        "here",
    )
    draws = set()
    for seed in range(20):
        chosen = choose_responses(record, k, choice, seed)
        assert chosen == sorted(set(chosen)) and len(chosen) == min(k, 9)
        scores = [record.scores[i] for i in chosen]
        assert {min(scores), max(scores)} == {-1.0, 9.0}
        assert chosen == choose_responses(record, k, choice, seed)
        texts = {shuffled.responses[i] for i in choose_responses(shuffled, k, choice, seed)}
        assert texts == {record.responses[i] for i in chosen}
        draws.add(tuple(chosen))
    assert (len(draws) > 1) == (2 < k < 9)


def test_stratified_responses_are_spread_over_the_scores():
    record = Record("p", [f" {i}" for i in range(20)], [], 0, [*map(float, range(20))], {}, "here")
    for seed in range(20):
        _, *between, _ = choose_responses(record, 5, "stratified", seed)
        assert [i // 6 for i in between] == [0, 1, 2] or [(i - 1) // 6 for i in between] == [
            0,
            1,
            2,
        ]


def test_chosen_responses_follow_the_seed_in_training_only(tmp_path):
    rows = [{"prompt": "p", "text": f" {i}", "reward": i} for i in range(9)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    options = {"max_responses": 4}
    seeds = range(8)
    train = [lists_of(tmp_path / "data", **options, seed=seed) for seed in seeds]
    test = [lists_of(tmp_path / "data", "test", **options, seed=seed) for seed in seeds]
    assert len({tuple(lists[0][1]) for lists, _ in train}) > 1
    assert len({tuple(lists[0][1]) for lists, _ in test}) == 1
    assert train[0][1]["skipped"] == {"responses beyond max_responses of a prompt": 5}
    fingerprints = {
        open_dataset(str(tmp_path / "data"), "train", lists=True, **more).fingerprint()
        for more in ({}, {"seed": 1}, options, {**options, "seed": 1}, {"max_responses": 3})
    }
    assert len(fingerprints) == 4  # without a limit the seed chooses nothing
    assert Options().lists is False


# ------------------------------------------------------------------------------ examples, batches


@pytest.fixture
def data(tmp_path):
    rows = [{"prompt": p, "text": t, "reward": s} for p, e in ALL.items() for t, s in e]
    return tokenised(tmp_path, rows, lists=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_list_is_an_example_and_its_prompt_is_read_once(data, layout):
    assert len(data) == 2 and data.groups.tolist() == [0, 1]
    batch = collate(data, np.array([1, 0]), Layout(layout, 257))
    assert batch.lists.tolist() == [[0, 1, 0], [2, 3, 4]]
    assert batch.listed.tolist() == [[True, True, False], [True, True, True]]
    assert batch.scores[batch.lists[1]].tolist() == [1.0, 3.0, 1.0]
    prompts = 4 + 4  # BOS and three bytes
    copies = prompts if layout == "prefix_shared" else 2 * 4 + 3 * 4
    assert batch.n_tokens == copies + 5 * 2  # two bytes of each response; EOS is not an input
    weights = token_weights(batch, 1)  # of the first list: its prompt is part of two texts
    assert weights.sum() == 2 * 4 + 2 * 2


def test_layouts_agree_on_losses_and_measures(data):
    models = [make_model("llama", seed=s, dtype=torch.float64) for s in (0, 1)]
    for model in models:
        packed_models.enable(model)
    policy, reference = map(Scorer, models)
    outputs = []
    for layout in LAYOUTS:
        batch = collate(data, np.arange(2), Layout(layout, 257))
        output, metrics = compute_loss(loss_of(), policy, reference, batch, data, "eval")
        outputs.append((output.losses.detach(), metrics))
    names = set(outputs[0][1])
    assert {name for name in names if not name.startswith("push_")} == {
        "loss/eval",
        *(
            f"{c}_eval/{s}"
            for c in ("logps", "logratios", "rewards")
            for s in ("chosen", "rejected")
        ),
        "rewards_eval/accuracies",
        "rewards_eval/margins",
        "ranking_eval/kendall_tau",
        "ranking_eval/ndcg",
    }
    for losses, metrics in outputs[1:]:
        torch.testing.assert_close(losses, outputs[0][0], rtol=1e-6, atol=1e-6)
        for name in names:
            torch.testing.assert_close(metrics[name], outputs[0][1][name], rtol=1e-5, atol=1e-5)
    # A policy that is the reference orders nothing.
    batch = collate(data, np.arange(2), Layout("prefix_shared", 257))
    _, metrics = compute_loss(loss_of(), policy, policy, batch, data, "eval")
    assert metrics["rewards_eval/accuracies"].tolist() == [0.5, 0.5]
    assert metrics["ranking_eval/kendall_tau"].tolist() == [0, 0]


def test_the_best_response_is_the_one_that_samples_are_shown_beside(data):
    decode = make_tokenizer().decode
    shown = {decode(p.tokens[1:]): decode(p.chosen[:-1]) for p in prompts_to_sample(data, 5, 32)}
    assert shown == {"one": " b", "two": " e"}


def test_scores_of_all_pairs_are_inspected_before_a_run(data):
    seen = []

    class Spy:
        name, reads, columns, weight = "spy", {"scores"}, (), None

        def inspect_scores(self, chosen, rejected, names):
            seen.extend(zip(chosen.tolist(), rejected.tolist(), map(str, names), strict=True))

    data.check_for(Spy())
    assert [(a, b) for a, b, _ in seen] == [(3.0, 1.0), (3.0, 1.0), (0.5, -2.0)]
    assert "(example 1)" in seen[2][2]
    data.stores[0].scores = np.array([1.0, np.nan, 1.0, 2.0, 3.0])
    with pytest.raises(DataError, match=r"spy needs scores, but .*has responses without one"):
        data.check_for(Spy())


# ------------------------------------------------------------------------------------------- runs


@pytest.mark.parametrize("name", [*LISTWISE, "dpo loss.all_pairs=true"])
def test_every_loss_of_lists_trains_and_is_evaluated(run, name):
    loss, *more = name.split()
    folder = run(loss, f"loss={loss}", *more, "n_epochs=2", "sample_during_eval=false")
    first, *_, last = read_rows(folder / "metrics.jsonl")
    assert last["examples"] == 48 and last["loss/eval"] < first["loss/eval"]
    if "reference" in bind_loss({"name": loss} | more_settings(loss)).reads:
        assert first["rewards_eval/accuracies"] == 0.5
        assert first["ranking_eval/kendall_tau"] == 0
    assert last["ranking_eval/kendall_tau"] == pytest.approx(
        2 * last["rewards_eval/accuracies"] - 1, abs=1e-6
    )  # as there are no ties in these scores
    assert last["ranking_eval/ndcg"] > first["ranking_eval/ndcg"]
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval_accuracy"] == last["rewards_eval/accuracies"] > 0.5


def more_settings(loss: str) -> dict:
    return {"beta": 0.1} if "beta" in LOSSES[loss].settings else {}


def test_a_run_on_lists_continues_bit_for_bit_with_a_cached_or_a_running_reference(
    run, imdb_dir, llama_folder, tmp_path
):
    options = ("loss=plackett-luce", "sample_during_eval=false")
    whole = run("whole", *options, "n_epochs=2")
    run("half", *options, "n_epochs=1")
    half = run("half", *options, "n_epochs=2")
    assert same_weights(final_weights(whole), final_weights(half))
    computed = run("computed", *options, "n_epochs=2", "reference.cache=false")
    rows = [untimed(read_rows(f / "metrics.jsonl")) for f in (whole, half, computed)]
    train = [[row for row in part if row["split"] == "train"] for part in rows]
    assert train[0] == train[1]
    for a, b in zip(train[0], train[2], strict=True):
        assert a["loss/train"] == pytest.approx(b["loss/train"], rel=1e-5)


def test_a_reward_model_learns_from_all_pairs_of_a_prompt(run):
    folder = run("rm", "loss=bradley_terry", "loss.all_pairs=true", "n_epochs=3")
    last = read_rows(folder / "metrics.jsonl")[-1]
    assert last["rewards_eval/accuracies"] > 0.6 and last["ranking_eval/ndcg"] > 0.8


@pytest.mark.parametrize(
    "more, message",
    [
        (["max_responses=3"], "max_responses=3 is for losses of lists, and loss=dpo learns from"),
        (["loss=lipo", "pairing=all"], r"pairing=all makes pairs, .*set pairing=null"),
        (["loss=lipo", "min_gap=0.1"], r"min_gap=0.1 makes pairs, .*set min_gap=0"),
        (["loss=lipo", "max_responses=1"], "max_responses=1"),
        (["loss=lipo", "choose_responses=worst"], "best_worst"),
        (["loss=lipo", "loss.all_pairs=true"], "loss=lipo is one of lists"),
    ],
)
def test_keys_that_contradict_the_loss_are_refused(more, message, imdb_dir, llama_folder, tmp_path):
    with pytest.raises(ConfigError, match=message):
        run_here(*small_run(llama_folder, imdb_dir, tmp_path / "run", *more))


def test_pairs_without_scores_are_no_lists(llama_folder, tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(9)]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    command = small_run(llama_folder, tmp_path, tmp_path / "run", f"datasets=[{path}]", "loss=lipo")
    with pytest.raises(ConfigError, match=r"loss=lipo needs scores.*instruction, completions"):
        run_here(*command)
