"""Win rates, and the endpoint that a judge may be."""

import json
import math
import re
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, write_jsonl

from judge import _body, main
from preflab.batching.chat import PromptText, transcript
from preflab.evaluation import win_rates
from preflab.evaluation.alpaca_eval import export_samples
from preflab.evaluation.length_control import PRIOR, length_controlled
from preflab.evaluation.win_rates import both_orders, fill, pair_up, read_verdict, win_rate
from preflab.reports.run_files import read_json, read_jsonl
from preflab.reports.statistics import share_interval, wilson
from preflab.reports.tables import CONSOLE_WIDTH
from preflab.rewards.llm_client import Answers, Endpoint, EndpointError
from preflab.rewards.llm_rater import _rating_question
from utils import ConfigError, DataError


def sample(i, policy, **more):
    row = {
        "examples": 64,
        "prompt": f"p{i}",
        "sample": 0,
        "policy": policy,
        "reference": "plain",
        "chosen": "the best",
        "temperature": 1.0,
    }
    row |= {"policy_reward": {"lexicon": float(len(policy))}, "reference_reward": {"lexicon": 5.0}}
    return row | more


@pytest.fixture
def folder(tmp_path):
    rows = [
        sample(i, text)
        for i, text in enumerate(["longer one", "tiny", "plain", "a {b} brace", "what"])
    ]
    write_jsonl(
        tmp_path / "run" / "samples.jsonl",
        [sample(0, "of an earlier evaluation", examples=0), *rows],
    )
    return tmp_path / "run"


def command(folder, *arguments):
    return subprocess.run(
        [
            sys.executable,
            ROOT / "judge.py",
            folder,
            "--cache",
            folder.parent / "cache.sqlite",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )


def completion(answer):
    return lambda body: {
        "choices": [
            {
                "message": {
                    "content": (
                        answer(body["messages"][0]["content"]) if callable(answer) else answer
                    )
                }
            }
        ]
    }


def longer(question):
    """A judge that takes the longer response."""
    a, b = re.search(
        r"Response A:\n(.*)\n\nResponse B:\n(.*)\n\nAnswer", question, re.DOTALL
    ).groups()
    return "A" if len(a) > len(b) else "B" if len(b) > len(a) else "tie"


def by_llm(folder, server, *more):
    return command(
        folder,
        "--by",
        "llm",
        "--url",
        f"{server.url}/v1",
        "--model",
        "m",
        "--retries",
        1,
        "--timeout",
        0.5,
        *more,
    )


# ------------------------------------------------------------------------------------------ numbers


def test_wilson_intervals_of_the_literature():
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert wilson(0.0, 1)[0] == 0


def test_a_win_rate_by_hand():
    pairs = [
        {"checkpoint": None, "temperature": 1.0, "against": "x", "prompt": p, "verdict": v}
        for p, v in (("a", 1.0), ("a", 0.5), ("b", 0.0), ("c", None))
    ]
    rate = win_rate(pairs, "reward")
    assert rate["win_rate"] == 0.5 and (
        rate["wins"],
        rate["ties"],
        rate["losses"],
        rate["unjudged"],
    ) == (1, 1, 1, 1)
    assert (
        rate["pairs"] == 3
        and rate["prompts"] == 2
        and (rate["low"], rate["high"]) == share_interval([[1.0, 0.5], [0.0]])
    )
    assert win_rate(pairs[3:], "reward")["win_rate"] is None


@pytest.mark.parametrize(
    "first, second, verdict",
    [
        ("A", "B", 1),
        ("B", "A", 0),
        ("A", "A", 0.5),
        ("B", "B", 0.5),
        ("tie", "tie", 0.5),
        ("A", "tie", 1),
        ("tie", "A", 0),
        ("A", None, None),
        (None, "tie", None),
    ],
)
def test_the_two_orders_make_one_verdict(first, second, verdict):
    assert both_orders(first, second) == verdict


@pytest.mark.parametrize(
    "answer, verdict",
    [
        ("A", "A"),
        (" b.\n", "B"),
        ("Tie", "tie"),
        ("Response A", "A"),
        ("**B**", "B"),
        ("Both are fine, but verdict: A", "A"),
        ("I think [[tie]]", "tie"),
        ("A is better than B", None),
        ("", None),
        ("neither", None),
        ("Answer: b", "B"),
        ("AB", None),
    ],
)
def test_reading_a_verdict(answer, verdict):
    assert read_verdict(answer) == verdict


def test_texts_with_braces_do_not_fill_other_places():
    assert fill("{prompt}|{a}|{b}|{c}", "{a}", "{b}", "\\1") == "{a}|{b}|\\1|{c}"


def pairs_of(gaps, verdicts, prompts=None):
    """Judged pairs whose responses differ by so many characters."""
    prompts = range(len(gaps)) if prompts is None else prompts
    return [
        {"prompt": f"p{p}", "policy": "x" * (500 + gap), "opponent": "y" * 500, "verdict": verdict}
        for p, gap, verdict in zip(prompts, gaps, verdicts, strict=True)
    ]


def test_a_judge_that_sees_the_length_alone_has_no_preference_at_equal_lengths():
    gaps = np.random.default_rng(0).integers(-50, 400, 4000)  # mostly longer
    longer = np.tanh(gaps / gaps.std(ddof=1))
    biased = 1 / (1 + np.exp(-2 * longer))
    assert biased.mean() > 0.7
    result = length_controlled(pairs_of(gaps, biased))
    assert result["rate"] == pytest.approx(0.5, abs=1e-3)
    assert result["effect"] == pytest.approx(2, abs=1e-2)
    better = 1 / (1 + np.exp(-(2 * longer + math.log(3))))
    assert length_controlled(pairs_of(gaps, better))["rate"] == pytest.approx(0.75, abs=1e-3)


def test_length_controlled_rates_equal_a_naive_fit():
    """Gradient ascent on the penalised likelihood, and the sandwich variance from derivatives by
    differences."""
    rng = np.random.default_rng(1)
    gaps, verdicts = rng.integers(-200, 300, 60), rng.choice([0.0, 0.5, 1.0], 60, p=[0.3, 0.2, 0.5])
    prompts = np.arange(60) // 3  # three samples of a prompt
    longer = np.tanh(gaps / gaps.std(ddof=1))

    def likelihood(at, members=slice(None), prior=1.0):
        logits = at[0] + at[1] * longer[members]
        wins = verdicts[members]
        of = wins * -np.logaddexp(0, -logits) + (1 - wins) * -np.logaddexp(0, logits)
        return of.sum() - prior * at[1] ** 2 / (2 * PRIOR**2)

    def slope(f, at, h=1e-5):
        return np.array([(f(at + h * e) - f(at - h * e)) / (2 * h) for e in np.eye(2)])

    at = np.zeros(2)
    for _ in range(3000):
        at = at + 0.03 * slope(likelihood, at)
    hessian = slope(lambda x: slope(likelihood, x, 1e-4), at, 1e-4)
    scores = np.array(
        [slope(lambda x, m=prompts == p: likelihood(x, m, 0.0), at) for p in range(20)]
    )
    inverse = np.linalg.inv(hessian)
    sandwich = (inverse @ (scores.T @ scores) @ inverse)[0, 0] * 20 / 19
    error = math.sqrt(max(sandwich, -inverse[0, 0]))
    t = 2.093024054408263  # 19 degrees of freedom
    expected = [1 / (1 + math.exp(-(at[0] + shift))) for shift in (-t * error, 0, t * error)]
    result = length_controlled(pairs_of(gaps, verdicts, prompts))
    assert [result[key] for key in ("low", "rate", "high")] == pytest.approx(expected, abs=1e-6)
    assert result["effect"] == pytest.approx(at[1], abs=1e-6)


@pytest.mark.parametrize(("mean", "theta"), [(100, 0.5), (0, 0.5)])
def test_length_controlled_intervals_hold_where_the_policy_is_nearly_always_longer(mean, theta):
    """Of 200 simulated judgements of 60 pairs each, with phi = 1."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        gaps = rng.normal(mean, 30, 60).round().astype(int)
        longer = np.tanh(gaps / gaps.std(ddof=1))
        wins = (rng.random(60) < 1 / (1 + np.exp(-(theta + longer)))).astype(float)
        result = length_controlled(pairs_of(gaps, wins))
        held += result["low"] <= 1 / (1 + math.exp(-theta)) <= result["high"]
    assert held >= 184  # three standard errors below 95%


def test_a_length_controlled_rate_is_not_made_up():
    equal = dict.fromkeys(("rate", "low", "high", "effect"))
    gaps, verdicts = [5, -5] * 6, [1.0, 0.0, 0.0, 1.0] * 3
    assert length_controlled(pairs_of(gaps, verdicts))["rate"] == pytest.approx(0.5)
    assert length_controlled(pairs_of(gaps[:9], verdicts[:9])) == equal  # few prompts
    assert length_controlled(pairs_of([7] * 12, verdicts)) == equal  # one difference
    assert length_controlled(pairs_of(gaps, [1.0] * 12)) == equal
    always = length_controlled(pairs_of(gaps, [1.0, 0.0] * 6))  # the longer one always wins
    assert always["rate"] == pytest.approx(0.5) and 1 < always["effect"] < 20


# ----------------------------------------------------------------------------------- what is paired


def test_samples_are_written_for_alpaca_eval(tmp_path):
    messages = [{"role": "user", "content": "p0"}]
    rows = [sample(0, "ours", messages=messages), sample(1, "too", chosen=None)]
    rows += [sample(0, "another", sample=1)]
    files = export_samples(rows, tmp_path / "out")
    assert [file.name for file in files] == ["policy.json", "reference.json", "chosen.json"]
    assert read_json(files[0]) == [
        {"instruction": "p0", "output": "ours", "generator": "policy"},
        {"instruction": "p1", "output": "too", "generator": "policy"},
    ]
    assert len(read_json(files[1])) == 2 and len(read_json(files[2])) == 1
    paths = ("runs/a/LATEST/policy.pt", "runs/b/LATEST/policy.pt")
    rows = [
        sample(0, f"{path} {t}", checkpoint=path, temperature=t) for path in paths for t in (0.5, 1)
    ]
    names = [file.name for file in export_samples(rows, tmp_path / "several")]
    assert {"a-T0.5.json", "a-T1.json", "b-T1.json", "reference-T0.5.json"} <= set(names)


def test_a_language_model_gets_the_conversation_with_its_tools(monkeypatch):
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    calls = [{"type": "function", "function": {"name": "look_up", "arguments": {"word": "x"}}}]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is x?"},
        {"role": "assistant", "content": "I look.", "tool_calls": calls},
        {"role": "tool", "content": "a letter"},
    ]
    rows = [
        {"messages": messages, "tools": tools, "prompt": "text", "policy": "A {a}", "chosen": "B"}
    ]
    asked = []

    class Asked:
        def ask(self, questions, read, description):
            asked.extend(question[0]["content"] for question in questions)
            return Answers(["A", "B"])

    verdicts, _ = win_rates.by_llm(pair_up(rows, "chosen"), Asked())
    assert verdicts[0]["verdict"] == 1.0
    conversation = (
        f"The assistant may call these tools:\n{json.dumps(tools[0])}\n\nsystem: Be brief.\n\n"
        f"user: What is x?\n\nassistant: I look.\n{json.dumps(calls)}\n\ntool: a letter"
    )
    assert asked[0] == win_rates.QUESTION.replace("{b}", "B").replace(
        "{prompt}", conversation
    ).replace("{a}", "A {a}", 1)
    rating = _rating_question(pair_up(rows, "chosen")[0]["prompt"], "A")
    assert f"Instruction:\n{conversation}\n\nResponse:\nA\n" in rating
    assert transcript("text") == "text" and transcript(PromptText(messages[1:2])) == "What is x?"


def test_the_last_evaluation_is_judged_by_the_scores_it_has(folder):
    done = command(folder, "--by", "reward")
    assert done.returncode == 0 and "0.500" in done.stdout, done.stderr
    [rate] = read_json(folder / "winrates.json")
    assert (rate["wins"], rate["ties"], rate["losses"]) == (2, 1, 2) and rate[
        "by"
    ] == "reward lexicon"
    assert [row["verdict"] for row in read_jsonl(folder / "judgements.jsonl")] == [1, 0, 0.5, 1, 0]
    assert (
        command(
            folder,
            "--by",
            "reward",
            "--against",
            "reference",
            "chosen",
            "--reward",
            "length",
            "unit=characters",
        ).returncode
        == 0
    )
    assert [
        (rate["against"], rate["by"], rate["win_rate"])
        for rate in read_json(folder / "winrates.json")
    ][1:] == [
        ("reference", "reward length unit=characters", 0.5),
        ("chosen", "reward length unit=characters", 0.4),
    ]
    command(folder, "--by", "reward")
    assert len(read_json(folder / "winrates.json")) == 3  # in place of what it replaces


def test_another_folder_is_matched_by_prompt_temperature_and_sample(folder, tmp_path):
    theirs = [
        sample(1, "their answer"),
        sample(0, "theirs"),
        sample(2, "hot", temperature=2.0),
        sample(3, "second", sample=1),
    ]
    write_jsonl(tmp_path / "other" / "samples.jsonl", theirs)
    pairs = pair_up(win_rates.latest_samples(folder), str(tmp_path / "other"))
    assert [(pair["policy"], pair["opponent"]) for pair in pairs] == [
        ("longer one", "theirs"),
        ("tiny", "their answer"),
    ]
    with pytest.raises(DataError, match="neither reference, nor chosen"):
        pair_up([sample(0, "x")], "nowhere")
    with pytest.raises(DataError, match="no sample there"):
        pair_up([sample(77, "x")], str(tmp_path / "other"))


def test_labels_count_in_either_order_and_others_stay_unjudged(folder, tmp_path):
    labels = [
        {"prompt": "p0", "a": "plain", "b": "longer one", "winner": "b"},
        {"prompt": "p1", "a": "tiny", "b": "plain", "winner": "b"},
        {"prompt": "p3", "a": "plain", "b": "a {b} brace", "winner": "tie"},
    ]
    path = write_jsonl(tmp_path / "labels.jsonl", labels)
    done = command(folder, "--by", "labels", "--labels", path)
    assert done.returncode == 1 and "not everything was judged" in done.stderr
    assert [row["verdict"] for row in read_jsonl(folder / "judgements.jsonl")] == [
        1,
        0,
        0.5,
        0.5,
        None,
    ]  # equal texts tie
    write_jsonl(path, [{"prompt": "p0", "a": "plain", "b": "x", "winner": "first"}])
    assert "labels.jsonl:1" in command(folder, "--by", "labels", "--labels", path).stderr


LLM = ("--by", "llm", "--url", "http://127.0.0.1:9/v1", "--model", "m")


@pytest.mark.parametrize(
    "file, content, arguments, message",
    [
        ("samples.jsonl", '{"prompt": "p", "examples": 1}', (), "a row has no 'policy'"),
        ("samples.jsonl", '{"prompt": "p", "policy": "a", "reference": "b"}', (), ""),
        ("samples.jsonl", '{"prompt": "p", "messages": [{"role": 5}]}', (), "'messages' is"),
        ("eval.jsonl", "[]\n{}", (), "eval.jsonl:1: expected an object"),
        ("x", '{"prompt": "p", "a": [], "b": "b", "winner": "a"}', "by labels", "x:1: expected"),
        ("x", b"\xff{prompt}{a}{b}", (*LLM, "--question", "x"), "--question .*x: not UTF-8"),
        ("x", "no database, and longer than it", (*LLM, "--cache", "x"), "x: no cache of answers"),
        (None, "", (*LLM, "--concurrency", "0"), "--concurrency 0: must be 1 or more"),
        (None, "", (*LLM, "--retries", "-1"), "--retries -1: must be 0 or more"),
        (None, "", (*LLM, "--timeout", "nan"), "--timeout nan: must be above 0"),
        (None, "", (*LLM, "--timeout", "inf"), "--timeout inf: must be above 0"),
        (None, "", (*LLM, "--body", "a=NaN"), "--body .*: Out of range float"),
        (None, "", (*LLM, "--url", "http://\udc80"), "--url .*surrogates not allowed"),
        (None, "", ("--by", "reward", "--reward", "length", "=="), "--reward ==: "),
        (None, "", ("--by", "reward", "--reward", "length", "a=${x"), "--reward a="),
    ],
)
def test_what_cannot_be_judged_is_one_line(
    folder, monkeypatch, capsys, file, content, arguments, message
):
    if file is not None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    if arguments == "by labels":
        arguments = ("--by", "labels", "--labels", "x")
    words = [str(folder / word) if word == "x" else word for word in arguments]
    monkeypatch.setattr(sys, "argv", ["judge.py", str(folder), *(words or ("--by", "reward"))])
    try:
        main()
    except SystemExit as ended:
        assert message and ended.code == 2
    else:
        assert not message
    assert re.search(message, capsys.readouterr().err)


def test_a_score_that_is_no_number_is_no_tie(folder):
    rows = [sample(0, "a", policy_reward={"lexicon": math.nan}), sample(1, "longer")]
    pairs = pair_up(rows, "reference")
    verdicts, _ = win_rates.by_reward(pairs, folder, "lexicon", [])
    assert [row["verdict"] for row in verdicts] == [None, 1.0]


def test_an_answer_of_a_cache_that_is_no_text_is_asked_again(tmp_path, http_server):
    server = http_server([completion("x")])
    question = [[{"role": "user", "content": "?"}]]
    endpoint = asks(tmp_path, server)
    endpoint.ask(question, str)
    endpoint._cache.execute("UPDATE answers SET answer = x'00'")
    assert endpoint.ask(question, str).answers == ["x"] and len(server.received) == 2
    endpoint._cache.execute("DROP TABLE answers")
    with pytest.raises(ConfigError, match=r"c.sqlite: no cache of answers"):
        endpoint.ask(question, str)


def test_no_samples_is_said(tmp_path):
    done = command(tmp_path, "--by", "reward")
    assert done.returncode == 2 and "no samples.jsonl" in done.stderr


# ---------------------------------------------------------------------------------- language models


def test_a_language_model_is_asked_in_both_orders_and_once(folder, http_server):
    server = http_server([completion(longer)])
    done = by_llm(folder, server)
    assert done.returncode == 0 and "requests 8" in done.stdout, done.stderr  # four pairs differ
    assert [row["verdict"] for row in read_jsonl(folder / "judgements.jsonl")] == [1, 0, 0.5, 1, 0]
    assert {body["model"] for body in server.received} == {"m"}
    again = by_llm(folder, server)
    assert "requests 0, from the cache 8" in again.stdout and len(server.received) == 8


def test_a_judge_that_prefers_a_place_makes_ties(folder, http_server):
    done = by_llm(folder, http_server([completion("A")]))
    assert done.returncode == 0 and max(map(len, done.stdout.splitlines())) <= CONSOLE_WIDTH
    head, row = [line for line in done.stdout.splitlines() if "llm m" in line or "by  " in line]
    assert head.split()[-1] == "contradictions" and row.split()[-1] == "4"
    assert read_json(folder / "winrates.json")[0]["win_rate"] == 0.5


def test_failures_are_retried(folder, http_server):
    fine = completion(longer)
    server = http_server([429, 500, fine, "drop", "stall", fine, "nonsense", "drip", fine])
    done = by_llm(folder, server, "--concurrency", 1, "--retries", 2)
    assert done.returncode == 0 and "requests 14" in done.stdout, (
        done.stderr
    )  # six of them for nothing
    assert [row["verdict"] for row in read_jsonl(folder / "judgements.jsonl")] == [1, 0, 0.5, 1, 0]


def test_the_cap_is_hard_and_what_was_answered_is_kept(folder, http_server):
    server = http_server([500, completion(longer)])
    done = by_llm(folder, server, "--max-requests", 5, "--concurrency", 3)
    assert (
        done.returncode == 1
        and len(server.received) == 5
        and "not sent because of the cap 4" in done.stdout
    )
    assert read_json(folder / "winrates.json")[0]["unjudged"] >= 2
    assert by_llm(folder, server, "--max-requests", 4).returncode == 0 and len(server.received) == 9


def test_answers_that_name_nobody_are_no_verdict_and_not_kept(folder, http_server):
    done = by_llm(folder, http_server([completion("They are both lovely.")]))
    assert done.returncode == 1 and "answers without a verdict 8" in done.stdout
    [rate] = read_json(folder / "winrates.json")
    assert (rate["pairs"], rate["ties"], rate["unjudged"]) == (
        1,
        1,
        4,
    )  # two equal texts are a tie without a question
    server = http_server([completion(longer)])
    assert "requests 8" in by_llm(folder, server).stdout


@pytest.mark.parametrize(
    "answer, message", [(401, "answered status 401"), (404, "answered status 404")]
)
def test_a_refusal_ends_it_at_once(answer, message, folder, http_server):
    server = http_server([answer])
    done = by_llm(folder, server, "--concurrency", 1)
    assert done.returncode == 2 and message in done.stderr and len(server.received) == 1
    assert not (folder / "winrates.json").exists()


def asks(tmp_path, server, **options):
    return Endpoint(server.url, "m", cache=tmp_path / "c.sqlite", retries=0, **options)


def test_the_fields_of_a_request_are_free(tmp_path, http_server):
    server = http_server([completion("x")])
    question = [[{"role": "user", "content": "?"}]]
    body = _body(["temperature=null", "max_completion_tokens=4000", "reasoning_effort=low"])
    asks(tmp_path, server, body=body).ask(question, str)
    assert server.received[0].keys() - {"model", "messages"} == body.keys() - {"temperature"}
    assert server.received[0]["max_completion_tokens"] == 4000
    assert server.received[0]["reasoning_effort"] == "low"
    asks(tmp_path, server).ask(question, str)  # other fields: not the answer of the cache
    assert server.received[1]["temperature"] == 0.0 and server.received[1]["max_tokens"] == 256
    with pytest.raises(ConfigError, match="body: stream cannot be set"):
        asks(tmp_path, server, body={"stream": True})
    with pytest.raises(DataError, match="--body temperature: expected KEY=VALUE"):
        _body(["temperature"])


def refuses(*names):
    """A server that refuses fields of a request as OpenAI's does."""

    def answer(body):
        for name in names:
            if name in body:
                message = f"Unsupported parameter: '{name}' is not supported with this model."
                message += " Use 'max_completion_tokens' instead." * (name == "max_tokens")
                error = {"message": message, "param": name, "code": "unsupported_parameter"}
                return 400, {"error": error | {"type": "invalid_request_error"}}
        return completion("x")(body)

    return answer


def test_max_tokens_that_is_refused_has_a_new_name(tmp_path, http_server, caplog):
    server = http_server([refuses("max_tokens")])
    questions = [[{"role": "user", "content": str(i)}] for i in range(3)]
    asked = asks(tmp_path, server, concurrency=1).ask(questions, str)
    assert asked.answers == ["x"] * 3 and asked.requests == 4
    assert [body.get("max_completion_tokens") for body in server.received] == [None, 256, 256, 256]
    assert "m refuses max_tokens; max_completion_tokens=256 is sent instead" in caplog.text
    again = asks(tmp_path, server).ask(questions, str)
    assert again.from_cache == 3 and len(server.received) == 4


def test_another_field_that_is_refused_is_named_with_the_fix(tmp_path, http_server):
    server = http_server([refuses("temperature")])
    questions = [[{"role": "user", "content": str(i)}] for i in range(3)]
    with pytest.raises(
        EndpointError, match=r"--body temperature=null, or reward.body={temperature: null}"
    ):
        asks(tmp_path, server, concurrency=1).ask(questions, str)
    assert len(server.received) == 1
    asked = asks(tmp_path, server, body={"temperature": None}).ask(questions, str)
    assert asked.answers == ["x"] * 3


def test_a_dead_server_ends_it(tmp_path, http_server):
    server = http_server([500])
    endpoint = Endpoint(server.url, "m", cache=tmp_path / "c.sqlite", retries=0, concurrency=1)
    with pytest.raises(EndpointError, match="8 questions in a row"):
        endpoint.ask([[{"role": "user", "content": str(i)}] for i in range(20)], str)
    assert len(server.received) < 12


def test_equal_questions_are_asked_once_and_several_at_a_time(tmp_path, http_server):
    def slow(body):
        time.sleep(0.3)
        return {"choices": [{"message": {"content": body["messages"][0]["content"]}}]}

    endpoint = Endpoint(http_server([slow]).url, "m", cache=tmp_path / "c.sqlite", concurrency=6)
    asked = endpoint.ask([[{"role": "user", "content": str(i % 3)}] for i in range(6)], int)
    assert asked.answers == [0, 1, 2, 0, 1, 2] and asked.requests == 3


def test_the_key_comes_from_the_environment(tmp_path, http_server, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    endpoint = Endpoint(
        http_server([completion("x")]).url, "m", cache=tmp_path / "c.sqlite", key_env="MY_KEY"
    )
    assert endpoint._client.headers["Authorization"] == "Bearer secret"
    assert "secret" not in json.dumps(endpoint.settings)


def test_a_run_is_judged_by_its_own_reward_whatever_else_is_asked(folder, tmp_path):
    """The chosen responses have no stored score: they get one from the run's settings, and the
    others keep theirs."""
    (tmp_path / "words.json").write_text(
        json.dumps({"positive": ["longer", "plain"], "negative": ["best"]})
    )
    reward = (
        f"reward: {{name: lexicon, path: {tmp_path / 'words.json'}, scale: 0.5}}\nmore_rewards:"
        " []\n"
    )
    (folder / "config.yaml").write_text(reward)
    assert command(folder, "--by", "reward", "--against", "reference", "chosen").returncode == 0
    rows = read_jsonl(folder / "judgements.jsonl")
    assert [row["verdict"] for row in rows[:5]] == [1, 0, 0.5, 1, 0]  # by the stored scores
    scores = [2 / (1 + 2.718281828459045 ** (-0.5 * n)) for n in (1, 0, 1, 0, 0)]
    assert [row["policy_score"] for row in rows[5:]] == pytest.approx(scores) and {
        round(row["opponent_score"], 6) for row in rows[5:]
    } == {round(2 / (1 + 2.718281828459045**0.5), 6)}


def test_a_folder_with_several_checkpoints_is_no_single_opponent(tmp_path):
    write_jsonl(
        tmp_path / "samples.jsonl", [sample(0, "a", checkpoint="x"), sample(0, "b", checkpoint="y")]
    )
    with pytest.raises(DataError, match="folder with one checkpoint"):
        pair_up([sample(0, "c")], str(tmp_path))


def test_a_question_that_the_server_rejects_leaves_the_others(folder, http_server):
    server = http_server([400, completion(longer)])
    done = by_llm(folder, server, "--concurrency", 1)
    assert done.returncode == 1 and "failed 1" in done.stdout and "requests 8" in done.stdout
    assert [row["verdict"] for row in read_jsonl(folder / "judgements.jsonl")] == [
        None,
        0,
        0.5,
        1,
        0,
    ]
