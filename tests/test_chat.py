"""Conversations: the ids are those of the model's chat template, and the loss counts what the
assistant would have to generate, the end of its turn included.

The templates are miniatures with the features of the families that they are named after.
"""

import datetime
import json
import time
from types import SimpleNamespace

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import (
    make_model,
    make_tokenizer,
    run_command,
    run_here,
    save_model,
    small_run,
    write_jsonl,
)
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from preflab.batching.chat import conversation_ids, conversations_ids, response_text
from preflab.batching.chat_template import ChatSettings, set_chat
from preflab.batching.collate import collate
from preflab.batching.examples import PreferenceData, prompt_to_sample
from preflab.batching.packed_models import enable
from preflab.batching.packing import Layout
from preflab.batching.token_store import prepare, tokenizer_hash
from preflab.batching.turn_ends import end_of_turn, turn_end
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.modeling.response_ends import response_ends
from preflab.readers.messages import Chat
from preflab.readers.registry import open_dataset
from utils import ConfigError, DataError, PrefLabError

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "<start_of_turn>{{ role }}\n{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI3 = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "[INST] {{ m['content'] }} [/INST]{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}"
    "{% endfor %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPACE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }} ASSISTANT:"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
DATED = "{{ strftime_now('%d %b %Y') }}\n" + CHATML
REASONING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% set c = m['content'] %}{% if m['role'] == 'assistant' and not loop.last and '</think>' in c"
    " %}{% set c = c.split('</think>')[-1] %}{% endif %}{{ c }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
TOOLS = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['tool_calls'] %}"
    "{{ m['tool_calls'] | tojson }}{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}"
    "<think></think>{% endif %}{% endif %}"
)
MARKERS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|end|>",
    "[INST]",
    "[/INST]",
]
EOS = make_tokenizer().eos_token
# Template, and what ends a response.
FAMILIES = {
    "chatml": (CHATML, "<|im_end|>"),
    "llama3": (LLAMA3, "<|eot_id|>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "phi3": (PHI3, "<|end|>"),
    "mistral": (MISTRAL, EOS),
    "zephyr": (ZEPHYR, EOS),
    "space": (SPACE, EOS),
    "dated": (DATED, "<|im_end|>"),
    "reasoning": (REASONING, "<|im_end|>"),
}


def tokenizer_with(template: str):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    tokenizer.chat_template = template
    return tokenizer


def chat(*texts):
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def records_of(rows, tmp_path, **options):
    """Of both splits, in the order of the file."""
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    both = [
        record
        for split in ("train", "test")
        for record in open_dataset(path, split, **options).records()
    ]
    return sorted(both, key=lambda record: int(record.source.rpartition(":")[2]))


# --------------------------------------------------------------------------------------------- ids


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("history", [("hi",), ("hi", "<think>hm</think>ho", "and?")])
def test_ids_are_those_of_the_template_up_to_the_end_of_the_turn(family, history):
    template, end = FAMILIES[family]
    tokenizer = tokenizer_with(template)
    prompt, response = conversation_ids(tokenizer, chat(*history), "fine, thanks")
    tokenizer.chat_template = template.replace("strftime_now('%d %b %Y')", "'26 Jul 2024'")
    whole = tokenizer.apply_chat_template(chat(*history, "fine, thanks"), tokenize=False)
    assert tokenizer.decode(prompt) == tokenizer.apply_chat_template(
        chat(*history), tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert (prompt + response) == ids[: len(prompt) + len(response)]
    assert tokenizer.decode(response).strip() == "fine, thanks" + end
    after = tokenizer.decode(ids[len(prompt) + len(response) :])
    assert after.replace(EOS, "").strip() == ""
    assert prompt.count(tokenizer.bos_token_id) == whole.split("fine, thanks")[0].count(EOS)


def test_an_end_that_is_no_token_is_scored_and_eos_follows():
    tokenizer = tokenizer_with(PLAIN.replace("}}\n", "}}</turn>\n"))
    _, response = conversation_ids(tokenizer, chat("hi"), "ho")
    assert tokenizer.decode(response) == f" ho</turn>{EOS}"
    assert end_of_turn(tokenizer) is None and turn_end(tokenizer).suffix == "</turn>\n"
    assert response_text(tokenizer, response) == " ho"
    assert response_text(tokenizer, response[:-1]) == " ho"  # as sampling ends it
    assert response_text(tokenizer, response[:-2]) == " ho</turn"  # cut
    turn = turn_end(tokenizer)
    completed = [turn.completes(tokenizer, response[:n]) for n in range(len(response) + 1)]
    assert completed == [n == len(response) - 1 for n in range(len(response) + 1)]
    # a token that joins the end with what stands before it
    tokenizer = joining_tokenizer(PLAIN.replace("}}\n", "}}\nEnd"))
    ids = tokenizer("ho\n\nEnd?", add_special_tokens=False)["input_ids"]
    assert turn_end(tokenizer).completes(tokenizer, ids[:-1])
    assert response_text(tokenizer, ids[:-1]) == "ho\n"


@pytest.mark.parametrize(
    "template",
    [
        # the generation prompt ends in other text than the conversation has
        CHATML.replace("assistant\n{% endif %}", "assistant\nSure: {% endif %}"),
        # the last question is written in another way once it has an answer
        "{% for m in messages %}{% if loop.last and m['role'] == 'user' %}?{% endif %}"
        "{{ m['content'] }}<|im_end|>{% endfor %}",
    ],
)
def test_a_template_that_cannot_be_split_is_refused_with_the_row(template):
    tokenizer = tokenizer_with(template)
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the chat template cannot be split"):
        conversations_ids(tokenizer, [(Chat(chat("hi")), ["ho"], "rows.jsonl:3")])


def joining_tokenizer(template=CHATML):
    """Of bytes, with one token for two newlines, and one for a newline and an h."""
    tokenizer = make_tokenizer()
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    model = backend["model"]
    backend["added_tokens"] = []  # they get the numbers behind the vocabulary again
    for pair in (("Ċ", "Ċ"), ("Ċ", "h")):
        model["vocab"]["".join(pair)] = len(model["vocab"])
        model["merges"].append(list(pair))
    backend["pre_tokenizer"]["use_regex"] = False
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        eos_token=EOS, bos_token=EOS, pad_token="<|pad|>", chat_template=template,
    )  # fmt: skip
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    return tokenizer


def test_tokens_that_join_over_the_border_belong_to_the_response(tmp_path):
    """The prompt of a pair is what it shares with both conversations. The prompt's tokens behind
    that are not counted, and a sample continues all of the prompt."""
    tokenizer = joining_tokenizer()
    prompt = tokenizer.apply_chat_template(chat("q"), tokenize=False, add_generation_prompt=True)
    full = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for answers in (("\nno", "yes"), ("yes", "\nno"), ("ho", "\nno"), ("yes", "no")):
        [[ids], [responses], [masks], [asked]] = conversations_ids(
            tokenizer, [(Chat(chat("q")), list(answers), "rows.jsonl:3")]
        )
        joins = answers != ("yes", "no")
        assert asked == full and ids == full[: len(full) - joins]
        for answer, response, mask in zip(answers, responses, masks, strict=True):
            whole = tokenizer.apply_chat_template(chat("q", answer), tokenize=False)
            end = tokenizer(whole, add_special_tokens=False)["input_ids"][:-1]
            assert ids + response == end
            apart = joins and answer == "yes"  # its newline is the template's
            assert mask == ([False] + [True] * (len(response) - 1) if apart else None)
            assert tokenizer.decode(response[apart:]) == "\n" * (joins and not apart) + answer + (
                "<|im_end|>"
            )
    rows = [{"chosen": chat(f"q{i}", "yes"), "rejected": chat(f"q{i}", "\nno")} for i in "ab"]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    lengths = {"max_length": 120, "max_prompt_length": 90, "cache_dir": tmp_path / "cache"}
    store = prepare(open_dataset(str(tmp_path / "data"), "train"), tokenizer, **lengths)
    sampled = prompt_to_sample(PreferenceData([store], "pairs", "rows"), 0, 90)
    assert tokenizer.decode(sampled.tokens) == prompt.replace("q", "qa")
    assert tokenizer.decode(sampled.chosen) == "yes<|im_end|>"


def test_turns_that_begin_with_a_newline_are_split_at_their_borders(tmp_path):
    tokenizer = joining_tokenizer()
    rows = [
        {
            "chosen": chat(f"q{i}", "one", "w", "\ntwo", "w", "three"),
            "rejected": chat(f"q{i}", "\nno", "w", "\nnot", "w", "\nnever"),
        }
        for i in "ab"
    ]
    store = turns_store(tmp_path, tokenizer, rows)
    for response, expected in ((0, ["one", "\n\ntwo", "three"]), (1, ["\n\nno", "\n\nnot"])):
        tokens = store.tokens[slice(*store.responses[response])]
        counted = tokens[store.scored_tokens(response)].tolist()
        answers = tokenizer.decode(counted).split("<|im_end|>")
        assert answers[: len(expected)] == expected


def test_a_prompt_that_joins_the_answer_whole_is_refused_with_the_row():
    tokenizer = joining_tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(DataError, match=r"rows\.jsonl:3: the prompt, .* shares no token"):
        conversations_ids(tokenizer, [(Chat(chat("\n")), ["ho"], "rows.jsonl:3")])


@pytest.mark.parametrize("as_chat", [True, False])
def test_a_response_that_was_cut_where_it_was_written_gets_no_end(tmp_path, as_chat):
    tokenizer = tokenizer_with(CHATML)
    prompt = chat("hi") if as_chat else "hi"
    rows = [
        {"prompt": prompt, "text": "one more", "reward": 1, "ended": False},
        {"prompt": prompt, "text": "two", "reward": 0, "ended": True},
        {"prompt": prompt, "text": "three", "reward": 2},
    ]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    source = open_dataset(str(tmp_path / "data"), "train")
    store = prepare(
        source, tokenizer, max_length=90, max_prompt_length=60, cache_dir=tmp_path / "cache"
    )
    texts = [tokenizer.decode(store.tokens[slice(*span)]) for span in store.responses]
    end = "<|im_end|>" if as_chat else EOS
    assert texts == ["one more", "two" + end, "three" + end]
    assert store.cut.tolist() == [True, False, False]
    write_jsonl(tmp_path / "data" / "train.jsonl", [rows[0] | {"ended": 1}])
    with pytest.raises(DataError, match=r"'ended' is int '1', expected true or false"):
        list(open_dataset(str(tmp_path / "data"), "train").records())


def test_a_response_ends_at_the_end_of_the_turn_in_sampling_too():
    tokenizer, model = tokenizer_with(CHATML), make_model("llama")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert response_ends(tokenizer, model).tokens == (tokenizer.eos_token_id, end)
    assert response_ends(make_tokenizer(), model).tokens == (tokenizer.eos_token_id,)


def test_truncation_keeps_bos_and_what_stands_before_the_answer(tmp_path):
    tokenizer = tokenizer_with(LLAMA3)
    rows = [
        {"chosen": chat("x" * 50, "yes " * 3), "rejected": chat("x" * 50, "no " * 20)},
        {"chosen": chat("other", "yes"), "rejected": chat("other", "no")},
    ]
    for split, part in (("train", rows), ("test", rows[1:])):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", part)
    source = open_dataset(str(tmp_path / "data"), "train")
    store = prepare(
        source, tokenizer, max_length=60, max_prompt_length=30, cache_dir=tmp_path / "cache"
    )
    long = next(i for i, (begin, end) in enumerate(store.prompts) if end - begin == 30)
    prompt = store.tokens[slice(*store.prompts[long])].tolist()
    text = tokenizer.decode(prompt)
    assert text.startswith(EOS) and text.endswith(
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    chosen, rejected = (
        store.tokens[slice(*store.responses[i])].tolist()
        for i in range(len(store.responses))
        if store.response_prompt[i] == long
    )
    end = tokenizer.convert_tokens_to_ids("<|eot_id|>")
    assert chosen[-1] == end and end not in rejected and len(rejected) == 30


def test_a_prompt_that_would_lose_what_stands_before_the_answer_is_refused(tmp_path):
    tokenizer = tokenizer_with(LLAMA3)
    begin = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    n = len(tokenizer(begin, add_special_tokens=False)["input_ids"]) + 1  # and BOS
    rows = [{"prompt": chat(f"hello {i}"), "chosen": "a", "rejected": "b"} for i in range(2)]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)

    def prompts(limit):
        source = open_dataset(str(tmp_path / "data"), "train")
        lengths = {"max_length": limit + 4, "max_prompt_length": limit}
        store = prepare(source, tokenizer, cache_dir=tmp_path / "cache", **lengths)
        return [tokenizer.decode(store.tokens[slice(*span)]) for span in store.prompts]

    assert prompts(n) == [EOS + begin] * 2
    with pytest.raises(
        DataError, match=rf"train\.jsonl:1: max_prompt_length={n - 1} does not hold"
    ):
        prompts(n - 1)
    tokenizer.chat_template = MISTRAL  # nothing but BOS
    assert len(prompts(1)) == 2


# -------------------------------------------------------------------------------- date and options


def test_the_date_is_a_setting_and_part_of_the_key(monkeypatch):
    def ids(zone, **settings):
        monkeypatch.setenv("TZ", zone)
        time.tzset()
        tokenizer = tokenizer_with(DATED)
        set_chat(tokenizer, ChatSettings(**settings))
        return conversation_ids(tokenizer, chat("hi"), "ho")[0], tokenizer_hash(tokenizer)

    try:
        assert ids("UTC") == ids("Etc/GMT-14")
        dated = ids("UTC", date="2031-12-05")
    finally:
        monkeypatch.delenv("TZ")
        time.tzset()
    assert "05 Dec 2031" in make_tokenizer().decode(dated[0])
    llama = "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    tokenizer = tokenizer_with(llama + "{{ date_string }}\n" + CHATML)
    for day, shown in (("2024-07-26", "26 Jul 2024"), ("2031-12-05", "05 Dec 2031")):
        set_chat(tokenizer, ChatSettings(date=day))
        prompt = conversation_ids(tokenizer, chat("hi"), "ho")[0]
        assert tokenizer.decode(prompt).startswith(shown)
    assert dated[1] != ids("UTC")[1]


def test_options_of_the_config_and_of_a_row_reach_the_template():
    tokenizer = tokenizer_with(TOOLS)
    plain = tokenizer.decode(conversation_ids(tokenizer, chat("hi"), "<think></think>ho")[0])
    without = Chat(chat("hi"), options={"enable_thinking": False})
    row = conversation_ids(tokenizer, without, "<think></think>ho")
    before = tokenizer_hash(tokenizer)
    set_chat(tokenizer, ChatSettings({"enable_thinking": False}))
    of_config = conversation_ids(tokenizer, chat("hi"), "<think></think>ho")
    assert row == of_config and "<think></think>" not in plain
    assert tokenizer.decode(row[0]).endswith("<think></think>")
    assert tokenizer.decode(row[1]) == "ho<|im_end|>"
    assert tokenizer_hash(tokenizer) != before


# -------------------------------------------------------------------------------------------- rows


def test_the_prompt_is_what_chosen_and_rejected_share_whatever_the_column_says(tmp_path):
    """The layout of UltraFeedback: the first question as text beside whole conversations."""
    history = ("first", "answer", "second")
    rows = [
        {"prompt": "first", "chosen": chat(*history, "a"), "rejected": chat(*history, "b")},
        {"prompt": chat("q"), "chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {
            "prompt": chat("last"),
            **{key: chat("q", "r", "last", key) for key in ("chosen", "rejected")},
        },
        # the answers alone, after a text and after messages
        {"prompt": "text", "chosen": chat("", "a")[1:], "rejected": chat("", "b")[1:]},
        {"prompt": chat(*history), "chosen": chat("", "c")[1:], "rejected": chat("", "d")[1:]},
        # messages and answers as text
        {"prompt": chat("plain"), "chosen": "a", "rejected": "b"},
        # JSON in cells
        {"chosen": json.dumps(chat("json", "a")), "rejected": json.dumps(chat("json", "b"))},
    ]
    records = records_of(rows, tmp_path)
    assert [record.prompt.messages for record in records] == [
        chat(*history),
        chat("q"),
        chat("q", "r", "last"),
        chat("text"),
        chat("plain"),
        chat("json"),
    ]
    assert records[0].responses == ["a", "b", "c", "d"]  # both rows are of one conversation


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "x", "chosen": chat("q", "a"), "rejected": chat("q", "b")}, "not part of the"),
        (
            {"prompt": chat("x"), "chosen": chat("q", "a"), "rejected": chat("q", "b")},
            "not part of the messages of 'chosen'",
        ),
        ({"chosen": chat("q"), "rejected": chat("q")}, "is a single message"),
        ({"chosen": chat("q", "a", "r"), "rejected": chat("q", "a", "s")}, "from role 'user'"),
        ({"prompt": "q", "chosen": chat("q", "a"), "rejected": "b"}, "the other one messages"),
        (
            {"system": "Be.", "chosen": [{"role": "system", "content": "Do."}, *chat("q", "a")],
             "rejected": [{"role": "system", "content": "Do."}, *chat("q", "b")]},
            "another system message",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "tools": [{"name": "f"}]},
            "'tools' is for a chat template",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "system": "Be."},
            "'system' is for a chat template, and 'prompt' is text",
        ),
        (
            {"prompt": "q", "chosen": "a", "rejected": "b", "chat_template_kwargs": {"a": 1}},
            "'chat_template_kwargs' is for a chat template, and 'prompt' is text",
        ),
        (
            {"prompt": chat("q"), "chosen": "a", "rejected": "b", "tools": "[{"},
            "'tools'",
        ),
        (
            {"chosen": [*chat("q"), {"role": "assistant", "content": [{"type": "image"}]}],
             "rejected": chat("q", "b")},
            "expected text only",
        ),
    ],
)  # fmt: skip
def test_rows_that_contradict_themselves_are_refused_with_their_place(tmp_path, row, message):
    with pytest.raises(DataError, match=message) as caught:
        records_of([row, row], tmp_path)
    assert "rows.jsonl:1" in str(caught.value)


def test_system_tools_and_calls_reach_the_template(tmp_path):
    tools = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
    call = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": {}}}
    history = [
        {"role": "user", "content": "what time is it?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "noon"},
    ]
    row = {
        "system": "Be brief.",
        "tools": json.dumps(tools),
        "chat_template_kwargs": {"enable_thinking": True},
        "chosen": [*history, {"role": "assistant", "content": "Noon."}],
        "rejected": [*history, {"role": "assistant", "content": "No idea."}],
    }
    other = {**row, "tools": None}
    record, without = records_of([row, other], tmp_path)
    tokenizer = tokenizer_with(TOOLS)
    for one, given in ((record, tools), (without, None)):
        [prompt], [[chosen, _]], *_ = conversations_ids(
            tokenizer, [(one.prompt, one.responses, one.source)]
        )
        assert tokenizer.decode(prompt + chosen) + "\n" == tokenizer.apply_chat_template(
            [{"role": "system", "content": "Be brief."}, *row["chosen"]],
            tools=given,
            tokenize=False,
        )


@pytest.mark.parametrize("train_on", ["last", "assistant"])
def test_a_call_of_a_tool_is_an_answer(tmp_path, train_on):
    call = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    rows = [{"chosen": [*chat("time?"), calls], "rejected": chat("time?", "No idea.")}] * 2
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    tokenizer = tokenizer_with(TOOLS)
    source = open_dataset(str(tmp_path / "data"), "train", train_on=train_on)
    store = prepare(
        source, tokenizer, max_length=220, max_prompt_length=99, cache_dir=tmp_path / "cache"
    )
    for number, key in enumerate(("chosen", "rejected")):
        rendered = tokenizer.apply_chat_template(rows[0][key], tokenize=False)
        whole = [
            *store.tokens[slice(*store.prompts[0])],
            *store.tokens[slice(*store.responses[number])],
        ]
        assert whole == tokenizer(rendered, add_special_tokens=False)["input_ids"][: len(whole)]
        assert tokenizer.decode(whole).endswith("<|im_end|>")
        assert store.scored_tokens(number).all()


def test_further_fields_of_messages_are_read_or_dropped(tmp_path):
    message = {
        "role": "user",
        "content": "hi",
        "at": datetime.datetime(2026, 1, 1),
        "raw": b"\xff",
        "name": "Ann",
        "cost": None,
    }
    rows = [
        {
            "chosen": [message, {"role": "assistant", "content": text}],
            "rejected": [message, {"role": "assistant", "content": "no"}],
        }
        for text in ("yes", "yes!")
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    path = tmp_path / "rows.parquet"
    with pytest.raises(PrefLabError, match="one prompt only"):
        list(open_dataset(str(path), "train").records())  # both rows have one prompt
    rows.append({"chosen": chat("x", "y"), "rejected": chat("x", "z")})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    prompts = [
        record.prompt.messages
        for split in ("train", "test")
        for record in open_dataset(str(path), split).records()
    ]
    assert [{"role": "user", "content": "hi", "name": "Ann"}] in prompts


@pytest.mark.parametrize(
    "template, rows",
    [
        (GEMMA, [{"chosen": [{"role": "system", "content": "Be."}, *chat("q", "a")],
                  "rejected": [{"role": "system", "content": "Be."}, *chat("q", "b")]}]),
        ("{{ messages[0].content + 1 }}", [{"chosen": chat("q", "a"), "rejected": chat("q", "b")}]),
        ("{{ nothing.at.all }}", [{"chosen": chat("q", "a"), "rejected": chat("q", "b")}]),
    ],
)  # fmt: skip
def test_the_refusal_of_a_template_is_an_error_with_file_and_line(tmp_path, template, rows):
    model = save_model(tmp_path / "model")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(model)
    fine = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(3)]
    path = write_jsonl(tmp_path / "rows.jsonl", fine + rows)
    command = small_run(model, tmp_path, tmp_path / "run", f"datasets=[{path}]", "debug=true")
    with pytest.raises(DataError, match=r"rows\.jsonl:4: the chat template of .* refuses"):
        run_here(*command)


def test_a_chat_run_by_the_command(tmp_path):
    """The whole command on conversations, and inspect_data.py on the same file."""
    tokenizer = tokenizer_with(CHATML)
    model = make_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"chosen": chat(f"question {i}", "yes"), "rejected": chat(f"question {i}", "no")}
        for i in range(40)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    summary = run_here(
        *small_run(
            tmp_path / "model", tmp_path, tmp_path / "run", f"datasets=[{path}]", "n_examples=16",
            "test_fraction=0.3",
        )
    )  # fmt: skip
    assert summary
    shown = run_command(
        "scripts/inspect_data.py",
        path,
        "--model",
        tmp_path / "model",
        "--max_length",
        64,
        "--max_prompt_length",
        32,
        "test_fraction=0.3",
    )
    assert "the assistant's turn ends with '<|im_end|>', which the loss counts" in shown.stdout
    assert "BOS 0 times in a prompt of one message" in shown.stdout


# --------------------------------------------------------------------------------- prompts of text


def test_questions_alone_are_prompts_and_a_template_frames_them(tmp_path):
    rows = [{"question": f"q{i}", "id": i} for i in range(4)]
    framed = records_of(rows, tmp_path, prompt_template="Question: {question}\n\nAnswer: ")
    assert {record.prompt for record in framed} <= {f"Question: q{i}\n\nAnswer: " for i in range(4)}
    pairs = [{"question": f"q{i}", "response_j": "a", "response_k": "b"} for i in range(4)]
    [first, *_] = records_of(pairs, tmp_path, prompt_template="Question: {question}\n\nAnswer: ")
    assert first.prompt.endswith("\n\nAnswer: ") and first.responses == ["a", "b"]
    with pytest.raises(ConfigError, match="must have one"):
        records_of(pairs, tmp_path, prompt_template="Question:")


# ------------------------------------------------------------------------------------ several turns

SHARED = ("hi", "ho")
TURNS = [
    {
        "chosen": chat(*SHARED, f"and {i}?", "one", "what?", "two words"),
        "rejected": chat(*SHARED, f"and {i}?", "another", "what?", "three"),
    }
    for i in range(6)
]


def turns_store(tmp_path, tokenizer, rows=TURNS, **options):
    for split in ("train", "test"):
        write_jsonl(tmp_path / "turns" / f"{split}.jsonl", rows)
    source = open_dataset(str(tmp_path / "turns"), "train", train_on="assistant", **options)
    return prepare(
        source, tokenizer, max_length=120, max_prompt_length=99, cache_dir=tmp_path / "cache"
    )


@pytest.mark.parametrize("family", ["chatml", "llama3", "gemma", "mistral", "zephyr", "space"])
def test_all_turns_of_the_assistant_are_scored_and_those_of_the_user_are_not(tmp_path, family):
    template, end = FAMILIES[family]
    tokenizer = tokenizer_with(template)
    store = turns_store(tmp_path, tokenizer)
    for response, answers in ((0, ("one", "two words")), (1, ("another", "three"))):
        tokens = store.tokens[slice(*store.responses[response])]
        scored = store.scored_tokens(response)
        runs, last = [], False
        for token, counted in zip(tokens.tolist(), scored.tolist(), strict=True):
            if counted and not last:
                runs.append([])
            if counted:
                runs[-1].append(token)
            last = counted
        assert [tokenizer.decode(run).strip() for run in runs] == [a + end for a in answers]
        whole = store.tokens[slice(*store.prompts[0])].tolist() + tokens.tolist()
        rendered = tokenizer.apply_chat_template(
            TURNS[0][("chosen", "rejected")[response]], tokenize=False
        )
        assert whole == tokenizer(rendered, add_special_tokens=False)["input_ids"][: len(whole)]


def test_with_the_last_turn_such_rows_are_skipped_and_single_turns_need_no_mask(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    with pytest.raises(DataError, match="holds no usable prompt"):
        turns_store(tmp_path, tokenizer, [
            {"chosen": chat("q", "a"), "rejected": chat("other", "b")}] * 2)  # fmt: skip
    store = turns_store(tmp_path, tokenizer, [
        {"chosen": chat("q", "a"), "rejected": chat("q", "b")},
        {"prompt": "p", "chosen": chat("", "c")[1:], "rejected": chat("", "d")[1:]},
    ])  # fmt: skip
    assert store.scored is None
    (tmp_path / "turns" / "test.jsonl").write_text(json.dumps(TURNS[0]))
    source = open_dataset(str(tmp_path / "turns"), "test")
    assert not list(source.records())
    assert source.counts["skipped"] == {
        "chosen and rejected have different prompts (train_on=assistant learns from earlier turns"
        " too)": 1
    }


@pytest.mark.parametrize("layout", ["padded", "packed", "prefix_shared"])
@pytest.mark.parametrize("cached", [False, True])
def test_log_probs_of_turns_against_a_plain_loop(tmp_path, layout, cached):
    tokenizer, model = tokenizer_with(CHATML), make_model("llama", dtype=torch.float64)
    model.resize_token_embeddings(len(tokenizer))
    store = turns_store(tmp_path, tokenizer)
    data = PreferenceData([store], "pairs", "turns")
    expected, counts = [], []
    for response in range(4):
        prompt = store.tokens[slice(*store.prompts[store.response_prompt[response]])].tolist()
        tokens = store.tokens[slice(*store.responses[response])].tolist()
        scored = store.scored_tokens(response)
        logits = model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
        values = [
            float(logits[len(prompt) + i - 1, token].detach()) for i, token in enumerate(tokens)
        ]
        expected.append(sum(v for v, counted in zip(values, scored, strict=True) if counted))
        counts.append(int(scored.sum()))
        if cached:
            store.reference = store.reference or SimpleNamespace(known={}, logps=None)
            store.reference.known[response] = np.array(values)
            store.reference.logps = store.reference.known.__getitem__
    if layout != "padded":
        enable(model)
    batch = collate(data, np.array([0, 1]), Layout(layout, pad_id=tokenizer.pad_token_id))
    scores = score_responses(Scorer(model), batch)
    by_response = {}
    for i, example in enumerate(batch.examples):
        chosen, rejected = store.pairs[example]
        by_response[int(chosen)], by_response[int(rejected)] = batch.chosen[i], batch.rejected[i]
    for response, place in by_response.items():
        assert abs(float(scores.logps[place]) - expected[response]) < 1e-9
        assert int(batch.lengths[place]) == counts[response]
    if cached:
        assert len(batch.reference_logps) == sum(counts)
        total = float(batch.reference_logps.sum())
        assert abs(total - sum(expected)) < 1e-9


def test_a_run_on_all_turns(tmp_path):
    tokenizer, model = tokenizer_with(CHATML), make_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{key: chat(*(m["content"] for m in row[key])) for key in row} for row in TURNS * 4]
    for i, row in enumerate(rows):
        for messages in row.values():
            messages[0]["content"] = f"question {i}"
    data = write_jsonl(tmp_path / "rows.jsonl", rows)
    command = small_run(
        tmp_path / "model", tmp_path, tmp_path / "run", f"datasets=[{data}]", "test_fraction=0.3",
        "train_on=assistant", "n_examples=16", "max_length=120", "max_prompt_length=90",
        "loss=tdpo2", "sample_during_eval=false",
    )  # fmt: skip
    run_here(*command)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").open().readline())
    assert abs(first["loss/eval"] - 0.6931) < 1e-3  # policy and reference are equal


# ------------------------------------------------------------------- what else a conversation holds

REASONS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['reasoning_content'] %}<think>{{ m['reasoning_content'] }}</think>{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_all_fields_of_an_answer_reach_the_template(tmp_path):
    def answer(reasoning):
        said = {"role": "assistant", "content": "four", "reasoning_content": reasoning}
        return [*chat("2+2?"), said]

    [record, *_] = records_of(
        [{"chosen": answer("2+2"), "rejected": answer("guess")}] * 2
        + [{"chosen": chat("x", "a"), "rejected": chat("x", "b")}],
        tmp_path,
    )
    tokenizer = tokenizer_with(REASONS)
    _, [[chosen, rejected]], masks, _ = conversations_ids(
        tokenizer, [(record.prompt, record.responses, record.source)]
    )
    assert tokenizer.decode(chosen) == "<think>2+2</think>four<|im_end|>"
    assert tokenizer.decode(rejected) == "<think>guess</think>four<|im_end|>"
    assert masks == [[None, None]]


def test_a_system_column_keeps_later_system_messages(tmp_path):
    history = [*chat("hi", "ho"), {"role": "system", "content": "Now in rhyme."}, *chat("and?")]
    rows = [
        {
            "system": "Be brief.",
            "chosen": [*history, {"role": "assistant", "content": "yes"}],
            "rejected": [*history, {"role": "assistant", "content": "no"}],
        },
        {"chosen": chat("x", "a"), "rejected": chat("x", "b")},
    ]
    [record, _] = records_of(rows, tmp_path)
    assert record.prompt.messages == [{"role": "system", "content": "Be brief."}, *history]


def test_nulls_of_json_are_kept_and_those_of_a_columnar_file_are_not(tmp_path):
    tools = [{"name": "f", "parameters": {"enum": ["x", None], "default": None}}]
    rows = [{"prompt": chat(f"q{i}"), "chosen": "a", "rejected": "b", "tools": tools} for i in "ab"]
    assert records_of(rows, tmp_path)[0].prompt.tools == tools
    tools = [{"name": "f", "a": 1}, {"name": "g", "b": 2}]
    rows = [{"prompt": chat(f"q{i}"), "chosen": "a", "rejected": "b", "tools": tools} for i in "ab"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    [record, *_] = open_dataset(str(tmp_path / "rows.parquet"), "train").records()
    assert record.prompt.tools == tools


def test_half_a_surrogate_in_any_field_is_refused_with_the_row(tmp_path):
    message = {"role": "user", "content": "q", "name": "\ud800"}
    row = {"prompt": [message], "chosen": "a", "rejected": "b"}
    for bad in (row, {**row, "prompt": chat("q"), "tools": [{"name": "\ud800"}]}):
        with pytest.raises(DataError, match=r"rows\.jsonl:1.*half a surrogate pair"):
            records_of([bad, bad], tmp_path)


def test_an_empty_result_of_a_tool_is_read(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {}}]}
    history = [*chat("q"), call, {"role": "tool", "content": ""}]
    rows = [
        {"prompt": history, "chosen": "a", "rejected": "b"},
        {"prompt": chat("x"), "chosen": "a", "rejected": "b"},
    ]
    assert records_of(rows, tmp_path)[0].prompt.messages == history


def test_a_prompt_is_sampled_as_it_is_trained_when_it_is_cut(tmp_path):
    tokenizer = tokenizer_with(CHATML)
    rows = [
        {"chosen": chat("x" * 60, "yes"), "rejected": chat("x" * 60, "no" * 60)},
        {"chosen": chat("y" * 60, "yes"), "rejected": chat("y" * 60, "no")},
    ]
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / f"{split}.jsonl", rows)
    source = open_dataset(str(tmp_path / "data"), "train")
    store = prepare(
        source, tokenizer, max_length=120, max_prompt_length=40, cache_dir=tmp_path / "cache"
    )
    data = PreferenceData([store], "pairs", "rows")
    for example in (0, 1):  # the first is cut in training too
        sampled = prompt_to_sample(data, example, 40).tokens
        trained = store.tokens[slice(*store.prompts[example])].tolist()
        assert sampled == trained[-40:] and len(sampled) == 40


def test_a_template_that_asks_for_a_system_message_has_an_end_of_turn():
    asks = (
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('no system') }}{% endif %}"
        + CHATML
    )
    tokenizer = tokenizer_with(asks)
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    messages = [{"role": "system", "content": "Be."}, *chat("hi")]
    assert tokenizer.decode(conversation_ids(tokenizer, messages, "ho")[1]) == "ho<|im_end|>"


def test_times_of_messages_tell_no_prompts_apart(tmp_path):
    def row(question, time):
        prompt = [{"role": "user", "content": question, "timestamp": time}]
        later = [{**prompt[0], "timestamp": time + "Z"}]
        return {"chosen": prompt + chat("", f"a{time}")[1:], "rejected": later + chat("", "b")[1:]}

    rows = [row(f"q{i % 10}", str(i)) for i in range(100)]
    records = records_of(rows, tmp_path)
    assert len(records) == 10 and sum(len(record.pairs) for record in records) == 100
