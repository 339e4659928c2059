"""The scripts around data: public comparisons and risk preferences to pairs, the flags of risk
preferences, the look before training."""

import json
import math
import re
import sys
import tracemalloc
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    make_tokenizer,
    run_command,
    run_here,
    save_model,
    scored_rows,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
import train_risk_preferences
from preflab.batching.token_store import prepare
from preflab.readers import files
from preflab.readers.registry import open_dataset
from preflab.settings.overrides import model_overrides, quoted
from scripts import dpo_data_generate, inspect_data, preproc_filter, preproc_pref
from utils import DataError


def call(monkeypatch, module, *arguments) -> int:
    """Run the command of a script in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", [module.__file__, *map(str, arguments)])
    try:
        module.main()
    except SystemExit as leaving:
        return leaving.code or 0
    return 0


def records(name, data_dir="."):
    return [
        record
        for split in ("train", "test")
        for record in open_dataset(str(name), split, data_dir=str(data_dir)).records()
    ]


# -------------------------------------------------------------------------------------------- TL;DR


def compared(i: int, choice: int = 0, first: str = " a  ", second: str = "b\n") -> dict:
    info = {
        "id": f"t3_{i}",
        "subreddit": "AskReddit",
        "title": f"title {i}",
        "post": f"Ärger \u2028 über “{i}”\n",
        "article": None,
    }
    return {
        "info": info,
        "summaries": [{"text": first, "policy": "sup1"}, {"text": second, "policy": "ref"}],
        "choice": choice,
        "worker": "w",
    }


ARTICLE = {
    "info": {"subreddit": None, "title": None, "post": None, "article": "news"},
    "summaries": [{"text": "a"}, {"text": "b"}],
    "choice": 1,
}
FORMS = {
    "lines.json": lambda rows: "".join(json.dumps(row) + "\n" for row in rows).encode(),
    "lines.jsonl": (
        lambda rows: "\r\n\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()
    ),
    "list.json": lambda rows: json.dumps(rows, ensure_ascii=False).encode(),
    "list.jsonl": lambda rows: b"\xef\xbb\xbf \n" + json.dumps(rows, indent=2).encode() + b"\n\n",
}


def raw(folder: Path, form: str, train: list[dict], test: list[dict]) -> Path:
    folder.mkdir()
    for split, rows in (("train", train), ("test", test)):
        (folder / f"{split}.{form.split('.')[1]}").write_bytes(FORMS[form](rows))
    return folder


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize("form", FORMS)
def test_comparisons_become_the_tldr_dataset(tmp_path, monkeypatch, capsys, form, chunk):
    monkeypatch.setattr(
        files, "CHUNK", chunk
    )  # letters of several bytes, and rows, fall on the borders
    folder = raw(
        tmp_path / "raw",
        form,
        [compared(1), compared(2, choice=1), compared(1, second="c")],
        [ARTICLE, compared(3), compared(4, first=" \n")],
    )
    assert call(monkeypatch, preproc_pref, folder, "--output", tmp_path / "data" / "tldr") == 0
    prompt = "SUBREDDIT: r/AskReddit\nTITLE: title {0}\nPOST: Ärger \u2028 über “{0}”\n\nTL;DR:"
    assert json.loads((tmp_path / "data" / "tldr" / "train.json").read_text(encoding="utf-8")) == [
        {"prompt": prompt.format(1), "chosen": " a", "rejected": " b"},
        {"prompt": prompt.format(2), "chosen": " b", "rejected": " a"},
        {"prompt": prompt.format(1), "chosen": " a", "rejected": " c"},
    ]
    assert json.loads((tmp_path / "data" / "tldr" / "test.json").read_text(encoding="utf-8")) == [
        {"prompt": prompt.format(3), "chosen": " a", "rejected": " b"}
    ]
    told = capsys.readouterr().out
    assert (
        "train.json: 3 rows\n" in told
        and "test.json: 1 rows; 1 left out: a news article, not a post; 1 left out: an empty summary"
        in told
    )
    one, two, three = records("tldr", tmp_path / "data")
    assert (
        one.prompt == prompt.format(1)
        and one.responses == [" a", " b", " c"]
        and one.pairs == [(0, 1), (0, 2)]
    )
    assert two.pairs == [(0, 1)] and three.prompt == prompt.format(3)


@pytest.mark.parametrize("form", ["lines.jsonl", "list.json"])
def test_filtered_posts_become_the_tldr_filtered_dataset(tmp_path, monkeypatch, capsys, form):
    posts = [
        {"subreddit": "loseit", "title": f"t{i}", "post": "body", "summary": f"  say {i} "}
        for i in range(2)
    ]
    folder = raw(
        tmp_path / "raw",
        form,
        posts,
        [{**posts[0], "title": "", "summary": " "}, {**posts[0], "title": ""}],
    )
    assert call(monkeypatch, preproc_filter, folder, "--output", tmp_path / "tldr_filtered") == 0
    first, second, test = records("tldr_filtered", tmp_path)
    assert (
        first.prompt == "SUBREDDIT: r/loseit\nTITLE: t0\nPOST: body\nTL;DR:"
        and first.responses == [" say 0"]
    )
    assert second.responses == [" say 1"] and test.prompt.startswith(
        "SUBREDDIT: r/loseit\nTITLE: \nPOST"
    )
    assert "1 rows; 1 left out: an empty summary" in capsys.readouterr().out


def without(row: dict, key: str) -> dict:
    return {name: value for name, value in row.items() if name != key}


@pytest.mark.parametrize(
    "bad, told",
    [
        (without(compared(2), "info"), "no 'info'; it has summaries"),
        ({**compared(2), "info": "x"}, "'info': str 'x', expected an object"),
        ({**compared(2), "info": {"title": "t", "post": "p"}}, "'info': no 'subreddit'"),
        ({**compared(2), "choice": 2}, "'choice' is 2, expected 0 or 1"),
        ({**compared(2), "choice": True}, "'choice' is bool"),
        ({**compared(2), "summaries": [{"text": "a"}]}, "1 summaries, expected 2"),
        (
            {**compared(2), "summaries": [{"text": "a"}, {"text": 3}]},
            "a summary: 'text' is int '3'",
        ),
        (b'{"info": }', "not JSON: Expecting value"),
        (b'{"info": NaN}', "NaN is not a JSON number"),
        (b'{"info": "\xff"}', "byte 0xff is not UTF-8"),
        (b"[" * 100_000, "not JSON: .*recursion"),
        (b'"text"', "str 'text', expected an object"),
        (b"", None),
    ],
)
@pytest.mark.parametrize("form", ["lines.jsonl", "list.json"])
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, monkeypatch, capsys, form, bad, told):
    folder = raw(tmp_path / "raw", form, [compared(1)], [compared(1)])
    good = json.dumps(compared(1)).encode()
    bad = bad if isinstance(bad, bytes) else json.dumps(bad).encode()
    between, frame = (b"\n", (b"", b"\n")) if form == "lines.jsonl" else (b",\n", (b"[", b"]"))
    (folder / f"test.{form.split('.')[1]}").write_bytes(
        frame[0] + between.join([good, bad, good]) + frame[1]
    )
    monkeypatch.setattr(files, "CHUNK", 50)
    code = call(monkeypatch, preproc_pref, folder, "--output", tmp_path / "out")
    if told is None and form == "lines.jsonl":  # an empty line
        assert code == 0
        return
    place = r"test.jsonl:2" if form == "lines.jsonl" else r"test.json: row 2"
    assert code == 2 and re.search(f"{place}.*{told or 'Expecting value'}", capsys.readouterr().err)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    "content, told",
    [
        (b'[{"a": 1}', "row 2: not JSON: Expecting ',' delimiter"),
        (b"[", "row 1: not JSON: Expecting value"),
        (b"[] []", "something follows the end of the list"),
        (b"[]", "holds no usable row"),
        (b"", "the file is empty"),
        (b" \n", "the file is empty"),
        (json.dumps([ARTICLE]).encode(), "holds no usable row; 1 left out: a news article"),
        ('["é'.encode()[:-1], "row 1: not JSON"),
    ],
)
def test_files_without_an_end_or_a_row(tmp_path, monkeypatch, capsys, content, told):
    (tmp_path / "raw").mkdir()
    for split in ("train", "test"):
        (tmp_path / "raw" / f"{split}.json").write_bytes(content)
    if content.startswith(b'[{"a"'):
        content = content.replace(b'{"a": 1}', json.dumps(compared(1)).encode())
        (tmp_path / "raw" / "train.json").write_bytes(content)
    assert call(monkeypatch, preproc_pref, tmp_path / "raw", "--output", tmp_path / "out") == 2
    assert (
        f"train.json{'' if told[0] in 'h' else ': '}" in (error := capsys.readouterr().err)
        and told in error
    )


def test_a_byte_that_is_no_text_is_found_after_the_rows_before_it_wherever_chunks_end(
    tmp_path, monkeypatch
):
    path = tmp_path / "list.json"
    path.write_bytes('[{"a": "éé"},\n{"b": "é€'.encode() + b'\xff"}, {"c": 1}]')
    for chunk in range(1, 40):
        monkeypatch.setattr(files, "CHUNK", chunk)
        with open(path, "rb") as f:
            rows = files.streamed_rows(f, path)
            assert next(rows) == ({"a": "éé"}, f"{path}: row 1")
            with pytest.raises(DataError, match="row 2: byte 0xff is not UTF-8"):
                next(rows)


def test_missing_files_are_named_with_what_is_there(tmp_path, monkeypatch, capsys):
    assert call(monkeypatch, preproc_pref, "x" * 300) == 2
    assert re.search("error: .*File name too long: 'x{300}/train.json'", capsys.readouterr().err)
    assert call(monkeypatch, preproc_pref, tmp_path / "nowhere") == 2
    assert "no train.json or train.jsonl; there is: no such folder" in capsys.readouterr().err
    (tmp_path / "validation.json").write_text("[]")
    assert call(monkeypatch, preproc_filter, tmp_path) == 2
    assert "there is: validation.json" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["lines.jsonl", "list.json"])
def test_rows_pass_through_memory_one_at_a_time(tmp_path, monkeypatch, form):
    monkeypatch.setattr(files, "CHUNK", 1 << 14)
    folder = raw(
        tmp_path / "raw", form, [compared(i, first="a" * 4000) for i in range(1000)], [compared(1)]
    )
    tracemalloc.start()
    try:
        assert call(monkeypatch, preproc_pref, folder, "--output", tmp_path / "out") == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "train.json").stat().st_size > 4e6 and peak < 1e6


# --------------------------------------------------------------------------------- risk preferences


def situation(i: int, **more) -> dict:
    return {
        "situation_id": i,
        "prompt_text": f"You have ${i}.\n(A) safe, (B) risky?",
        "correct_label": "A",
        "incorrect_label": "B",
        **more,
    }


def as_csv(path: Path, rows: list[dict]) -> None:
    import pandas

    pandas.DataFrame(rows).to_csv(path, index=False)


def as_excel(path: Path, rows: list[dict]) -> None:
    import pandas

    pandas.DataFrame(rows).to_excel(path, index=False)


WRITERS = {
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "lines.json": lambda path, rows: write_jsonl(path, rows),
    "lines.jsonl": lambda path, rows: write_jsonl(path, rows),
    "columns.json": lambda path, rows: path.write_text(
        json.dumps({key: [row[key] for row in rows] for key in rows[0]}, indent=1)
    ),
    "numbered.json": lambda path, rows: path.write_text(
        json.dumps({key: {str(i): row[key] for i, row in enumerate(rows)} for key in rows[0]})
    ),
    "table.csv": as_csv,
    "table.xlsx": as_excel,
}


def generate(monkeypatch, tmp_path, rows, *more, file="rows.json") -> list[dict]:
    WRITERS[file](tmp_path / file, rows)
    assert (
        call(
            monkeypatch,
            dpo_data_generate,
            "--input",
            tmp_path / file,
            "--output",
            tmp_path / "pairs.json",
            *more,
        )
        == 0
    )
    return json.loads((tmp_path / "pairs.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("file", WRITERS)
def test_situations_become_pairs_whatever_the_file(tmp_path, monkeypatch, file):
    """A row for each option, labels that are numbers or look like nothing, empty cells in a column
    that is not used."""
    rows = [
        situation(
            i,
            option=option,
            correct_label=1,
            incorrect_label="NA",
            bad_correct_answers="" if i else '["a"]',
        )
        for i in range(3)
        for option in "ab"
    ]
    expected = [
        {"prompt": f"You have ${i}.\n(A) safe, (B) risky?", "chosen": "1", "rejected": "NA"}
        for i in range(3)
    ]
    assert generate(monkeypatch, tmp_path, rows, file=file) == expected
    assert sorted(record.prompt for record in records(tmp_path / "pairs.json")) == [
        pair["prompt"] for pair in expected
    ]


def test_situations_are_sampled_by_the_seed(tmp_path, monkeypatch, capsys):
    rows = [situation(i) for i in range(40)]
    a, again, b = (
        generate(monkeypatch, tmp_path, rows, "--sample_size", 10, "--seed", seed)
        for seed in (0, 0, 1)
    )
    assert (
        a == again != b
        and len({pair["prompt"] for pair in a}) == len({pair["prompt"] for pair in b}) == 10
    )
    assert [
        rows.index(next(row for row in rows if row["prompt_text"] == pair["prompt"])) for pair in a
    ] == sorted(int(re.search(r"\d+", pair["prompt"])[0]) for pair in a)
    assert "10 pairs, of 40 situations" in capsys.readouterr().out
    assert len(generate(monkeypatch, tmp_path, rows)) == 40  # fewer than the 500 of the default
    shuffled = generate(monkeypatch, tmp_path, rows[::-1], "--sample_size", 10)
    assert {pair["prompt"] for pair in shuffled} == {pair["prompt"] for pair in a}


def test_several_labels_and_other_spellings_are_drawn_by_the_seed(tmp_path, monkeypatch):
    rows = [
        situation(
            i,
            incorrect_label=label,
            bad_correct_answers='["a", "option A"]',
            bad_incorrect_answers=["b"],
        )
        for i in range(60)
        for label in "BC"
    ]
    exact = generate(monkeypatch, tmp_path, rows)
    assert len(exact) == 60 and {(pair["chosen"], pair["rejected"]) for pair in exact} == {
        ("A", "B"),
        ("A", "C"),
    }
    variants = generate(monkeypatch, tmp_path, rows, "--answers", "variants")
    assert {(pair["chosen"], pair["rejected"]) for pair in variants} == {
        ("a", "b"),
        ("option A", "b"),
    }
    both = generate(monkeypatch, tmp_path, rows, "--answers", "both")
    assert {pair["chosen"] for pair in both} == {"A", "a", "option A"} and {
        pair["rejected"] for pair in both
    } == {"B", "C", "b"}
    assert (
        generate(monkeypatch, tmp_path, rows, "--sample_size", 5)[0] in exact
    )  # a situation's pair is its own


@pytest.mark.parametrize(
    "rows, told",
    [
        (
            [situation(1), without(situation(2), "correct_label")],
            r"rows.json: row 2: no 'correct_label'; it has situation_id",
        ),
        (
            [situation(1), without(situation(2), "situation_id")],
            r"rows.json: row 2: no 'situation_id'",
        ),
        (
            [situation(1), situation(1, prompt_text="another")],
            r"situation_id 1 has different texts in 'prompt_text': .*row 1 and .*row 2",
        ),
        (
            [situation(1, incorrect_label="A")],
            r"row 1: situation_id 1 has 'A' as a correct and as an incorrect answer",
        ),
        (
            [situation(1), situation(1, correct_label="B", incorrect_label="A")],
            r"has 'A' as a correct and as an incorrect answer",
        ),
        (
            [situation(1, correct_label=True)],
            r"row 1: 'correct_label' is bool 'True', expected text",
        ),
        ([situation(1, correct_label=" ")], r"row 1: 'correct_label' is empty"),
        ([3], r"row 1: int '3', expected an object"),
        ([], r"holds no situation"),
        ("text", r"rows.json: str 'text', expected a list of situations"),
        (
            {"situation_id": [1, 2], "prompt_text": ["a"]},
            r"column 'prompt_text' does not have the same rows as 'situation_id'",
        ),
    ],
)
def test_bad_situations_are_named(tmp_path, monkeypatch, capsys, rows, told):
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    assert (
        call(
            monkeypatch,
            dpo_data_generate,
            "--input",
            tmp_path / "rows.json",
            "--output",
            tmp_path / "pairs.json",
        )
        == 2
    )
    assert re.search(told, capsys.readouterr().err) and not (tmp_path / "pairs.json").exists()


@pytest.mark.parametrize(
    "name, content, more, told",
    [
        ("x.json", b'[{"a": 1},\n{]', (), r"x.json:2: not JSON"),
        ("x.json", b'{"a": 1}\n{]', (), r"x.json:2: not JSON"),
        ("x.xlsx", b"no workbook", (), r"x.xlsx: no readable Excel file"),
        ("x.xls", b"old", (), r"unknown type of file; accepted: .*\.xlsx"),
        ("x.json", None, (), r"x.json: no such file"),
        (".", None, (), r": a folder, expected a file"),
        ("x" * 300, None, (), r"File name too long: '.*/x{300}'"),
        (
            "x.csv",
            b"situation_id,prompt_text,prompt_text\n1,a,b\n",
            (),
            r"x.csv: the header names the column 'prompt_text' 2 times",
        ),
        ("x.json", b"[]", ("--sample_size", "0"), r"no situation|at least 1"),
        (
            "x.json",
            json.dumps([situation(1)]).encode(),
            ("--sample_size", "0"),
            r"--sample_size 0 must be at least 1",
        ),
        (
            "x.json",
            json.dumps([situation(1)]).encode(),
            ("--answers", "both"),
            r"row 1: no 'bad_correct_answers'",
        ),
        (
            "x.json",
            json.dumps([situation(1, bad_correct_answers="a,b")]).encode(),
            ("--answers", "both"),
            r"row 1, 'bad_correct_answers': not JSON",
        ),
        (
            "x.json",
            json.dumps([situation(1, bad_correct_answers='"a"')]).encode(),
            ("--answers", "both"),
            r"is str 'a', expected a JSON list",
        ),
    ],
)
def test_files_of_situations_that_cannot_be_used(
    tmp_path, monkeypatch, capsys, name, content, more, told
):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    assert (
        call(
            monkeypatch,
            dpo_data_generate,
            "--input",
            tmp_path / name,
            "--output",
            tmp_path / "pairs.json",
            *more,
        )
        == 2
    )
    assert re.search(told, capsys.readouterr().err) and not (tmp_path / "pairs.json").exists()


# -------------------------------------------------------------------- the flags of risk preferences


def test_the_flags_are_the_documented_command():
    flags = (
        "--model_name microsoft/phi-2 --dataset risk_averse_dpo.json --epochs 3 --beta 0.5"
        " --batch_size 4 --lr 1e-5 --wandb_project risk-averse-phi2"
    )
    command = (
        "model=phi2 datasets=[risk_averse_dpo.json] loss=dpo loss.beta=0.5 n_epochs=3 batch_size=4"
        " lr=1e-5 wandb.project=risk-averse-phi2"
    )
    assert train_risk_preferences.translate(flags.split()) == command.split()
    more = [
        "--dataset",
        "a.json",
        "--output_dir",
        "o",
        "--seed",
        "1",
        "--max_length",
        "64",
        "--max_prompt_length",
        "32",
        "--gradient_accumulation_steps",
        "2",
        "eval_every=8",
    ]
    told = (
        "seed=1 gradient_accumulation_steps=2 max_length=64 max_prompt_length=32 local_run_dir=o"
        " eval_every=8"
    )
    assert train_risk_preferences.translate(more)[-6:] == told.split()


@pytest.mark.parametrize(
    "name, expected",
    [
        ("microsoft/phi-2", ["model=phi2"]),
        ("gptj", ["model=gptj"]),
        (ROOT / "data" / "tiny", ["model=tiny"]),
        ("Qwen/Qwen3-8B", ["model=blank_model", "model.name_or_path=Qwen/Qwen3-8B"]),
    ],
)
def test_models_take_the_settings_that_config_has_for_them(name, expected):
    assert model_overrides(str(name)) == expected


@pytest.mark.parametrize(
    "value",
    [
        "plain.json",
        "my pairs.json",
        "it's",
        "back\\",
        "\\'",
        "a,b=[c]{d}",
        "é",
        'quo"te',
        "C:\\x\\y",
        "",
    ],
)
def test_values_reach_hydra_as_they_are(value):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    read = OverridesParser.create().parse_override(f"key=[{quoted(value)}]").value()
    assert [getattr(one, "text", one) for one in read] == [value]


def test_risk_preferences_train_a_model_that_loads_and_speaks(tmp_path, monkeypatch, capsys):
    generate(monkeypatch, tmp_path, [situation(i) for i in range(12)])
    tiny, run_dir = ROOT / "data" / "tiny", tmp_path / "my run"
    flags = [
        "--model_name",
        tiny,
        "--dataset",
        tmp_path / "pairs.json",
        "--epochs",
        2,
        "--beta",
        0.5,
        "--batch_size",
        4,
        "--lr",
        1e-4,
        "--output_dir",
        run_dir,
    ]
    ran = []
    monkeypatch.setattr(
        train, "main", lambda: ran.append(run_here(*sys.argv[1:]))
    )  # hydra's own start is for a process of its own
    assert (
        call(
            monkeypatch,
            train_risk_preferences,
            *flags,
            "wandb.enabled=false",
            f"cache_dir={tmp_path / 'cache'}",
            "sample_during_eval=false",
        )
        == 0
    )
    assert "\npython train.py model=tiny " in capsys.readouterr().out
    assert ran[0]["finished"] and ran[0]["examples"] == 2 * sum(
        1 for _ in open_dataset(str(tmp_path / "pairs.json"), "train").records()
    )
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(run_dir / "LATEST" / "hf"),
        AutoTokenizer.from_pretrained(run_dir / "LATEST" / "hf"),
    )
    start = tokenizer("You have $3.", return_tensors="pt")
    out = model.generate(**start, max_new_tokens=5, do_sample=False)
    assert out.shape[1] > start["input_ids"].shape[1] and isinstance(tokenizer.decode(out[0]), str)


def test_the_exit_code_is_that_of_train(tmp_path):
    result = run_command(
        "train_risk_preferences.py",
        "--dataset",
        tmp_path / "none.json",
        "wandb.enabled=false",
        check=False,
    )
    assert (
        result.returncode == 2
        and "none.json: no such file" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert result.stdout.startswith("python train.py model=phi2")


# ---------------------------------------------------------------------------------- the look before

END = "<|endoftext|>"  # BOS and EOS of the byte tokenizer, whose tokens are bytes
BAD = [
    ("p1", " a", " b"),
    ("p1", " b", " a"),
    ("p1", " a", " b"),
    ("p2", " same", " same"),
    (f"{END}p3", f" x{END}", f" y{END}z"),
    (f"mid{END}dle", " yes", " no"),
    ("again", "again and", " no"),
    ("L" * 50, " c", " d"),
    ("R", " " + "e" * 60, " " + "e" * 61),
    ('[{"role": "user"}]', " u", " vv"),
]
# Counted by hand, with max_length=40 and max_prompt_length=20. The pairs of p1: each has its
# opposite, one is repeated.
BAD_COUNTS = {
    "rows": 9,
    "prompts": 7,
    "responses": 14,
    "pairs": 9,
    "contradictory_pairs": 3,
    "duplicate_pairs": 1,
    "same_after_cut": 1,
    "eos_in_responses": 1,
    "eos_doubled": 1,
    "eos_in_prompts": 1,
    "bos_doubled": 1,
    "prompt_repeated": 1,
    "truncated_prompts": 1,
    "truncated_responses": 2,
    "messages_as_text": 1,
    "identical_pairs": 0,
    "empty_responses": 0,
    "merged_boundaries": 0,
    "skipped": {"chosen and rejected identical": 1},
}


def pairs(rows) -> list[dict]:
    return [dict(zip(("prompt", "chosen", "rejected"), row)) for row in rows]


def folder_of(folder: Path, train, test) -> Path:
    write_jsonl(folder / "train.jsonl", pairs(train))
    write_jsonl(folder / "test.jsonl", pairs(test))
    return folder


@pytest.fixture
def look(monkeypatch, tmp_path, llama_folder, capsys):
    """Inspect some data with the byte tokenizer; returns the exit code, the numbers and what was
    printed."""

    def look(data, *more, model=llama_folder):
        code = call(
            monkeypatch,
            inspect_data,
            data,
            "--model",
            model,
            "--max_length",
            40,
            "--max_prompt_length",
            20,
            "--json",
            tmp_path / "found.json",
            *more,
        )
        found = tmp_path / "found.json"
        told = capsys.readouterr()
        return code, json.loads(found.read_text()) if found.exists() else None, told.out + told.err

    return look


def test_every_fault_is_counted_and_what_spoils_training_is_an_error(look, tmp_path):
    code, found, told = look(
        folder_of(tmp_path / "data", BAD, [("p1", " x", " yy"), ("new", " x", " y")]), "--n", 20
    )
    train, test = found["splits"]["train"], found["splits"]["test"]
    assert code == 1 and {key: train[key] for key in BAD_COUNTS} == BAD_COUNTS
    assert test["leaked_prompts"] == 1 and test["pairs"] == 2 and train["leaked_prompts"] == 0
    levels = {
        (finding["split"], finding["what"]): finding["level"] for finding in found["findings"]
    }
    errors = {
        "contradictory_pairs",
        "same_after_cut",
        "eos_in_responses",
        "eos_doubled",
        "eos_in_prompts",
        "bos_doubled",
    }
    assert {
        what for (split, what), level in levels.items() if level == "error" and split == "train"
    } == errors
    assert (
        levels["test", "leaked_prompts"] == "error"
        and levels["train", "truncated_responses"] == "warning"
    )
    assert (
        "error: train: 3 of 9 pairs (33.33%): their opposite is there as well, and undoes them;"
        " first at"
        in told
        and "train.jsonl:1" in told
    )
    assert "error: test: 1 of 2 prompts (50.00%): they are prompts of the train split too" in told
    # Longer in two, shorter in three; Wilson's bounds p solve (share - p)^2 = z^2 p (1 - p) / n.
    wins = train["longer_wins"]
    assert wins["share"] == pytest.approx(2 / 5) and wins["pairs"] == 5
    for p in wins["interval"]:
        assert (0.4 - p) ** 2 == pytest.approx(1.959963985**2 * p * (1 - p) / 5, rel=1e-6)
    assert (
        train["prompt_tokens"]["max"] == 50
        and train["response_tokens"]["max"] == 62
        and train["response_tokens"]["min"] == 2
    )


def test_examples_show_what_the_loss_counts(look, tmp_path, monkeypatch):
    rows = [("p\x1b[31m", " a", " b"), ("R", " " + "e" * 60, " c")]
    _, _, told = look(folder_of(tmp_path / "data", rows, [("new", " x", " y")]), "--n", 5)
    assert (
        f"  prompt: {END}p\\x1b[31m\n  chosen: [ ][a][{END}]\n  rejected: [ ][b][{END}]\n" in told
        and "\x1b" not in told
    )
    assert (
        f"  prompt: {END}R\n  chosen: [ ]{'[e]' * 37} (cut, so without EOS)\n  rejected: ["
        f" ][c][{END}]" in told
    )
    tokenizer = make_tokenizer()
    tokens = [tokenizer.eos_token_id, *tokenizer("hi")["input_ids"]]
    assert (
        inspect_data.painted(tokens, tokenizer, "plain", colours=True)
        == f"\033[7m{END}\033[0m\033[2mh\033[0m\033[2mi\033[0m"
    )
    assert (
        inspect_data.painted(tokens[1:], tokenizer, "chosen", colours=True)
        == "\033[32mh\033[0m\033[92mi\033[0m"
    )
    assert (
        inspect_data.painted(tokens[1:] * 50, tokenizer, "chosen", colours=False)
        == "[h][i]" * 20 + " … 20 tokens … " + "[h][i]" * 20
    )
    monkeypatch.setattr(type(sys.stdout), "isatty", lambda self: True)
    assert "\033[32m" in look(tmp_path / "data")[2]
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\033[32m" not in look(tmp_path / "data")[2]


def test_sound_data_pass_and_a_small_share_of_contradictions_is_tolerated(look, tmp_path):
    train = [(f"p{i}", f" {i}" + "a" * (i % 2), f" {i}" + "a" * ((i + 1) % 2)) for i in range(300)]
    code, found, told = look(folder_of(tmp_path / "data", train, [("new", " x", " y")]))
    assert code == 0 and not found["findings"] and "error" not in told and "warning" not in told
    chosen, rejected = train[0][1:]
    folder_of(tmp_path / "data", [*train, ("p0", rejected, chosen)], [("new", " x", " y")])
    code, found, told = look(tmp_path / "data")
    assert (
        code == 0
        and "warning: train: 2 of 301 pairs (0.66%): their opposite is there as well" in told
    )
    assert look(tmp_path / "data", "--tolerate", 0)[0] == 1


def test_length_bias_is_told(look, tmp_path):
    train = [(f"p{i}", " " + "a" * (2 + i % 5), " a") for i in range(40)]
    code, found, told = look(folder_of(tmp_path / "data", train, [("new", " x", " y")]))
    assert code == 0 and found["splits"]["train"]["longer_wins"]["share"] == 1
    assert "warning: train: the longer response is chosen in 100.0% of the pairs" in told


def test_scored_data_by_name_with_settings(look, imdb_dir):
    """Of each prompt four samples with scores 0.25, 0.75, 1.25, 1.75; the first two make a pair."""
    code, found, _ = look("imdb", f"data_dir={imdb_dir}")
    train = found["splits"]["train"]
    assert (
        found["splits"]["test"]["leaked_prompts"] == 8 and code == 1
    )  # the two files of this fixture share prompts
    assert train["pairs"] == 24 and train["skipped"] == {
        "responses beyond the first two of a prompt": 48
    }
    assert (
        train["score_gap"]["min"] == 0.5
        and train["score_gap"]["max"] == 1.5
        and sum(train["score_gap"]["histogram"]["counts"]) == 24
    )
    every = look("imdb", f"data_dir={imdb_dir}", "pairing=all", "min_gap=0.6")[1]["splits"]["train"]
    assert every["pairs"] == 3 * 24 and every["skipped"] == {
        "pairs of equal score or a gap below min_gap": 3 * 24
    }
    assert every["score_gap"]["median"] == 1.0


def test_data_without_pairs(look, tmp_path, imdb_dir):
    write_jsonl(
        imdb_dir / "imdb-sft-train.jsonl", [row | {"reward": 1.0} for row in scored_rows(4)]
    )
    code, _, told = look("imdb", f"data_dir={imdb_dir}")
    assert code == 1 and "error: train: no pair in it" in told
    code, _, told = look(
        write_jsonl(
            tmp_path / "targets.jsonl", [{"prompt": f"p{i}", "chosen": " a"} for i in range(9)]
        )
    )
    assert (
        code == 0
        and "warning: train: responses to imitate (loss=sft), no pairs" in told
        and "  target: [ ][a]" in told
    )


def test_chat_messages_are_rendered_and_their_own_special_tokens_are_no_fault(look, tmp_path):
    model = save_model(tmp_path / "chat")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}" + END + "{% endfor %}"
    )
    tokenizer.save_pretrained(model)
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        for text in ("hi", "ho", f"h{END}")
    ]
    rows = [
        {"chosen": chat, "rejected": [*chat[:-1], {"role": "assistant", "content": "no"}]}
        for chat in chats
    ]
    for split, part in (("train", rows), ("test", [row for row in rows if row is rows[0]])):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", part)
    _, found, told = look(tmp_path / "data", model=model)
    train = found["splits"]["train"]
    assert (
        train["eos_in_prompts"] == 1
        and train["bos_doubled"] == 0
        and found["splits"]["test"]["leaked_prompts"] == 1
    )
    assert f"prompt: {END}user:hi{END}\n" in told and f"chosen: [y][e][s][{END}]" in told


def test_boundaries_where_the_tokenizer_would_join(look, tmp_path):
    """The shipped tokenizer has a token " the": a prompt that ends with a space is other tokens
    when the response follows at once."""
    data = folder_of(
        tmp_path / "data",
        [("we saw ", "the film", "a film"), ("we saw", " the film", " a film")],
        [("x", " y", " z")],
    )
    _, found, told = look(data, model="tiny")
    assert (
        found["splits"]["train"]["merged_boundaries"] >= 1
        and "such as 'we saw ' and 'the film'" in told
    )
    joined = AutoTokenizer.from_pretrained(ROOT / "data" / "tiny")
    apart = [
        len(joined(a)["input_ids"]) + len(joined(b)["input_ids"])
        for a, b in (("we saw ", "the film"), ("we saw", " the film"))
    ]
    assert apart[0] > len(joined("we saw the film")["input_ids"]) == apart[1]


def test_the_counts_are_those_of_training(look, tmp_path):
    """Truncation, prompts and pairs are what the token store of a run would tell."""
    tokenizer = make_tokenizer()
    rows = [(f"{'p' * (i % 40)} {i}", " c" * (i % 31 + 1), " d" * (i % 17 + 1)) for i in range(80)]
    data = folder_of(tmp_path / "data", rows, [("x", " y", " z")])
    store = prepare(
        open_dataset(str(data), "train"),
        tokenizer,
        max_length=40,
        max_prompt_length=20,
        cache_dir=tmp_path / "cache",
    )
    train = look(data)[1]["splits"]["train"]
    for key in ("rows", "prompts", "pairs", "truncated_prompts", "truncated_responses"):
        assert train[key] == store.counts[key] > 0
    assert not math.isclose(train["truncated_prompts"], train["truncated_responses"])


@pytest.mark.parametrize(
    "arguments, told",
    [
        (("nowhere.jsonl",), "error: nowhere.jsonl: no such file"),
        (("imbd",), "did you mean imdb?"),
        (("imdb", "paring=all"), "unknown key paring; did you mean pairing"),
        (("imdb", "--n", "-1"), "--n -1 must be at least 0"),
        (("imdb", "--tolerate", "2"), "--tolerate 2.0 a share between 0 and 1"),
        (
            ("imdb", "max_length=4000", "max_prompt_length=8"),
            "max_length=4000 exceeds the 128 positions",
        ),
    ],
)
def test_what_cannot_be_inspected_is_refused(look, imdb_dir, arguments, told):
    code, found, printed = look(*arguments, f"data_dir={imdb_dir}")
    assert code == 2 and told in printed and found is None and "Traceback" not in printed


def test_models_that_do_not_load_are_refused(look, tmp_path, imdb_dir, monkeypatch):
    code, _, printed = look("imdb", f"data_dir={imdb_dir}", model="x" * 300)
    assert (
        code == 2
        and "error: model.name_or_path=xxx" in printed
        and "is neither a folder here nor a name on a reachable hub" in printed
    )
    for error, told in ((OSError(), "OSError"), (ValueError("\n\nwhy\nmore"), "why")):
        monkeypatch.setattr(
            "models.AutoConfig.from_pretrained",
            lambda *args, **options: (_ for _ in ()).throw(error),
        )
        code, _, printed = look("imdb", f"data_dir={imdb_dir}")
        assert code == 2 and f"is a folder that cannot be read as such: {told}\n" in printed


def test_a_bad_row_is_no_finding_but_a_refusal(look, tmp_path):
    code, found, told = look(
        write_jsonl(
            tmp_path / "bad.jsonl",
            [*pairs([("p", " a", " b")]), {"prompt": "q", "chosen": 3, "rejected": " b"}],
        )
    )
    assert code == 2 and found is None and "bad.jsonl:2: 'chosen' is int '3'" in told
