"""Rewards, judges and files get the messages of a conversation, not text without its markers."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from conftest import (
    ROOT,
    final_weights,
    make_model,
    read_rows,
    run_here,
    same_weights,
    save_model,
    small_run,
    write_jsonl,
)
from script_calls import call
from test_chat import CHATML, chat, tokenizer_with
from transformers import AutoConfig, AutoModelForSequenceClassification

from preflab.batching.chat import (
    PromptText,
    conversation_ids,
    messages_of_prompt,
    turn_end,
)
from preflab.evaluation.win_rates import pair_up
from preflab.online.service import Predict, _problem_of_messages, _prompts_of
from preflab.rewards.http_client import _messages
from preflab.rewards.models import _chat_ids
from preflab.rewards.registry import build_reward
from scripts import build_preferences, score_rewards
from utils import load_module

SEES = """
import json
from rewards import register_reward

@register_reward("sees", reads_messages={reads})
def sees(*, unit="words"):
    def score(prompts, responses):
        with open({path!r}, "a") as f:
            f.writelines(json.dumps(prompt) + "\\n" for prompt in prompts)
        return [float(len(response)) for response in responses]
    return score
"""


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat") / "model"
    tokenizer, model = tokenizer_with(CHATML), make_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


ROWS = [
    {
        "chosen": chat("hi", "ho", f"and {i}?", "yes"),
        "rejected": chat("hi", "ho", f"and {i}?", "no"),
    }
    for i in range(24)
]


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("function", ["train", "online"])
def test_a_reward_sees_the_conversation(chat_model, tmp_path, reads, function):
    seen = tmp_path / "seen.jsonl"
    (tmp_path / "sees.py").write_text(SEES.format(reads=reads, path=str(seen)))
    load_module(str(tmp_path / "sees.py"), "reward.module")
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    more = ["n_examples=8"]
    if function == "online":
        more = ["function=online", "loss=dpo", "online.rounds=1", "online.eval_every=1"]
    run_here(
        *small_run(
            chat_model, tmp_path, tmp_path / "run", f"datasets=[{data}]", "test_fraction=0.3",
            "reward=length", "reward.name=sees", *more,
        )
    )  # fmt: skip
    prompts = read_rows(seen)
    if reads:
        assert all([m["role"] for m in p] == ["user", "assistant", "user"] for p in prompts)
        assert prompts[0][:2] == chat("hi", "ho")
    else:
        assert prompts[0].startswith("user: hi\n\nassistant: ho\n\nuser: and ")
    row = read_rows(tmp_path / "run" / "samples.jsonl")[0]
    assert row["messages"][:2] == chat("hi", "ho")
    assert row["prompt"] == str(PromptText(row["messages"]))
    assert row["chosen"] == "yes"


def test_a_chat_reward_model_gets_the_ids_it_was_trained_on(tmp_path):
    """All messages by the template, as in training on the whole conversation."""
    tokenizer = tokenizer_with(CHATML)
    prompt = PromptText(chat("hi", "ho", "and?"))
    whole = tokenizer.apply_chat_template(chat("hi", "ho", "and?", "yes"), tokenize=False)
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert _chat_ids(tokenizer, prompt, "yes", None) == expected
    assert _chat_ids(tokenizer, "hi", "yes", 4) == expected[-4:]
    config = AutoConfig.from_pretrained(save_model(tmp_path / "lm"), num_labels=1)
    config.vocab_size = len(tokenizer)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    score = build_reward(
        {"name": "reward_model", "path": str(tmp_path / "rm"), "chat_template": True}
    )
    [whole], [last], [as_text] = (score([one], ["yes"]) for one in (prompt, "and?", str(prompt)))
    assert len({whole, last, as_text}) == 3


def test_messages_travel_over_http():
    prompts = [PromptText(chat("hi", "ho", "and?")), "text"]
    payload = _messages(prompts)
    assert payload["messages"] == [chat("hi", "ho", "and?"), chat("text")]
    assert _messages(["text"]) == {}
    request = Predict(prompts=list(map(str, prompts)), responses=["a", "b"], **payload)
    received = _prompts_of(request)
    assert [messages_of_prompt(prompt) for prompt in received] == payload["messages"]
    assert received == prompts and _problem_of_messages(request) is None
    request.messages = [[{"role": "user"}], []]
    assert "no 'content'" in _problem_of_messages(request)


# ------------------------------------------------------------------------------------------ scripts


def build(chat_model, folder, prompts, *more):
    return [
        "scripts/build_preferences.py", "--prompts", prompts, "--output", folder / "made",
        "--k", 2, "--n_test", 2, "model=blank_model", f"model.name_or_path={chat_model}",
        "reward=length", "reward.unit=characters", "max_new_tokens=6", "max_length=64",
        "max_prompt_length=48", *more,
    ]  # fmt: skip


def test_prompts_of_messages_are_sampled_and_the_file_trains(chat_model, tmp_path, monkeypatch):
    prompts = write_jsonl(
        tmp_path / "prompts.jsonl",
        [{"prompt": chat("hi", "ho", f"{i}?")} for i in range(8)],
    )
    assert call(monkeypatch, build_preferences, *build(chat_model, tmp_path, prompts)[1:]) == 0
    rows = read_rows(tmp_path / "made-train.jsonl")
    assert len(rows) == 12 and rows[0]["prompt"] == chat("hi", "ho", "0?")
    assert not (tmp_path / "made-partial.jsonl").exists()
    summary = run_here(
        *small_run(
            chat_model, tmp_path, tmp_path / "run", f"datasets=[{tmp_path / 'made-train.jsonl'}]",
            "test_fraction=0.5", "debug=true", "sample_during_eval=false", "loss=sft", "n_epochs=1",
        )
    )  # fmt: skip
    assert summary


def test_a_killed_script_continues_where_it_was(chat_model, tmp_path, monkeypatch, capsys):
    prompts = write_jsonl(
        tmp_path / "prompts.jsonl", [{"prompt": f"question {i}"} for i in range(140)]
    )
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    whole = build(chat_model, tmp_path / "whole", prompts)[1:]
    assert call(monkeypatch, build_preferences, *whole) == 0
    script, *arguments = build(chat_model, tmp_path / "killed", prompts)
    child = subprocess.Popen(
        [sys.executable, str(ROOT / script), *map(str, arguments)],
        cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    partial = tmp_path / "killed" / "made-partial.jsonl"
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 64):
        assert child.poll() is None
        time.sleep(0.005)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    with open(partial, "ab") as f:
        f.write(b'{"prompt": "half a li')
    assert call(monkeypatch, build_preferences, *arguments, "temperature=0.5") == 2
    assert "begun with other settings" in capsys.readouterr().err
    assert call(monkeypatch, build_preferences, *arguments) == 0
    for split in ("train", "test"):
        killed, whole = (
            (tmp_path / folder / f"made-{split}.jsonl").read_bytes()
            for folder in ("killed", "whole")
        )
        assert killed == whole


def test_conversations_are_scored_by_their_messages(tmp_path, monkeypatch):
    rows = [
        {"prompt": chat("hi", "ho", "and?"), "response": "one two"},
        {"prompt": "text", "messages": chat("hi", "ho", "and?"), "response": "three"},
        {"prompt": "text", "response": "four"},
    ]
    path = write_jsonl(tmp_path / "outs.jsonl", rows)
    seen = tmp_path / "seen.jsonl"
    (tmp_path / "sees.py").write_text(SEES.format(reads=True, path=str(seen)))
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "sees.yaml").write_text(f"name: sees\nmodule: {tmp_path / 'sees.py'}\n")
    arguments = ("--fname", path, "--reward", "sees", "--config-dir", tmp_path)
    assert call(monkeypatch, score_rewards, *arguments) == 0
    assert read_rows(seen) == [chat("hi", "ho", "and?")] * 2 + [chat("text")]
    scored = read_rows(tmp_path / "outs.scored.jsonl")
    assert [row["score"] for row in scored] == [7.0, 5.0, 4.0]
    assert json.loads((tmp_path / "outs.scored.summary.json").read_text())["responses"] == 3


def test_an_online_run_on_conversations_is_stopped_and_continued(chat_model, tmp_path):
    """The pool and the replay of a discriminator hold prompts, which are conversations."""
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)

    def go(name, rounds):
        return run_here(
            *small_run(
                chat_model, tmp_path, tmp_path / name, f"datasets=[{data}]", "test_fraction=0.3",
                "function=online", "loss=dpo", "reward=length", "reward.unit=characters",
                "online.discriminator=bradley_terry", "online.initial_labels=4",
                "online.relabel_every=4", "online.budget=12", f"online.rounds={rounds}",
                "online.eval_every=1", "online.save_every=1", "sample_during_eval=false",
            )
        )  # fmt: skip

    go("whole", 4)
    go("stopped", 2)
    go("stopped", 4)
    assert same_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "stopped"))


def test_a_judge_by_reward_gets_the_messages(tmp_path):
    rows = [{"prompt": "text", "messages": chat("hi", "ho", "and?"), "policy": "a", "chosen": "b"}]
    [pair] = pair_up(rows, "chosen")
    assert messages_of_prompt(pair["prompt"]) == chat("hi", "ho", "and?")
    assert json.loads(json.dumps(pair["prompt"])) == str(PromptText(chat("hi", "ho", "and?")))


def test_a_reward_model_trained_here_is_scored_on_the_ids_it_was_trained_on(chat_model, tmp_path):
    data = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    command = small_run(
        chat_model, tmp_path, tmp_path / "rm", f"datasets=[{data}]", "test_fraction=0.3",
        "loss=bradley_terry", "n_examples=8",
    )  # fmt: skip
    run_here(*command)
    tokenizer = tokenizer_with(CHATML)
    prompt = PromptText(chat("hi", "ho", "and 1?"))
    before, answer = conversation_ids(tokenizer, prompt.messages, "yes")
    path = str(tmp_path / "rm" / "LATEST" / "hf")
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    body = model.model(input_ids=torch.tensor([before + answer])).last_hidden_state
    expected = float(model.score(body)[0, -1])
    for chat_template in (True, False):
        score = build_reward({"name": "reward_model", "path": path, "chat_template": chat_template})
        assert abs(score([prompt], ["yes"])[0] - expected) < 1e-5


def test_an_empty_answer_is_the_end_alone():
    tokenizer = tokenizer_with(CHATML)
    assert conversation_ids(tokenizer, chat("hi"), "")[1] == [turn_end(tokenizer).token]
