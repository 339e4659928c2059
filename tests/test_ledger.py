"""What was paid for, and what a service answers, is checked whatever the flags of the interpreter
are."""

import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT

from preflab.online.ledger import Ledger
from preflab.rewards.registry import RewardError, build_reward
from utils import DataError

ROW = {
    "round": 1,
    "key": 0,
    "prompt": "p",
    "prompt_tokens": [1],
    "responses": ["a", "b"],
    "tokens": [[1], [2]],
    "scores": [0.0, 1.0],
    "cost": 1,
}
PROMPTS, RESPONSES = ["p", "q"], [["a", "b"], ["c", "d"]]
LABELS = {
    "scores": [[0.0, 1.0], [1, 2]],
    "pairs": [[1, 0], None],
    "labels_bought": 1,
    "room": None,
}


def write_ledger(path, *rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"cost": -50}, r"cost is -50 \(accepted: whole numbers from 1\)"),
        ({"cost": 0}, "cost is 0"),
        ({"cost": True}, "cost is True"),
        ({"cost": 1.0}, "cost is 1.0"),
        ({"cost": "1"}, "cost is '1'"),
        ({"round": -1}, "round is -1"),
        ({"scores": [1.0]}, "not lists of the same length"),
        ({"responses": "ab"}, "not lists of the same length"),
        ({"tokens": None}, "not lists of the same length"),
        ({"scores": [1.0, math.nan]}, r"scores are \[1.0, nan\] \(accepted: finite numbers\)"),
        ({"scores": [1.0, True]}, "scores are"),
    ],
)
def test_a_line_that_cannot_have_been_bought_is_refused(tmp_path, change, message):
    path = tmp_path / "labels.jsonl"
    write_ledger(path, ROW, ROW | change)
    with pytest.raises(DataError, match=rf"labels\.jsonl:2: expected a bought label.*{message}"):
        Ledger(path, 5)
    assert len(path.read_text().splitlines()) == 2  # the file is left for its owner to restore


def test_a_line_without_a_column_or_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "labels.jsonl"
    write_ledger(path, {key: value for key, value in ROW.items() if key != "cost"})
    with pytest.raises(DataError, match="the line has no cost"):
        Ledger(path, 5)
    path.write_bytes(b'{"prompt": "\xff"}\n')
    with pytest.raises(DataError, match="the line is not JSON"):
        Ledger(path, 5)


@pytest.mark.parametrize(
    "change",
    [
        {"scores": [[0.0, 1.0]]},
        {"scores": [[0.0], [1.0]]},
        {"scores": [[0.0, 1.0], [math.inf, 0.0]]},
        {"scores": [["0", 1.0], [1.0, 0.0]]},
        {"scores": {"p": [0.0, 1.0]}},
        {"pairs": [[1, 0]]},
        {"pairs": [[0, 0], None]},
        {"pairs": [[2, 0], None]},
        {"pairs": [[-1, 0], None]},
        {"pairs": [[0, 1, 1], None]},
        {"pairs": [[True, False], None]},
        {"labels_bought": -1},
        {"labels_bought": "1"},
        {"room": -1},
        {"room": 0.5},
    ],
)
def test_labels_of_a_service_that_cannot_be_are_an_error(change, http_server):
    server = http_server([lambda _: LABELS | change])
    score = build_reward({"name": "http", "url": server.url, "retries": 0})
    with pytest.raises(RewardError, match=r'/train answered .*; expected .*"pairs"'):
        score.learn("run", 1, PROMPTS, RESPONSES)


def test_labels_of_a_service_arrive_as_they_are(http_server):
    server = http_server([lambda _: LABELS])
    score = build_reward({"name": "http", "url": server.url, "retries": 0})
    assert score.learn("run", 1, PROMPTS, RESPONSES) == LABELS
    assert server.received[0]["responses"] == RESPONSES and server.received[0]["round"] == 1


OPTIMIZED = """
import sys
from pathlib import Path

from preflab.online.ledger import Ledger
from preflab.rewards.registry import RewardError, build_reward
from utils import DataError

path, url = sys.argv[1:]
try:
    print("affords", Ledger(Path(path), 5).affords(1))
except DataError as error:
    print("refused:", error)
score = build_reward({"name": "http", "url": url, "retries": 0})
try:
    print("scores", score(["p"], ["a"]))
except RewardError as error:
    print("refused:", error)
try:
    print("labels", score.learn("run", 1, ["p"], [["a", "b"]]))
except RewardError as error:
    print("refused:", error)
"""


def test_the_checks_stay_under_python_dash_o(tmp_path, http_server):
    """With `assert` for these checks, a line of cost -50 let a budget of 5 afford 55 labels."""
    path = tmp_path / "labels.jsonl"
    write_ledger(path, ROW | {"cost": -50})
    server = http_server([lambda _: {"scores": ["1"], "pairs": [[0, 0]], "labels_bought": 0}])
    command = [sys.executable, "-O", "-c", OPTIMIZED, str(path), server.url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == ["refused"] * 3
    assert "cost is -50" in done.stdout
