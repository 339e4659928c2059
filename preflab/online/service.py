"""The HTTP service that scores responses, buys labels and learns."""

import asyncio
import hmac
import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field, StrictBool, StrictInt, StrictStr
from starlette.exceptions import HTTPException

from preflab.batching.chat import PromptText
from preflab.distributed.process_group import ALONE
from preflab.online.build import make_labeler
from preflab.online.rollouts import Rollouts
from preflab.readers.messages import messages_of
from preflab.reports.run_files import read_jsonl, read_service_state
from preflab.rewards.registry import build_reward
from preflab.settings.schema import Settings
from preflab.training.checkpoints import save_checkpoint
from utils import DataError, PrefLabError, atomic_write, content_hash

MAX_TEXTS = 4096  # in a request
MAX_CHARACTERS = 200_000  # in a text
MAX_BYTES = 2**26  # in a request
MAX_WAITING = 64  # requests; the service refuses more


class Predict(BaseModel):
    """The body of POST /predict: the texts to score, (n,) prompts and (n,) responses.

    messages: those of the prompts, where they are conversations.
    """

    prompts: list[StrictStr] = Field(max_length=MAX_TEXTS)
    responses: list[StrictStr] = Field(max_length=MAX_TEXTS)
    messages: list[list[dict]] | None = Field(default=None, max_length=MAX_TEXTS)


class Train(BaseModel):
    """The body of POST /train: the responses of a round to label, (prompts, K) with K >= 2.

    ranks: whether all K are put in order, and not only the best and the worst found. id: the same
    for a request that is sent again, which gets the same answer.
    """

    id: StrictStr = Field(max_length=200)
    round: StrictInt
    prompts: list[StrictStr] = Field(max_length=MAX_TEXTS)
    responses: list[list[StrictStr]] = Field(max_length=MAX_TEXTS)
    ranks: StrictBool = False
    messages: list[list[dict]] | None = Field(default=None, max_length=MAX_TEXTS)


class Service:
    """A labeler, with its state in `folder`.

    state.json is written last in every request and names the discriminator's checkpoint that it
    belongs to. A request that was killed before is not done; the labels it bought are in the ledger
    for when it is sent again.
    """

    def __init__(self, settings: Settings, folder: Path, trainer: type):
        self.settings, self.folder = settings, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.state = {"requests": 0, "steps": 0, "labels": {}}
        if (path := folder / "state.json").is_file():
            self.state = read_service_state(path)
        # By id, for clients that did not receive them or that start again.
        self.answers = self._known_answers()
        for checkpoint in folder.glob("step-*"):
            if int(checkpoint.name.removeprefix("step-")) > self.state["steps"]:
                shutil.rmtree(checkpoint)
        self.score = build_reward(settings.reward)
        self.labeler = make_labeler(trainer, settings, self.score, folder, ALONE)
        if self.discriminator is not None:
            self.discriminator.prepare()
            if checkpoint := self.discriminator.learner.checkpoint:
                self.discriminator.load(checkpoint)
        if self.state["labels"]:
            self.labeler.load_state_dict(self.state["labels"])

    def _known_answers(self) -> dict[str, dict]:
        """The answers by id, after deleting that of a request that was killed before its state was
        written."""
        path = self.folder / "answers.jsonl"
        rows = [row for row in read_jsonl(path) if row["request"] <= self.state["requests"]]
        with atomic_write(path) as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        return {row["id"]: row["answer"] for row in rows}

    @property
    def discriminator(self):
        """The model that scores responses; None where the reward scores them."""
        return self.labeler.discriminator

    def predict(self, prompts: list[str], responses: list[str]) -> list[float]:
        """The score of each response, (n,). Raises RewardError or NonFiniteLossError."""
        if self.discriminator is None:
            return self.score(prompts, responses)
        alone = [[response] for response in responses]
        return [score for [score] in self.discriminator.score_responses(prompts, alone)]

    def train(self, request: Train) -> dict:
        """The labels of the responses, after learning from those that were bought.

        Returns the earlier answer for an id that was answered before. Raises DataError for a
        request that this service cannot label, and RewardError if the gold reward fails.
        """
        if request.id in self.answers:
            return self.answers[request.id]
        number = self.state["requests"] + 1
        self.labeler.ranks = request.ranks
        rollouts = _rollouts_of(request, number)
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
        labels = self.labeler.label(rollouts)
        answer = {
            "scores": labels.scores,
            "pairs": labels.pairs,
            "labels_bought": self.labeler.bought_until(number),
            "room": self.labeler.room(number + 1),
        }
        self._save(number, request.id, answer)
        return answer

    def _save(self, number: int, request_id: str, answer: dict) -> None:
        steps = self.discriminator.learner.counters.steps if self.discriminator is not None else 0
        if steps != self.state["steps"]:
            save_checkpoint(self.folder, steps, self._fill_checkpoint, keep=2).wait()
        self.state = {"requests": number, "steps": steps, "labels": self.labeler.state_dict()}
        with open(self.folder / "answers.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"id": request_id, "request": number, "answer": answer}) + "\n")
        self.answers[request_id] = answer
        with atomic_write(self.folder / "state.json") as f:
            json.dump(self.state, f)

    def _fill_checkpoint(self, folder: Path) -> None:
        (folder / "discriminator").mkdir()
        self.discriminator.save(folder / "discriminator", {}, {})

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
    """The prompts, with their messages where the client has sent them."""
    if request.messages is None:
        return request.prompts
    rows = [{"messages": messages} for messages in request.messages]
    return [PromptText(messages_of(row, "messages", "messages")) for row in rows]


def _rollouts_of(request: Train, number: int) -> Rollouts:
    """The responses of a request as rollouts of round `number`, without tokens."""
    texts_of_prompts = zip(request.prompts, request.responses, strict=True)
    return Rollouts(
        number,
        keys=[content_hash(prompt, *texts) for prompt, texts in texts_of_prompts],
        prompts=_prompts_of(request),
        prompt_tokens=[[] for _ in request.prompts],
        responses=request.responses,
        tokens=[[[] for _ in texts] for texts in request.responses],
    )


def make_app(service: Service, token: str | None) -> FastAPI:
    """The HTTP application of a service. token: what clients must send; None for no token."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _guard(app, token)
    worker = _Worker()

    @app.post("/predict")
    async def predict(request: Predict):
        if problem := _problem_of_predict(request) or _problem_of_messages(request):
            return refuse(422, problem)
        scores = await worker.run(service.predict, _prompts_of(request), request.responses)
        return scores if isinstance(scores, JSONResponse) else {"scores": scores}

    @app.post("/train")
    async def train(request: Train):
        if problem := _problem_of_train(request) or _problem_of_messages(request):
            return refuse(422, problem)
        return await worker.run(service.train, request)

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
    """Runs the work of requests one after the other, in a thread."""

    def __init__(self):
        self._executor = ThreadPoolExecutor(1, "service")
        self._n_waiting = 0

    async def run(self, function, *arguments):
        """The result of `function(*arguments)`, or a response with the error."""
        if self._n_waiting >= MAX_WAITING:
            return refuse(503, f"{self._n_waiting} requests are waiting; try again later")
        self._n_waiting += 1
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._executor, function, *arguments)
        except DataError as error:
            return refuse(422, str(error))
        except PrefLabError as error:
            return refuse(502, str(error))
        finally:
            self._n_waiting -= 1


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
    if request.messages is None:
        return None
    if len(request.messages) != len(request.prompts):
        return f"{len(request.messages)} messages and {len(request.prompts)} prompts"
    try:
        return _too_long([str(prompt) for prompt in _prompts_of(request)])
    except DataError as error:
        return str(error)


def _too_long(texts: list[str]) -> str | None:
    longest = max(map(len, texts), default=0)
    if longest <= MAX_CHARACTERS:
        return None
    return f"a text has {longest:,} characters; at most {MAX_CHARACTERS:,} are accepted"


def refuse(status: int, message: str) -> JSONResponse:
    """A response with an error."""
    return JSONResponse({"error": message}, status)


def _guard(app: FastAPI, token: str | None) -> None:
    """Check the token and the size of requests, and answer every error with JSON."""

    @app.middleware("http")
    async def guard(request: Request, call_next):
        credentials = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(credentials.encode(), f"Bearer {token}".encode()):
            return refuse(
                401,
                "a bearer token is required: set REWARD_TOKEN for the client as for the service",
            )
        size = request.headers.get("content-length", "")
        is_acceptable = size.isdigit() and int(size) <= MAX_BYTES
        if request.method == "POST" and not is_acceptable:
            return refuse(413, f"a request needs a Content-Length of at most {MAX_BYTES:,} bytes")
        return await call_next(request)

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError):
        errors = error.errors()[:3]
        return refuse(422, "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors))

    @app.exception_handler(HTTPException)
    async def no_route(_, error: HTTPException):
        routes = "POST /predict, POST /train, GET /health, GET /state"
        return refuse(error.status_code, f"{error.detail}; there are {routes}")

    @app.exception_handler(Exception)
    async def unexpected(_, error: Exception):
        return refuse(500, f"{type(error).__name__}: {error}")
