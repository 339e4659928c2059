"""A user's files and folders: every set of columns in every format, and errors with their place."""

import json
from dataclasses import replace

import pytest
from conftest import write_jsonl
from dataset_files import (  # noqa: F401  a fixture
    PAIRS,
    as_file,
    both,
    chat,
    hub_cache,
    named_pairs,
    read,
    scored_rows,
)

from preflab.readers.registry import open_dataset
from utils import DataError

# ------------------------------------------------------------------------------------ single files


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
        tmp_path / "flat.csv",
        [row for i in range(6) for row in scored_rows(f"p{i}", a=1.0, b=2.0, c=3.0)],
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
    assert [chat("explicit")] == [r.prompt.messages for r in records if r.responses == ["x", "y"]]
    assert sum(r.responses == ["good", "bad"] for r in records) == 3 and len(records) == 4
    assert "chosen and rejected have different prompts" in read(path, tmp_path)[1].counts["skipped"]


# --------------------------------------------------------------- folders of datasets and of the hub

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
    assert sorted((r.prompt.messages for r in records), key=str) == prompts
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
