"""Every reader on small files of its schema, every pairing by hand, every kind of bad input with its place."""

import json
import math

import pytest
from conftest import write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from preference_datasets import DATASETS, open_dataset
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


# ------------------------------------------------------------------------------------------------ scored lines


@pytest.mark.parametrize("name, file", [("imdb", "imdb-sft-train.jsonl"), ("toxicity", "toxicity-sft-train-reward.jsonl"), ("reviews", "reviews-train.jsonl")])
def test_scored_lines_merge_prompts_that_come_back(tmp_path, name, file):
    write_jsonl(tmp_path / file, rows("p", a=1.0, b=3.0) + rows("q", c=2.0) + rows("p", d=2.0))
    records, source = read(name, tmp_path)
    assert [r.prompt for r in records] == ["p", "q"]
    kept = 2 if name != "reviews" else 3  # first_two leaves the others out
    assert records[0].responses == ["a", "b", "d"][:kept] and records[0].scores == [1.0, 3.0, 2.0][:kept]
    assert records[0].sft_target == 1 and records[1].pairs == []
    assert records[0].source == f"{tmp_path / file}:1" and records[1].source.endswith(":3")
    expected = [("b", "a")] if name != "reviews" else [("b", "a"), ("d", "a"), ("b", "d")]
    assert named_pairs(records[0]) == expected
    assert source.counts["rows"] == 4 and source.counts["prompts"] == 2 and source.counts["responses"] == kept + 1
    assert source.counts["pairs"] == len(expected) and source.counts["skipped"]["prompts without a pair"] == 1
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
    records, source = read("imdb", tmp_path, pairing=pairing, min_gap=min_gap)
    assert named_pairs(records[0]) == expected
    assert records[0].sft_target == (0 if pairing == "first_two" else 2)  # the higher of those that are in use


def test_random_pairing_depends_on_seed_and_prompt_alone(tmp_path):
    data = [row for i in range(30) for row in rows(f"p{i}", a=1.0, b=2.0, c=3.0)]
    write_jsonl(tmp_path / "imdb-sft-train.jsonl", data)
    chosen = {s: [named_pairs(r) for r in read("imdb", tmp_path, pairing="random", seed=s)[0]] for s in (0, 1)}
    assert all(len(p) == 1 for p in chosen[0]) and len({str(p) for p in chosen[0]}) == 3
    assert chosen[0] != chosen[1]
    write_jsonl(tmp_path / "imdb-sft-train.jsonl", data[::-1])
    assert [named_pairs(r) for r in read("imdb", tmp_path, pairing="random")[0]][::-1] == chosen[0]


def test_an_empty_sample_is_a_sample(tmp_path):
    """A policy that ends at once was scored for it; the published files hold such rows."""
    write_jsonl(tmp_path / "imdb-sft-train.jsonl", rows("p", a=1.0) + [{"prompt": "p", "text": "", "reward": 2.0}])
    records, source = read("imdb", tmp_path)
    assert named_pairs(records[0]) == [("", "a")] and source.counts["empty_responses"] == 1


# ------------------------------------------------------------------------------------------------- hub sets


def hub(tmp_path, repo, data, split="train"):
    return write_jsonl(tmp_path / repo / f"{split}.jsonl", data)


def dialogue(question, answer):
    return f"\n\nHuman: {question}\n\nAssistant:{answer}"


def test_hh(tmp_path):
    long = dialogue("hi", " hello") + dialogue("and?", "")
    hub(tmp_path, "Anthropic/hh-rlhf", [
        {"chosen": long + " good", "rejected": long + " bad"},
        {"chosen": dialogue("x", " yes"), "rejected": dialogue("y", " no")},
        {"chosen": long + " good", "rejected": long + " worse"},
        {"chosen": dialogue("z", " same"), "rejected": dialogue("z", " same")},
    ])  # fmt: skip
    hub(tmp_path, "Anthropic/hh-rlhf", [{"chosen": long + " t", "rejected": long + " u"}], "test")
    records, source = read("hh", tmp_path)
    assert len(records) == 1 and records[0].prompt == long
    assert records[0].responses == [" good", " bad", " worse"] and named_pairs(records[0]) == [(" good", " bad"), (" good", " worse")]
    assert records[0].scores is None and records[0].responses[records[0].sft_target] == " good"
    assert source.truncation == "keep_end" and source.provides == {"pairs"}
    assert source.counts["skipped"] == {"rejected does not start with the prompt of chosen": 1, "chosen and rejected identical": 1}
    assert read("hh", tmp_path, "test")[0][0].responses == [" t", " u"]


def test_shp(tmp_path):
    def row(history, a, b, score_a, score_b, label):
        return {"history": history, "human_ref_A": a, "human_ref_B": b, "score_A": score_a, "score_B": score_b, "labels": label}

    hub(tmp_path, "stanfordnlp/SHP", [row("q", "one", "two", 10, 5, 1), row("q", "one", "three", 10, 40, 0), row("q", "one", "four", 10, 9, 1), row("r", "x", "y", 3, 1, 1)])  # fmt: skip
    hub(tmp_path, "stanfordnlp/SHP", [row("t", "x", "y", 3, 1, 1)], "test")
    records, source = read("shp", tmp_path)
    assert records[0].prompt == "\n\nHuman: q\n\nAssistant:"
    assert named_pairs(records[0]) == [(" one", " two"), (" three", " one")]
    assert records[0].scores == [10, 5, 40] and records[0].responses[records[0].sft_target] == " three"
    assert source.counts["skipped"] == {"the larger score is not twice the smaller": 1}
    same_text = [row("q", "same", "low", 10, 1, 1), row("q", "high", "same", 90, 2, 1)]
    hub(tmp_path, "stanfordnlp/SHP", same_text)
    (record,) = read("shp", tmp_path)[0]
    assert all(record.scores[a] > record.scores[b] for a, b in record.pairs)  # a text with two scores is two responses


def test_se(tmp_path):
    def row(i):
        answers = [{"text": "<p>plain &amp; <b>bold</b></p>", "pm_score": 2}, {"text": "<p>see <code>x &lt; 1</code></p>", "pm_score": 5}, {"text": "tie", "pm_score": 2}]
        return {"question": f"<p>question {i}</p>", "answers": answers}

    hub(tmp_path, "HuggingFaceH4/stack-exchange-preferences", [row(i) for i in range(200)])
    train, source = read("se", tmp_path)
    test, _ = read("se", tmp_path, "test")
    assert (len(train), len(test)) == (198, 2)
    assert not {r.prompt for r in train} & {r.prompt for r in test}
    record = train[0]
    assert record.prompt.startswith("\n\nHuman: question ") and record.prompt.endswith("\n\nAssistant:")
    assert record.responses == [" plain & bold", " see <code>x < 1</code>", " tie"]
    assert named_pairs(record) == [(record.responses[1], record.responses[0]), (record.responses[1], record.responses[2])]
    assert record.sft_target == 1


def test_a_hub_set_out_of_reach_says_where_a_copy_goes(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda name: (_ for _ in ()).throw(ConnectionError(f"no network for {name}")))
    with pytest.raises(DataError, match=r"Anthropic/hh-rlhf cannot be loaded \(no network.*put a copy.*hh-rlhf"):
        open_dataset("hh", "train", data_dir=str(tmp_path))


# ----------------------------------------------------------------------------------------------------- tldr


def test_tldr_ratings(tmp_path):
    posts = {"post one": {"responses": [" a", " b", " c<|endoftext|>", " d"], "rewards": [5, 7, 6, 5]}, "two": {"responses": [" x", " y"], "rewards": [3, 3]}}
    (tmp_path / "tldr-sft-train-rel.json").write_text(json.dumps(posts))
    records, source = read("tldr", tmp_path)
    assert records[0].prompt == "post one\n\nTL;DR:" and records[0].responses == [" a", " b", " d"]
    assert named_pairs(records[0]) == [(" b", " a"), (" b", " d")] and records[0].scores == [5, 7, 5]
    assert records[1].pairs == []
    assert source.counts["skipped"]["responses that contain <|endoftext|>"] == 1


def test_tldr_pairs_and_neither(tmp_path):
    with pytest.raises(DataError, match=r"tldr-sft-train-rel.json.*tldr/train.json.*preproc_pref.py"):
        open_dataset("tldr", "train", data_dir=str(tmp_path))
    (tmp_path / "tldr").mkdir()
    (tmp_path / "tldr" / "train.json").write_text(json.dumps([{"prompt": "p", "chosen": " a", "rejected": " b"}]))
    records, source = read("tldr", tmp_path)
    assert named_pairs(records[0]) == [(" a", " b")] and source.provides == {"pairs"} and records[0].prompt == "p"
    (tmp_path / "tldr-sft-train-rel.json").write_text(json.dumps({"post": {"responses": [" a", " b"], "rewards": [1, 2]}}))
    assert open_dataset("tldr", "train", data_dir=str(tmp_path)).provides == {"pairs", "scores"}


def test_tldr_filtered_has_targets_only_and_each_row_is_one(tmp_path):
    with pytest.raises(DataError, match="preproc_filter.py"):
        open_dataset("tldr_filtered", "train", data_dir=str(tmp_path))
    (tmp_path / "tldr_filtered").mkdir()
    (tmp_path / "tldr_filtered" / "train.json").write_text(json.dumps([{"prompt": "p", "chosen": " a"}, {"prompt": "p", "chosen": " b"}]))
    records, source = read("tldr_filtered", tmp_path)
    assert [r.responses for r in records] == [[" a"], [" b"]] and source.provides == frozenset()


# ------------------------------------------------------------------------------------------ a user's own file

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
    other, _ = read(path, tmp_path, "test", test_fraction=0.25, seed=1)
    assert {r.prompt for r in other} != {r.prompt for r in test}
    assert "held out by seed 0" in source.counts["note"] and source.truncation == "keep_end"
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
    (tmp_path / "test.csv").unlink()
    assert sorted(len(read(tmp_path, tmp_path, split)[0]) for split in ("train", "test")) == [1, 2]  # made from train
    (tmp_path / "train.jsonl").rename(tmp_path / "all.jsonl")
    with pytest.raises(DataError, match="no file named train .*there is: all.jsonl"):
        read(tmp_path, tmp_path, "test")


def both(path, tmp_path, **options):
    """All records of a file, of whichever split."""
    return [r for split in ("train", "test") for r in read(path, tmp_path, split, **options)[0]]


def test_j_over_k_with_a_magnitude(tmp_path):
    data = [{"question": f"q{i}", "response_j": " j", "response_k": " k", "magnitude": i / 2} for i in range(6)]
    records = both(as_file(tmp_path / "r.csv", data), tmp_path)
    assert {r.prompt: r.columns["magnitude"] for r in records} == {f"q{i}": [i / 2] for i in range(6)}
    assert named_pairs(records[0]) == [(" j", " k")]


def test_scored_rows_and_lists(tmp_path):
    flat = as_file(tmp_path / "flat.csv", [row for i in range(6) for row in rows(f"p{i}", a=1.0, b=2.0, c=3.0)])
    lists = as_file(tmp_path / "lists.jsonl", [{"prompt": f"p{i}", "responses": ["a", "b", "c"], "scores": [1, 2, 3]} for i in range(6)])
    for path in (flat, lists):
        records = both(path, tmp_path)
        assert len(records) == 6 and records[0].scores == [1, 2, 3]
        assert named_pairs(records[0]) == [("b", "a"), ("c", "a"), ("c", "b")]


def test_columns_under_other_names(tmp_path):
    path = as_file(tmp_path / "x.jsonl", [{"instruction": f"p{i}", "better": " a", "worse": " b"} for i in range(4)])
    with pytest.raises(DataError, match="columns instruction, better, worse; accepted sets: prompt, chosen, rejected;.*dataset_columns"):
        both(path, tmp_path)
    records = both(path, tmp_path, columns={"prompt": "instruction", "chosen": "better", "rejected": "worse"})
    assert {r.prompt for r in records} == {f"p{i}" for i in range(4)}
    path = as_file(tmp_path / "both.jsonl", [{"text": f"p{i}", "prompt": "unused", "chosen": " a", "rejected": " b"} for i in range(4)])
    assert {r.prompt for r in both(path, tmp_path, columns={"prompt": "text"})} == {f"p{i}" for i in range(4)}


def test_chat_messages(tmp_path):
    def chat(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(texts)]

    data = [{"chosen": chat(f"hi {i}", "good"), "rejected": chat(f"hi {i}", "bad")} for i in range(3)]
    data += [{"prompt": chat("explicit"), "chosen": chat("explicit", "x"), "rejected": chat("explicit", "y")}]
    data += [{"chosen": chat("one", "a"), "rejected": chat("another", "b")}, {"chosen": chat("one", "a"), "rejected": chat("b")}]
    path = as_file(tmp_path / "chat.jsonl", data)
    records = both(path, tmp_path)
    assert [chat("explicit")] == [r.prompt for r in records if r.responses == ["x", "y"]]
    assert sum(r.responses == ["good", "bad"] for r in records) == 3 and len(records) == 4
    assert "chosen and rejected have different prompts" in read(path, tmp_path)[1].counts["skipped"]


# ------------------------------------------------------------------------------------------------ bad input

GOOD = '{"prompt": "p", "text": "t", "reward": 1.0}'


@pytest.mark.parametrize(
    "line, told",
    [
        ("no json", r"imdb-sft-train.jsonl:2: not JSON"),
        ("[1, 2]", r":2: list .*expected an object"),
        ('{"prompt": "p", "text": "t"}', r":2: no 'reward'; it has prompt, text"),
        ('{"prompt": 3, "text": "t", "reward": 1}', r":2: 'prompt' is int '3', expected text"),
        ('{"prompt": " ", "text": "t", "reward": 1}', r":2: 'prompt' is empty"),
        ('{"prompt": "p", "text": ["t"], "reward": 1}', r":2: 'text' is list"),
        ('{"prompt": "p", "text": "t", "reward": "1"}', r":2: 'reward' is str '1', expected a number"),
        ('{"prompt": "p", "text": "t", "reward": true}', r":2: 'reward' is bool"),
        ('{"prompt": "p", "text": "t", "reward": NaN}', r":2: NaN is no number"),
        ('{"prompt": "p", "text": "t", "reward": 1e999}', r":2: 'reward' is inf, expected a finite number"),
        (b'{"prompt": "p\xff", "text": "t", "reward": 1}', r":2: byte 0xff is not UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, told):
    content = line if isinstance(line, bytes) else line.encode()
    (tmp_path / "imdb-sft-train.jsonl").write_bytes(GOOD.encode() + b"\n" + content + b"\n" + GOOD.encode() + b"\n")
    with pytest.raises(DataError, match=told):
        read("imdb", tmp_path)


def test_bad_files(tmp_path):
    with pytest.raises(DataError, match="imdb-sft-train.jsonl: no such file; in .*: nothing"):
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
    with pytest.raises(DataError, match="a.json:2: not JSON"):
        read(tmp_path / "a.json", tmp_path)
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected\na,b\n")
    with pytest.raises(DataError, match="a.csv: row 1 has another number of fields"):
        read(tmp_path / "a.csv", tmp_path)
    (tmp_path / "a.parquet").write_text("no parquet")
    with pytest.raises(DataError, match="a.parquet: no readable parquet"):
        read(tmp_path / "a.parquet", tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [PAIRS[0], PAIRS[0] | {"magnitude": "1", "rejected": " c"}])
    with pytest.raises(DataError, match="a.jsonl:2: 'magnitude' is str '1', expected a number"):
        read(tmp_path / "a.jsonl", tmp_path)
    write_jsonl(tmp_path / "a.jsonl", [PAIRS[0] | {"chosen": "\ud800"}])
    with pytest.raises(DataError, match="a.jsonl:1: 'chosen' holds half a surrogate pair"):
        read(tmp_path / "a.jsonl", tmp_path)
    for missing in ({"chosen": ""}, {"rejected": "  "}):
        write_jsonl(tmp_path / "a.jsonl", PAIRS[:2] + [PAIRS[3] | missing])
        with pytest.raises(DataError, match=f"a.jsonl:3: '{next(iter(missing))}' is empty"):
            read(tmp_path / "a.jsonl", tmp_path)


def test_byte_order_mark_crlf_and_blank_lines_are_fine(tmp_path):
    content = "\ufeff" + "\r\n".join([GOOD, "", GOOD.replace('"t"', '"ü 😀"').replace("1.0", "2.0"), ""])
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
    with pytest.raises(DataError, match="nowhere.jsonl: no such file"):
        open_dataset(str(tmp_path / "nowhere.jsonl"), "train")


def test_fingerprint_follows_content_and_options(tmp_path):
    path = write_jsonl(tmp_path / "imdb-sft-train.jsonl", rows("p", a=1.0, b=2.0))
    prints = [open_dataset("imdb", "train", data_dir=tmp_path, **o).fingerprint() for o in ({}, {}, {"pairing": "all"}, {"min_gap": 0.5}, {"seed": 1})]
    assert prints[0] == prints[1] and len(set(prints)) == 4
    path.write_text(path.read_text().replace("2.0", "2.5"))
    assert open_dataset("imdb", "train", data_dir=tmp_path).fingerprint() not in prints


def test_the_registry_holds_the_documented_names():
    assert set(DATASETS) == {"hh", "shp", "se", "imdb", "toxicity", "tldr", "tldr_filtered", "reviews"}


JSON = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["prompt", "text", "reward", "chosen", "rejected", "x"]), inner, max_size=4), max_leaves=8)  # fmt: skip


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(JSON.map(lambda v: json.dumps(v).encode()) | st.binary(max_size=40), max_size=5), st.sampled_from([".jsonl", ".json", ".csv"]))
def test_whatever_the_bytes_there_are_records_or_an_error_with_a_place(tmp_path, lines, suffix):
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(b"\n".join(lines))
    try:
        for record in both(path, tmp_path):
            assert record.prompt and record.responses
            assert all(record.scores is None or math.isfinite(record.scores[i]) for pair in record.pairs for i in pair)
    except DataError as error:
        assert "fuzz" in str(error)
