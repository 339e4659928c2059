"""Choices under risk: from situations to pairs, and the flags of their training script."""

import json
import re
import sys
from pathlib import Path

import pytest
from conftest import (
    ROOT,
    run_command,
    run_here,
    write_jsonl,
)
from script_calls import call, records, without
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
import train_risk_preferences
from preflab.readers.registry import open_dataset
from preflab.settings.overrides import model_overrides, quoted
from scripts import dpo_data_generate


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
    "rows, message",
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
def test_bad_situations_are_named(tmp_path, monkeypatch, capsys, rows, message):
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
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "pairs.json").exists()


@pytest.mark.parametrize(
    "name, content, more, message",
    [
        ("x.json", b'[{"a": 1},\n{]', (), r"x.json:2: not JSON"),
        ("x.json", b'{"a": 1}\n{]', (), r"x.json:2: not JSON"),
        ("x.xlsx", b"no workbook", (), r"x.xlsx: no readable Excel file"),
        ("x.xls", b"old", (), r"unknown type of file; accepted: .*\.xlsx"),
        ("x.json", None, (), r"x.json: no such file"),
        (".", None, (), r": a folder, expected a file"),
        ("x" * 300, None, (), r"x{300}: File name too long"),
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
    tmp_path, monkeypatch, capsys, name, content, more, message
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
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "pairs.json").exists()


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
    message = (
        "seed=1 gradient_accumulation_steps=2 max_length=64 max_prompt_length=32 local_run_dir=o"
        " eval_every=8"
    )
    assert train_risk_preferences.translate(more)[-6:] == message.split()


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
    )  # hydra's own start needs a separate process
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
        and "none.json]: no such file" in result.stderr
        and "Traceback" not in result.stderr
    )
    assert result.stdout.startswith("python train.py model=phi2")
