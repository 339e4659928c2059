"""Rewards, judges and files get the messages of a conversation, not text without its markers."""

import json
import os
import shutil
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
from test_chat import CHATML, LLAMA3, TOOLS, chat, tokenizer_with
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from preflab.batching.chat import (
    PromptText,
    chat_of_prompt,
    conversation_ids,
    prompt_columns,
    prompt_key,
    prompt_of_columns,
)
from preflab.batching.chat_template import ChatSettings
from preflab.batching.token_store import prepare
from preflab.batching.turn_ends import turn_end
from preflab.evaluation.win_rates import pair_up
from preflab.modeling.generation import sample
from preflab.online.ledger import Ledger, ledger_row
from preflab.online.rollouts import Rollouts
from preflab.online.service import (
    Predict,
    Train,
    _problem_of_messages,
    _prompts_of,
    _rollouts_of,
)
from preflab.readers.messages import Chat
from preflab.readers.registry import open_dataset
from preflab.rewards.http_client import conversation_fields
from preflab.rewards.models import _chat_ids, _joined, _own_chat, _own_ids
from preflab.rewards.registry import REWARDS, RewardError, build_reward, register_reward
from scripts import build_preferences, score_rewards
from scripts.partial_file import PartialFile
from utils import TRAINING_CONFIG, DataError, load_module

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
    payload = conversation_fields(prompts)
    assert payload["messages"] == [chat("hi", "ho", "and?"), chat("text")]
    assert conversation_fields(["text"]) == {}
    request = Predict(prompts=list(map(str, prompts)), responses=["a", "b"], **payload)
    received = _prompts_of(request)
    assert [chat_of_prompt(prompt).messages for prompt in received] == payload["messages"]
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


def test_prompts_that_are_too_long_are_cut_as_in_evaluations(
    chat_model, tmp_path, monkeypatch, capsys
):
    tokenizer = tokenizer_with(CHATML)
    texts = ["a short\u2028one", "the long one " * 9, "p", chat("a long one " * 9), chat("q")]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": text} for text in texts])
    asked = []
    monkeypatch.setattr(
        build_preferences,
        "sample",
        lambda *arguments, **more: asked.extend(arguments[2]) or sample(*arguments, **more),
    )
    arguments = build(chat_model, tmp_path, prompts)[1:]
    assert call(monkeypatch, build_preferences, *arguments) == 0
    assert "2 of 5 prompts are longer than max_prompt_length=48 tokens" in capsys.readouterr().out
    bos, generation = tokenizer.bos_token_id, "<|im_start|>assistant\n"
    _, long, short, conversation, _ = asked[::2]
    ids = tokenizer(texts[1], add_special_tokens=False)["input_ids"]
    assert long == [bos, *ids[len(ids) - 47 :]] and short == [bos, *tokenizer("p")["input_ids"]]
    assert len(conversation) == 48 and tokenizer.decode(conversation).endswith(generation)
    assert conversation[0] != bos  # this template writes none
    written = read_rows(tmp_path / "made-train.jsonl") + read_rows(tmp_path / "made-test.jsonl")
    assert [row["prompt"] for row in written[::2]] == texts
    short = [
        one.replace("max_prompt_length=48", "max_prompt_length=4") for one in map(str, arguments)
    ]
    assert call(monkeypatch, build_preferences, *short) == 2
    assert "does not hold what the chat template writes before" in capsys.readouterr().err


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
        {"prompt": chat("hi"), "response": chat("hi", "five")},
        {"question": "hi", "response": {"role": "assistant", "content": "six"}},
    ]
    path = write_jsonl(tmp_path / "outs.jsonl", rows)
    seen = tmp_path / "seen.jsonl"
    (tmp_path / "sees.py").write_text(SEES.format(reads=True, path=str(seen)))
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "sees.yaml").write_text(f"name: sees\nmodule: {tmp_path / 'sees.py'}\n")
    arguments = ("--fname", path, "--reward", "sees", "--config-dir", tmp_path)
    assert call(monkeypatch, score_rewards, *arguments) == 0
    assert read_rows(seen) == [chat("hi", "ho", "and?")] * 2 + [chat("text")] + [chat("hi")] * 2
    scored = read_rows(tmp_path / "outs.scored.jsonl")
    assert [row["score"] for row in scored] == [7.0, 5.0, 4.0, 4.0, 3.0]
    assert json.loads((tmp_path / "outs.scored.summary.json").read_text())["responses"] == 5


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
    assert pair["prompt"].messages == chat("hi", "ho", "and?")
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


# -------------------------------------------------------------------------------- tools and options

CLOCK = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]


def with_tools(*texts) -> PromptText:
    return PromptText(chat(*texts), CLOCK, {"enable_thinking": False})


def test_tools_and_options_travel_with_a_prompt(tmp_path):
    """In files, in checkpoints, over HTTP, in the ledger, and to rewards that read chats."""
    prompt, other = with_tools("hi", "ho", "time?"), PromptText(chat("hi", "ho", "time?"))
    assert prompt == other and prompt_key(prompt) != prompt_key(other)
    written = json.loads(json.dumps(prompt_columns(prompt)))
    assert written["tools"] == CLOCK and prompt_of_columns(written).chat == prompt.chat
    assert prompt_columns(other).keys() == {"prompt", "messages"}
    torch.save({"pool": [prompt]}, tmp_path / "state.pt")
    with torch.serialization.safe_globals([PromptText]):
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert state["pool"][0].chat == prompt.chat
    request = Predict(
        prompts=[prompt, "text"], responses=["a", "b"], **conversation_fields([prompt, "text"])
    )
    assert _problem_of_messages(request) is None
    assert _prompts_of(request)[0].chat == prompt.chat
    for broken in ({"tools": [CLOCK]}, {"messages": None}):
        assert _problem_of_messages(request.model_copy(update=broken))
    keys = [
        _rollouts_of(
            Train(id="1", round=1, prompts=[one], responses=[["a", "b"]],
                  **conversation_fields([one])),
            1,
        ).keys
        for one in (prompt, other)
    ]  # fmt: skip
    assert keys[0] != keys[1]
    rollouts = Rollouts(1, [0], [prompt], [[1]], [["a", "b"]], [[[2], [3]]])
    ledger = Ledger(tmp_path / "labels.jsonl", None)
    ledger.buy([ledger_row(rollouts, 0, (0, 1))], lambda prompts, responses: [1.0, 2.0])
    [row] = Ledger(tmp_path / "labels.jsonl", None).rows
    assert row["prompt"].chat == prompt.chat


def test_a_reward_that_reads_chats_gets_tools_and_options():
    seen = []

    @register_reward("reads_chats", reads_chats=True)
    def reads_chats():
        return lambda prompts, responses: [seen.append(one) or 0.0 for one in prompts]

    try:
        build_reward({"name": "reads_chats"})([with_tools("time?"), "text"], ["a", "b"])
    finally:
        del REWARDS["reads_chats"]
    assert seen == [with_tools("time?").chat, Chat(chat("text"))]


def test_a_file_of_build_preferences_trains_with_the_ids_it_was_sampled_with(
    tmp_path, monkeypatch, capsys
):
    # The last answer begins as the generation prompt ends, as in Qwen3's template.
    template = TOOLS.replace(
        "{% else %}{{ m['content'] }}",
        "{% else %}{% if loop.last and m['role'] == 'assistant' and enable_thinking is false %}"
        "<think></think>{% endif %}{{ m['content'] }}",
    )
    tokenizer, model = tokenizer_with(template), make_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.config.max_position_embeddings = 320
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"prompt": chat(f"{i}?"), "system": "Be.", "tools": json.dumps(CLOCK)} for i in range(3)
    ]
    rows += [
        {"prompt": json.dumps(chat("a", "b", "0?"))},
        {"prompt": chat("0?"), "chat_template_kwargs": {"enable_thinking": True}},
        {"prompt": "text"},
    ]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [*rows, rows[0]])
    sampled = []
    monkeypatch.setattr(
        build_preferences,
        "sample",
        lambda *arguments, **more: sampled.extend(arguments[2]) or sample(*arguments, **more),
    )
    arguments = build(
        tmp_path / "model", tmp_path, prompts, "chat_template_kwargs={enable_thinking: false}",
        "max_length=320", "max_prompt_length=300",
    )[1:]  # fmt: skip
    assert call(monkeypatch, build_preferences, *arguments) == 0
    (tmp_path / "made").mkdir()
    for split in ("train", "test"):
        (tmp_path / f"made-{split}.jsonl").rename(tmp_path / "made" / f"{split}.jsonl")
    trained = []
    for split in ("train", "test"):
        store = prepare(
            open_dataset(str(tmp_path / "made"), split), tokenizer_with(template),
            max_length=320, max_prompt_length=300, cache_dir=tmp_path / "cache",
        )  # fmt: skip
        trained += [store.tokens[begin:end].tolist() for begin, end in store.prompts]
    assert trained == sampled[::2] and len(trained) == len(rows)  # two responses to each
    assert tokenizer.decode(trained[0]).count("clock") == 1
    # a changed input under the partial output is noticed
    done = PartialFile(tmp_path / "partial.jsonl", {"model": {"archive": str(prompts)}})
    done.add([{"a": 1}])
    del done  # which holds the file
    assert PartialFile(tmp_path / "partial.jsonl", {"model": {"archive": str(prompts)}}).rows
    prompts.write_text(prompts.read_text() + "\n")
    with pytest.raises(DataError, match=r"other contents of .*prompts\.jsonl"):
        PartialFile(tmp_path / "partial.jsonl", {"model": {"archive": str(prompts)}})


def test_reward_models_get_tools_options_and_keep_bos(tmp_path):
    tokenizer = tokenizer_with(TOOLS)
    prompt = with_tools("time?")
    whole = tokenizer.apply_chat_template(
        chat("time?", "noon"), tools=CLOCK, enable_thinking=False, tokenize=False
    )
    expected = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert _chat_ids(tokenizer, prompt, "noon", None) == expected
    # as in training: without what the template writes after the end of the turn
    thought = "<think></think>noon"  # the template's generation prompt begins so
    before, answer = conversation_ids(tokenizer, prompt.chat, thought)
    assert _own_ids(tokenizer, prompt, thought, None) == before + answer
    config = tmp_path / TRAINING_CONFIG
    config.write_text("chat_template_kwargs: {enable_thinking: false}\nchat_date: '2031-12-05'\n")
    assert _own_chat(config) == ChatSettings({"enable_thinking": False}, "2031-12-05")
    tokenizer = tokenizer_with(LLAMA3)
    for tokenise in (_chat_ids, _own_ids):
        ids = tokenise(tokenizer, PromptText(chat("a long question")), "yes", None)
        assert ids[0] == tokenizer.bos_token_id
        assert tokenise(tokenizer, PromptText(chat("a long question")), "yes", 9) == (
            ids[:1] + ids[-8:]
        )


def test_conversations_are_scored_by_the_template_of_a_language_model(chat_model, tmp_path):
    """contrastivedistill: the mean log-prob of all tokens but the first, by a plain forward."""
    other = tmp_path / "other"
    shutil.copytree(chat_model, other)
    model = make_model("llama", seed=1)
    model.resize_token_embeddings(len(tokenizer_with(CHATML)))
    model.save_pretrained(other)
    settings = {"name": "contrastivedistill", "large": str(chat_model), "small": str(other)}
    prompt = PromptText(chat("hi", "ho", "and?"))
    before, answer = conversation_ids(tokenizer_with(CHATML), prompt.chat, "yes")
    ids = before + answer
    means = []
    for folder in (chat_model, other):
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([ids])).logits[0]
        logps = logits.detach().log_softmax(-1)[range(len(ids) - 1), ids[1:]]
        means.append(float(logps.mean()))
    [score] = build_reward(settings)([prompt], ["yes"])
    assert abs(score - (means[0] - means[1])) < 1e-5
    assert abs(build_reward(settings)([str(prompt)], ["yes"])[0] - score) > 1e-4
    (other / "chat_template.jinja").unlink()
    with pytest.raises(RewardError, match=r"reward\.large has a chat template and reward\.small"):
        build_reward(settings)([prompt], ["yes"])
    assert _joined(prompt, "yes") == "user: hi\n\nassistant: ho\n\nuser: and?\n\nassistant: yes"
    assert _joined("text", " yes") == "text yes"
    # Without a template in either, both read the roles and the answer's too.
    (chat_model_copy := tmp_path / "third").mkdir()
    for file in chat_model.iterdir():
        if file.name != "chat_template.jinja":
            shutil.copy(file, chat_model_copy)
    settings = {**settings, "large": str(chat_model_copy)}
    before = "user: hi\n\nassistant: ho\n\nuser: and?\n\nassistant: "
    [score], [other_score] = (build_reward(settings)([one], ["yes"]) for one in (prompt, before))
    assert abs(score - other_score) < 1e-6
