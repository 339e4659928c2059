"""scripts/inspect_data.py: every fault in data is counted, and the counts are those of training."""

import json
import math
import re
import sys
from pathlib import Path
from unittest import mock

import pytest
from conftest import (
    ROOT,
    make_model,
    make_tokenizer,
    save_model,
    scored_rows,
    write_jsonl,
)
from script_calls import call
from test_chat import chat, joining_tokenizer
from transformers import AutoTokenizer

from preflab.batching.token_store import prepare
from preflab.readers.registry import open_dataset
from scripts import inspect_data

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
    ("[{'from': 'user'}]", " u", " vv"),
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
    "joined_prompts": 0,
    "skipped": {"chosen and rejected identical": 1},
}


def pairs(rows) -> list[dict]:
    return [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in rows]


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
            tmp_path / "report.json",
            *more,
        )
        report = tmp_path / "report.json"
        message = capsys.readouterr()
        return (
            code,
            json.loads(report.read_text()) if report.exists() else None,
            message.out + message.err,
        )

    return look


def test_every_fault_is_counted_and_what_spoils_training_is_an_error(look, tmp_path):
    code, report, message = look(
        folder_of(tmp_path / "data", BAD, [("p1", " x", " yy"), ("new", " x", " y")]), "--n", 20
    )
    train, test = report["splits"]["train"], report["splits"]["test"]
    assert code == 1 and {key: train[key] for key in BAD_COUNTS} == BAD_COUNTS
    assert test["leaked_prompts"] == 1 and test["pairs"] == 2 and train["leaked_prompts"] == 0
    levels = {
        (finding["split"], finding["what"]): finding["level"] for finding in report["findings"]
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
        in message
        and "train.jsonl:1" in message
    )
    assert (
        "error: test: 1 of 2 prompts (50.00%): they are prompts of the train split too" in message
    )
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
    _, _, message = look(folder_of(tmp_path / "data", rows, [("new", " x", " y")]), "--n", 5)
    assert (
        f"  prompt: {END}p\\x1b[31m\n  chosen: [ ][a][{END}]\n  rejected: [ ][b][{END}]\n"
        in message
        and "\x1b" not in message
    )
    assert (
        f"  prompt: {END}R\n  chosen: [ ]{'[e]' * 37} (cut, so without its end)\n  rejected: ["
        f" ][c][{END}]" in message
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
    code, report, message = look(folder_of(tmp_path / "data", train, [("new", " x", " y")]))
    assert (
        code == 0 and not report["findings"] and "error" not in message and "warning" not in message
    )
    chosen, rejected = train[0][1:]
    folder_of(tmp_path / "data", [*train, ("p0", rejected, chosen)], [("new", " x", " y")])
    code, report, message = look(tmp_path / "data")
    assert (
        code == 0
        and "warning: train: 2 of 301 pairs (0.66%): their opposite is there as well" in message
    )
    assert look(tmp_path / "data", "--tolerate", 0)[0] == 1


def test_length_bias_is_told(look, tmp_path):
    train = [(f"p{i}", " " + "a" * (2 + i % 5), " a") for i in range(40)]
    code, report, message = look(folder_of(tmp_path / "data", train, [("new", " x", " y")]))
    assert code == 0 and report["splits"]["train"]["longer_wins"]["share"] == 1
    assert "warning: train: the longer response is chosen in 100.0% of the pairs" in message


def test_scored_data_by_name_with_settings(look, imdb_dir):
    """Of each prompt four samples with scores 0.25, 0.75, 1.25, 1.75; the first two make a pair."""
    code, report, _ = look("imdb", f"data_dir={imdb_dir}")
    train = report["splits"]["train"]
    assert (
        report["splits"]["test"]["leaked_prompts"] == 8 and code == 1
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
    code, _, message = look("imdb", f"data_dir={imdb_dir}")
    assert code == 1 and "error: train: no pair in it" in message
    code, _, message = look(
        write_jsonl(
            tmp_path / "targets.jsonl", [{"prompt": f"p{i}", "chosen": " a"} for i in range(9)]
        )
    )
    assert (
        code == 0
        and "warning: train: responses to imitate (loss=sft), no pairs" in message
        and "  target: [ ][a]" in message
    )


def test_chat_messages_are_rendered_and_their_own_special_tokens_are_no_fault(look, tmp_path):
    model = save_model(tmp_path / "chat")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}" + END + "{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
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
    _, report, message = look(tmp_path / "data", model=model)
    train = report["splits"]["train"]
    assert (
        train["eos_in_prompts"] == 1
        and train["bos_doubled"] == 0
        and report["splits"]["test"]["leaked_prompts"] == 1
    )
    assert f"prompt: user:hi{END}assistant:\n" in message and f"chosen: [y][e][s][{END}]" in message
    assert f"the assistant's turn ends with '{END}', which the loss counts" in message


def test_a_generation_prompt_that_joins_an_answer_is_a_warning(look, tmp_path):
    tokenizer, model = joining_tokenizer(), make_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "chat")
    tokenizer.save_pretrained(tmp_path / "chat")
    rows = [
        {"chosen": chat(f"q{i}", "yes"), "rejected": chat(f"q{i}", answer)}
        for i, answer in enumerate(("no", "\nno", "never"))
    ]
    for split, part in (("train", rows), ("test", rows[:1])):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", part)
    lengths = ("--max_length", 100, "--max_prompt_length", 60)
    _, report, message = look(tmp_path / "data", *lengths, model=tmp_path / "chat")
    splits = report["splits"]
    assert splits["train"]["joined_prompts"] == 1 and splits["test"]["joined_prompts"] == 0
    assert "1 of 3 prompts (33.33%): the last token of their generation prompt joins" in message
    assert "train.jsonl:2" in message


def test_boundaries_where_the_tokenizer_would_join(look, tmp_path):
    """The shipped tokenizer has a token " the": a prompt that ends with a space is other tokens
    when the response follows at once."""
    data = folder_of(
        tmp_path / "data",
        [("we saw ", "the film", "a film"), ("we saw", " the film", " a film")],
        [("x", " y", " z")],
    )
    _, report, message = look(data, model="tiny")
    assert (
        report["splits"]["train"]["merged_boundaries"] >= 1
        and "such as 'we saw ' and 'the film'" in message
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
    "arguments, message",
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
def test_what_cannot_be_inspected_is_refused(look, imdb_dir, arguments, message):
    code, report, printed = look(*arguments, f"data_dir={imdb_dir}")
    assert code == 2 and message in printed and report is None and "Traceback" not in printed


def test_models_that_do_not_load_are_refused(look, tmp_path, imdb_dir, monkeypatch):
    code, _, printed = look("imdb", f"data_dir={imdb_dir}", model="x" * 300)
    assert (
        code == 2
        and "error: model.name_or_path=xxx" in printed
        and "is neither a folder here nor a name on a reachable hub" in printed
    )
    for error, message in ((OSError(), "OSError"), (ValueError("\n\nwhy\nmore"), "why")):
        monkeypatch.setattr(
            "preflab.modeling.model_source.AutoConfig.from_pretrained",
            mock.Mock(side_effect=error),
        )
        code, _, printed = look("imdb", f"data_dir={imdb_dir}")
        assert code == 2 and f"is a folder that cannot be read as such: {message}\n" in printed


def test_a_bad_row_is_no_finding_but_a_refusal(look, tmp_path):
    code, report, message = look(
        write_jsonl(
            tmp_path / "bad.jsonl",
            [*pairs([("p", " a", " b")]), {"prompt": "q", "chosen": 3, "rejected": " b"}],
        )
    )
    assert code == 2 and report is None and "bad.jsonl:2: 'chosen' is int '3'" in message


SMALL = ("--max_length", "40", "--max_prompt_length", "20")


def test_lists_are_counted_and_shown_as_lists(tmp_path, monkeypatch, capsys):
    model = save_model(tmp_path / "model")
    rows = [
        {"prompt": "one", "responses": [" a", " bb", " ccc", " d"], "scores": [1.0, 3.0, 2.0, 1.0]},
        {"prompt": "two", "responses": [" e", " ff"], "scores": [0.5, 0.25]},
        {"prompt": "three", "responses": [" g"], "scores": [1.0]},
    ]
    write_jsonl(tmp_path / "data" / "train.jsonl", rows)
    held_out = [row | {"prompt": f"not {row['prompt']}"} for row in rows]
    write_jsonl(tmp_path / "data" / "test.jsonl", held_out)
    report = tmp_path / "report.json"
    arguments = (tmp_path / "data", "--model", model, "--lists", "--n", "2", "--json", report)
    assert call(monkeypatch, inspect_data, *arguments, *SMALL) == 0
    numbers = json.loads(report.read_text(encoding="utf-8"))["splits"]["train"]
    assert (numbers["prompts"], numbers["responses"], numbers["pairs"]) == (2, 6, 5 + 1)
    assert numbers["tied_pairs"] == 1 and numbers["skipped"] == {"prompts with one response": 1}
    assert (numbers["list_length"]["min"], numbers["list_length"]["max"]) == (2, 4)
    # Of the six pairs, " bb" over " a" and " d", and " ccc" over both, are won by the longer one.
    assert numbers["longer_wins"]["share"] == pytest.approx(4 / 6)
    out = capsys.readouterr().out
    shown = re.findall(r"response (\d) of 4, score ([\d.]+)", out)
    assert shown == [("1", "3"), ("2", "2"), ("3", "1"), ("4", "1")]
    assert "chosen, score 0.5" in out and "pairs of equal score" in out
