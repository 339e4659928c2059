"""Samples of a model that a server holds: a server of threads here, honest and with each fault."""

import contextlib
import json
import math
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from conftest import make_model, read_rows, run_here, save_model, small_run, write_jsonl
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import generate
from preflab.batching.examples import PromptToSample
from preflab.distributed.process_group import ALONE
from preflab.modeling.generation import sample
from preflab.modeling.logprobs import Scorer
from preflab.modeling.response_ends import ResponseEnds
from preflab.online.ahead import Ahead
from preflab.online.drawing import Drawing
from preflab.serving.build import served_models
from preflab.serving.checks import check_sampler
from preflab.serving.protocol import Limits, Protocol, WrongAnswerError
from preflab.serving.sampler import ServedModel, weights_stamp
from preflab.serving.server import SamplerError, Server, _joined
from preflab.settings.compose import compose
from preflab.settings.load import load_settings
from preflab.settings.refused import errors_in_one_line
from preflab.settings.values import changed
from scripts.build_preferences import build_rows
from utils import ConfigError, DataError

END, N_NEW = 256, 6
PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6], [9]]
KEYS = [0, 1, (2, 1)]


class FakeServer:
    """What `vllm serve` answers, or with `text` what `transformers serve` does, by a model.

    change(answer, body, n): what request n gets instead: a dict, a status with headers, bytes,
    "drop" or "stall". greedy: whatever temperature is asked for.
    """

    def __init__(self, scorer, tokenizer, *, text=False, change=None, greedy=False, names=("m",)):
        self.scorer, self.tokenizer, self.text = scorer, tokenizer, text
        self.change, self.greedy, self.names = change, greedy, names
        self.bodies, self.headers, self.lock = [], [], threading.Lock()
        self.stopped = threading.Event()

    def draw(self, prompt, body):
        """A response, and its log-probs by the whole model's own logits."""
        config = json.loads(body.get("generation_config", "{}"))
        greedy = self.greedy or not body["temperature"] or config.get("do_sample") is False
        [tokens] = sample(
            self.scorer,
            self.tokenizer,
            [prompt],
            keys=[body["seed"]],
            max_new_tokens=body["max_tokens"],
            temperature=0 if greedy else body["temperature"],
        )
        with torch.no_grad():
            logits = self.scorer.model(torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 :]
        logps = logits.log_softmax(-1)[range(len(tokens)), tokens]
        return tokens, logps.tolist()

    def answer(self, body):
        prompt = self.tokenizer(body["prompt"])["input_ids"] if self.text else body["prompt"]
        with self.lock:
            tokens, logps = self.draw(prompt, body)
        ended = tokens[-1] == END
        choice = {"index": 0, "finish_reason": "stop" if ended else "length"}
        choice["text"] = self.tokenizer.decode(tokens, skip_special_tokens=True)
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(tokens)}
        answer = {"model": body["model"], "choices": [choice], "usage": usage}
        if not self.text:
            assert body["return_token_ids"] and body["logprobs"] == 0
            choice |= {"token_ids": tokens, "prompt_token_ids": prompt}
            choice["logprobs"] = {"token_logprobs": logps, "tokens": ["x"] * len(tokens)}
        return answer

    def post(self, body, headers):
        with self.lock:
            n = len(self.bodies)
            self.bodies.append(body)
            self.headers.append(headers)
        answer = self.answer(body)
        return answer if self.change is None else self.change(answer, body, n)


@contextlib.contextmanager
def running(fake):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            names = {"data": [{"id": name} for name in fake.names or ()]}
            self.reply("stall" if fake.names is None else names)

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.reply(fake.post(body, dict(self.headers)))

        def reply(self, answer):
            if answer == "stall":
                fake.stopped.wait(20)
            if answer in ("drop", "stall"):
                self.connection.close()
                return
            status, headers = answer if isinstance(answer, tuple) else (200, {})
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(OSError):
                self.wfile.write(content)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        fake.stopped.set()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def scorer():
    return Scorer(make_model("llama"))


@pytest.fixture(scope="module")
def letters():
    """A tokenizer whose tokens are letters, so that every response is a text."""
    vocabulary = {chr(0x100 + i): i for i in range(END)} | {"<e>": END, "<p>": END + 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<e>", pad_token="<p>")


@pytest.fixture(scope="module")
def settings():
    return load_settings(compose(["tracker=none"]))


@pytest.fixture
def ask(scorer, letters, settings, tmp_path):
    """Draw from a fake server, by a new ServedModel as a new process would have."""

    def ask(fake, *, here=scorer, prompts=PROMPTS, keys=KEYS, options=None, **sampler):
        with running(fake) as url:
            quick = {"url": url, "retries": 1, "backoff": 0.01, "timeout": 5.0} | sampler
            quick["server"] = "transformers" if fake.text else "vllm"
            if fake.text:
                quick["model"] = "m"
            served = ServedModel(
                replace(settings.sampler, **quick),
                name=quick.get("model"),
                of="policy",
                stamp="s",
                store=tmp_path / "served_samples.jsonl",
            )
            more = {"max_new_tokens": N_NEW, "seed": 3} | (options or {})
            return served(here, letters, prompts, keys=keys, **more)

    return ask


# ---------------------------------------------------------------------------------- what is asked


def test_responses_are_those_of_the_server_and_each_is_asked_for_once(ask, scorer, letters):
    fake = FakeServer(scorer, letters)
    drawn = ask(fake, options={"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1})
    bodies = fake.bodies[-3:]  # after those of the comparison
    assert sorted(map(str, drawn)) == sorted(
        str(fake.draw(body["prompt"], body)[0]) for body in bodies
    )
    assert [body["prompt"] for body in sorted(bodies, key=lambda b: len(b["prompt"]))] == sorted(
        PROMPTS, key=len
    )
    for body in bodies:
        asked = (0.7, 0.9, 5, 0.1, N_NEW, 1, [END])
        names = ("temperature", "top_p", "top_k", "min_p", "max_tokens", "n", "stop_token_ids")
        assert tuple(body[name] for name in names) == asked
        assert body["repetition_penalty"] == 1 and not body["skip_special_tokens"]
    seeds = {body["seed"] for body in bodies}
    assert len(seeds) == 3
    # The same command asks for nothing; for other keys only, with other seeds.
    again = FakeServer(scorer, letters, change=lambda *_: (500, {}))
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1}
    assert ask(again, options=options) == drawn and again.bodies == []
    more = FakeServer(scorer, letters)
    ask(more, keys=[0, 1, (2, 2)], options=options)
    assert more.bodies[-1]["prompt"] == PROMPTS[2] and len(more.bodies) == 4
    assert more.bodies[-1]["seed"] not in seeds


def test_greedy_responses_are_those_drawn_here(ask, scorer, letters):
    here = sample(scorer, letters, PROMPTS, keys=KEYS, max_new_tokens=N_NEW, temperature=0, seed=3)
    for text in (False, True):
        fake = FakeServer(scorer, letters, text=text)
        options = {"temperature": 0, "max_new_tokens": N_NEW}
        assert ask(fake, options=options) == here


def test_a_token_from_the_environment_is_sent_and_never_shown(ask, scorer, letters, monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "secret-1")
    fake = FakeServer(scorer, letters)
    ask(fake, token_env="MY_TOKEN")
    assert {h["Authorization"] for h in fake.headers} == {"Bearer secret-1"}
    fake.change = lambda *_: b"Bearer secret-1 is wrong"
    with pytest.raises(SamplerError, match=r"Bearer \*\*\* is wrong") as raised:
        ask(fake, keys=[7, 8, 9], token_env="MY_TOKEN")
    assert "secret" not in str(raised.value)


# -------------------------------------------------------------------------------- faulty servers


def altered(**fields):
    """Answers whose choice has other fields."""

    def change(answer, body, n):
        return answer | {"choices": [answer["choices"][0] | fields]}

    return change


def twice(answer, body, n):
    return answer | {"choices": answer["choices"] * 2}


def cut_short(answer, body, n):
    [choice] = answer["choices"]
    return answer | {"choices": [choice | {"token_ids": [65], "finish_reason": "length"}]}


def other_prompt(answer, body, n):
    return answer | {"usage": answer["usage"] | {"prompt_tokens": 99}}


def other_text(answer, body, n):
    """No ids, and a text that has fewer tokens here than were sampled."""
    return altered(token_ids=None, text="\u0105\u0106")(
        answer | {"usage": answer["usage"] | {"completion_tokens": 3}}, body, n
    )


def other_logps(answer, body, n):
    [choice] = answer["choices"]
    logps = [value - 0.2 for value in choice["logprobs"]["token_logprobs"]]
    return altered(logprobs=choice["logprobs"] | {"token_logprobs": logps})(answer, body, n)


FAULTS = {
    "dead": ("drop", "gave no samples in 2 attempts"),
    "stalled": ("stall", "gave no samples in 2 attempts.*(does not end|Timeout)"),
    "500": ((500, {}), "in 2 attempts, the last answer: status 500"),
    "400": ((400, {}), "gave no samples, the last answer: status 400"),
    "404": ((404, {}), "status 404.*does the address end in /v1"),
    "422": ((422, {}), "status 422.*sampler.server"),
    "cut JSON": (b'{"choices": [{"te', "in 2 attempts, the last answer: no whole JSON"),
    "cut events": (b'data: {"choices": [{"text": "a"}]}\n\n', "no whole JSON"),
    "not a completion": ({"error": "out of memory"}, "no completion"),
    "no choice": (lambda a, b, n: a | {"choices": []}, "0 choices, and one was asked for"),
    "two choices": (twice, "2 choices, and one was asked for"),
    "filtered": (altered(finish_reason="content_filter"), "finish_reason 'content_filter'"),
    "short": (cut_short, "1 tokens that ended by length, and max_tokens is 6"),
    "no end": (altered(token_ids=[65], finish_reason="stop"), "without an end token"),
    "unknown ids": (altered(token_ids=[9999]), "ids that the tokenizer does not have"),
    "prompt": (other_prompt, "read the prompt as 99 tokens, and here it has"),
    "text": (other_text, "3 tokens as text, which has 2 here"),
    "no log-probs": (altered(logprobs=None), "gives no log-probs"),
    "other log-probs": (other_logps, "serves another model.*differ by 0.2 nats"),
    "name": (lambda a, b, n: a | {"model": "b"}, "as model 'b', and 'm' was asked for"),
    "no name": (lambda a, b, n: a | {"model": 5}, "as model 5, and 'm' was asked for"),
    "bool ids": (altered(token_ids=[True] * 6), "ids that the tokenizer does not have"),
    "list of log-probs": (altered(logprobs=[-1.0]), "1 log-probs of 6 tokens"),
    "log-probs of text": (altered(logprobs={"token_logprobs": 5}), "log-probs that are no list: 5"),
    "text of numbers": (altered(token_ids=None, text=5), "no completion"),
    "odd number": (altered(token_ids=None, logprobs={"tokens": ["token_id:²"]}), "no completion"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_server_ends_the_command_with_an_error(ask, scorer, letters, fault):
    change, message = FAULTS[fault]
    faulty = change if callable(change) else lambda *_: change
    fake = FakeServer(scorer, letters, change=faulty)
    with pytest.raises(SamplerError, match=message):
        ask(fake, timeout=0.4 if fault == "stalled" else 5.0)


def test_a_stop_is_seen_while_a_server_does_not_name_its_models(settings, scorer, letters):
    looks = iter([None, None, KeyboardInterrupt])

    def look():
        if error := next(looks):
            raise error

    with running(FakeServer(scorer, letters, names=None)) as url:
        server = Server(replace(settings.sampler, url=url, server="vllm", timeout=30.0))
        with pytest.raises(KeyboardInterrupt):
            server.models(look)
    assert not list(looks)


@pytest.mark.parametrize("names", [(), ("a", "b")])
def test_a_server_without_the_model_names_what_it_has(ask, scorer, letters, names):
    fake = FakeServer(scorer, letters, names=names)
    with pytest.raises(SamplerError, match=f"serves {', '.join(names) or 'nothing'}"):
        ask(fake)
    if names:
        ask(FakeServer(scorer, letters, names=names), model="b")


def test_nobody_listens(scorer, letters, settings, tmp_path):
    sampler = replace(settings.sampler, url="http://127.0.0.1:1/v1", retries=0)
    served = ServedModel(sampler, name="m", of="policy", stamp="", store=tmp_path / "s.jsonl")
    with pytest.raises(SamplerError, match="in 1 attempts, the last answer: ConnectError"):
        served(scorer, letters, PROMPTS, keys=KEYS, max_new_tokens=4)


def test_a_busy_server_is_asked_again(ask, scorer, letters):
    def busy(answer, body, n):
        return (429, {"Retry-After": "0.02"}) if n in (0, 4) else answer

    fake = FakeServer(scorer, letters, change=busy)
    drawn = ask(fake, concurrency=1)
    assert len(drawn) == 3 and len(fake.bodies) == 8  # 3 compared, 3 drawn, 2 again


def test_what_was_obtained_before_a_failure_is_kept(ask, scorer, letters):
    def dies(answer, body, n):
        return answer if n < 5 else (500, {})

    fake = FakeServer(scorer, letters, change=dies)
    with pytest.raises(SamplerError, match="the same command continues"):
        ask(fake, concurrency=1)
    drawn_before = [body["prompt"] for body in fake.bodies[3:5]]
    healthy = FakeServer(scorer, letters)
    drawn = ask(healthy, concurrency=1)
    assert [body["prompt"] for body in healthy.bodies[3:]] == PROMPTS[2:]
    assert drawn_before == PROMPTS[:2] and len(drawn) == 3


def test_a_damaged_file_of_responses_is_named_and_a_cut_line_is_not(ask, scorer, letters, tmp_path):
    ask(FakeServer(scorer, letters))
    path = tmp_path / "served_samples.jsonl"
    whole = path.read_text()
    path.write_text(whole[:-8])
    again = FakeServer(scorer, letters)
    ask(again)
    assert len(again.bodies) == 4 and len(path.read_text().splitlines()) == 3
    path.write_text('{"key": "a"}\n' + whole)
    with pytest.raises(DataError, match=r"served_samples.jsonl:1: the row has no 'tokens'"):
        ask(again)
    for tokens in ('"text"', "[-1]", "[true]", "[[1]]", "{}"):
        path.write_text(f'{{"key": "a", "tokens": {tokens}}}\n' + whole)
        with pytest.raises(DataError, match=r"served_samples.jsonl: .*not what was written there"):
            ask(again)


# ------------------------------------------------------------------------ which model is it, text


def test_another_model_is_told_from_the_one_here(ask, scorer, letters):
    other = Scorer(make_model("llama", seed=1))
    with pytest.raises(SamplerError, match=r"serves another model than the policy.* differ by"):
        ask(FakeServer(other, letters))
    with pytest.raises(SamplerError, match="below those of the likeliest tokens by"):
        ask(FakeServer(other, letters, text=True))
    assert len(ask(FakeServer(other, letters), tolerance=None)) == 3


def test_ids_written_as_tokens_are_read(ask, scorer, letters):
    def as_tokens(answer, body, n):
        [choice] = answer["choices"]
        names = [f"token_id:{i}" for i in choice["token_ids"]]
        logprobs = choice["logprobs"] | {"tokens": names}
        return altered(token_ids=None, logprobs=logprobs, text="?")(answer, body, n)

    fake = FakeServer(scorer, letters, change=as_tokens, greedy=True)
    here = sample(scorer, letters, PROMPTS, keys=KEYS, max_new_tokens=N_NEW, temperature=0)
    assert ask(fake) == here


def test_streamed_text_gives_the_ids_that_were_sampled():
    """Also where the tokenizer would write the text in other tokens."""
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4, "<e>": 5}
    pairs = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b"), ("b", "c")]))
    pairs.pre_tokenizer, pairs.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=pairs, eos_token="<e>")
    protocol = Protocol(False, tokenizer, ResponseEnds((5,)))
    assert tokenizer("abc")["input_ids"] == [3, 2]

    def event(text, reason=None, **more):
        return "data: " + json.dumps({"choices": [{"text": text, "finish_reason": reason}], **more})

    usage = {"prompt_tokens": 1, "completion_tokens": 3}
    events = [event("a"), event("bc"), event("", "stop", usage=usage), "data: [DONE]"]
    stream = "\n\n".join(events).encode()
    assert protocol.read(_joined(stream), [0], Limits(9)).tokens == [0, 4, 5]
    whole = {"choices": [{"text": "abc", "finish_reason": "stop"}], "usage": usage}
    assert protocol.read(whole, [0], Limits(9)).tokens == [3, 2, 5]
    with pytest.raises(WrongAnswerError, match="4 tokens as text, which has 2 here"):
        protocol.read(whole | {"usage": usage | {"completion_tokens": 4}}, [0], Limits(9))
    with pytest.raises(WrongAnswerError, match="may end with any of <e>, c"):
        Protocol(False, tokenizer, ResponseEnds((5, 2))).check_ends()
    with pytest.raises(WrongAnswerError, match="has other token ids here than its text"):
        protocol.body("m", [0, 1], Limits(9), 0)


# --------------------------------------------------------------------------------------- commands

URL = "http://127.0.0.1:8000/v1"
REFUSED = [
    ({"function": "train"}, {"url": URL}, "the policy of function=train changes"),
    ({"function": "train"}, {"url": URL, "model": "m", "reference_model": "r"}, "changes"),
    ({"function": "online"}, {"url": URL}, "or online.sampler=reference"),
    ({"function": "eval", "archives": 2}, {"url": URL}, "serves one policy"),
    ({"samples": False}, {"url": URL, "reference_model": "r"}, "draws no samples"),
    ({}, {"model": "m"}, "sampler.model=m names a model of a server"),
    ({}, {"url": "127.0.0.1:8000"}, "is not an address"),
    ({}, {"url": "http://me:pass@host/v1"}, "would be saved in config.yaml"),
]


@pytest.mark.parametrize("run, sampler, message", REFUSED)
def test_what_a_server_cannot_sample_is_refused(settings, run, sampler, message):
    run = {"function": "train", "archives": 1, "samples": True} | run
    changes = {"function": run["function"], "sampler": sampler}
    with pytest.raises(ConfigError, match=message):
        check_sampler(
            changed(settings, **changes), n_policies=run["archives"], samples=run["samples"]
        )
    for function, more in (("train", {"reference_model": "r"}), ("eval", {}), ("plan", {})):
        fine = changed(settings, function=function, sampler={"url": URL, **more})
        check_sampler(fine, n_policies=1, samples=True)
    fixed = changed(
        settings, function="online", sampler={"url": URL}, online={"sampler": "reference"}
    )
    check_sampler(fixed, n_policies=0, samples=True)


@pytest.fixture
def command(imdb_dir, llama_folder, tmp_path):
    return lambda *more: small_run(llama_folder, imdb_dir, tmp_path / "run", *more)


def test_an_evaluation_of_greedy_samples_of_a_server_is_that_of_samples_here(
    command, scorer, tokenizer, tmp_path, llama_folder
):
    words = ("function=eval", "temperature=0", f"model.reference_archive={llama_folder}")
    run_here(*command(*words))
    here = read_rows(tmp_path / "run" / "samples.jsonl")
    with running(FakeServer(scorer, tokenizer)) as url:
        served = (f"sampler.url={url}", f"local_run_dir={tmp_path / 'served'}")
        run_here(*command(*words, *served))
    assert read_rows(tmp_path / "served" / "samples.jsonl") == here and len(here) == 8
    assert all(math.isfinite(row["kl"]) for row in here)
    [row] = read_rows(tmp_path / "served" / "eval.jsonl")
    assert row["sampled_by"] == "vllm: policy"


def test_generate_ends_with_one_line_and_continues(command, scorer, tokenizer, tmp_path, capsys):
    dies = FakeServer(scorer, tokenizer, change=lambda a, b, n: a if n < 10 else (500, {}))
    words = ("function=eval", "loss=sft", "sampler.retries=0", "sampler.concurrency=1")

    def run(url):
        config = compose(command(*words, f"sampler.url={url}"))
        with errors_in_one_line():
            return generate.generate(config, tmp_path / "run")

    with running(dies) as url, pytest.raises(SystemExit) as ended:
        run(url)
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert ended.value.code == 2 and len(errors) == 1 and "status 500" in errors[0]
    healthy = FakeServer(scorer, tokenizer)
    with running(healthy) as url:
        rows = read_rows(run(url))
    # 8 compared and 2 drawn before; 8 compared and 6 drawn after
    assert len(rows) == 8 and len(healthy.bodies) == 14
    assert rows[0]["sampled_by"] == "vllm: policy"


def test_preferences_and_rounds_are_drawn_by_a_server(
    command, scorer, tokenizer, tmp_path, llama_folder
):
    fake = FakeServer(scorer, tokenizer)
    with running(fake) as url:
        config = compose(command(f"sampler.url={url}", "function=eval"))
        partial = tmp_path / "out-partial.jsonl"
        train, test = build_rows(config, ["one", "two"], 2, 1, partial)
        assert (len(train), len(test)) == (2, 2) and len(fake.bodies) == 2 + 4
        assert len(read_rows(tmp_path / "out-partial-served.jsonl")) == 4

        words = ("function=online", "online.sampler=reference", f"sampler.url={url}")
        words += ("sampler.retries=0",)
        settings = load_settings(compose(command(*words)))
        served = served_models(settings, tmp_path)["sampler"]
        drawing = Drawing(settings, scorer, tokenizer, ALONE, served)
        prompts = [PromptToSample(ids, [], i) for i, ids in enumerate(PROMPTS)]
        rollouts = drawing.roll_out(1, prompts, [])
        asked = {tuple(body["prompt"]) for body in fake.bodies[-6:]}
        assert asked == set(map(tuple, PROMPTS))

        ahead = Ahead(drawing, None)
        ahead.begin(2, prompts)
        ahead.wait(ALONE)
        n_asked, drawn = len(fake.bodies), ahead.take(2)
        assert (
            len(drawn) == 3 and drawn == drawing.draw(2, prompts)[0] and len(fake.bodies) == n_asked
        )
    assert [len(of_prompt) for of_prompt in rollouts.tokens] == [2, 2, 2]
    ahead.begin(3, prompts)  # the server is gone, which the round says when it begins
    ahead.wait(ALONE)
    assert ahead.take(3) is None and ahead.state(3) is None
    with pytest.raises(SamplerError, match="in 1 attempts"):
        drawing.draw(3, prompts)


def test_the_stamp_changes_with_the_weights(settings, tmp_path):
    folder, other = save_model(tmp_path / "a"), save_model(tmp_path / "b")
    model = changed(settings.model, name_or_path=str(folder))
    before = weights_stamp(model, None)
    assert weights_stamp(model, None) == before != weights_stamp(model, str(other))
    write_jsonl(folder / "model.safetensors", [{}])
    assert weights_stamp(model, None) != before
