"""Conversations in every set of columns: lists, rows with one response each, and pairs under other
names, read by the rule of chosen and rejected."""

import hashlib
import json

import numpy as np
import pytest
from conftest import make_model, run_here, small_run, write_jsonl
from test_chat import CHATML, chat, records_of, tokenizer_with

from preflab.batching.chat import conversation_ids
from preflab.batching.chat_template import render
from preflab.batching.token_store import prepare
from preflab.readers import records
from preflab.readers.messages import Chat, Turns, messages_of
from preflab.readers.registry import open_dataset
from preflab.reports.run_files import read_jsonl
from utils import DataError

TOOLS = [{"type": "function", "function": {"name": "look_up"}}]
# Of each set of columns, the rows of a prompt with a better and a worse response.
FORMS = {
    "pair": lambda p, a, b: [{"prompt": p, "chosen": a, "rejected": b}],
    "j over k": lambda p, a, b: [{"question": p, "response_j": a, "response_k": b}],
    "list": lambda p, a, b: [{"prompt": p, "responses": [b, a], "scores": [1, 2]}],
    "completions": lambda p, a, b: [
        {
            "instruction": p,
            "completions": [{"response": r, "overall_score": s} for r, s in ((a, 2), (b, 1))],
        }
    ],
    "messages of completions": lambda p, a, b: [
        {
            "instruction": p,
            "completions": [{"messages": r, "overall_score": s} for r, s in ((a, 2), (b, 1))],
        }
    ],
    "rows": lambda p, a, b: [{"prompt": p, "text": r, "reward": s} for r, s in ((a, 2), (b, 1))],
    "labels": lambda p, a, b: [
        {"prompt": p, "completion": r, "label": good} for r, good in ((a, True), (b, False))
    ],
}


def rows_of(form, prompt, better, worse, **context):
    """Rows without a null, which may have further columns."""
    rows = [row | context for row in FORMS[form](prompt, better, worse)]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def pairs_of(rows, tmp_path, **options):
    """{prompt: (chosen, rejected)} of all pairs, the prompt by its key."""
    return {
        record.prompt if isinstance(record.prompt, str) else record.prompt.key(): (
            record.responses[chosen],
            record.responses[rejected],
        )
        for record in records_of(rows, tmp_path, **options)
        for chosen, rejected in record.pairs
    }


@pytest.mark.parametrize("form", FORMS)
def test_answers_and_whole_conversations_of_every_set_of_columns(tmp_path, form):
    question, _ = chat("q0", "")
    whole = [chat("q1", answer) for answer in ("good", "bad")]
    system = {"role": "system", "content": "s"}
    alone = [{"role": "assistant", "content": answer} for answer in ("good", "bad")]
    lists = [[answer] for answer in alone]
    cases = [
        (rows_of(form, [question], *lists), Chat([question])),
        (rows_of(form, "q2", *lists), Chat(chat("q2"))),
        (rows_of(form, chat("q3"), *alone), Chat(chat("q3"))),
        (rows_of(form, chat("q4"), "good", "bad"), Chat(chat("q4"))),
        (rows_of(form, None, *whole), Chat(chat("q1"))),
        (
            rows_of(form, json.dumps(chat("q5")), *map(json.dumps, lists), tools=TOOLS),
            Chat(chat("q5"), TOOLS),
        ),
        (
            rows_of(form, "q6", *map(json.dumps, lists), system="s", chat_template_kwargs={"a": 1}),
            Chat([system, *chat("q6")], None, {"a": 1}),
        ),
        (rows_of(form, chat("q7"), *map(json.dumps, alone)), Chat(chat("q7"))),
    ]
    # The first row decides the set of columns, and one prompt is held out.
    rows = [row for rows, _ in cases for row in rows]
    expected = {prompt.key(): ("good", "bad") for _, prompt in cases}
    assert pairs_of(rows, tmp_path) == expected
    rows.sort(key=lambda row: "q1" not in str(row))  # one without a prompt comes first
    assert pairs_of(rows, tmp_path) == expected


@pytest.mark.parametrize("form", FORMS)
def test_texts_that_look_like_objects_are_texts(tmp_path, form):
    text = '{"role": "admin", "age": 3}', '[{"x": 1}]'
    rows = [row for q in "qr" for row in rows_of(form, q, *text)]
    assert pairs_of(rows, tmp_path) == {"q": text, "r": text}


@pytest.mark.parametrize("form", FORMS)
def test_an_object_that_answers_a_text_is_text_also_where_it_looks_like_a_message(tmp_path, form):
    """A model that is to write JSON would else learn the content without its braces."""
    answers = tuple(json.dumps({"role": "assistant", "content": c}) for c in "ab")
    rows = [row for q in "qr" for row in rows_of(form, q, *answers)]
    assert pairs_of(rows, tmp_path) == {"q": answers, "r": answers}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "prompt, better, message",
    [
        ([], "a", "is an empty list, expected chat messages"),
        ("q", [{"role": "gpt", "content": "a"}], "is not part of the messages of"),
        ("q", [*chat("q"), {"role": "gpt", "content": "a"}], "'gpt', expected the answer, from"),
        (chat("q"), [{"role": "user", "content": "a"}], "'user', expected the|is not part of"),
        (chat("q"), chat("other", "a"), "is not part of the messages of"),
        ("q", [{"from": "gpt", "value": "a"}], "expected {role, content}"),
        ("q", '[{"from": "gpt", "value": "a"}]', "expected {role, content}"),
        ("q", "[{'role': 'assistant', 'content': 'a'}]", "begins as chat messages and is not JSON"),
        ("q", '[{"role": "assistant", "content": "a"', "begins as chat messages and is not JSON"),
        ("q", '[{"role": "assistant", "content": "a", "content": "b"}]', "has the key 'content'"),
        ("q", [{"role": "assistant", "content": 3}], "'content' is int '3', expected text"),
    ],
)
def test_refusals_name_the_row_in_every_set_of_columns(tmp_path, form, prompt, better, message):
    rows = rows_of(form, chat("q"), *([answer] for answer in chat("", "x", "", "y")[1::2]))
    n = len(rows)
    rows += rows_of(form, prompt, better, chat("", "b")[1:])
    with pytest.raises(DataError, match=rf"rows\.jsonl:{n + 1}\b.*({message})"):
        records_of(rows, tmp_path)


@pytest.mark.parametrize("form", ["list", "completions", "rows", "j over k"])
def test_a_text_beside_messages_is_refused(tmp_path, form):
    rows = rows_of(form, "q", "a", chat("", "b")[1:])
    if form == "rows":  # a prompt of text and one of a message are two prompts
        assert pairs_of(rows, tmp_path) == {}
        return
    with pytest.raises(DataError, match=r"rows\.jsonl:1: of .*one is text and the other one mess"):
        records_of(rows, tmp_path)


def test_what_is_read_otherwise_takes_another_version(tmp_path, monkeypatch):
    """The records of fixed rows. Where this digest changes, READER_VERSION has to be raised, or a
    cache of tokens that was read otherwise is taken."""
    digest = hashlib.sha256(records.READER_VERSION.encode())
    for form in FORMS:
        message = {"role": "assistant", "content": "c", "time": 3}
        rows = rows_of(form, "p", "a", "b") if form != "messages of completions" else []
        rows += rows_of(form, [*chat("p"), message, *chat("q")], chat("", "a")[1:], message)
        rows += rows_of(form, chat("r"), json.dumps(chat("r", "a")), chat("r", "b"), tools=TOOLS)
        rows += rows_of(form, "s", chat("s", "a", "t", "b"), chat("s", "x", "t", "y"), system="s")
        rows += rows_of(form, "u", json.dumps(message), "b")
        for train_on in ("last", "assistant"):
            for record in records_of(rows, tmp_path, train_on=train_on):
                prompt = (
                    record.prompt if isinstance(record.prompt, str) else record.prompt.to_json()
                )
                rest = record.responses, record.pairs, record.scores, record.sft_target
                digest.update(json.dumps([prompt, *rest]).encode())
    assert (records.READER_VERSION, digest.hexdigest()[:16]) == ("7", "ff8456331b0f244b")
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows))
    now = open_dataset(path, "train").fingerprint()
    monkeypatch.setattr(records, "READER_VERSION", "6")
    assert open_dataset(path, "train").fingerprint() != now


def test_lists_share_the_prompt_before_the_turn_in_which_they_differ(tmp_path):
    """train_on=assistant on lists of three, and without it such rows are counted as skipped."""
    first = [chat("q", answer, "and?", "end") for answer in ("a", "b")]
    rows = [{"responses": [*first, chat("q", "a", "and?", "c")], "scores": [3, 2, 1]}]
    rows += [{"responses": [chat("r", "a", "s", x) for x in "xyz"], "scores": [1, 2, 3]}]
    of_first, of_second = records_of(rows, tmp_path, train_on="assistant", lists=True)
    assert of_first.prompt == Chat(chat("q")) and of_second.prompt == Chat(chat("r", "a", "s"))
    assert [one.messages for one in of_first.responses] == [r[1:] for r in rows[0]["responses"]]
    assert all(isinstance(one, Turns) for one in of_first.responses)
    assert of_second.responses == ["x", "y", "z"]
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows * 2))
    source = open_dataset(path, "train", lists=True, test_fraction=0.0)
    with pytest.raises(DataError, match="one prompt only"):  # the other one is skipped
        list(source.records())


def test_the_ids_of_lists_are_those_of_pairs(tmp_path):
    """Every set of columns makes the tokens and masks that chosen and rejected make."""
    tokenizer = tokenizer_with(CHATML)
    stores = {}
    for form in FORMS:
        wholes = [[chat(f"q{i}", "one", "then?", x) for x in ("two", "three")] for i in range(3)]
        rows = [row for whole in wholes for row in rows_of(form, None, *whole)]
        path = str(write_jsonl(tmp_path / f"{form}.jsonl", rows))
        source = open_dataset(path, "train", test_fraction=0.3)
        folder = tmp_path / "cache"
        stores[form] = prepare(
            source, tokenizer, max_length=100, max_prompt_length=60, cache_dir=folder
        )
    pairs = stores.pop("pair")
    begin, end = pairs.responses[pairs.pairs[0, 0]]
    conversation = Chat(chat("q1", "one", "then?"))
    where = [int(s.rpartition(":")[2]) for s in pairs.sources]
    conversation.messages[0]["content"] = f"q{where[0] - 1}"
    prompt, response = conversation_ids(tokenizer, conversation, "two")
    assert pairs.tokens[begin:end].tolist() == response
    assert (
        prompt
        == tokenizer(
            render(tokenizer, conversation, generation_prompt=True), add_special_tokens=False
        )["input_ids"]
    )
    for store in stores.values():
        for side in (0, 1):
            for (a, b), (c, d) in zip(
                store.responses[store.pairs[:, side]],
                pairs.responses[pairs.pairs[:, side]],
                strict=True,
            ):
                assert store.tokens[a:b].tolist() == pairs.tokens[c:d].tolist()
        for (a, b), (c, d) in zip(store.prompts, pairs.prompts, strict=True):
            assert store.tokens[a:b].tolist() == pairs.tokens[c:d].tolist()


def test_a_response_of_messages_that_was_cut_gets_no_end(tmp_path):
    rows = [
        {"prompt": "q", "text": chat("", text)[1:], "reward": i, "ended": text != "cut"}
        for i, text in enumerate(("whole", "cut"))
    ]
    tokenizer = tokenizer_with(CHATML)
    path = str(write_jsonl(tmp_path / "rows.jsonl", rows + [row | {"prompt": "r"} for row in rows]))
    store = prepare(
        open_dataset(path, "train"),
        tokenizer,
        max_length=60,
        max_prompt_length=30,
        cache_dir=tmp_path,
    )
    ends = [store.tokens[end - 1] for _, end in store.responses]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert (np.array(ends) == end).tolist() == [True, False] and store.cut.tolist() == [False, True]
    message = {"role": "assistant", "content": "a", "reasoning_content": "b"}
    rows = [{"prompt": "q", "text": [message], "reward": 1, "ended": False}]
    with pytest.raises(DataError, match=r"rows\.jsonl:\d: 'ended' is false, and the response has"):
        records_of(rows * 2 + [rows[0] | {"prompt": "r"}], tmp_path)


def test_a_run_of_a_list_loss_on_conversations(tmp_path):
    """Whole conversations with tools, trained on, sampled for and evaluated."""
    tokenizer = tokenizer_with(CHATML)
    model = make_model("llama")
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [
        {"responses": [chat(f"q{i}", x) for x in "abc"], "scores": [1, 2, 3], "tools": TOOLS}
        for i in range(20)
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = tmp_path / "run"
    more = f"datasets=[{path}]", "loss=lipo", "n_examples=8", "test_fraction=0.3"
    assert run_here(*small_run(tmp_path / "model", tmp_path, run, *more))
    [first, *_] = read_jsonl(run / "samples.jsonl")
    assert first["tools"] == TOOLS and first["chosen"] == "c"
    assert first["messages"] in [chat(f"q{i}") for i in range(20)]


@pytest.mark.parametrize(
    "answer",
    [
        '[{"role": "user", "content": "Hi"}]\n\nThis is it.',
        '[{"from": "a", "to": "b", "value": 3}]',
        '{"name": "x"}',
    ],
)
def test_an_answer_that_holds_json_stays_text(answer):
    assert messages_of({"chosen": answer}, "chosen", "here", may_be_empty=False) is None
