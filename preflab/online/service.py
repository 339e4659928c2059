"""The HTTP service that scores responses, buys labels and learns."""

import asyncio
import hmac
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr, ValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from preflab.batching.chat import PromptText, chat_of_prompt, context_columns
from preflab.distributed.process_group import ALONE
from preflab.online.build import make_labeler
from preflab.online.rollouts import Rollouts
from preflab.readers.messages import messages_of
from preflab.reports.run_files import read_jsonl, read_service_state
from preflab.rewards.registry import RewardError, build_reward
from preflab.settings.schema import Settings
from preflab.training.checkpoints import save_checkpoint
from utils import DataError, PrefLabError, atomic_write, content_hash, machine_error

logger = logging.getLogger(__name__)

MAX_TEXTS = 4096  # in a request
MAX_CHARACTERS = 200_000  # in a text
MAX_BYTES = 2**26  # in a request
MAX_VALUES = 2**20  # texts, lists, fields of messages in a request: each takes far more than a byte
MAX_WAITING = 256  # requests; the service refuses more
MAX_BYTES_WAITING = 4 * MAX_BYTES  # in all requests that wait or are being read

_JSON_TEXT = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


class Predict(BaseModel):
    """The body of POST /predict: the texts to score, (n,) prompts and (n,) responses.

    messages: those of the prompts, where they are conversations. tools, chat_template_kwargs: what
    their chat template gets beside them, (n,) each.
    """

    prompts: list[StrictStr] = Field(max_length=MAX_TEXTS)
    responses: list[StrictStr] = Field(max_length=MAX_TEXTS)
    messages: list[list[dict]] | None = Field(default=None, max_length=MAX_TEXTS)
    tools: list[list | None] | None = Field(default=None, max_length=MAX_TEXTS)
    chat_template_kwargs: list[dict | None] | None = Field(default=None, max_length=MAX_TEXTS)


class Train(BaseModel):
    """The body of POST /train: the responses of a round to label, (prompts, K) with K >= 2.

    ranks: whether all K are put in order, and not only the best and the worst found. id: the same
    for a request that is sent again, which gets the same answer.
    """

    id: StrictStr = Field(min_length=1, max_length=200)
    round: StrictInt
    prompts: list[StrictStr] = Field(max_length=MAX_TEXTS)
    responses: list[list[StrictStr]] = Field(max_length=MAX_TEXTS)
    ranks: StrictBool = False
    messages: list[list[dict]] | None = Field(default=None, max_length=MAX_TEXTS)
    tools: list[list | None] | None = Field(default=None, max_length=MAX_TEXTS)
    chat_template_kwargs: list[dict | None] | None = Field(default=None, max_length=MAX_TEXTS)


class Service:
    """A labeler, with its state in `folder`.

    state.json is written last in every request and names the discriminator's checkpoint that it
    belongs to. A request that was killed before is in request.json, and the labels it bought are in
    the ledger: it is done again before any other one, which would buy them again under its number.
    """

    def __init__(self, settings: Settings, folder: Path, trainer: type):
        self.settings, self.folder, self.trainer = settings, folder, trainer
        folder.mkdir(parents=True, exist_ok=True)
        self.score = build_reward(settings.reward)
        self._restore()

    def _restore(self) -> None:
        """Take the state of the last request that was done from the folder."""
        folder = self.folder
        self.is_stale = True  # until all of it is restored
        self.state = {"requests": 0, "steps": 0, "labels": {}}
        if (path := folder / "state.json").is_file():
            self.state = read_service_state(path)
        # By id, for clients that did not receive them or that start again.
        self.answers = self._known_answers()
        for checkpoint in folder.glob("step-*"):
            if int(checkpoint.name.removeprefix("step-")) > self.state["steps"]:
                shutil.rmtree(checkpoint)
        self.labeler = make_labeler(self.trainer, self.settings, self.score, folder, ALONE)
        if self.discriminator is not None:
            self.discriminator.prepare()
            if checkpoint := self.discriminator.learner.checkpoint:
                self.discriminator.load(checkpoint)
        if self.state["labels"]:
            self.labeler.load_state_dict(self.state["labels"])
        self.is_stale = False

    def _known_answers(self) -> dict[str, dict]:
        """The rows of answers.jsonl by id, after deleting that of a request that was killed before
        its state was written."""
        path = self.folder / "answers.jsonl"
        rows = [row for row in read_jsonl(path) if row["request"] <= self.state["requests"]]
        with atomic_write(path) as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        return {row["id"]: row for row in rows}

    @property
    def _begun(self) -> Path:
        return self.folder / "request.json"

    def _interrupted(self) -> Train | None:
        """The request that was begun and not done, because of a kill or an error."""
        if not self._begun.is_file():
            return None
        try:
            request = Train.model_validate_json(self._begun.read_bytes())
        except ValidationError:  # killed while it was written: nothing had been bought
            return None
        return None if request.id in self.answers else request

    @property
    def discriminator(self):
        """The model that scores responses; None where the reward scores them."""
        return self.labeler.discriminator

    def predict(self, prompts: list[str], responses: list[str]) -> list[float]:
        """The score of each response, (n,). Raises RewardError or NonFiniteLossError."""
        if self.is_stale:
            self._restore()
        if not responses:
            return []
        if self.discriminator is None:
            return self.score(prompts, responses)
        alone = [[response] for response in responses]
        return [score for [score] in self.discriminator.score_responses(prompts, alone)]

    def train(self, request: Train) -> dict:
        """The labels of the responses, after learning from those that were bought.

        Returns the earlier answer for an id that was answered before. Raises DataError for a
        request that this service cannot label, and RewardError if the gold reward fails. After any
        other error the next request starts from the folder, as after a kill.
        """
        if self.is_stale:
            self._restore()
        if (interrupted := self._interrupted()) and interrupted != request:
            self._attempt(interrupted)
        return self._attempt(request)

    def _attempt(self, request: Train) -> dict:
        try:
            return self._train(request)
        except BaseException as error:
            n = self.state["requests"]
            bought = self.labeler.bought_until(n + 1) - self.labeler.bought_until(n)
            if isinstance(error, (DataError, RewardError)) and not bought:  # nothing has changed
                self._begun.unlink(missing_ok=True)
            else:
                self.is_stale = True
            raise

    def _train(self, request: Train) -> dict:
        number = self.state["requests"] + 1
        self.labeler.ranks = request.ranks
        rollouts = _rollouts_of(request, number)
        content = content_hash(*rollouts.keys)
        if row := self.answers.get(request.id):
            if row.get("content", content) != content:
                raise DataError(f"id {request.id!r} was sent before with other texts")
            return row["answer"]
        k, n = self.settings.online.responses_per_prompt, len(request.responses[0])
        if self.discriminator is None and n != k:
            raise DataError(
                f"{n} responses of each prompt, and this service labels {k}; start it with"
                f" online.responses_per_prompt={n}"
            )
        if (room := self.labeler.room(number)) is not None and room < len(rollouts):
            raise DataError(
                f"{len(rollouts)} pairs are to be labelled, and the budget of"
                f" {self.settings.online.budget} labels has room for {room}"
            )
        with open(self._begun, "w", encoding="utf-8") as f:
            json.dump(request.model_dump(), f)
            f.flush()
            os.fsync(f.fileno())  # before the first label is bought
        labels = self.labeler.label(rollouts)
        answer = {
            "scores": labels.scores,
            "pairs": labels.pairs,
            "labels_bought": self.labeler.bought_until(number),
            "room": self.labeler.room(number + 1),
        }
        self._save({"id": request.id, "request": number, "content": content, "answer": answer})
        return answer

    def _save(self, row: dict) -> None:
        steps = self.discriminator.learner.counters.steps if self.discriminator is not None else 0
        if steps != self.state["steps"]:
            save_checkpoint(self.folder, steps, self._fill_checkpoint, keep=2).wait()
        state = {"requests": row["request"], "steps": steps, "labels": self.labeler.state_dict()}
        with open(self.folder / "answers.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(row) + "\n")
            f.flush()
            os.fsync(f.fileno())  # the state below promises that the answer is there
        with atomic_write(self.folder / "state.json") as f:
            json.dump(state, f)
        self._begun.unlink()
        self.state, self.answers[row["id"]] = state, row

    def _fill_checkpoint(self, folder: Path) -> Callable[[], None]:
        (folder / "discriminator").mkdir()
        return self.discriminator.save(folder / "discriminator", {}, {})

    def describe_state(self) -> dict:
        """The answer of GET /state: counts of requests, labels, pooled pairs and steps."""
        state = self.state
        return {
            "requests": state["requests"],
            "labels_bought": self.labeler.bought_until(state["requests"]),
            "budget": self.settings.online.budget,
            "pool": len(state["labels"].get("pool", ())),
            "discriminator_steps": state["steps"],
        }


def _prompts_of(request: Predict | Train) -> list[str]:
    """The prompts, as conversations where the client has sent their messages."""
    if request.messages is None:
        return request.prompts
    return [
        PromptText(messages_of({"messages": messages}, "messages", "messages"), tools, options)
        for messages, tools, options in zip(
            request.messages,
            request.tools or itertools.repeat(None),
            request.chat_template_kwargs or itertools.repeat(None),
            strict=False,  # as many of each: _problem_of_messages
        )
    ]


def _context(prompt: str) -> list[str]:
    """What tells two conversations of the same text apart."""
    context = context_columns(chat_of_prompt(prompt))
    return [json.dumps(context, sort_keys=True)] if context else []


def _rollouts_of(request: Train, number: int) -> Rollouts:
    """The responses of a request as rollouts of round `number`, without tokens."""
    prompts = _prompts_of(request)
    return Rollouts(
        number,
        keys=[
            content_hash(prompt, *texts, *_context(prompt))
            for prompt, texts in zip(prompts, request.responses, strict=True)
        ],
        prompts=prompts,
        prompt_tokens=[[] for _ in request.prompts],
        responses=request.responses,
        tokens=[[[] for _ in texts] for texts in request.responses],
    )


def make_app(service: Service, token: str | None) -> FastAPI:
    """The HTTP application of a service. token: what clients must send; None for no token."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(_Guard, token=token)
    _answer_errors_with_json(app)
    worker = _Worker()

    def predict(body: Predict):
        if problem := _problem_of_predict(body) or _problem_of_messages(body):
            return refuse(422, problem)
        return {"scores": service.predict(_prompts_of(body), body.responses)}

    def train(body: Train):
        if problem := _problem_of_train(body) or _problem_of_messages(body):
            return refuse(422, problem)
        return service.train(body)

    @app.post("/predict")
    async def post_predict(request: Request):
        return await worker.run(request, Predict, predict)

    @app.post("/train")
    async def post_train(request: Request):
        return await worker.run(request, Train, train)

    @app.get("/health")
    async def health():
        discriminator = service.discriminator
        return {
            "ok": True,
            "reward": service.settings.reward["name"],
            "discriminator": discriminator is not None and discriminator.learner.loss.name,
        }

    @app.get("/state")
    async def state():
        return service.describe_state()

    return app


class _Worker:
    """Parses requests and does their work, one after the other in a thread.

    What waits is the bytes of the bodies, which are limited; only one is parsed at a time.
    """

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, "service")
        self._n_waiting = self._n_bytes = 0

    async def run(self, request: Request, model: type[BaseModel], answer: Callable):
        """What `answer` returns for the body of a request, or a response with the error."""
        size = int(request.headers["content-length"])
        if self._n_waiting >= MAX_WAITING or self._n_bytes + size > MAX_BYTES_WAITING:
            return refuse(503, f"{self._n_waiting} requests are waiting; try again later")
        self._n_waiting += 1
        self._n_bytes += size
        try:
            if (body := await _read(request, size)) is None:
                return refuse(400, f"expected {size:,} bytes, as Content-Length says")
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._executor, _answer, body, model, answer)
        finally:
            self._n_waiting -= 1
            self._n_bytes -= size


async def _read(request: Request, size: int) -> bytearray | None:
    """The body of a request; None where it has another size, or its client is gone."""
    body = bytearray()
    try:
        async for part in request.stream():
            body += part
            if len(body) > size:
                return None
    except ClientDisconnect:
        return None
    return body if len(body) == size else None


def _answer(body: bytearray, model: type[BaseModel], answer: Callable):
    try:
        if _has_too_many_values(body):
            return refuse(413, f"a request may have at most {MAX_VALUES:,} texts and lists")
        result = answer(model.model_validate_json(body))
        return result if isinstance(result, JSONResponse) else JSONResponse(result)
    except ValidationError as error:
        errors = error.errors(include_input=False, include_url=False)[:3]
        places = (".".join(map(str, e["loc"])) or "the body" for e in errors)
        problems = zip(places, errors, strict=True)
        return refuse(422, "; ".join(f"{place}: {e['msg']}" for place, e in problems))
    except DataError as error:
        return refuse(422, str(error))
    except PrefLabError as error:
        return refuse(502, str(error))
    except Exception as error:
        if not (refused := machine_error(error)):
            raise
        logger.warning(refused)
        return refuse(507, f"{refused}; then send the same request again")


def _has_too_many_values(body: bytearray) -> bool:
    """Whether a body would become more values than MAX_VALUES, counted without parsing it."""

    def count(json_bytes) -> int:
        return sum(map(json_bytes.count, (b",", b"[", b"{")))

    return count(body) > MAX_VALUES and count(_JSON_TEXT.sub(b"", body)) > MAX_VALUES


def _problem_of_predict(request: Predict) -> str | None:
    """What is wrong with a request; None if nothing is."""
    n_prompts, n_responses = len(request.prompts), len(request.responses)
    if n_prompts != n_responses:
        return f"{n_prompts} prompts and {n_responses} responses; send as many of each"
    return _too_long([*request.prompts, *request.responses])


def _problem_of_train(request: Train) -> str | None:
    """What is wrong with a request; None if nothing is."""
    sizes = {len(texts) for texts in request.responses}
    if len(request.prompts) != len(request.responses) or len(sizes) != 1 or min(sizes) < 2:
        return "expected a list of two or more responses to each prompt, all equally many"
    responses = (text for texts in request.responses for text in texts)
    return _too_long([*request.prompts, *responses])


def _problem_of_messages(request: Predict | Train) -> str | None:
    """What is wrong with the messages of a request; None if nothing is."""
    beside = ("tools", "chat_template_kwargs")
    if request.messages is None:
        unread = [name for name in beside if getattr(request, name) is not None]
        return f"{' and '.join(unread)} without messages" if unread else None
    for name in ("messages", *beside):
        values = getattr(request, name)
        if values is not None and len(values) != len(request.prompts):
            return f"{len(values)} {name} and {len(request.prompts)} prompts"
    try:
        prompts = _prompts_of(request)
    except DataError as error:
        return str(error)
    return _too_long([text for prompt in prompts for text in (prompt, *_context(prompt))])


def _too_long(texts: list[str]) -> str | None:
    longest = max(map(len, texts), default=0)
    if longest <= MAX_CHARACTERS:
        return None
    return f"a text has {longest:,} characters; at most {MAX_CHARACTERS:,} are accepted"


def refuse(status: int, message: str) -> JSONResponse:
    """A response with an error."""
    return JSONResponse({"error": message}, status)


class _Guard:
    """Refuses requests without the token, or too large to be read, before any of it is read."""

    def __init__(self, app, token: str | None):
        self.app, self.credentials = app, token and f"Bearer {token}".encode()

    async def __call__(self, scope, receive, send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        await (refusal or self.app)(scope, receive, send)

    def _refusal(self, scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        credentials = headers.get("authorization", "").encode()
        if self.credentials and not hmac.compare_digest(credentials, self.credentials):
            return refuse(
                401,
                "a bearer token is required: set REWARD_TOKEN for the client as for the service",
            )
        size = headers.get("content-length", "")
        is_acceptable = size.isdecimal() and len(size) < 20 and int(size) <= MAX_BYTES
        if scope["method"] == "POST" and not is_acceptable:
            return refuse(413, f"a request needs a Content-Length of at most {MAX_BYTES:,} bytes")
        return None


def _answer_errors_with_json(app: FastAPI) -> None:
    @app.exception_handler(HTTPException)
    async def no_route(_, error: HTTPException):
        routes = "POST /predict, POST /train, GET /health, GET /state"
        return refuse(error.status_code, f"{error.detail}; there are {routes}")

    @app.exception_handler(Exception)
    async def unexpected(_, error: Exception):
        return refuse(500, f"{type(error).__name__}: {error}")
