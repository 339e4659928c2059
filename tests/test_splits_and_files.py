"""Splits that the user names, scores beside pairs, and further forms of files."""

import gzip
import json
import math
import tracemalloc
from dataclasses import replace

import pyarrow
import pyarrow.parquet
import pytest
from conftest import ROOT, write_jsonl
from dataset_files import PAIRS, as_file, hub_cache, named_pairs, read  # noqa: F401  a fixture
from omegaconf import OmegaConf

from preflab.checks import check_config
from preflab.readers.files import file_rows
from preflab.readers.registry import open_dataset
from preflab.settings.compose import compose
from preflab.settings.load import validate
from preflab.settings.run_folder import choose_run_dir
from preflab.settings.schema import RULES
from scripts import build_preferences, score_rewards
from utils import ConfigError, DataError

# ------------------------------------------------------------------------- splits by their names

SPLITS = {
    "train_prefs": PAIRS[:8],
    "test_prefs": PAIRS[8:11],
    "train_sft": PAIRS[11:20],
    "test_sft": PAIRS[20:22],
}
NAMED = {"train_split": "train_prefs", "test_split": "test_prefs"}


def saved(folder):
    import datasets

    splits = {name: datasets.Dataset.from_list(rows) for name, rows in SPLITS.items()}
    datasets.DatasetDict(splits).save_to_disk(folder)


def as_files(folder):
    for name, rows in SPLITS.items():
        folder.mkdir(exist_ok=True)
        as_file(folder / f"{name}.jsonl", rows)


def as_shards(folder):
    (folder / "data").mkdir(parents=True)
    for name, rows in SPLITS.items():
        as_file(folder / "data" / f"{name}-00000-of-00001.parquet", rows)


def listed(folder):
    as_shards(folder)
    files = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in SPLITS)
    head = f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n"
    (folder / "README.md").write_text(head)


def prompts(rows):
    return {row["prompt"] for row in rows}


def read_prompts(name, data_dir, split, **options):
    return {record.prompt for record in read(name, data_dir, split, **options)[0]}


@pytest.mark.parametrize("write", [saved, as_files, as_shards, listed])
@pytest.mark.parametrize("from_hub", [False, True])
def test_names_choose_the_splits(tmp_path, write, from_hub):
    folder = tmp_path / "me" / "mine"
    folder.parent.mkdir()
    write(folder)
    name = "me/mine" if from_hub else folder  # a copy of a hub set in data_dir, or a path
    assert read_prompts(name, tmp_path, "train", **NAMED) == prompts(SPLITS["train_prefs"])
    assert read_prompts(name, tmp_path, "test", **NAMED) == prompts(SPLITS["test_prefs"])
    sft = {"train_split": "train_sft", "test_split": "test_sft"}
    assert read_prompts(name, tmp_path, "train", **sft) == prompts(SPLITS["train_sft"])
    with pytest.raises(DataError, match=r"mine has no train_pref split; it has: .*") as refused:
        read(name, tmp_path, train_split="train_pref", test_split="test_prefs")
    there = str(refused.value).split("it has: ")[1].split(";")[0]
    assert sorted(there.split(", ")) == sorted(SPLITS)
    with pytest.raises(DataError, match=r"no test or validation split.*test_split chooses one"):
        read(name, tmp_path, "test", train_split="train_prefs")
    with pytest.raises(DataError, match=r"no train split.*train_split chooses one"):
        read(name, tmp_path, test_split="test_prefs")
    one = {"train_split": "train_prefs", "test_split": "train_prefs", "test_fraction": 0.3}
    train, test = (read_prompts(name, tmp_path, split, **one) for split in ("train", "test"))
    assert test and not train & test and train | test == prompts(SPLITS["train_prefs"])


@pytest.mark.parametrize("from_hub", [False, True])
@pytest.mark.parametrize(
    "files, message",
    [
        (
            ["train_prefs", "train_sft", "test_prefs"],
            "train_prefs.jsonl and train_sft.jsonl would all be its train split;"
            " choose by train_split=train_prefs or train_split=train_sft",
        ),
        (
            ["train_prefs", "test_prefs", "test_sft"],
            "test_prefs.jsonl and test_sft.jsonl would all be its test split;"
            " choose by test_split=test_prefs or test_split=test_sft",
        ),
        (
            ["prefs/train", "sft/train"],
            "prefs/train.jsonl and sft/train.jsonl would all be its train split;"
            " give one of them, or its folder, by its path",
        ),
        (["train_1", "train_2", "test-1"], None),
        (["2023/train", "2024/train"], None),
        (["train/a", "train/b", "valid/a"], None),
        (["data/train-00000-of-00002", "data/train-00001-of-00002"], None),
    ],
)
def test_files_that_would_be_one_split_are_chosen_by_name(tmp_path, files, message, from_hub):
    folder = tmp_path / "me" / "mine"
    for i, name in enumerate(files):
        write_jsonl(folder / f"{name}.jsonl", PAIRS[4 * i : 4 * i + 4])
    name = "me/mine" if from_hub else folder
    if message is None:
        train, test = (read_prompts(name, tmp_path, split) for split in ("train", "test"))
        assert train | test == prompts(PAIRS[: 4 * len(files)]) and not train & test
        return
    with pytest.raises(DataError) as refused:
        read(name, tmp_path)
    assert str(refused.value) == f"{folder}: {message}"


def test_the_names_are_part_of_the_key_of_the_cache(tmp_path):
    saved(tmp_path / "x")

    def key(**names):
        return open_dataset(str(tmp_path / "x"), "test", **names).fingerprint()

    assert key(**NAMED) == key(**NAMED)
    assert key(**NAMED) != key(train_split="train_prefs", test_split="test_sft")
    assert key(**NAMED) != key(train_split="test_prefs", test_split="test_prefs")


def test_names_of_splits_are_refused_where_there_is_no_choice(tmp_path):
    path = as_file(tmp_path / "pairs.jsonl", PAIRS)
    with pytest.raises(ConfigError, match=r"pairs\.jsonl\] is one file, and train_split and"):
        read(path, tmp_path, train_split="train_prefs")
    write_jsonl(tmp_path / "imdb-sft-train.jsonl", [{"prompt": "p", "text": "t", "reward": 1}])
    with pytest.raises(ConfigError, match=r"\[imdb\] has its published splits.*set them to null"):
        open_dataset("imdb", "train", data_dir=str(tmp_path), test_split="test_prefs")


def test_a_folder_with_train_and_a_named_test_file(tmp_path):
    as_file(tmp_path / "train.jsonl", PAIRS[:3])
    as_file(tmp_path / "test.jsonl", PAIRS[3:5])
    as_file(tmp_path / "dev.csv", PAIRS[5:9])
    assert read_prompts(tmp_path, tmp_path, "test", test_split="dev") == prompts(PAIRS[5:9])
    assert read_prompts(tmp_path, tmp_path, "train", test_split="dev") == prompts(PAIRS[:3])
    assert read_prompts(tmp_path, tmp_path, "test") == prompts(PAIRS[3:5])


# -------------------------------------------------------------------------- scores beside pairs


def rated(i, high, low):
    return PAIRS[i] | {"score_chosen": high, "score_rejected": low}


RATED = [rated(0, 8.5, 3), rated(1, 7, 7), rated(2, 2.0, 4.0), rated(3, 6, 5.5)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
def test_scores_beside_pairs(tmp_path, suffix):
    rows = [{k: float(v) if "score" in k else v for k, v in row.items()} for row in RATED]
    path = as_file(tmp_path / f"rated{suffix}", rows)
    records, source = read(path, tmp_path)
    assert source.provides == {"pairs", "scores"}
    records = {record.prompt: record for record in records + read(path, tmp_path, "test")[0]}
    assert {prompt: record.scores for prompt, record in records.items()} == {
        "p0": [8.5, 3.0],
        "p1": [7.0, 7.0],
        "p2": [2.0, 4.0],
        "p3": [6.0, 5.5],
    }
    for i in range(4):  # the pairs are those of the data, whatever the scores
        assert named_pairs(records[f"p{i}"]) == [(f" good {i}", f" bad {i}")]


def test_min_gap_drops_pairs_whose_scores_are_equal_or_contradict_them(tmp_path):
    as_file(tmp_path / "train.jsonl", RATED)
    as_file(tmp_path / "test.jsonl", RATED[:1])
    records, source = read(tmp_path, tmp_path, min_gap=0.001)
    assert [record.prompt for record in records] == ["p0", "p3"]
    assert source.counts["skipped"]["pairs with a score gap below min_gap"] == 2
    assert [record.prompt for record in read(tmp_path, tmp_path, min_gap=1.0)[0]] == ["p0"]


def test_scores_under_other_names_and_of_several_pairs_of_a_prompt(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "chosen-rating": 5, "rejected-rating": 2},
        {"prompt": "p", "chosen": "a", "rejected": "c", "chosen-rating": 5, "rejected-rating": 1},
    ]
    as_file(tmp_path / "train.jsonl", rows)
    as_file(tmp_path / "test.jsonl", rows)
    names = {"score_chosen": "chosen-rating", "score_rejected": "rejected-rating"}
    [record], _ = read(tmp_path, tmp_path, columns=names)
    assert record.responses == ["a", "b", "c"] and record.scores == [5, 2, 1]
    assert record.pairs == [(0, 1), (0, 2)]
    [plain], source = read(tmp_path, tmp_path)
    assert plain.scores is None and source.provides == {"pairs"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([RATED[0], PAIRS[1]], r"train\.jsonl:2: no 'score_chosen'"),
        ([PAIRS[0], RATED[1]], r"train\.jsonl:2: score_chosen and score_rejected, which the first"),
        (
            [RATED[0], rated(1, "7", 3)],
            r"train\.jsonl:2: 'score_chosen' is str '7', expected a num",
        ),
        ([RATED[0], rated(1, 7, float("inf"))], r"train\.jsonl:2"),
    ],
)
def test_scores_of_some_rows_are_refused(tmp_path, rows, message):
    as_file(tmp_path / "train.jsonl", rows)
    as_file(tmp_path / "test.jsonl", RATED)
    with pytest.raises(DataError, match=message):
        read(tmp_path, tmp_path)


def test_a_loss_without_scores_names_the_columns_that_would_do(tmp_path):
    def check(rows):
        as_file(tmp_path / "pairs.jsonl", rows)
        check_config(compose(["loss=odpo", f"datasets=[{tmp_path / 'pairs.jsonl'}]"]))

    with pytest.raises(ConfigError, match=r"needs scores.* has none; with scores: ") as refused:
        check(PAIRS)
    for columns in (
        "prompt, chosen, rejected, score_chosen, score_rejected; prompt, text, reward;",
        "prompt, responses, scores",
        "dataset_columns",
    ):
        assert columns in str(refused.value)
    check(RATED)


# ------------------------------------------------------------------------------- forms of files


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.json", bytes),
        ("x.jsonl.gz", gzip.compress),
        ("x.JSONL.GZ", gzip.compress),
        ("x.jsonl.zst", zstd),
        # several frames, as appending or packing in parallel writes them
        ("x.jsonl.gz", lambda content: gzip.compress(content[:70]) + gzip.compress(content[70:])),
        ("x.jsonl.zst", lambda content: zstd(content[:70]) + zstd(content[70:])),
    ],
)
def test_json_lines_under_another_name_or_packed(tmp_path, name, pack):
    plain = as_file(tmp_path / "plain.jsonl", PAIRS)
    other = tmp_path / name
    other.write_bytes(pack(as_lines(PAIRS)))
    for split in ("train", "test"):
        expected = read(plain, tmp_path, split, test_fraction=0.3)[0]
        records = read(other, tmp_path, split, test_fraction=0.3)[0]
        assert len(expected) > 2
        assert [replace(record, source="") for record in records] == [
            replace(record, source="") for record in expected
        ]
    other.write_bytes(pack(as_lines(PAIRS[:3]) + b"\n[]\n"))
    with pytest.raises(DataError, match=rf"{name}:5: list"):
        read(other, tmp_path)


def test_a_folder_with_packed_files(tmp_path):
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(as_lines(PAIRS[:3])))
    (tmp_path / "test.jsonl.zst").write_bytes(zstd(as_lines(PAIRS[3:5])))
    assert read_prompts(tmp_path, tmp_path, "train") == prompts(PAIRS[:3])
    assert read_prompts(tmp_path, tmp_path, "test") == prompts(PAIRS[3:5])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.jsonl.gz", as_lines(PAIRS)),
        ("x.jsonl.zst", as_lines(PAIRS)),
        ("x.jsonl.gz", gzip.compress(as_lines(PAIRS))[:-20]),
        ("x.jsonl.zst", zstd(as_lines(PAIRS))[:-20]),
    ],
)
def test_packed_files_that_are_damaged(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: cannot be unpacked"):
        read(tmp_path / name, tmp_path)


@pytest.mark.parametrize("name", ["x.json.gz", "x.csv.zst", "x.gz"])
def test_other_packed_files_are_refused(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(as_lines(PAIRS)))
    with pytest.raises(DataError, match=r"unknown type of file; accepted: .*\.jsonl\.gz"):
        read(tmp_path / name, tmp_path)


def test_a_key_that_is_given_twice_is_refused_with_its_place(tmp_path):
    good = json.dumps(PAIRS[0])
    twice = '{"prompt": "p", "chosen": "a", "rejected": "b", "chosen": "c"}'
    message = "an object has the key 'chosen' 2 times"
    for name in ("x.jsonl", "x.json"):
        (tmp_path / name).write_text(f"{good}\n\n{twice}\n")
        with pytest.raises(DataError, match=rf"{name}:3: {message}"):
            read(tmp_path / name, tmp_path)
    (tmp_path / "list.json").write_text(f"[{good},\n{twice}]")
    with pytest.raises(DataError, match=rf"list\.json: row 2: {message}"):
        read(tmp_path / "list.json", tmp_path)
    inside = '{"prompt": [{"role": "user", "role": "system", "content": "c"}], "chosen": "a"}'
    (tmp_path / "inside.jsonl").write_text(f"{inside}\n")
    with pytest.raises(DataError, match=r"inside\.jsonl:1: an object has the key 'role' 2 times"):
        read(tmp_path / "inside.jsonl", tmp_path)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_list_is_indexed_and_not_held_in_memory(tmp_path, monkeypatch, indent):
    monkeypatch.setattr("preflab.readers.json_text.CHUNK", 1 << 12)
    written = [{"prompt": f"é {i}", "text": "ß€" * 500, "score": math.inf} for i in range(1000)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(written, ensure_ascii=False, indent=indent), encoding="utf-8-sig")
    tracemalloc.start()
    try:
        rows = file_rows(path)
        assert all(rows.read(i) == written[i] for i in reversed(range(rows.n)))
        assert tracemalloc.get_traced_memory()[1] < path.stat().st_size / 5
    finally:
        tracemalloc.stop()
    assert rows.n == 1000 and rows.where(7) == f"{path}: row 8"


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz"])
def test_a_line_that_is_too_long_is_refused_without_reading_it(tmp_path, name, monkeypatch):
    monkeypatch.setattr("preflab.readers.json_text.LONGEST_LINE", 1000)
    row = PAIRS[1] | {"chosen": "x" * 300_000}
    content = as_lines([PAIRS[0], row])
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"{name}:2: a line of more than 0\.001 MB"):
        file_rows(tmp_path / name)
    if not name.endswith("gz"):
        assert tracemalloc.get_traced_memory()[1] < 200_000
    tracemalloc.stop()
    (tmp_path / "one.json").write_text(json.dumps([row]))  # a list has no lines
    assert file_rows(tmp_path / "one.json").n == 1


# ------------------------------------------------------------------------------- paths from home


PATH_KEYS = [key for key, rule in RULES.items() if "PathText" in repr(rule.accepts)]


def test_every_setting_that_takes_a_path_is_known():
    assert set(PATH_KEYS) == {
        *("local_run_dir", "local_dirs", "resume", "skip_finished", "data_dir", "cache_dir"),
        *("datasets", "trainer", "online.sampler", "online.discriminator_path"),
        *("optimizer", "criterion"),
        *("model.name_or_path", "model.tokenizer_name_or_path"),
        *("model.archive", "model.reference_archive"),
    }


@pytest.mark.parametrize("key", [*PATH_KEYS, "dataset_module", "loss.module", "reward.path"])
def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch, key):
    monkeypatch.setenv("HOME", str(tmp_path))
    is_list = key in ("datasets", "local_dirs")
    word = "'~/x.py'"
    config = compose([f"{key}=[{word}]" if is_list else f"{key}={word}"])
    expected = str(tmp_path / "x.py")
    validate(config)
    assert OmegaConf.select(config, key) == ([expected] if is_list else expected)


def test_run_folders_and_further_rewards_below_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert choose_run_dir("~/run", None, ["runs"], "x") == str(tmp_path / "run")
    assert choose_run_dir(None, "~/run", ["runs"], "x") == str(tmp_path / "run")
    assert choose_run_dir(None, None, ["~/runs"], "x").startswith(str(tmp_path / "runs"))
    config = compose(["more_rewards=[{name: lexicon, path: '~/words.json'}]"])
    assert validate(config).more_rewards[0]["path"] == str(tmp_path / "words.json")


def test_a_tilde_behind_an_equals_sign_of_a_command_line(tmp_path, monkeypatch):
    """No shell reads it there, and --output=~/x made a folder of that name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    parsed = build_preferences._parser().parse_args(["--prompts=~/p.jsonl", "--output=~/made"])
    assert (parsed.prompts, parsed.output) == (tmp_path / "p.jsonl", tmp_path / "made")
    for file in [*ROOT.glob("*.py"), *ROOT.glob("scripts/*.py")]:
        assert "type=Path" not in file.read_text(encoding="utf-8"), file
    # settings that scripts compose
    write_jsonl(tmp_path / "outs.jsonl", [{"prompt": "p", "response": "good"}])
    (tmp_path / "words.json").write_text((ROOT / "data" / "lexicon.json").read_text())
    command = ["score_rewards.py", "--fname=~/outs.jsonl", "--reward=lexicon"]
    monkeypatch.setattr("sys.argv", [*command, "reward.path='~/words.json'"])
    score_rewards.main()
    assert (tmp_path / "outs.scored.jsonl").is_file()


def test_parquet_files_are_read_by_pieces_in_any_order(tmp_path, monkeypatch):
    rows = [{"prompt": f"p{i}", "chosen": "a" * (i % 7 + 1), "rejected": "b"} for i in range(3000)]
    path = tmp_path / "rows.parquet"
    table = pyarrow.Table.from_pylist(rows)
    pyarrow.parquet.write_table(table, path, row_group_size=700)
    monkeypatch.setattr(pyarrow.parquet, "read_table", None)  # not the whole file
    read = file_rows(path)
    order = [*range(3000), *range(2999, 0, -371), 0, 699, 700, 2799, 2800]
    assert read.n == 3000 and all(read.read(i) == rows[i] for i in order)
    assert read.where(699) == f"{path}: row 700"
