"""The discriminator of D2PO: a model that scores responses and learns from bought labels."""

import contextlib
import logging
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from preflab.batching.chat import PromptText
from preflab.batching.chat_template import chat_of, set_chat
from preflab.batching.examples import PreferenceData
from preflab.batching.packing import Batch, lay_out
from preflab.batching.token_store import store_of, tokenise
from preflab.batching.truncation import truncate
from preflab.batching.turn_ends import check_room
from preflab.distributed.process_group import World
from preflab.modeling.loading import load_tokenizer
from preflab.modeling.model_checks import check_texts, vocabulary_rows
from preflab.modeling.model_source import model_config
from preflab.objective.registry import BoundLoss
from preflab.online.checks import discriminator_loss
from preflab.readers.messages import Chat
from preflab.readers.records import Record
from preflab.settings.schema import Settings
from preflab.settings.values import changed
from preflab.training.checkpoints import latest_checkpoint
from preflab.training.compute_loss import compute_loss
from preflab.training.learner import Learner, NonFiniteLossError, NonFiniteStepError
from preflab.training.metrics import MetricLog, rewind
from utils import ConfigError, model_folder, seed_everything

logger = logging.getLogger(__name__)


def build_discriminator(
    trainer: type, settings: Settings, run_dir: Path, world: World
) -> "Discriminator":
    """The discriminator of `online.discriminator`, placed as `trainer` places models."""
    loss = discriminator_loss(settings)
    own = _own_settings(settings, loss)
    folder = run_dir / "discriminator"
    folder.mkdir(parents=True, exist_ok=True)
    start = settings.online.discriminator_path or own.model.archive or own.model.name_or_path
    logger.info(f"discriminator: loss={loss.name}, from {start}")
    return Discriminator(own, loss, folder, trainer, world)


def _own_settings(settings: Settings, loss: BoundLoss):
    """The settings of the run, changed to those of its discriminator."""
    online = settings.online
    return changed(
        settings,
        model=_own_model(settings, loss),
        lr=online.discriminator_lr,
        optimizer="AdamW",
        optimizer_args={},
        lr_schedule="constant",
        lr_min=0.0,
        warmup_steps=0,
        batch_size=online.discriminator_batch_size,
        gradient_accumulation_steps=1,
        sample_during_eval=False,
        profile_steps=None,
        # what is set is for the policy
        reference={"update": "frozen", "every": None, "rate": None, "past": None},
    )


def _own_model(settings: Settings, loss: BoundLoss) -> dict:
    """The settings of `model` that differ from the policy's."""
    start, model = settings.online.discriminator_path, settings.model
    if "scalar_head" not in loss.reads:
        # Its scores are log pi - log pi_ref; its reference is the model where the policy starts.
        return {
            "archive": start or model.archive,
            "reference_archive": model.reference_archive or model.archive,
            "lora": {"r": 0},
        }
    if not start:
        return {}
    folder = str(model_folder(start))
    if settings.online.budget == 0 and not _is_reward_model(folder):
        raise ConfigError(
            f"online.discriminator_path={start} is not a reward model, and with online.budget=0 it"
            f" would never learn; give a run of loss={loss.name}, or a budget"
        )
    return {
        "name_or_path": folder,
        "tokenizer_name_or_path": folder,
        "archive": None,
        "block_name": None,
        "from_scratch": False,
        "reinit_head": False,
    }


def _is_reward_model(folder: str) -> bool:
    architectures = AutoConfig.from_pretrained(folder).architectures or ()
    return any(name.endswith("ForSequenceClassification") for name in architectures)


class Discriminator:
    """Scores texts, and learns from bought labels. A response's score is its reward in the loss.

    settings: those of the discriminator. folder: for its metrics.jsonl. The discriminator is saved
    in the checkpoints of its run.
    """

    def __init__(
        self, settings: Settings, loss: BoundLoss, folder: Path, trainer: type, world: World
    ):
        seed_everything(settings.seed)
        self.settings, self.folder, self.world = settings, folder, world
        with _named_by_its_own_key(settings):
            self.rows = vocabulary_rows(model_config(settings.model))
            self.tokenizer = load_tokenizer(settings.model, self.rows)
            set_chat(self.tokenizer, chat_of(settings))
            self.learner = Learner(
                settings,
                loss,
                self.tokenizer,
                trainer,
                world,
                checkpoint=world.agree(self._latest),
            )
            self.learner.build_reference(at_archive=False)
        self.log = MetricLog(
            folder, None, settings.minimum_log_interval_secs, writes=world.rank == 0
        )

    def _latest(self) -> Path | None:
        checkpoint = latest_checkpoint(self.folder.parent)
        return checkpoint / "discriminator" if checkpoint else None

    def prepare(self) -> None:
        """Make the optimizer; `load` follows where there is a checkpoint."""
        self.learner.prepare()
        if self.learner.checkpoint is None:
            self._drop_rows_after(-1)

    def save(self, folder: Path, state: dict, metrics: dict) -> Callable[[], None]:
        """As `Learner.save`."""
        return self.learner.save(folder, state, metrics)

    def load(self, folder: Path) -> dict:
        """As `Learner.load`; rows of metrics.jsonl that are newer are deleted."""
        state = self.learner.load(folder)
        self._drop_rows_after(self.learner.counters.examples)
        return state

    def _drop_rows_after(self, examples: int) -> None:
        if self.world.rank == 0:
            rewind(self.folder / "metrics.jsonl", examples)

    def score_responses(self, prompts: list[str], responses: list[list[str]]) -> list[list[float]]:
        """The scores of the responses, (prompts, K). Raises NonFiniteLossError."""
        learner = self.learner

        def scores_of(batch: Batch) -> list[float]:
            batch.rejected = batch.chosen  # a loss reads pairs; only one side's reward is used
            output, _ = compute_loss(
                learner.loss, learner.policy, learner.reference, batch, None, "eval"
            )
            return output.chosen_rewards.tolist()

        return self._of_responses(prompts, responses, scores_of)

    def features(self, prompts: list[str], responses: list[list[str]]) -> list[np.ndarray]:
        """The hidden state that the last layer of the model reads at the end of each response,
        (K, hidden size) in float64 for each prompt: where a scalar head gives the score, or where a
        policy predicts the last token. Raises NonFiniteLossError."""
        policy = self.learner.policy

        def features_of(batch: Batch) -> list[np.ndarray]:
            ends = batch.ends
            if ends is None:
                ends = batch.positions[batch.lengths.cumsum(0) - 1]
            hidden = policy.run(lambda: policy.hidden(batch, ends))
            return list(hidden.double().cpu().numpy())

        return [np.stack(rows) for rows in self._of_responses(prompts, responses, features_of)]

    @torch.no_grad()
    def _of_responses(
        self, prompts: list[str], responses: list[list[str]], function: Callable[[Batch], list]
    ) -> list[list]:
        """What `function` returns for each response of a batch, (prompts, K). Raises
        NonFiniteLossError."""
        trees = self._tokenize(prompts, responses)
        n_tokens = [len(prompt) + sum(map(len, of_prompt)) for prompt, of_prompt in trees]
        order = sorted(range(len(trees)), key=n_tokens.__getitem__)
        mine = []
        for rows, n_real in self.world.batches(order, self.settings.eval_batch_size):
            self.world.stop_if_asked()
            batch = lay_out([trees[i] for i in rows], self.learner.layout)
            values = iter(function(batch.to(self.learner.policy.device)))
            mine += [(i, [next(values) for _ in trees[i][1]]) for i in rows][:n_real]
        of_prompts = dict(self.world.gather(mine))
        if not all(np.isfinite(values).all() for values in of_prompts.values()):
            raise NonFiniteLossError(
                "the discriminator's scores are not finite; try a smaller online.discriminator_lr"
            )
        return [of_prompts[i] for i in range(len(trees))]

    def learn(self, pairs: list[tuple[str, str, str]], *, epochs: int, seed: list[int]) -> None:
        """Train on bought labels, `epochs` passes in an order that depends on `seed`.

        pairs: (prompt, better response, worse response). Raises NonFiniteLossError.
        """
        prompts = [prompt for prompt, _, _ in pairs]
        trees = self._tokenize(prompts, [[better, worse] for _, better, worse in pairs])
        scores = [[math.nan, math.nan]] * len(pairs)
        store = store_of("bought labels", trees, scores, [(0, 1)] * len(pairs))
        data = PreferenceData([store], "pairs", store.name)
        size = self.settings.batch_size
        for epoch in range(epochs):
            order = np.random.default_rng([*seed, epoch]).permutation(len(pairs))
            for begin in range(0, len(order), size):
                self._step(data, order[begin : begin + size])

    def _step(self, data: PreferenceData, examples: np.ndarray) -> None:
        learner = self.learner
        self.world.stop.held = True  # a part of its labels learned cannot be continued
        try:
            metrics = learner.step(data, learner.microbatches(data, examples), len(examples))
        except NonFiniteStepError:
            raise NonFiniteLossError(
                "the discriminator's loss, or its gradient, is not finite; try a smaller"
                " online.discriminator_lr"
            ) from None
        self.log.write_at(learner.counters, "train", metrics)

    def _tokenize(
        self, prompts: list[str], responses: list[list[str]]
    ) -> list[tuple[list[int], list[list[int]]]]:
        """Tokens of prompts and responses as in training: texts separately, with EOS after each
        response; conversations by the chat template."""
        records = [
            Record(_as_prompt(prompt), of_prompt, [], 0, None, {}, "a prompt of the run")
            for prompt, of_prompt in zip(prompts, responses, strict=True)
        ]
        settings = self.settings
        for record in records:
            room = settings.max_prompt_length
            check_room(self.tokenizer, record.prompt, room, "the discriminator")
        limits = (self.tokenizer, "keep_end", settings.max_length, settings.max_prompt_length)
        trees = [
            truncate(prompt, of_prompt, *limits, chat=isinstance(record.prompt, Chat))[:2]
            for record, prompt, of_prompt, *_ in zip(
                records, *tokenise(records, self.tokenizer), strict=True
            )
        ]
        if self.rows is not None:
            texts = (text for prompt, of_prompt in trees for text in (prompt, *of_prompt))
            check_texts(texts, self.tokenizer, self.rows, settings.model.name_or_path)
        return trees


@contextlib.contextmanager
def _named_by_its_own_key(settings: Settings):
    """Inside, an error about the discriminator's model names the setting that it comes from."""
    start = settings.online.discriminator_path
    try:
        yield
    except ConfigError as error:
        if not start:
            raise
        given = f"model.name_or_path={settings.model.name_or_path}"
        text = str(error).replace(given, f"online.discriminator_path={start}")
        raise ConfigError(text.replace("model.archive", "online.discriminator_path")) from error


def _as_prompt(prompt: str) -> str | Chat:
    return prompt.chat if isinstance(prompt, PromptText) else prompt
