"""The prompts of a round, the model that samples responses to them, and the sampling."""

from pathlib import Path

import numpy as np
from torch import Tensor

from preflab.batching.chat import prompt_text, response_text
from preflab.batching.examples import PreferenceData, PromptToSample, prompt_to_sample
from preflab.batching.loader import Loader
from preflab.distributed.process_group import World
from preflab.modeling.generation import sample
from preflab.modeling.loading import build_policy
from preflab.modeling.logprobs import Scorer
from preflab.online.rollouts import Rollouts
from preflab.serving.sampler import ServedModel
from preflab.settings.schema import Settings
from preflab.settings.values import changed, truncation
from preflab.training.learner import Learner


class PromptLoader:
    """Batches of `prompts_per_round` prompts, in a new order in every epoch, without an end."""

    def __init__(self, settings: Settings, data: PreferenceData):
        self.data, self.max_prompt_length = data, settings.max_prompt_length
        self.loader = Loader(
            np.arange(len(data)),
            batch_size=settings.online.prompts_per_round or settings.batch_size,
            seed=settings.seed,
            n_epochs=None,
            n_examples=2**62,  # never reached: online.rounds ends the run
            mixture=data.mixture,
        )

    def __next__(self) -> list[PromptToSample]:
        return self._prompts(next(self.loader))

    def peek(self) -> list[PromptToSample]:
        """The next prompts, without a change of the position."""
        return self._prompts(self.loader.peek())

    def _prompts(self, numbers: np.ndarray) -> list[PromptToSample]:
        return [prompt_to_sample(self.data, int(i), self.max_prompt_length) for i in numbers]

    def state_dict(self) -> dict:
        """The position in the order, for a checkpoint."""
        return self.loader.state_dict()

    def load_state_dict(self, state: dict) -> None:
        """Continue from a position."""
        self.loader.load_state_dict(state)


def build_sampler(settings: Settings, learner: Learner) -> Scorer:
    """The model of `online.sampler`: the learning policy, the initial reference, or a model of an
    archive.

    Only the policy changes during the run.
    """
    source = settings.online.sampler
    if source is None:
        return learner.policy
    if source == "reference" and learner.initial_reference is not None:
        return learner.initial_reference
    model = settings.model
    archive = (model.reference_archive or model.archive) if source == "reference" else source
    return build_policy(changed(model, archive=archive), trainable=False, place=learner.place)


class Drawing:
    """Draws K responses to each prompt of a round.

    The random numbers of a response depend only on the seed, its prompt, the round and its number
    in the round. served: the sampler on a server, which then draws them. keeps_hidden: whether the
    rollouts have the policy's hidden states, which are then not computed again.
    """

    def __init__(
        self,
        settings: Settings,
        sampler: Scorer,
        tokenizer,
        world: World,
        served: ServedModel | None = None,
        *,
        keeps_hidden: bool = False,
    ):
        self.settings, self.sampler, self.keeps_hidden = settings, sampler, keeps_hidden
        self.sample = served or sample
        self.tokenizer, self.world = tokenizer, world
        self.k = settings.online.responses_per_prompt
        self.max_new_tokens = (
            settings.online.max_new_tokens
            or settings.max_new_tokens
            or settings.max_length - settings.max_prompt_length
        )

    def roll_out(
        self,
        number: int,
        prompts: list[PromptToSample],
        recorded: list[dict],
        drawn: list[list[list[int]]] | None = None,
    ) -> Rollouts:
        """The rollouts of round `number`.

        recorded: ledger lines of this round, from before the run was stopped. Their responses are
        used again because their labels are paid for. drawn: the responses to these prompts and
        perhaps to more, (prompts, K, tokens), where they have been drawn before.
        """
        hidden: list = [[None] * self.k for _ in prompts]
        if drawn is None:
            drawn, hidden = self.draw(number, prompts)
        paid = {row["key"]: row["tokens"] for row in recorded}
        tokens = []
        for i, prompt in enumerate(prompts):
            tokens.append(paid.get(prompt.key, drawn[i]))
            if tokens[i] != drawn[i]:  # rounded otherwise, on another machine for example
                hidden[i] = [None] * self.k
        prompt_tokens = [prompt.tokens for prompt in prompts]
        return Rollouts(
            number,
            keys=[prompt.key for prompt in prompts],
            prompts=[prompt_text(self.tokenizer, p.tokens, p.chat) for p in prompts],
            prompt_tokens=prompt_tokens,
            responses=[self._texts(of_prompt) for of_prompt in tokens],
            tokens=tokens,
            hidden=hidden,
        )

    def draw(
        self, number: int, prompts: list[PromptToSample]
    ) -> tuple[list[list[list[int]]], list[list[Tensor | None]]]:
        """The responses of round `number`, (prompts, K, tokens), and the hidden states that predict
        their tokens where they are kept, (prompts, K)."""
        settings, hidden = self.settings, []
        items = [(prompt, j) for prompt in prompts for j in range(self.k)]
        responses = self.sample(
            self.sampler,
            self.tokenizer,
            [prompt.tokens for prompt, _ in items],
            keys=[(prompt.key, number, n) for n, (prompt, _) in enumerate(items)],
            max_new_tokens=self.max_new_tokens,
            temperature=settings.temperature,
            **truncation(settings),
            seed=settings.seed,
            batch_size=settings.eval_batch_size,
            world=self.world,
            description="roll out",
            **({"hidden": hidden} if self.keeps_hidden else {}),
        )
        by_prompt = range(0, len(items), self.k)
        hidden = hidden or [None] * len(items)
        return (
            [responses[i : i + self.k] for i in by_prompt],
            [hidden[i : i + self.k] for i in by_prompt],
        )

    def _texts(self, responses: list[list[int]]) -> list[str]:
        return [response_text(self.tokenizer, ids) for ids in responses]


def rollouts_file(run_dir: Path) -> Path:
    """The file with all rollouts of a run, one line for each prompt of a round."""
    return run_dir / "rollouts.jsonl"
