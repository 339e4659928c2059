"""Rows of prompt, completion and label: their records, single responses as examples, and runs."""

import json

import numpy as np
import pytest
from conftest import make_tokenizer, read_rows, write_jsonl

from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData, prompts_to_sample
from preflab.batching.packing import LAYOUTS, Layout
from preflab.batching.token_store import prepare
from preflab.objective.registry import bind_loss
from preflab.readers.registry import open_dataset
from utils import ConfigError, DataError

ROWS = [
    {"prompt": "one", "completion": " good", "label": True},
    {"prompt": "two", "completion": " bad", "label": False},
    {"prompt": "one", "completion": " worse", "label": False},
    {"prompt": "three", "completion": " fine", "label": True},
]


def kto(**settings):
    return bind_loss({"name": "kto_unpaired", "beta": 0.1} | settings)


def records_of(path):
    source = open_dataset(str(path), "train", test_fraction=0.01)
    held_out = open_dataset(str(path), "test", test_fraction=0.01)
    records = [*source.records(), *held_out.records()]
    return sorted(records, key=lambda record: int(record.source.rsplit(":", 1)[1])), source


def prepared(source, tmp_path):
    return prepare(
        source, make_tokenizer(), max_length=64, max_prompt_length=32, cache_dir=tmp_path / "cache"
    )


def store_of(tmp_path, rows=ROWS):
    for split in ("train", "test"):
        write_jsonl(tmp_path / "labelled" / f"{split}.jsonl", rows)
    return prepared(open_dataset(str(tmp_path / "labelled"), "train"), tmp_path)


def test_labels_are_scores_and_responses_of_a_prompt_meet(tmp_path):
    records, source = records_of(write_jsonl(tmp_path / "labelled.jsonl", ROWS))
    assert [(r.prompt, r.responses, r.scores) for r in records] == [
        ("one", [" good", " worse"], [1.0, 0.0]),
        ("two", [" bad"], [0.0]),
        ("three", [" fine"], [1.0]),
    ]
    # A prompt with both labels makes a pair as well.
    assert records[0].pairs == [(0, 1)] and records[1].pairs == []
    assert source.provides == {"pairs", "scores"}


@pytest.mark.parametrize(
    "true, false", [("true", "false"), ("True", "False"), ("1", "0"), ("1.0", "0.0")]
)
def test_labels_of_a_csv_file_are_text(tmp_path, true, false):
    (tmp_path / "labelled.csv").write_text(
        f"prompt,completion,label\none, good,{true}\ntwo, bad,{false}\n", encoding="utf-8"
    )
    assert [r.scores for r in records_of(tmp_path / "labelled.csv")[0]] == [[1.0], [0.0]]


def test_a_completion_may_be_chat_messages(tmp_path):
    def row(question, answer, label):
        return {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
            "label": label,
        }

    rows = [row("hello", "hi", True), row("hello", "go away", False), row("and you?", "fine", 1)]
    records, _ = records_of(write_jsonl(tmp_path / "chat.jsonl", rows))
    assert [(r.responses, r.scores) for r in records] == [
        (["hi", "go away"], [1.0, 0.0]),
        (["fine"], [1.0]),
    ]


@pytest.mark.parametrize(
    "label, message",
    [
        ("good", "'label' is str 'good', expected true"),
        (0.5, "expected true"),
        (2, "expected true"),
        (None, "no 'label'"),
    ],
)
def test_other_labels_are_refused_with_their_place(tmp_path, label, message):
    row = {"prompt": "four", "completion": " x", "label": label}
    path = write_jsonl(tmp_path / "labelled.jsonl", [*ROWS, row])
    with pytest.raises(DataError, match=f":5.*{message}"):
        records_of(path)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_response_is_an_example(tmp_path, layout):
    data = PreferenceData([store_of(tmp_path)], "responses", "labelled")
    assert len(data) == 4 and data.groups.tolist() == [0, 0, 1, 2]
    batch = collate(data, np.array([1, 3, 0]), Layout(layout, 257))
    assert batch.rejected is None and batch.scores[batch.chosen].tolist() == [0.0, 1.0, 1.0]
    texts = (" worse", " fine", " good")
    for example, text in zip(batch.chosen.tolist(), texts, strict=True):
        assert make_tokenizer().decode(batch.targets[batch.owners == example][:-1]) == text


def test_a_prompt_is_sampled_once_and_compared_with_its_best_response(tmp_path):
    rows = [
        {"prompt": "p", "completion": f" {label}{i}", "label": label}
        for i, label in enumerate([False, True, False])
    ]
    store = store_of(tmp_path, [*rows, *ROWS])
    prompts = prompts_to_sample(PreferenceData([store], "responses", "labelled"), 10, 32)
    decode = make_tokenizer().decode
    best = {decode(p.tokens[1:]): decode(p.chosen[:-1]) for p in prompts}
    assert best == {"p": " True1", "one": " good", "two": " bad", "three": " fine"}


def test_responses_without_a_label_are_refused_by_name(tmp_path):
    rows = [{"prompt": p, "chosen": " a", "rejected": " b"} for p in ("one", "two")]
    path = write_jsonl(tmp_path / "mixed.jsonl", rows)
    store = prepared(open_dataset(str(path), "train"), tmp_path)
    data = PreferenceData([store], "responses", "mixed")
    with pytest.raises(DataError, match=r"kto_unpaired needs scores, but .*mixed\.jsonl"):
        data.check_for(kto())
    assert PreferenceData([store_of(tmp_path)], "responses", "labelled").check_for(kto()) is None


@pytest.fixture
def labelled(tmp_path):
    """One response for each prompt; those with ! are desirable."""
    rows = [
        {
            "prompt": f"prompt number {i}",
            "completion": f" answer {i}" + "!" * (i % 2),
            "label": i % 2 == 1,
        }
        for i in range(24)
    ]
    for split, part in (("train", rows), ("test", rows[:8])):
        write_jsonl(tmp_path / "labelled" / f"{split}.jsonl", part)
    return f"datasets=[{tmp_path / 'labelled'}]"


def test_kto_trains_on_responses_without_a_pair(run, labelled):
    folder = run("run", "loss=kto_unpaired", labelled, "lr=1e-4", "n_epochs=2")
    first, *_, last = read_rows(folder / "metrics.jsonl")
    assert first["loss/eval"] == first["rewards_eval/accuracies"] == 0.5
    assert first["kl_eval/estimate"] == 0
    assert last["examples"] == 48 and last["loss/eval"] < 0.5
    assert last["rewards_eval/accuracies"] > 0.5
    assert last["desirable_eval/share"] == 0.5
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert summary["eval_accuracy"] == last["rewards_eval/accuracies"]


def test_the_reference_may_run_in_every_step_or_be_looked_up(run, labelled):
    options = ("loss=kto_unpaired", labelled, "lr=1e-4", "sample_during_eval=false")
    cached, computed = (
        read_rows(run(cache, *options, f"reference.cache={cache}") / "metrics.jsonl")
        for cache in ("auto", "false")
    )
    for a, b in zip(cached, computed, strict=True):
        assert a[f"loss/{a['split']}"] == pytest.approx(b[f"loss/{b['split']}"], rel=1e-5)


def test_a_batch_of_labelled_responses_is_not_split(run, labelled):
    with pytest.raises(ConfigError, match="kto_unpaired couples"):
        run("run", "loss=kto_unpaired", labelled, "gradient_accumulation_steps=2")
    with pytest.raises(DataError, match="hold no pairs"):
        run("run", "loss=dpo", labelled)
