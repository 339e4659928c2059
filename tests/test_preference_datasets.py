"""Every named reader on small files of its schema, every pairing by hand, splits and the seed."""

import json
import re

import pytest
from conftest import ROOT, write_jsonl
from dataset_files import hub_cache, named_pairs, read, scored_rows  # noqa: F401  a fixture
from test_configuration import compose

from preflab.checks import check_config
from preflab.readers.registry import DATASETS, open_dataset
from utils import DataError

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
    write_jsonl(
        tmp_path / file,
        scored_rows("p", a=1.0, b=3.0) + scored_rows("q", c=2.0) + scored_rows("p", d=2.0),
    )
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
    write_jsonl(tmp_path / "imdb-sft-train.jsonl", scored_rows("p", a=1.0, b=1.0, c=2.5, d=0.0))
    (record,), _ = read("imdb", tmp_path, pairing=pairing, min_gap=min_gap)
    assert named_pairs(record) == expected
    assert record.sft_target == (0 if pairing == "first_two" else 2)  # the best of those in use


def test_random_pairing_depends_on_seed_and_prompt_alone(tmp_path):
    data = [row for i in range(30) for row in scored_rows(f"p{i}", a=1.0, b=2.0, c=3.0)]
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
    data = [row for i in range(30) for row in scored_rows(f"p{i}", a=1.0, b=2.0, c=3.0)]
    path = write_jsonl(tmp_path / "scored.jsonl", data)

    def opened(seed, pairing):
        config = compose(f"datasets=[{path}]", f"seed={seed}", f"pairing={pairing}")
        _, sources = check_config(config)
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
    write_jsonl(tmp_path / "imdb-sft-train.jsonl", [*scored_rows("p", a=1.0), empty])
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
    with pytest.raises(DataError, match=r"rel\.json .*tldr/train\.json .*both are there; move"):
        open_dataset("tldr", "train", data_dir=str(tmp_path))
    (tmp_path / "tldr" / "train.json").unlink()
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


# ------------------------------------------------------------------------------ cache key and names


def test_fingerprint_follows_content_and_options(tmp_path):
    path = write_jsonl(tmp_path / "imdb-sft-train.jsonl", scored_rows("p", a=1.0, b=2.0))

    def fingerprint(**options):
        return open_dataset("imdb", "train", data_dir=tmp_path, **options).fingerprint()

    before = fingerprint()
    assert fingerprint() == fingerprint(seed=1) == before
    changed = [{"pairing": "all"}, {"min_gap": 0.5}, {"pairing": "random"}]
    changed.append({"pairing": "random", "seed": 1})
    assert len({before, *(fingerprint(**options) for options in changed)}) == 5
    path.write_text(path.read_text().replace("2.0", "2.5"))
    assert fingerprint() != before


def test_the_documented_names_are_registered():
    table = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("## Public sets")[1]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    names = {name for line in lines for name in re.findall(r"`(\w+)`", line.split("|")[1])}
    assert names and names <= set(DATASETS)
