"""Sampling a fixed model on a server, in place of `generation.sample`."""

import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preflab.batching.packing import Layout, lay_out
from preflab.distributed.process_group import ALONE, World
from preflab.modeling.logprobs import Scorer
from preflab.modeling.model_source import weight_files
from preflab.modeling.response_ends import response_ends
from preflab.reports.run_files import read_jsonl
from preflab.serving.protocol import Completion, Limits, Protocol, WrongAnswerError
from preflab.serving.server import SamplerError, Server
from preflab.settings.schema import ModelSettings, SamplerSettings
from utils import DataError, Progress, content_hash, drop_incomplete_line

logger = logging.getLogger(__name__)

STORE = "served_samples.jsonl"
CHECKED_PROMPTS, CHECKED_TOKENS = 8, 32  # of the comparison with the model here, at most


class ServedModel:
    """Samples of a fixed model that a server holds; it is called like `generation.sample`, with the
    same model here.

    name: of the model on the server; None for the only one. of: what it is the model of, for
    messages. stamp: changes with the weights. store: the file where responses are kept as they
    arrive, so that the same command asks for none of them twice.

    Before the first response, the server's log-probs of a few responses are compared with those
    here, and SamplerError is raised where they differ by more than `sampler.tolerance` in the mean
    over tokens. A response depends on the server, the seed and its key: each is a request of its
    own, with a seed made of both.
    """

    def __init__(
        self, settings: SamplerSettings, *, name: str | None, of: str, stamp: str, store: Path
    ):
        self.settings, self.name, self.of, self.stamp = settings, name, of, stamp
        self.takes_ids = settings.server != "transformers"
        self._server = Server(settings)
        self._store = _Store(store)
        self._is_checked = False

    def __call__(
        self,
        policy: Scorer,
        tokenizer,
        prompts: list[list[int]],
        *,
        keys: list[int | tuple[int, ...]],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float | None = None,
        seed: int = 0,
        batch_size: int = 16,
        description: str = "sample",
        world: World = ALONE,
    ) -> list[list[int]]:
        """One response to each prompt, as token ids, with its end token if it ended."""
        protocol = Protocol(self.takes_ids, tokenizer, response_ends(tokenizer, policy.causal_lm))
        limits = Limits(max_new_tokens, temperature, top_p, top_k, min_p)
        prompts = [list(map(int, prompt)) for prompt in prompts]
        seeds = [_seed(seed, key) for key in keys]

        def known() -> list[list[int] | None]:
            return [self._store.find(key) for key in self._keys(prompts, seeds, limits)]

        found = world.agree(known)
        if None in found:
            if not self._is_checked:
                self._check(policy, protocol, prompts, max_new_tokens, world)
                self._is_checked = True
            missing = [i for i, tokens in enumerate(found) if tokens is None]
            world.agree(
                lambda: self._ask(
                    protocol,
                    [prompts[i] for i in missing],
                    [seeds[i] for i in missing],
                    limits,
                    world,
                    description,
                )
            )
            found = world.agree(known)
        return [list(tokens) for tokens in found]

    def _keys(self, prompts: list[list[int]], seeds: list[int], limits: Limits) -> list[str]:
        """A hash of all that each response depends on, but the server itself."""
        about = [self.stamp, self.settings.server, vars(limits)]
        return [
            content_hash(json.dumps([*about, prompt, seed]))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def _ask(
        self,
        protocol: Protocol,
        prompts: list[list[int]],
        seeds: list[int],
        limits: Limits,
        world: World,
        description: str,
    ) -> None:
        """Ask for responses, and keep each as it arrives."""
        keys = self._keys(prompts, seeds, limits)
        bar = Progress(
            total=len(prompts),
            desc=f"{description} (served)",
            unit=" samples",
            leave=False,
            delay=1.0,
            disable=world.no_bar,
        )
        with bar:
            for i, completion in self._completions(protocol, prompts, seeds, limits, world):
                self._store.add(keys[i], completion.tokens)
                bar.update()

    def _completions(
        self,
        protocol: Protocol,
        prompts: list[list[int]],
        seeds: list[int],
        limits: Limits,
        world: World,
    ):
        """The number and the completion of each request, as they arrive."""
        try:
            protocol.check_ends()
            bodies = [
                protocol.body(self.name, prompt, limits, seed)
                for prompt, seed in zip(prompts, seeds, strict=True)
            ]
        except WrongAnswerError as error:
            raise SamplerError(f"sampler.server={self.settings.server}: {error}") from error

        def read(number: int, answer) -> Completion:
            self._check_name(answer)
            return protocol.read(answer, prompts[number], limits)

        return self._server.complete(bodies, read, world.stop_first)

    # ---------------------------------------------------------------------- which model is served

    def _check_name(self, answer) -> None:
        """Raise WrongAnswerError where an answer is of a model of another name."""
        model = answer.get("model") if isinstance(answer, dict) else None
        # transformers adds the revision: NAME@main
        if self.name and model and str(model).partition("@")[0] != self.name.partition("@")[0]:
            raise WrongAnswerError(f"as model {model!r}, and {self.name!r} was asked for")

    def _find_name(self, world: World) -> str | None:
        """The name of the model on the server. Raises SamplerError where it serves no such one."""
        if not self.takes_ids:
            return self.name  # its list is that of the hub's cache
        names, key = self._server.models(world.stop_first), self.settings.url
        if self.name is None and len(names) == 1:
            return names[0]
        if self.name not in names:
            asked = "no name was given" if self.name is None else f"{self.name!r} was asked for"
            raise SamplerError(
                f"sampler.url={key} serves {', '.join(names) or 'nothing'}, and {asked} for the"
                f" {self.of}; give one of them as"
                f" sampler.{'reference_' if self.of == 'reference' else ''}model"
            )
        return self.name

    def _check(
        self,
        policy: Scorer,
        protocol: Protocol,
        prompts: list[list[int]],
        max_new_tokens: int,
        world: World,
    ) -> None:
        """Raise SamplerError where the server seems to hold another model than the one here."""
        self.name = world.agree(lambda: self._find_name(world))
        tolerance = self.settings.tolerance
        if tolerance is None:
            logger.info(f"sampler.tolerance=null: the served {self.of} is not compared")
            return
        some = [list(p) for p in dict.fromkeys(map(tuple, prompts))][:CHECKED_PROMPTS]
        # Of all tokens, so that a server's log-probs are those of the model whatever it truncates.
        limits = Limits(min(CHECKED_TOKENS, max_new_tokens), 1.0 if self.takes_ids else 0.0)
        drawn = world.agree(
            lambda: dict(self._completions(protocol, some, list(range(len(some))), limits, world))
        )
        completions = [drawn[i] for i in range(len(some))]
        if self.takes_ids and any(completion.logps is None for completion in completions):
            raise SamplerError(
                f"sampler.url={self.settings.url} gives no log-probs, so nothing says whether it"
                f" serves the {self.of} of this run; sampler.tolerance=null samples it unchecked"
            )
        error = self._difference(policy, protocol, some, completions)
        # Ranks round differently: one that raises alone would leave the others waiting.
        [error] = world.max([error if math.isfinite(error) else math.inf])
        measure = "differ by" if self.takes_ids else "are below those of the likeliest tokens by"
        if not error <= tolerance:
            raise SamplerError(
                f"sampler.url={self.settings.url} serves another model than the {self.of} of this"
                f" run: the log-probs of its tokens {measure} {error:.3g} nats in the mean"
                f" (sampler.tolerance={tolerance}); serve the hf/ folder of the archive that this"
                " command names, in the same precision"
            )
        logger.info(f"the served {self.of} is the one here: log-probs {measure} {error:.2g} nats")

    @torch.no_grad()
    def _difference(
        self,
        policy: Scorer,
        protocol: Protocol,
        prompts: list[list[int]],
        completions: list[Completion],
    ) -> float:
        """The mean over tokens of |log p there - log p here|; for greedy responses without
        log-probs, of how far their tokens are below the likeliest here. In nats."""
        responses = [[completion.tokens] for completion in completions]
        layout = Layout(pad_id=protocol.tokenizer.pad_token_id)
        batch = lay_out(list(zip(prompts, responses, strict=True)), layout).to(policy.device)
        if not self.takes_ids:
            return policy.token_gaps(batch).mean().item()
        ours = iter(policy.token_logps(batch).tolist())
        errors = []
        for completion in completions:
            here = [next(ours) for _ in completion.tokens]
            errors += [abs(a - b) for a, b in zip(completion.logps, here, strict=False)]
        return float(np.mean(errors))


class _Store:
    """Responses by the hash of what they depend on, in a file that grows as they arrive."""

    def __init__(self, path: Path):
        self.path = path
        self._tokens: dict[str, list[int]] | None = None

    def find(self, key: str) -> list[int] | None:
        if self._tokens is None:
            drop_incomplete_line(self.path)
            rows = read_jsonl(self.path)
            for row in rows:
                if not isinstance(row["key"], str) or not _is_ids(row["tokens"]):
                    raise DataError(
                        f"{self.path}: {str(row)[:80]}: not what was written there; remove this"
                        " line, or the file, and its responses are asked for again"
                    )
            self._tokens = {row["key"]: row["tokens"] for row in rows}
        return self._tokens.get(key)

    def add(self, key: str, tokens: list[int]) -> None:
        self._tokens[key] = tokens
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps({"key": key, "tokens": tokens}) + "\n")


def _is_ids(tokens: Any) -> bool:
    return isinstance(tokens, list) and all(type(i) is int and i >= 0 for i in tokens)


def _seed(seed: int, key: int | tuple[int, ...]) -> int:
    """The seed of a request, a function of the run's and of a response's key."""
    return int(np.random.default_rng([seed, *np.atleast_1d(key)]).integers(2**31))


def weights_stamp(model: ModelSettings, archive: str | None) -> str:
    """A hash that changes with the files that determine the weights of a model."""
    stats = [
        (file.name, file.stat().st_size, file.stat().st_mtime_ns)
        for file in (file.resolve() for file in weight_files(model, archive))
        if file.is_file()
    ]
    about = [model.name_or_path, archive if not stats else None, model.from_scratch, stats]
    return content_hash(json.dumps(about))
