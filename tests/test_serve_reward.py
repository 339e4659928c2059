"""The scoring service: what it answers, what it refuses, and that killing it loses and repeats
nothing."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from conftest import (
    ROOT,
    final_weights,
    read_rows,
    run_here,
    same_weights,
    save_model,
    small_run,
)
from fastapi.testclient import TestClient
from hydra import compose, initialize_config_dir
from test_refusals import disk

from preflab.checks import check_service
from preflab.online import connections, rounds, service
from preflab.online import service as service_module
from preflab.online.service import Service, make_app
from preflab.rewards.registry import RewardError, build_reward
from preflab.settings.keys import CONFIG_DIR
from preflab.settings.load import validate
from preflab.settings.run_folder import register_resolvers
from trainers import BasicTrainer
from utils import ConfigError


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("models") / "gpt2", "gpt2", scale=1.0)


LEARNS = [
    "online.discriminator=bradley_terry",
    "online.discriminator_lr=1e-3",
    "online.discriminator_epochs=2",
    "online.relabel_every=16",
    "online.relabels=3",
    "online.replay=1",
]


def service_options(small_folder, imdb_dir, *more: str) -> list[str]:
    """What a service shares with the run that it labels for."""
    return [
        f"model.name_or_path={small_folder}",
        "model=blank_model",
        "reward=length",
        "reward.unit=characters",
        "max_length=64",
        "max_prompt_length=32",
        "eval_batch_size=8",
        *more,
    ]


def settings_of(*overrides: str):
    register_resolvers()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        config = compose("config", overrides=["function=online", *map(str, overrides)])
    settings = validate(config)
    check_service(settings)
    return settings


@pytest.fixture
def client(small_folder, imdb_dir, tmp_path):
    """A client of a service in this process."""

    def client(*more: str, token: str | None = None, folder: Path = tmp_path / "state"):
        service = Service(
            settings_of(*service_options(small_folder, imdb_dir, *more)), folder, BasicTrainer
        )
        return TestClient(make_app(service, token), raise_server_exceptions=False), service

    return client


def request(number: int, n: int = 4) -> dict:
    return {
        "id": f"r{number}",
        "round": number,
        "prompts": [f"p{i}" for i in range(n)],
        "responses": [["x" * (i + number), "y" * (2 * i + 1)] for i in range(n)],
    }


def test_predict_scores_by_the_reward(client):
    http, _ = client()
    assert http.post(
        "/predict", json={"prompts": ["a", "b"], "responses": ["four", ""]}
    ).json() == {"scores": [4.0, 0.0]}
    assert http.get("/health").json() == {"ok": True, "reward": "length", "discriminator": False}
    assert settings_of().host == "127.0.0.1"  # this machine alone, unless told


def test_train_without_a_discriminator_is_opo_with_gold(client):
    http, _ = client("online.budget=6")
    answer = http.post("/train", json=request(1)).json()
    assert answer["scores"] == [[1.0, 1.0], [2.0, 3.0], [3.0, 5.0], [4.0, 7.0]]
    assert answer["pairs"] == [None, [1, 0], [1, 0], [1, 0]] and (
        answer["labels_bought"],
        answer["room"],
    ) == (4, 2)
    refused = http.post("/train", json=request(2))
    assert (
        refused.status_code == 422
        and "4 pairs are to be labelled, and the budget of 6 labels has room for 2"
        in refused.json()["error"]
    )
    assert http.get("/state").json() | {"pool": 0} == {
        "requests": 1,
        "labels_bought": 4,
        "budget": 6,
        "pool": 0,
        "discriminator_steps": 0,
    }


def test_a_service_charges_for_the_order_of_all_where_it_is_asked_for(client):
    http, _ = client("online.responses_per_prompt=4")
    body = request(1, 1) | {"responses": [["a", "aa", "aaa", "aaaa"]]}
    assert http.post("/train", json=body).json()["labels_bought"] == 4
    body = request(2, 1) | {"responses": [["b", "bb", "bbb", "bbbb"]], "ranks": True}
    assert http.post("/train", json=body).json()["labels_bought"] == 4 + 5


def test_a_service_of_pairs_refuses_three_before_it_asks_its_gold(client, tmp_path):
    http, _ = client()
    answer = http.post("/train", json=request(1) | {"responses": [["a", "b", "c"]] * 4})
    assert (
        answer.status_code == 422
        and "start it with online.responses_per_prompt=3" in answer.json()["error"]
    )
    assert not (tmp_path / "state" / "labels.jsonl").exists()


def test_train_learns_and_says_the_same_to_the_same_id(client):
    http, service = client(*LEARNS)
    before = http.post("/predict", json={"prompts": ["p"], "responses": ["xyz"]}).json()
    first = http.post("/train", json=request(1)).json()
    assert first["labels_bought"] == 0 and http.get("/state").json()["pool"] == 4
    second = http.post("/train", json=request(2)).json()
    assert second["labels_bought"] == 3 and http.get("/state").json()["pool"] == 0
    after = http.post("/predict", json={"prompts": ["p"], "responses": ["xyz"]}).json()
    assert after != before
    steps = service.discriminator.learner.counters.steps
    assert (
        http.post("/train", json=request(2)).json() == second
        and service.discriminator.learner.counters.steps == steps
    )  # asked again: nothing is bought or learnt
    assert http.get("/health").json()["discriminator"] == "bradley_terry"


def test_a_service_started_again_goes_on(client, tmp_path):
    http, _ = client(*LEARNS)
    answers = [http.post("/train", json=request(n)).json() for n in range(1, 6)]
    other, _ = client(*LEARNS, folder=tmp_path / "other")
    for n in range(1, 4):
        other.post("/train", json=request(n))
    again, _ = client(*LEARNS, folder=tmp_path / "other")
    assert again.post("/train", json=request(3)).json() == answers[2]  # the client had not got it
    assert [again.post("/train", json=request(n)).json() for n in (4, 5)] == answers[3:]
    assert read_rows(tmp_path / "other" / "labels.jsonl") == read_rows(
        tmp_path / "state" / "labels.jsonl"
    )


@pytest.mark.parametrize("where", ["before the checkpoint", "after it"])
def test_killed_between_buying_and_saving_nothing_is_bought_twice(
    client, tmp_path, monkeypatch, where
):
    http, _ = client(*LEARNS)
    answers = [http.post("/train", json=request(n)).json() for n in range(1, 5)]
    other, service = client(*LEARNS, folder=tmp_path / "other")
    other.post("/train", json=request(1))

    def killed(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(
        service_module,
        "save_checkpoint" if where == "before the checkpoint" else "atomic_write",
        killed,
    )
    with pytest.raises(KeyboardInterrupt):
        service.train(service_module.Train(**request(2)))
    monkeypatch.undo()
    assert len(read_rows(tmp_path / "other" / "labels.jsonl")) == 3
    again, _ = client(*LEARNS, folder=tmp_path / "other")
    assert [again.post("/train", json=request(n)).json() for n in (2, 3, 4)] == answers[1:]
    assert read_rows(tmp_path / "other" / "labels.jsonl") == read_rows(
        tmp_path / "state" / "labels.jsonl"
    )


def test_another_request_after_a_kill_buys_nothing_twice(client, tmp_path, monkeypatch):
    _http, killed = client()

    def kill(*arguments, **more):
        raise KeyboardInterrupt

    monkeypatch.setattr(Service, "_save", kill)
    with pytest.raises(KeyboardInterrupt):
        killed.train(service_module.Train(**request(1)))
    monkeypatch.undo()
    again, _ = client()  # and the client of the first request is slower than another one
    second = again.post("/train", json=request(2)).json()
    first = again.post("/train", json=request(1)).json()
    assert (first["labels_bought"], second["labels_bought"]) == (4, 8)
    rows = read_rows(tmp_path / "state" / "labels.jsonl")
    assert [row["round"] for row in rows] == [1] * 4 + [2] * 4
    request_file = tmp_path / "state" / "request.json"
    assert not request_file.exists()
    request_file.write_text('{"id": "r3", "rou')  # killed while it was written
    assert client()[0].post("/train", json=request(3)).json()["labels_bought"] == 12


@pytest.mark.parametrize(
    "path, body, status, cause",
    [
        ("/predict", {"prompts": ["a"], "responses": []}, 422, "1 prompts and 0 responses"),
        ("/predict", {"prompts": ["a"]}, 422, "responses: Field required"),
        ("/predict", {"prompts": ["a"], "responses": [3]}, 422, "valid string"),
        ("/predict", {"prompts": ["a"] * 5000, "responses": ["b"] * 5000}, 422, "at most 4096"),
        (
            "/predict",
            {"prompts": ["a"], "responses": ["b" * 300_000]},
            422,
            "a text has 300,000 characters",
        ),
        (
            "/train",
            {"id": "1", "round": 1, "prompts": ["a"], "responses": [["b"]]},
            422,
            "two or more responses",
        ),
        (
            "/train",
            {
                "id": "1",
                "round": 1,
                "prompts": ["a", "b"],
                "responses": [["b", "c"], ["b", "c", "d"]],
            },
            422,
            "equally many",
        ),
        ("/train", {"id": "1", "round": 1, "prompts": [], "responses": []}, 422, "two or more"),
        ("/nothing", {}, 404, "POST /predict"),
    ],
)
def test_bad_requests_are_told_what_is_wrong(client, path, body, status, cause):
    http, _ = client()
    answer = http.post(path, json=body)
    assert answer.status_code == status and cause in answer.json()["error"]


def test_what_is_not_json_or_too_large_or_of_the_wrong_method(client, monkeypatch):
    http, _ = client()
    assert http.post("/predict", content=b"\xff{").status_code == 422
    assert "error" in http.post("/predict", content=b"[").json()
    assert http.get("/predict").status_code == 405
    monkeypatch.setattr(service, "MAX_BYTES", 100)
    large = http.post("/predict", json={"prompts": ["a" * 200], "responses": ["b"]})
    assert large.status_code == 413 and "at most 100 bytes" in large.json()["error"]
    assert (
        http.post("/predict", content=iter([b"{}"])).status_code == 413
    )  # does not say how long it is


CHAT = '{"prompts": ["a"], "responses": ["b"], "messages": %s}'


@pytest.mark.parametrize(
    "path, body, status",
    [
        ("/predict", '{"prompts": [], "responses": []}', 200),
        ("/predict", '{"prompts": [], "responses": [], "messages": []}', 200),
        ("/predict", '{"prompts": [""], "responses": [""], "messages": null}', 200),
        ("/predict", r'{"prompts": ["\u0000\n\ud83d\ude00"], "responses": ["<|pad|>"]}', 200),
        ("/predict", r'{"prompts": ["\ud800"], "responses": ["b"]}', 422),
        ("/predict", r'{"prompts": ["a"], "responses": ["\udfff\ud800"]}', 422),
        ("/predict", CHAT % r'[[{"role": "user", "content": "\ud800"}]]', 422),
        ("/predict", CHAT % r'[[{"role": "user", "content": "a", "\udc00": 1}]]', 422),
        ("/predict", CHAT % '[[{"role": "user", "content": "a", "more": NaN}]]', 200),
        ("/predict", CHAT % '[[{"role": "assistant", "content": null, "tool_calls": 5}]]', 200),
        ("/predict", CHAT % "[[]]", 422),
        ("/predict", CHAT % f'[[{{"role": "user", "content": {"[" * 9000}{"]" * 9000}}}]]', 422),
        ("/predict", "null", 422),
        ("/predict", "[" * 9000 + "]" * 9000, 422),
        ("/predict", '"\\ud800"', 422),
        ("/train", '{"id": "1", "round": 1, "prompts": [], "responses": []}', 422),
        ("/train", '{"id": "1", "round": 1, "prompts": ["a"], "responses": [[]]}', 422),
        ("/train", '{"id": "", "round": 1, "prompts": ["a"], "responses": [["b", "c"]]}', 422),
        ("/train", f'{{"id": "1", "round": {"9" * 5000}, "prompts": [], "responses": []}}', 422),
        ("/train", '{"id": "1", "round": 1e400, "prompts": [], "responses": []}', 422),
    ],
)
@pytest.mark.parametrize("learns", [False, True])
def test_odd_but_well_formed_json_has_an_answer(odd_clients, learns, path, body, status):
    answer = odd_clients[learns].post(path, content=body)
    if learns and "role" in body:
        status = 422  # the tokenizer of its discriminator has no chat template
    assert answer.status_code == status, answer.text
    assert ("scores" if status == 200 else "error") in answer.json()


@pytest.fixture(scope="module")
def odd_clients(small_folder, tmp_path_factory):
    """Clients of a service without a discriminator and of one with it."""

    def client(*more: str) -> TestClient:
        settings = settings_of(*service_options(small_folder, None, *more))
        service = Service(settings, tmp_path_factory.mktemp("state"), BasicTrainer)
        return TestClient(make_app(service, None), raise_server_exceptions=False)

    return client(), client(*LEARNS)


def test_bodies_are_limited_together_and_by_what_they_become(client, monkeypatch):
    http, _ = client()
    texts = {"prompts": ["a, [b], {c}" * 9], "responses": ["b"]}
    monkeypatch.setattr(service, "MAX_VALUES", 20)
    assert http.post("/predict", json=texts).status_code == 200  # what stands in texts is no value
    many = http.post("/predict", json={"prompts": [[]] * 20, "responses": []})
    assert many.status_code == 413 and "at most 20 texts and lists" in many.json()["error"]
    monkeypatch.setattr(service, "MAX_BYTES_WAITING", 100)
    full = http.post("/predict", json=texts)
    assert full.status_code == 503 and "try again later" in full.json()["error"]
    assert http.post("/predict", json={"prompts": [], "responses": []}).status_code == 200


def test_after_an_error_while_saving_nothing_is_bought_or_learnt_twice(
    client, tmp_path, monkeypatch
):
    http, _ = client(*LEARNS)
    answers = [http.post("/train", json=request(n)).json() for n in range(1, 5)]
    other, _ = client(*LEARNS, folder=tmp_path / "other")
    other.post("/train", json=request(1))

    def full(*arguments, **more):
        raise OSError("No space left on device")

    monkeypatch.setattr(service_module, "save_checkpoint", full)
    assert "No space left" in other.post("/train", json=request(2)).json()["error"]
    monkeypatch.undo()
    assert [other.post("/train", json=request(n)).json() for n in (2, 3, 4)] == answers[1:]
    assert read_rows(tmp_path / "other" / "labels.jsonl") == read_rows(
        tmp_path / "state" / "labels.jsonl"
    )


def test_a_full_disk_is_told_and_the_request_is_done_once_there_is_space(client, tmp_path):
    http, _ = client(*LEARNS)
    answers = [http.post("/train", json=request(n)).json() for n in (1, 2)]
    with disk(tmp_path / "disk", 6000) as small:
        other, _ = client(*LEARNS, folder=small / "state")
        other.post("/train", json=request(1))
        space = os.statvfs(small)  # 40 KiB remain: labels are bought, a checkpoint has no room
        (small / "full").write_bytes(bytes(space.f_bavail * space.f_frsize - 40 * 1024))
        refused = other.post("/train", json=request(2))
        assert refused.status_code == 507 and "free some space" in refused.json()["error"]
        assert other.post("/predict", json={"prompts": ["a"], "responses": ["b"]}).is_success
        (small / "full").unlink()
        assert other.post("/train", json=request(2)).json() == answers[1]
        bought = [
            read_rows(folder / "labels.jsonl") for folder in (tmp_path / "state", small / "state")
        ]
        assert bought[0] == bought[1]


def test_an_id_of_other_texts_is_refused(client):
    http, _ = client()
    first = http.post("/train", json=request(1)).json()
    other = http.post("/train", json=request(2) | {"id": "r1"})
    assert other.status_code == 422 and "'r1' was sent before" in other.json()["error"]
    assert http.post("/train", json=request(1)).json() == first


@pytest.fixture
def address(client, monkeypatch):
    """The address of a service behind a real server, which does not wait long."""
    monkeypatch.setattr(connections, "SILENT_SECONDS", 0.5)
    monkeypatch.setattr(connections, "LOOK_SECONDS", 0.05)
    http, _ = client()
    server = connections.make_server(http.app, "127.0.0.1", free_port())
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield "127.0.0.1", server.config.port
    server.should_exit = True
    thread.join()


HEAD = b"POST /predict HTTP/1.1\r\nHost: x\r\n"


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST /pre", HEAD + b"Content-Length: 50000000\r\n\r\n{", b"GET /health HTTP/1.1\r\n"],
    ids=["nothing", "part of a line", "part of a body", "part of the headers"],
)
def test_half_open_connections_are_closed(address, sent):
    with socket.create_connection(address, timeout=60) as half_open:
        half_open.sendall(sent)
        with contextlib.suppress(ConnectionResetError):
            assert half_open.recv(100) == b""
    url = f"http://{address[0]}:{address[1]}/predict"
    assert httpx.post(url, json={"prompts": ["a"], "responses": ["b"]}).json() == {"scores": [1.0]}


def test_a_body_is_not_read_beyond_its_content_length(address):
    with socket.create_connection(address, timeout=60) as client:
        client.sendall(HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n")
        client.sendall(b"fff\r\n" + b" " * 0xFFF + b"\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 400")


def test_a_token_is_asked_for_where_there_is_one(client):
    http, _ = client(token="secret")
    assert (
        http.get("/health").status_code == 401
        and http.get("/health", headers={"Authorization": "Bearer wrong"}).status_code == 401
    )
    assert http.get("/health", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_gold_that_fails_is_told_with_its_cause_and_changes_nothing(client):
    http, service = client(*LEARNS)
    http.post("/train", json=request(1))

    def broken(prompts, responses):
        raise RewardError("the oracle is asleep")

    gold, service.labeler.gold = service.labeler.gold, broken
    answer = http.post("/train", json=request(2))
    assert answer.status_code == 502 and answer.json() == {"error": "the oracle is asleep"}
    service.labeler.gold = gold
    assert http.post("/train", json=request(2)).json()["labels_bought"] == 3


def test_more_requests_than_can_wait_are_sent_away(client, monkeypatch):
    monkeypatch.setattr(service, "MAX_WAITING", 0)
    http, _ = client()
    answer = http.post("/predict", json={"prompts": ["a"], "responses": ["b"]})
    assert answer.status_code == 503 and "try again later" in answer.json()["error"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["reward=http", "reward.url=http://x"], "asks another one"),
        (["port=70000"], "from 1 to 65535"),
        (["online.initial_labels=4", *LEARNS], "discriminator_path"),
    ],
)
def test_a_service_that_cannot_work_is_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        settings_of(*overrides)


# ---------------------------------------------------------------------------- a run and its service


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    """The service as users start it."""

    def __init__(self, options: list[str]):
        self.port = free_port()
        self.command = [
            sys.executable,
            str(ROOT / "serve_reward.py"),
            *options,
            f"port={self.port}",
        ]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            self.command,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ,
        )

    def wait(self) -> None:
        for _ in range(600):
            assert self.process.poll() is None, self.process.stdout.read()
            try:
                httpx.get(f"{self.url}/health")
                return
            except httpx.ConnectError:
                time.sleep(0.1)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def test_a_run_whose_service_is_killed_ends_as_one_that_labels_itself(
    small_folder, imdb_dir, tmp_path, monkeypatch
):
    run = [
        "function=online",
        "online.rounds=6",
        "online.prompts_per_round=4",
        "online.eval_every=6",
        "batch_size=4",
        "sample_during_eval=false",
        "optimizer=AdamW",
        "warmup_steps=0",
    ]
    alone = tmp_path / "alone"
    run_here(
        *small_run(
            small_folder, imdb_dir, alone, *run, "reward=length", "reward.unit=characters", *LEARNS
        )
    )
    server = Server(
        service_options(small_folder, imdb_dir, *LEARNS, f"local_run_dir={tmp_path / 'state'}")
    )
    learn = rounds.OnlineTrainer._learn

    def and_kill(self, steps, bar):
        if steps.round == 3:  # after one that bought, and before it buys again
            server.kill()
            server.start()  # takes seconds, in which the run asks in vain
        return learn(self, steps, bar)

    monkeypatch.setattr(rounds.OnlineTrainer, "_learn", and_kill)
    try:
        server.wait()
        served = tmp_path / "served"
        run_here(
            *small_run(
                small_folder,
                imdb_dir,
                served,
                *run,
                "reward=http",
                f"reward.url={server.url}",
                "reward.retries=12",
                "reward.backoff=0.05",
            )
        )
    finally:
        server.kill()
    assert same_weights(final_weights(served), final_weights(alone))
    paid = [
        [(row["responses"], row["scores"]) for row in read_rows(folder / "labels.jsonl")]
        for folder in (tmp_path / "state", alone)
    ]
    assert paid[0] == paid[1] and len(paid[0]) == 9
    assert json.loads((served / "summary.json").read_text())["labels_bought"] == 9
    with pytest.raises(RewardError, match="gave no scores in 2 attempts"):
        build_reward({"name": "http", "url": server.url, "retries": 1, "backoff": 0.01}).learn(
            "run", 7, ["p"], [["a", "b"]]
        )
