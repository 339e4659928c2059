"""Every reader on small files of its schema, every pairing by hand, and errors that name the
place."""

import contextlib
import json
import math
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_configuration import compose

from preflab.checks import check_config
from preflab.readers.registry import DATASETS, open_dataset
from trainers import TRAINERS
from utils import ConfigError, DataError


@pytest.fixture(autouse=True)
def hub_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hub-cache")


def read(name, data_dir, split="train", **options):
    source = open_dataset(str(name), split, data_dir=data_dir, **options)
    records = list(source.records())
    return records, source


def named_pairs(record):
    """Pairs as texts, which is what matters."""
    return [(record.responses[a], record.responses[b]) for a, b in record.pairs]


def rows(prompt, **texts):
    return [{"prompt": prompt, "text": text, "reward": reward} for text, reward in texts.items()]


# ------------------------------------------------------------------------------------- scored lines


@pytest.mark.parametrize(
    "name, file",
    [
        ("imdb", "imdb-sft-train.jsonl"),
        ("toxicity", "toxicity-sft-train-reward.jsonl"),
        ("reviews", "reviews-train.jsonl"),
    ],
)
def test_scored_lines_merge_prompts_that_come_back(tmp_path, name, file):
    write_jsonl(tmp_path / file, rows("p", a=1.0, b=3.0) + rows("q", c=2.0) + rows("p", d=2.0))
    records, source = read(name, tmp_path)
    assert [r.prompt for r in records] == ["p", "q"]
    n = 2 if name != "reviews" else 3  # first_two drops the others
    assert records[0].responses == ["a", "b", "d"][:n]
    assert records[0].scores == [1.0, 3.0, 2.0][:n]
    assert records[0].sft_target == 1 and records[1].pairs == []
    assert records[0].source == f"{tmp_path / file}:1" and records[1].source.endswith(":3")
    expected = [("b", "a")] if name != "reviews" else [("b", "a"), ("d", "a"), ("b", "d")]
    assert named_pairs(records[0]) == expected
    counts = source.counts
    assert (counts["rows"], counts["prompts"], counts["responses"]) == (4, 2, n + 1)
    assert counts["pairs"] == len(expected) and counts["skipped"]["prompts without a pair"] == 1
    assert source.truncation == "keep_start" and source.provides == {"pairs", "scores"}


@pytest.mark.parametrize(
    "pairing, min_gap, expected",
    [
        ("first_two", 0.0, []),  # equal scores
        ("all", 0.0, [("c", "a"), ("a", "d"), ("c", "b"), ("b", "d"), ("c", "d")]),
        ("all", 2.0, [("c", "d")]),
        ("best_worst", 0.0, [("c", "d")]),
        ("best_worst", 3.0, []),
    ],
)
def test_pairing_by_hand(tmp_path, pairing, min_gap, expected):
    write_jsonl(tmp_path / "imdb-sft-train.jsonl", rows("p", a=1.0, b=1.0, c=2.5, d=0.0))
    (record,), _ = read("imdb", tmp_path, pairing=pairing, min_gap=min_gap)
    assert named_pairs(record) == expected
    assert record.sft_target == (0 if pairing == "first_two" else 2)  # the best of those in use


def test_random_pairing_depends_on_seed_and_prompt_alone(tmp_path):
    data = [row for i in range(30) for row in rows(f"p{i}", a=1.0, b=2.0, c=3.0)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / f"imdb-sft-{split}.jsonl", data)

    def pairs(split, seed):
        records, _ = read("imdb", tmp_path, split, pairing="random", seed=seed)
        return [named_pairs(record) for record in records]

    first = pairs("train", seed=0)
    assert all(len(of_prompt) == 1 for of_prompt in first) and len({str(p) for p in first}) == 3
    assert pairs("train", seed=1) != first
    assert pairs("test", seed=1) == pairs("test", seed=0)  # seeds are compared on one test set
    write_jsonl(tmp_path / "imdb-sft-train.jsonl", data[::-1])
    assert pairs("train", seed=0)[::-1] == first


def test_the_seed_of_a_run_reaches_random_pairing_and_nothing_else(tmp_path):
    data = [row for i in range(30) for row in rows(f"p{i}", a=1.0, b=2.0, c=3.0)]
    path = write_jsonl(tmp_path / "scored.jsonl", data)

    def opened(seed, pairing):
        config = compose(f"datasets=[{path}]", f"seed={seed}", f"pairing={pairing}")
        _, sources = check_config(config, TRAINERS)
        sources = {split: source for split, (source,) in sources.items()}
        records = {split: list(source.records()) for split, source in sources.items()}
        return {split: source.fingerprint() for split, source in sources.items()}, records

    (keys, first), (other_keys, other) = opened(0, "random"), opened(1, "random")
    assert {r.prompt for r in other["test"]} == {r.prompt for r in first["test"]}
    assert other["test"] == first["test"] and other_keys["test"] == keys["test"]
    assert other["train"] != first["train"] and other_keys["train"] != keys["train"]
    assert opened(0, "all") == opened(1, "all")


def test_an_empty_sample_is_a_sample(tmp_path):
    """A policy that ends at once was scored for it; the published files hold such rows."""
    empty = {"prompt": "p", "text": "", "reward": 2.0}
    write_jsonl(tmp_path / "imdb-sft-train.jsonl", [*rows("p", a=1.0), empty])
    records, source = read("imdb", tmp_path)
    assert named_pairs(records[0]) == [("", "a")] and source.counts["empty_responses"] == 1


# ----------------------------------------------------------------------------------------- hub sets


def hub(tmp_path, repo, data, split="train"):
    return write_jsonl(tmp_path / repo / f"{split}.jsonl", data)


def dialogue(question, answer):
    return f"\n\nHuman: {question}\n\nAssistant:{answer}"


def test_hh(tmp_path):
    long = dialogue("hi", " hello") + dialogue("and?", "")
    hub(
        tmp_path,
        "Anthropic/hh-rlhf",
        [
            {"chosen": long + " good", "rejected": long + " bad"},
            {"chosen": dialogue("x", " yes"), "rejected": dialogue("y", " no")},
            {"chosen": long + " good", "rejected": long + " worse"},
            {"chosen": dialogue("z", " same"), "rejected": dialogue("z", " same")},
        ],
    )
    hub(tmp_path, "Anthropic/hh-rlhf", [{"chosen": long + " t", "rejected": long + " u"}], "test")
    records, source = read("hh", tmp_path)
    assert len(records) == 1 and records[0].prompt == long
    assert records[0].responses == [" good", " bad", " worse"]
    assert named_pairs(records[0]) == [(" good", " bad"), (" good", " worse")]
    assert records[0].scores is None and records[0].responses[records[0].sft_target] == " good"
    assert source.truncation == "keep_end" and source.provides == {"pairs"}
    assert source.counts["skipped"] == {
        "rejected does not start with the prompt of chosen": 1,
        "chosen and rejected identical": 1,
    }
    assert read("hh", tmp_path, "test")[0][0].responses == [" t", " u"]


def test_shp(tmp_path):
    def row(history, a, b, score_a, score_b, label):
        return {
            "history": history,
            "human_ref_A": a,
            "human_ref_B": b,
            "score_A": score_a,
            "score_B": score_b,
            "labels": label,
        }

    hub(
        tmp_path,
        "stanfordnlp/SHP",
        [
            row("q", "one", "two", 10, 5, 1),
            row("q", "one", "three", 10, 40, 0),
            row("q", "one", "four", 10, 9, 1),
            row("r", "x", "y", 3, 1, 1),
        ],
    )
    hub(tmp_path, "stanfordnlp/SHP", [row("t", "x", "y", 3, 1, 1)], "test")
    records, source = read("shp", tmp_path)
    assert records[0].prompt == "\n\nHuman: q\n\nAssistant:"
    assert named_pairs(records[0]) == [(" one", " two"), (" three", " one")]
    assert records[0].scores == [10, 5, 40]
    assert records[0].responses[records[0].sft_target] == " three"
    assert source.counts["skipped"] == {"the larger score is not twice the smaller": 1}
    same_text = [row("q", "same", "low", 10, 1, 1), row("q", "high", "same", 90, 2, 1)]
    hub(tmp_path, "stanfordnlp/SHP", same_text)
    (record,) = read("shp", tmp_path)[0]
    # A text with two scores is two responses.
    assert all(record.scores[a] > record.scores[b] for a, b in record.pairs)
    hub(
        tmp_path,
        "stanfordnlp/SHP",
        [row("q", "x", "y", 3, 1, 0), row("q", "x", "z", 1, 9, 1), row("q", "v", "w", 1, 2, 0)],
    )
    (record,), source = read("shp", tmp_path)
    assert named_pairs(record) == [(" w", " v")]
    assert source.counts["skipped"] == {"the label contradicts the scores": 2}


def test_se(tmp_path):
    def row(i):
        answers = [
            {"text": "<p>plain &amp; <b>bold</b></p>", "pm_score": 2},
            {"text": "<p>see <code>x &lt; 1</code></p>", "pm_score": 5},
            {"text": "tie", "pm_score": 2},
        ]
        return {"question": f"<p>question {i}</p>", "answers": answers}

    hub(tmp_path, "HuggingFaceH4/stack-exchange-preferences", [row(i) for i in range(200)])
    train, _ = read("se", tmp_path)
    test, _ = read("se", tmp_path, "test")
    assert (len(train), len(test)) == (198, 2)
    assert not {r.prompt for r in train} & {r.prompt for r in test}
    record = train[0]
    assert record.prompt.startswith("\n\nHuman: question ")
    assert record.prompt.endswith("\n\nAssistant:")
    assert record.responses == [" plain & bold", " see <code>x < 1</code>", " tie"]
    plain, code, tie = record.responses
    assert named_pairs(record) == [(code, plain), (code, tie)]
    assert record.sft_target == 1


def test_a_hub_set_out_of_reach_says_where_a_copy_goes(tmp_path, monkeypatch):
    def unreachable(name):
        raise ConnectionError(f"no network for {name}")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(
        DataError, match=r"Anthropic/hh-rlhf cannot be loaded \(no network.*put a copy.*hh-rlhf"
    ):
        open_dataset("hh", "train", data_dir=str(tmp_path))


# --------------------------------------------------------------------------------------------- tldr


def test_tldr_ratings(tmp_path):
    posts = {
        "post one": {"responses": [" a", " b", " c<|endoftext|>", " d"], "rewards": [5, 7, 6, 5]},
        "two": {"responses": [" x", " y"], "rewards": [3, 3]},
    }
    (tmp_path / "tldr-sft-train-rel.json").write_text(json.dumps(posts))
    records, source = read("tldr", tmp_path)
    assert records[0].prompt == "post one\n\nTL;DR:" and records[0].responses == [" a", " b", " d"]
    assert named_pairs(records[0]) == [(" b", " a"), (" b", " d")]
    assert records[0].scores == [5, 7, 5]
    assert records[1].pairs == []
    assert source.counts["skipped"]["responses that contain <|endoftext|>"] == 1


def test_tldr_pairs_and_neither(tmp_path):
    with pytest.raises(
        DataError, match=r"tldr-sft-train-rel\.json.*tldr/train\.json.*preproc_pref\.py"
    ):
        open_dataset("tldr", "train", data_dir=str(tmp_path))
    (tmp_path / "tldr").mkdir()
    (tmp_path / "tldr" / "train.json").write_text(
        json.dumps([{"prompt": "p", "chosen": " a", "rejected": " b"}])
    )
    records, source = read("tldr", tmp_path)
    assert records[0].prompt == "p" and named_pairs(records[0]) == [(" a", " b")]
    assert source.provides == {"pairs"}
    (tmp_path / "tldr-sft-train-rel.json").write_text(
        json.dumps({"post": {"responses": [" a", " b"], "rewards": [1, 2]}})
    )
    assert open_dataset("tldr", "train", data_dir=str(tmp_path)).provides == {"pairs", "scores"}


def test_tldr_filtered_has_targets_only_and_each_row_is_one(tmp_path):
    with pytest.raises(DataError, match=r"preproc_filter\.py"):
        open_dataset("tldr_filtered", "train", data_dir=str(tmp_path))
    (tmp_path / "tldr_filtered").mkdir()
    (tmp_path / "tldr_filtered" / "train.json").write_text(
        json.dumps([{"prompt": "p", "chosen": " a"}, {"prompt": "p", "chosen": " b"}])
    )
    records, source = read("tldr_filtered", tmp_path)
    assert [r.responses for r in records] == [[" a"], [" b"]] and source.provides == frozenset()


# -------------------------------------------------------------------------------- a user's own file

PAIRS = [{"prompt": f"p{i}", "chosen": f" good {i}", "rejected": f" bad {i}"} for i in range(40)]


def as_file(path, data):
    import csv

    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".json":
        path.write_text(json.dumps(data))
    elif path.suffix == ".jsonl":
        write_jsonl(path, data)
    elif path.suffix == ".csv":
        with open(path, "w", newline="") as f:
            writer = csv.DictWriter(f, list(data[0]))
            writer.writeheader()
            writer.writerows(data)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(data), path)
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_pairs_in_any_type_of_file_and_a_split_without_leaks(tmp_path, suffix):
    path = as_file(tmp_path / f"my pairs{suffix}", PAIRS + PAIRS[:5])
    train, source = read(path, tmp_path, test_fraction=0.25)
    test, _ = read(path, tmp_path, "test", test_fraction=0.25)
    assert {r.prompt for r in train} | {r.prompt for r in test} == {f"p{i}" for i in range(40)}
    assert not {r.prompt for r in train} & {r.prompt for r in test} and 2 <= len(test) <= 20
    assert read(path, tmp_path, "test", test_fraction=0.25, seed=1)[0] == test
    note = f"{len(test)} of 40 prompts are held out, the same for every seed"
    assert note in source.counts["note"] and source.truncation == "keep_end"
    merged = next(r for r in train + test if r.prompt == "p0")
    assert len(merged.responses) == 2 and len(merged.pairs) == 2


def test_small_files_still_have_a_test_prompt(tmp_path):
    path = as_file(tmp_path / "pairs.json", PAIRS[:2])
    assert len(read(path, tmp_path)[0]) == len(read(path, tmp_path, "test")[0]) == 1
    with pytest.raises(DataError, match="one prompt only"):
        read(as_file(tmp_path / "one.json", PAIRS[:1]), tmp_path)


def test_a_folder_with_train_and_test(tmp_path):
    as_file(tmp_path / "train.jsonl", PAIRS[:3])
    as_file(tmp_path / "test.csv", PAIRS[3:5])
    assert (len(read(tmp_path, tmp_path)[0]), len(read(tmp_path, tmp_path, "test")[0])) == (3, 2)
    (tmp_path / "test.csv").rename(tmp_path / "validation.csv")
    assert (len(read(tmp_path, tmp_path)[0]), len(read(tmp_path, tmp_path, "test")[0])) == (3, 2)
    (tmp_path / "validation.csv").unlink()
    sizes = {len(read(tmp_path, tmp_path, split)[0]) for split in ("train", "test")}
    assert sizes == {1, 2}  # both from train
    as_file(tmp_path / "train.csv", PAIRS[:3])
    with pytest.raises(DataError, match=r"train\.jsonl and train\.csv, expected one of them"):
        read(tmp_path, tmp_path)
    (tmp_path / "train.csv").unlink()
    (tmp_path / "train.jsonl").rename(tmp_path / "all.jsonl")
    as_files(tmp_path / "constrain", {"trainer": PAIRS})
    with pytest.raises(DataError, match=r"no file named train .*there is: all\.jsonl, constrain/"):
        read(tmp_path, tmp_path, "test")


def both(path, tmp_path, **options):
    """All records of a file, of whichever split."""
    return [r for split in ("train", "test") for r in read(path, tmp_path, split, **options)[0]]


def test_j_over_k_with_a_magnitude(tmp_path):
    data = [
        {"question": f"q{i}", "response_j": " j", "response_k": " k", "magnitude": i / 2}
        for i in range(6)
    ]
    records = both(as_file(tmp_path / "r.csv", data), tmp_path)
    assert {r.prompt: r.columns["magnitude"] for r in records} == {
        f"q{i}": [i / 2] for i in range(6)
    }
    assert named_pairs(records[0]) == [(" j", " k")]


def test_scored_rows_and_lists(tmp_path):
    flat = as_file(
        tmp_path / "flat.csv", [row for i in range(6) for row in rows(f"p{i}", a=1.0, b=2.0, c=3.0)]
    )
    lists = as_file(
        tmp_path / "lists.jsonl",
        [{"prompt": f"p{i}", "responses": ["a", "b", "c"], "scores": [1, 2, 3]} for i in range(6)],
    )
    for path in (flat, lists):
        records = both(path, tmp_path)
        assert len(records) == 6 and records[0].scores == [1, 2, 3]
        assert named_pairs(records[0]) == [("b", "a"), ("c", "a"), ("c", "b")]


def test_columns_under_other_names(tmp_path):
    path = as_file(
        tmp_path / "x.jsonl",
        [{"instruction": f"p{i}", "better": " a", "worse": " b"} for i in range(4)],
    )
    sets = "accepted sets: prompt, chosen, rejected; question, response_j"
    with pytest.raises(
        DataError, match=f"columns instruction, better, worse; {sets}.*dataset_columns"
    ):
        both(path, tmp_path)
    records = both(
        path, tmp_path, columns={"prompt": "instruction", "chosen": "better", "rejected": "worse"}
    )
    assert {r.prompt for r in records} == {f"p{i}" for i in range(4)}
    path = as_file(
        tmp_path / "both.jsonl",
        [{"text": f"p{i}", "prompt": "unused", "chosen": " a", "rejected": " b"} for i in range(4)],
    )
    assert {r.prompt for r in both(path, tmp_path, columns={"prompt": "text"})} == {
        f"p{i}" for i in range(4)
    }


def test_chat_messages(tmp_path):
    data = [
        {"chosen": chat(f"hi {i}", "good"), "rejected": chat(f"hi {i}", "bad")} for i in range(3)
    ]
    data += [
        {
            "prompt": chat("explicit"),
            "chosen": chat("explicit", "x"),
            "rejected": chat("explicit", "y"),
        }
    ]
    data += [
        {"chosen": chat("one", "a"), "rejected": chat("another", "b")},
        {"chosen": chat("one", "a"), "rejected": chat("b")},
    ]
    path = as_file(tmp_path / "chat.jsonl", data)
    records = both(path, tmp_path)
    assert [chat("explicit")] == [r.prompt for r in records if r.responses == ["x", "y"]]
    assert sum(r.responses == ["good", "bad"] for r in records) == 3 and len(records) == 4
    assert "chosen and rejected have different prompts" in read(path, tmp_path)[1].counts["skipped"]


# --------------------------------------------------------------- folders of datasets and of the hub


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


# Rows of prompt i, for every set of columns that has responses to compare.
SETS = {
    "pairs": lambda i: [
        {"prompt": f"p{i}", "chosen": " a", "rejected": " b"},
        {"prompt": f"p{i}", "chosen": " c", "rejected": " b"},
    ],
    "chat pairs": lambda i: [{"chosen": chat(f"p{i}", "a"), "rejected": chat(f"p{i}", "b")}],
    "j over k": lambda i: [
        {"question": f"p{i}", "response_j": " j", "response_k": " k", "magnitude": i / 2}
    ],
    "scored rows": lambda i: [
        {"prompt": f"p{i}", "text": text, "reward": reward}
        for text, reward in ((" a", 0.5), (" b", -1.0), ("", 2.0))
    ],
    "scored lists": lambda i: [
        {"prompt": f"p{i}", "responses": [" a", " b", " c"], "scores": [1.5, float(i), -2.0]}
    ],
    "labelled": lambda i: [
        {"prompt": f"p{i}", "completion": text, "label": text == " a"} for text in (" a", " b")
    ],
}


def without_source(records):
    return [replace(record, source="") for record in records]


def as_files(folder, parts):
    for split, rows in parts.items():
        write_jsonl(folder / f"{split}.jsonl", rows)


def as_saved(folder, parts):
    """What `save_to_disk` writes: of a Dataset where there is one part, else of a DatasetDict."""
    import datasets

    parts = {split: datasets.Dataset.from_list(rows) for split, rows in parts.items()}
    (datasets.DatasetDict(parts) if len(parts) > 1 else parts["train"]).save_to_disk(folder)


def as_on_the_hub(folder, parts):
    for split, rows in parts.items():
        (folder / "data").mkdir(parents=True, exist_ok=True)
        as_file(folder / "data" / f"{split}-00000-of-00001.parquet", rows)


def as_configs(folder, parts):
    """Files whose names say nothing, and a README that says which split they are; one of no split
    is there as well."""
    folder.mkdir()
    for split, rows in [*parts.items(), ("more", [{"x": 1}])]:
        as_file(folder / f"{split[::-1]}.parquet", rows)
    files = "".join(f"  - split: {split}\n    path: {split[::-1]}.parquet\n" for split in parts)
    (folder / "README.md").write_text(
        f"---\nlicense: mit\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n\n#"
        " Pairs\n",
        encoding="utf-8",
    )


@pytest.mark.parametrize("form", SETS)
@pytest.mark.parametrize("layout", [as_saved, as_on_the_hub, as_configs])
def test_folders_of_datasets_and_of_the_hub_hold_what_plain_files_hold(tmp_path, layout, form):
    """With both splits, and with a test split held out of the only one; in a folder with an odd
    name."""
    rows = [row for i in range(30) for row in SETS[form](i)]
    for n_splits in (2, 1):
        parts = (
            {"train": rows[: len(rows) * 2 // 3], "test": rows[len(rows) * 2 // 3 :]}
            if n_splits == 2
            else {"train": rows}
        )
        plain, folder = tmp_path / f"plain {n_splits}", tmp_path / f"-our pärs, 数据 {n_splits}"
        as_files(plain, parts)
        layout(folder, parts)
        for split in ("train", "test"):
            expected, plain_source = read(plain, tmp_path, split, test_fraction=0.3)
            records, source = read(folder, tmp_path, split, test_fraction=0.3)
            assert without_source(records) == without_source(expected) and records
            assert source.counts == plain_source.counts
            assert source.provides == plain_source.provides
            assert ("note" in source.counts) == (n_splits == 1)
            assert records[0].source.startswith(f"{folder}[")
            assert source.fingerprint() != plain_source.fingerprint()
            if n_splits == 2:
                assert len(records) == {"train": 20, "test": 10}[split]


def test_a_dataset_is_read_as_rows_whatever_it_was_saved_as_and_its_splits_may_be_given(
    tmp_path, monkeypatch
):
    import datasets

    data = datasets.Dataset.from_list([row for i in range(4) for row in SETS["scored rows"](i)])
    data.with_format("numpy", columns=["reward"]).select(range(9)).save_to_disk(tmp_path / "numpy")
    assert sorted(r.prompt for r in both(tmp_path / "numpy", tmp_path)) == ["p0", "p1", "p2"]
    datasets.DatasetDict(test=data).save_to_disk(tmp_path / "test only")
    everything, _ = read(tmp_path / "test only", tmp_path, "test")  # for function=eval
    assert len(everything) == 4
    with pytest.raises(DataError, match="test only has no train split; it has: test"):
        read(tmp_path / "test only", tmp_path)
    assert len(both(tmp_path / "test only" / "test", tmp_path)) == 4
    datasets.DatasetDict(train=data, validation=data.select([0])).save_to_disk(
        tmp_path / "mirror" / "me" / "mine"
    )
    assert len(read("me/mine", tmp_path / "mirror")[0]) == 4
    assert len(read("me/mine", tmp_path / "mirror", "test")[0]) == 1
    datasets.DatasetDict(train=data, more=data).save_to_disk(tmp_path / "two")
    with pytest.raises(DataError, match="two has no test or validation split; it has: train, more"):
        read(tmp_path / "two", tmp_path, "test")
    monkeypatch.chdir(tmp_path)
    as_on_the_hub(tmp_path / "parquet", {"train": PAIRS})  # to datasets the name of a kind of file
    assert len(both("./parquet", tmp_path)) == len(both("parquet", tmp_path)) == 40


def test_the_fingerprint_of_a_folder_follows_its_files_and_not_what_git_or_a_download_keeps_there(
    tmp_path,
):
    as_on_the_hub(tmp_path / "x", {"train": PAIRS})
    before = open_dataset(str(tmp_path / "x"), "train").fingerprint()
    (tmp_path / "x" / ".git").mkdir()
    (tmp_path / "x" / ".git" / "index").write_text("x")
    assert open_dataset(str(tmp_path / "x"), "train").fingerprint() == before
    as_on_the_hub(tmp_path / "x", {"train": PAIRS[1:]})
    assert open_dataset(str(tmp_path / "x"), "train").fingerprint() != before


def test_folders_that_cannot_be_loaded(tmp_path):
    import pyarrow

    as_saved(tmp_path / "cut", {"train": PAIRS})
    (arrow,) = (tmp_path / "cut").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes()[:200])
    with pytest.raises(DataError, match=r"/cut cannot be loaded \(Expected to read"):
        read(tmp_path / "cut", tmp_path)
    arrow.unlink()
    with pytest.raises(DataError, match=r"/cut cannot be loaded \(.*No such file"):
        read(tmp_path / "cut", tmp_path)
    as_on_the_hub(tmp_path / "hub", {"train": PAIRS})
    (tmp_path / "hub" / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: data/*\n- config_name: other\n "
        " data_files: data/*\n---\n"
    )
    match = r"/hub cannot be loaded \(Config name is missing.*'one', 'other'.*give one file of it"
    with pytest.raises(DataError, match=match):
        read(tmp_path / "hub", tmp_path)
    (tmp_path / "hub" / "README.md").write_text("---\nconfigs: [:\n---\n")
    with pytest.raises(DataError, match=r"/hub cannot be loaded \(while parsing"):
        read(tmp_path / "hub", tmp_path)
    as_on_the_hub(tmp_path / "a[b]", {"train": PAIRS})
    with pytest.raises(
        DataError, match=r"a\[b\]: datasets reads .* as a pattern; rename the folder"
    ):
        read(tmp_path / "a[b]", tmp_path)
    as_on_the_hub(tmp_path / "columns", {"train": [{"x": 1}]})
    with pytest.raises(DataError, match=r"columns\[train\]:0: columns x; accepted sets"):
        read(tmp_path / "columns", tmp_path)
    as_saved(tmp_path / "bytes", {"train": PAIRS})
    (arrow,) = (tmp_path / "bytes").glob("*.arrow")
    arrow.write_bytes(arrow.read_bytes().replace(b"good 7", b"good \xff"))
    with pytest.raises(DataError, match=r"bytes\[train\]:7: cannot be read \(.*0xff"):
        read(tmp_path / "bytes", tmp_path)
    assert pyarrow.ipc.open_stream(arrow).read_all().num_rows == 40  # the file itself is valid


# ---------------------------------------------------------------------------------------------- CSV


def write_csv(path, header, rows, *, newline="\n"):
    import csv

    with open(path, "w", newline="", encoding="utf-8") as f:
        csv.writer(f, lineterminator=newline).writerows([header, *rows])
    return path


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("form", SETS)
def test_csv_holds_what_jsonl_holds_with_lists_and_messages_as_json(tmp_path, form, indent):
    rows = [row for i in range(6) for row in SETS[form](i)]
    cells = [
        [
            json.dumps(value, indent=indent) if isinstance(value, list) else value
            for value in row.values()
        ]
        for row in rows
    ]
    records = both(write_csv(tmp_path / "x.csv", list(rows[0]), cells), tmp_path)
    expected = both(as_file(tmp_path / "x.jsonl", rows), tmp_path)
    assert without_source(records) == without_source(expected)
    folder = tmp_path / "folder"
    folder.mkdir()
    write_csv(folder / "train.csv", list(rows[0]), cells)
    sources = {r.source.replace("x.csv", "folder/train.csv") for r in records}
    assert {r.source for r in both(folder, tmp_path)} == sources


def test_csv_messages_as_prompt_and_under_other_names(tmp_path):
    prompts = [chat(f'hi {i}, "you"\n') for i in range(3)]
    no_list = json.dumps(chat("x", "no"))[1:]
    rows = [[json.dumps(prompt), "yes", no_list] for prompt in prompts]
    path = write_csv(tmp_path / "x.csv", ["question", "better", "worse"], rows)
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    records = both(path, tmp_path, columns=columns)
    assert sorted((r.prompt for r in records), key=str) == prompts
    assert records[0].responses == ["yes", no_list]
    texts = ["[x] y", "{1}", "[]", '["a"]', "[ ] {"]  # none of them begins as messages do
    rows = [[f"p{i}", text, f"not {text}"] for i, text in enumerate(texts)]
    path = write_csv(tmp_path / "x.csv", ["prompt", "chosen", "rejected"], rows)
    records = both(path, tmp_path)
    assert sorted(r.responses[0] for r in records) == sorted(texts)


@pytest.mark.parametrize(
    "content, message",
    [
        (
            "prompt,chosen,rejected,chosen\np,a,b,c\n",
            r"x.csv: the header names the column 'chosen' 2 times",
        ),
        (
            ",,prompt,chosen,chosen\n,,p,a,b\n",
            r"x.csv: the header names the column 'chosen' 2 times",
        ),
        (
            "prompt,chosen,rejected\n",
            r"x.csv holds a header and no row; the header: prompt, chosen, rejected",
        ),
        ("\ufeff\r\nprompt,chosen,rejected\r\n\r\n", r"x.csv holds a header and no row"),
        ("\n\n", r"x.csv holds no row"),
        ("prompt,chosen,rejected\n\np,a,b\nq,x\n", r"x.csv:4: 2 fields, the header has 3"),
        (
            'prompt,chosen,rejected\np,"a\nb",c\nq,"x\ny",z,\n',
            r"x.csv:4: 4 fields, the header has 3",
        ),
        (
            "prompt,chosen,rejected\np,a,b\nq,[{oops,b\n",
            r"x.csv:3, 'chosen': not JSON: .*begins as chat messages in JSON",
        ),
        (
            "prompt,chosen,rejected\n\"[{'role': 'user', 'content': 'p'}]\",a,b\n",
            r"x.csv:2, 'prompt': not JSON: .*chat messages in JSON, as json.dumps writes",
        ),
        (
            'prompt,chosen,rejected\n"[{""role"": ""user""}]",a,b\n',
            r"x.csv:2, a message of 'prompt': no 'content'",
        ),
        (
            'prompt,responses,scores\np,"[""a"", ""b""]","[1, 2"\n',
            r"x.csv:2, 'scores': not JSON: .*begins as a list in JSON",
        ),
        (
            'prompt,responses,scores\np,"[""a"", ""b""]","[1, NaN]"\n',
            r"x.csv:2, 'scores': NaN is not a JSON number",
        ),
        (
            'prompt,responses,scores\np,"[""a"", ""b""]","[1]"\n',
            r"x.csv:2: 2 responses and 1 scores",
        ),
        (
            'prompt,responses,scores\np,a;b,"[1, 2]"\n',
            r"x.csv:2: 'responses' is str 'a;b', expected a list",
        ),
        ("prompt,text,reward\np,a,1\np,b,x\n", r"x.csv:3: 'reward' is str 'x', expected a number"),
        ("prompt,text,reward\np,a,nan\n", r"x.csv:2: 'reward' is nan, expected a finite number"),
    ],
)
def test_errors_in_a_csv_file_name_its_line(tmp_path, content, message):
    (tmp_path / "x.csv").write_text(content, encoding="utf-8", newline="")
    with pytest.raises(DataError, match=message):
        read(tmp_path / "x.csv", tmp_path)


def test_columns_without_a_name_are_no_column_twice(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected,,\np,a,b,,\nq,c,d,x,y\n")
    assert len(both(tmp_path / "x.csv", tmp_path)) == 2


# ---------------------------------------------------------------------------------------- bad input

GOOD = '{"prompt": "p", "text": "t", "reward": 1.0}'


@pytest.mark.parametrize(
    "line, message",
    [
        ("no json", r"imdb-sft-train.jsonl:2: not JSON"),
        ("[1, 2]", r":2: list .*expected an object"),
        ('{"prompt": "p", "text": "t"}', r":2: no 'reward'; it has prompt, text"),
        ('{"prompt": 3, "text": "t", "reward": 1}', r":2: 'prompt' is int '3', expected text"),
        ('{"prompt": " ", "text": "t", "reward": 1}', r":2: 'prompt' is empty"),
        ('{"prompt": "p", "text": ["t"], "reward": 1}', r":2: 'text' is list"),
        (
            '{"prompt": "p", "text": "t", "reward": "1"}',
            r":2: 'reward' is str '1', expected a number",
        ),
        ('{"prompt": "p", "text": "t", "reward": true}', r":2: 'reward' is bool"),
        ('{"prompt": "p", "text": "t", "reward": NaN}', r":2: NaN is not a JSON number"),
        (
            '{"prompt": "p", "text": "t", "reward": 1e999}',
            r":2: 'reward' is inf, expected a finite number",
        ),
        (b'{"prompt": "p\xff", "text": "t", "reward": 1}', r":2: byte 0xff is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    content = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "imdb-sft-train.jsonl").write_bytes(
        GOOD.encode() + b"\n" + content + b"\n" + GOOD.encode() + b"\n"
    )
    with pytest.raises(DataError, match=message):
        read("imdb", tmp_path)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match=r"imdb-sft-train\.jsonl: no such file; in .*: nothing"):
        read("imdb", tmp_path)
    (tmp_path / "imdb-sft-train.jsonl").write_text("")
    with pytest.raises(DataError, match="the file is empty"):
        read("imdb", tmp_path)
    (tmp_path / "imdb-sft-train.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="holds no row"):
        read("imdb", tmp_path)
    (tmp_path / "a.json").write_text('{"prompt": 1}')
    with pytest.raises(DataError, match="expected a list of objects"):
        read(tmp_path / "a.json", tmp_path)
    (tmp_path / "a.json").write_text('[{"prompt": "p",\n"chosen": }]')
    with pytest.raises(DataError, match=r"a\.json:2: not JSON"):
        read(tmp_path / "a.json", tmp_path)
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match=r"a\.parquet: no readable parquet"):
        read(tmp_path / "a.parquet", tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [PAIRS[0], PAIRS[0] | {"magnitude": "1", "rejected": " c"}])
    with pytest.raises(DataError, match=r"a\.jsonl:2: 'magnitude' is str '1', expected a number"):
        read(tmp_path / "a.jsonl", tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [PAIRS[0] | {"chosen": "\ud800"}])
    with pytest.raises(DataError, match=r"a\.jsonl:1: 'chosen' holds half a surrogate pair"):
        read(tmp_path / "a.jsonl", tmp_path)
    for missing in ({"chosen": ""}, {"rejected": "  "}):
        write_jsonl(tmp_path / "a.jsonl", [*PAIRS[:2], PAIRS[3] | missing])
        with pytest.raises(DataError, match=f"a.jsonl:3: '{next(iter(missing))}' is empty"):
            read(tmp_path / "a.jsonl", tmp_path)


def test_byte_order_mark_crlf_and_blank_lines_are_fine(tmp_path):
    content = "\ufeff" + "\r\n".join(
        [GOOD, "", GOOD.replace('"t"', '"ü 😀"').replace("1.0", "2.0"), ""]
    )
    (tmp_path / "imdb-sft-train.jsonl").write_bytes(content.encode())
    records, _ = read("imdb", tmp_path)
    assert named_pairs(records[0]) == [("ü 😀", "t")]


def test_names_and_options_are_checked_at_once(tmp_path):
    with pytest.raises(ConfigError, match="did you mean imdb"):
        open_dataset("imbd", "train")
    with pytest.raises(ConfigError, match="accepted: train, test"):
        open_dataset("imdb", "validation")
    with pytest.raises(ConfigError, match="did you mean best_worst"):
        open_dataset("imdb", "train", pairing="best_wurst")


@pytest.mark.parametrize(
    "name",
    ["/nowhere/pairs", "./pairs", "../pairs", "data/my/pairs", "pairs.jsonl", "me/pairs.parquet"],
)
def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.setattr("datasets.load_dataset", lambda name: pytest.fail("asked the hub"))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    nearest = {"/nowhere/pairs": "/: ", "../pairs": f"{tmp_path}: data/"}
    nearest = nearest.get(name, f"{tmp_path / 'data'}: nothing")
    message = re.escape(f"{Path(name)}: no such file or folder; in {nearest}")
    with pytest.raises(DataError, match=message):
        open_dataset(name, "train", data_dir=str(tmp_path))


def test_a_home_folder_is_not_expanded(monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda name: pytest.fail("asked the hub"))
    for name in ("~/pairs", "~/pairs.jsonl", "~somebody"):
        with pytest.raises(DataError, match=f"{name}: no such file or folder; ~ is not expanded"):
            open_dataset(name, "train")


@pytest.mark.parametrize(
    "name",
    [
        "x" * 300,
        "x" * 300 + ".jsonl",
        "x" * 300 + ".parquet",
        "x/" + "y" * 300,
        "y" * 5000 + "/x",
        "x\0y.jsonl",
        "\ud800/x",
    ],
)
def test_names_that_no_file_can_have_are_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    for data_dir in (tmp_path, "d" * 300):
        with pytest.raises(
            (DataError, ConfigError), match=r"File name too long|cannot be loaded|no such file"
        ):
            open_dataset(name, "train", data_dir=str(data_dir))
    with pytest.raises(DataError, match=r"d{300}/imdb-sft-train\.jsonl: File name too long"):
        open_dataset("imdb", "train", data_dir="d" * 300)


def test_a_name_that_yaml_takes_for_a_number_is_refused():
    with pytest.raises(
        ConfigError, match=r"datasets=\[2024\] is int '2024', expected a name.*\./2024"
    ):
        open_dataset(2024, "train")


@contextlib.contextmanager
def without_privileges():
    """As somebody who is not root, to whom alone permissions mean nothing."""
    root = os.geteuid() == 0
    if root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if root:
            os.seteuid(0)


def test_files_that_may_not_be_read_are_named(tmp_path):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for suffix in (".json", ".jsonl", ".csv", ".parquet"):
            as_file(folder / f"x{suffix}", PAIRS).chmod(0)
        posts = folder / "tldr-sft-train-rel.json"
        posts.write_text("{}")
        posts.chmod(0)
        (folder / "closed").mkdir(mode=0)
        folder.chmod(0o755)
        with without_privileges():
            for suffix in (".json", ".jsonl", ".csv", ".parquet"):
                with pytest.raises(DataError, match=rf"/x\{suffix}: .*[Pp]ermission denied"):
                    open_dataset(str(folder / f"x{suffix}"), "train")
            for name in ("closed", "closed/x.jsonl"):
                with pytest.raises(DataError, match=f"/{name}.*: Permission denied"):
                    open_dataset(str(folder / name), "train")
            with pytest.raises(DataError, match=r"rel\.json: Permission denied"):
                open_dataset("tldr", "train", data_dir=str(folder))


def test_what_is_not_a_file_or_is_deleted_is_named(tmp_path):
    (tmp_path / "imdb-sft-train.jsonl").mkdir()
    with pytest.raises(DataError, match=r"imdb-sft-train\.jsonl: a folder, expected a file"):
        read("imdb", tmp_path)
    os.mkfifo(tmp_path / "x.jsonl")  # as a shell makes of <(command)
    with pytest.raises(DataError, match=r"x\.jsonl: a pipe or a device, expected a file"):
        read(tmp_path / "x.jsonl", tmp_path)
    source = open_dataset(str(as_file(tmp_path / "y.jsonl", PAIRS)), "train")
    (tmp_path / "y.jsonl").unlink()
    with pytest.raises(DataError, match=r"y\.jsonl: No such file"):
        list(source.records())


def test_fingerprint_follows_content_and_options(tmp_path):
    path = write_jsonl(tmp_path / "imdb-sft-train.jsonl", rows("p", a=1.0, b=2.0))

    def fingerprint(**options):
        return open_dataset("imdb", "train", data_dir=tmp_path, **options).fingerprint()

    before = fingerprint()
    assert fingerprint() == fingerprint(seed=1) == before
    changed = [{"pairing": "all"}, {"min_gap": 0.5}, {"pairing": "random"}]
    changed.append({"pairing": "random", "seed": 1})
    assert len({before, *(fingerprint(**options) for options in changed)}) == 5
    path.write_text(path.read_text().replace("2.0", "2.5"))
    assert fingerprint() != before


def test_the_registry_holds_the_documented_names():
    assert set(DATASETS) == {
        "hh",
        "shp",
        "se",
        "imdb",
        "toxicity",
        "tldr",
        "tldr_filtered",
        "reviews",
    }


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "text", "reward", "chosen", "rejected", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(JSON.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=40), max_size=5),
    st.sampled_from([".jsonl", ".json", ".csv"]),
)
def test_whatever_the_bytes_there_are_records_or_an_error_with_a_place(tmp_path, lines, suffix):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(b"\n".join(lines))
    try:
        for record in both(path, tmp_path):
            assert record.prompt and record.responses
            assert all(
                record.scores is None or math.isfinite(record.scores[i])
                for pair in record.pairs
                for i in pair
            )
    except DataError as error:
        assert "fuzz" in str(error)
