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
from pydantic import BaseModel, Field, StrictInt, StrictStr
from starlette.exceptions import HTTPException

from preflab.distributed.process_group import ALONE
from preflab.online.build import make_labeler
from preflab.online.rollouts import Rollouts
from preflab.reports.runs import read_jsonl
from preflab.rewards.registry import build_reward
from preflab.settings.schema import Settings
from preflab.training.checkpoints import save_checkpoint
from utils import DataError, PrefLabError, atomic_write, content_hash

MOST_TEXTS, MOST_CHARACTERS, MOST_BYTES = (
    4096,
    200_000,
    2**26,
)  # of a request, of a text, of a request


MOST_WAITING = 64  # requests; further ones are told to come back later


class Predict(BaseModel):
    """Prompt and response of each text to score."""

    prompts: list[StrictStr] = Field(max_length=MOST_TEXTS)
    responses: list[StrictStr] = Field(max_length=MOST_TEXTS)


class Train(BaseModel):
    """The responses of each prompt of a round, at least two of each."""

    id: StrictStr = Field(max_length=200)
    round: StrictInt
    prompts: list[StrictStr] = Field(max_length=MOST_TEXTS)
    responses: list[list[StrictStr]] = Field(max_length=MOST_TEXTS)


class Service:
    """What is behind the address: a labeler, and its state in `folder`.

    state.json, written after each request, names the discriminator's step that goes with it; a kill
    between the two leaves the request undone, and the labels it bought in the ledger for when it
    comes again.
    """

    def __init__(self, settings: Settings, folder: Path, trainer: type):
        self.settings, self.folder = settings, folder
        folder.mkdir(parents=True, exist_ok=True)
        self.state = {"requests": 0, "steps": 0, "labels": {}}
        if (path := folder / "state.json").is_file():
            self.state = json.loads(path.read_text(encoding="utf-8"))
        self.answers = (
            self._known_answers()
        )  # by id, for clients that did not get them, or start again
        for later in folder.glob("step-*"):
            if int(later.name.removeprefix("step-")) > self.state["steps"]:
                shutil.rmtree(later)
        self.score = build_reward(settings.reward)
        self.labeler = make_labeler(trainer, settings, self.score, folder, ALONE)
        if self.discriminator is not None:
            self.discriminator.prepare()
            if checkpoint := self.discriminator.learner.checkpoint:
                self.discriminator.load(checkpoint)
        if self.state["labels"]:
            self.labeler.load_state_dict(self.state["labels"])

    def _known_answers(self) -> dict[str, dict]:
        """Those of requests that the state knows of; one that a kill left undone is forgotten."""
        path = self.folder / "answers.jsonl"
        rows = [row for row in read_jsonl(path) if row["request"] <= self.state["requests"]]
        with atomic_write(path) as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        return {row["id"]: row["answer"] for row in rows}

    @property
    def discriminator(self):
        return self.labeler.discriminator

    def predict(self, prompts: list[str], responses: list[str]) -> list[float]:
        if self.discriminator is None:
            return self.score(prompts, responses)
        return [
            score
            for [score] in self.discriminator.score_responses(
                prompts, [[response] for response in responses]
            )
        ]

    def train(self, request: Train) -> dict:
        """Labels of the responses; the same answer for the same id."""
        if request.id in self.answers:
            return self.answers[request.id]
        number = self.state["requests"] + 1
        keys = [
            content_hash(prompt, *texts)
            for prompt, texts in zip(request.prompts, request.responses, strict=True)
        ]
        none = [[] for _ in keys]
        rollouts = Rollouts(
            number,
            keys,
            request.prompts,
            none,
            request.responses,
            [[[] for _ in texts] for texts in request.responses],
        )
        k = self.settings.online.responses_per_prompt
        if self.discriminator is None and len(request.responses[0]) != k:
            raise DataError(
                f"{len(request.responses[0])} responses of each prompt, and this service labels"
                f" {k}; start it with online.responses_per_prompt={len(request.responses[0])}"
            )
        if (room := self.labeler.room(number)) is not None and room < len(keys):
            raise DataError(
                f"{len(keys)} pairs are to be labelled, and the budget of"
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

    def _save(self, number: int, name: str, answer: dict) -> None:
        steps = self.discriminator.learner.counters.steps if self.discriminator is not None else 0
        if steps != self.state["steps"]:
            save_checkpoint(self.folder, steps, self._fill, keep=2).wait()
        self.state = {"requests": number, "steps": steps, "labels": self.labeler.state_dict()}
        with open(self.folder / "answers.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"id": name, "request": number, "answer": answer}) + "\n")
        self.answers[name] = answer
        with atomic_write(self.folder / "state.json") as f:
            json.dump(self.state, f)

    def _fill(self, folder: Path) -> None:
        (folder / "discriminator").mkdir()
        self.discriminator.save(folder / "discriminator", {}, {})

    def told(self) -> dict:
        """For /state."""
        online, state = self.settings.online, self.state
        bought = self.labeler.bought_until(state["requests"])
        pool = len(state["labels"].get("pool", ()))
        return {
            "requests": state["requests"],
            "labels_bought": bought,
            "budget": online.budget,
            "pool": pool,
            "discriminator_steps": state["steps"],
        }


def make_app(service: Service, token: str | None) -> FastAPI:
    """The service behind HTTP. token: what clients must bear, None for nothing."""
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _guard(app, token)
    worker = ThreadPoolExecutor(1, "service")  # one request after the other
    waiting = 0

    async def work(function, *arguments):
        nonlocal waiting
        if waiting >= MOST_WAITING:
            return refuse(503, f"{waiting} requests are waiting; try again later")
        waiting += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(worker, function, *arguments)
        except DataError as error:
            return refuse(422, str(error))
        except PrefLabError as error:
            return refuse(502, str(error))
        finally:
            waiting -= 1

    @app.post("/predict")
    async def predict(request: Predict):
        if len(request.prompts) != len(request.responses):
            return refuse(
                422,
                f"{len(request.prompts)} prompts and {len(request.responses)} responses, expected"
                " as many",
            )
        if too_long := _too_long([*request.prompts, *request.responses]):
            return refuse(422, too_long)
        scores = await work(service.predict, request.prompts, request.responses)
        return scores if isinstance(scores, JSONResponse) else {"scores": scores}

    @app.post("/train")
    async def train(request: Train):
        sizes = {len(texts) for texts in request.responses}
        if len(request.prompts) != len(request.responses) or len(sizes) != 1 or min(sizes) < 2:
            return refuse(
                422,
                "expected a list of two or more responses for each prompt, of each equally many",
            )
        if too_long := _too_long(
            [*request.prompts, *(text for texts in request.responses for text in texts)]
        ):
            return refuse(422, too_long)
        return await work(service.train, request)

    @app.get("/health")
    async def health():
        return {
            "ok": True,
            "reward": service.settings.reward["name"],
            "discriminator": service.discriminator is not None
            and service.discriminator.learner.loss.name,
        }

    @app.get("/state")
    async def state():
        return service.told()

    return app


def refuse(status: int, why: str) -> JSONResponse:
    return JSONResponse({"error": why}, status)


def _guard(app: FastAPI, token: str | None) -> None:
    """Who may ask, how much, and that every error is JSON with its cause."""

    @app.middleware("http")
    async def guard(request: Request, call_next):
        given = request.headers.get("authorization", "")
        if token and not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
            return refuse(
                401, "a bearer token is wanted: set REWARD_TOKEN for the client as for the service"
            )
        size = request.headers.get("content-length")
        if request.method == "POST" and (
            size is None or not size.isdigit() or int(size) > MOST_BYTES
        ):
            return refuse(413, f"a request is to say its length, of at most {MOST_BYTES:,} bytes")
        return await call_next(request)

    @app.exception_handler(RequestValidationError)
    async def invalid(_, error: RequestValidationError):
        told = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:3])
        return refuse(422, told)

    @app.exception_handler(HTTPException)
    async def unknown(_, error: HTTPException):
        return refuse(
            error.status_code,
            f"{error.detail}; there are POST /predict, POST /train, GET /health, GET /state",
        )

    @app.exception_handler(Exception)
    async def unforeseen(_, error: Exception):
        return refuse(500, f"{type(error).__name__}: {error}")


def _too_long(texts: list[str]) -> str | None:
    longest = max(map(len, texts), default=0)
    return (
        f"a text has {longest:,} characters, at most {MOST_CHARACTERS:,} are taken"
        if longest > MOST_CHARACTERS
        else None
    )
