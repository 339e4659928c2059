"""scripts/score_rewards.py: it scores a file with a reward, or says which line is wrong."""

import json
import math
import re
import subprocess
import sys

import pytest
from conftest import (
    ROOT,
    read_rows,
    run_command,
    write_jsonl,
)
from omegaconf import OmegaConf

from preflab.rewards.arithmetic import solution
from scripts import score_rewards
from utils import DataError


def score_file(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["score_rewards.py", *map(str, arguments)])
    score_rewards.main()


def test_score_rewards_writes_scores_and_their_mean_beside_the_file(tmp_path):
    rows = [
        {"prompt": "p", "response": "the data", "sample": 3},
        {"question": "q", "response": ""},
        {"prompt": "p", "response": "hope, naïve\u2028 safe 東"},
    ]
    path = write_jsonl(tmp_path / "outs.jsonl", rows)
    path.write_text(path.read_text() + "\n\n")
    command = ["scripts/score_rewards.py", "--fname", str(path), "--reward", "bagofwords"]
    # Taggers are loaded only by the rewards that use them.
    code = (
        f"import runpy, sys; sys.argv = {command}; runpy.run_path(sys.argv[0], run_name='__main__')"
        "; assert not {'nltk', 'spacy'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    scored = [
        json.loads(line)
        for line in (tmp_path / "outs.scored.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]
    numbers = [(1.0, 2), (0.0, 0), (2.0, 4)]
    assert scored == [
        row | {"score": score, "length": length}
        for row, (score, length) in zip(rows, numbers, strict=True)
    ]
    summary = json.loads((tmp_path / "outs.scored.summary.json").read_text())
    assert (
        summary["mean"] == 1.0
        and summary["standard_error"] == pytest.approx(1 / math.sqrt(3))
        and summary["mean_length"] == 2.0
        and summary["responses"] == 3
    )
    assert summary["reward"]["name"] == "bagofwords"
    assert (
        done.stdout
        == f"{tmp_path / 'outs.scored.jsonl'}: 3 responses, bagofwords 1 ± 0.5774, mean length 2.0"
        " words\n"
    )


def test_score_rewards_reads_a_list_takes_settings_and_scores_in_parts(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "outs.json").write_text(
        json.dumps([{"prompt": "p", "response": "x" * i} for i in range(5)]), encoding="utf-8"
    )
    monkeypatch.setattr(score_rewards, "ROWS_AT_A_TIME", 2)
    score_file(
        monkeypatch,
        "--fname",
        tmp_path / "outs.json",
        "--reward",
        "length",
        "--output",
        tmp_path / "there" / "s.jsonl",
        "reward.unit=characters",
    )
    assert [row["score"] for row in read_rows(tmp_path / "there" / "s.jsonl")] == [0, 1, 2, 3, 4]
    assert (
        json.loads((tmp_path / "there" / "s.summary.json").read_text())["reward"]["unit"]
        == "characters"
    )
    assert "5 responses, length 2 ± 0.7071, mean length 0.8 words" in capsys.readouterr().out
    assert not list(tmp_path.glob("*scored*"))


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"prompt": "p", "response": "r"}\n\n{"prompt": "p"}', ":3: expected"),
        ('{"prompt": "p", "response": "r"}\n{"prompt"', ":2: not JSON"),
        ('{"prompt": 1, "response": "r"}', ":1: expected"),
        ('[{"prompt": "p", "response": "r"}, {"response": "r"}]', ": entry 2: expected"),
        ('["a"]', ": entry 1: expected"),
        ('[\n{"prompt"]', ":2: not JSON"),
        ("", "no generations"),
        ("[]", "no generations"),
        ('{"question": "p", "response": "r", "score": 1}', ":1: has a score already"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_score_rewards_says_which_line_is_wrong(content, message, tmp_path):
    path = tmp_path / "outs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(message)):
        score_rewards.read_generations(path)


def test_score_rewards_that_fails_leaves_nothing(tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "outs.jsonl", [{"prompt": "p", "response": "r"}])
    for arguments, message in (
        (("--fname", path, "--reward", "bagofword"), "did you mean bagofwords"),
        (("--fname", path, "--reward", "length", "reward.unti=words"), "did you mean reward.unit"),
        (
            ("--fname", path, "--reward", "length", "reward.unit=miles"),
            "accepted: words, characters",
        ),
        (("--fname", path, "--reward", "length", "--output", path), "give another name"),
        (("--fname", tmp_path / "none.jsonl", "--reward", "length"), "no such file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            score_file(monkeypatch, *arguments)
        assert stopped.value.code == 2 and message in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["outs.jsonl"]
    assert OmegaConf.create(read_rows(path)[0]) == {"prompt": "p", "response": "r"}


def test_prompts_for_math_are_different_expressions(tmp_path):
    run_command("scripts/make_math_prompts.py", "--output", tmp_path / "math.jsonl", "--n", 300)
    prompts = [row["prompt"] for row in read_rows(tmp_path / "math.jsonl")]
    assert len(set(prompts)) == len(prompts) == 300 and all(
        solution(prompt.removesuffix(" = ")) for prompt in prompts
    )
