"""A discriminator: a model that scores responses and learns from bought labels."""

import math
from pathlib import Path

import numpy as np
import torch
from omegaconf import OmegaConf
from tqdm import tqdm
from transformers import AutoConfig

from preflab.batching.examples import PreferenceData
from preflab.batching.packing import lay_out
from preflab.batching.token_store import store_of, truncate
from preflab.distributed.signals import StopSignals
from preflab.modeling.loading import build_reference, load_tokenizer
from preflab.modeling.logprobs import Scorer
from preflab.online.checks import discriminator_loss
from preflab.training.checkpoints import latest_checkpoint
from preflab.training.compute_loss import compute_loss
from preflab.training.learner import NonFiniteLoss
from trainers import BasicTrainer
from utils import ConfigError, model_folder


class Several:
    """Futures as one."""

    def __init__(self, futures: list):
        self.futures = futures

    def result(self) -> None:
        for future in self.futures:
            future.result()


def make_discriminator(
    kind: type[BasicTrainer], config, run_dir: Path, world, stop: StopSignals | None = None
):
    """A trainer of this kind whose model scores responses, and whose examples are bought labels."""
    loss, settings = discriminator_loss(config), config.online
    model, start = {}, settings.discriminator_path
    if "scalar_head" in loss.reads and start:
        folder = str(model_folder(start))
        if settings.budget == 0 and not any(
            kind.endswith("ForSequenceClassification")
            for kind in AutoConfig.from_pretrained(folder).architectures or ()
        ):
            raise ConfigError(
                f"online.discriminator_path={start} is no reward model, and with online.budget=0 it"
                f" would stay untaught; give a run of loss={loss.name}, or a budget"
            )
        model = {
            "name_or_path": folder,
            "tokenizer_name_or_path": folder,
            "archive": None,
            "block_name": None,
            "from_scratch": False,
            "reinit_head": False,
        }
    elif (
        "scalar_head" not in loss.reads
    ):  # log pi - log pi_ref; the reference is where the policy starts
        model = {
            "archive": start or config.model.archive,
            "reference_archive": config.model.reference_archive or config.model.archive,
            "lora": {"r": 0},
        }
    changed = {
        "model": model,
        "lr": settings.discriminator_lr,
        "optimizer": "AdamW",
        "warmup_steps": 0,
        "batch_size": settings.discriminator_batch_size,
        "gradient_accumulation_steps": 1,
        "sample_during_eval": False,
        "profile_steps": None,
    }
    own = OmegaConf.merge(OmegaConf.create(OmegaConf.to_container(config, resolve=True)), changed)
    kind = type(f"Discriminator{kind.__name__}", (Discriminator, kind), {})
    (run_dir / "discriminator").mkdir(parents=True, exist_ok=True)
    print(
        f"discriminator: loss={loss.name}, from"
        f" {start or own.model.archive or own.model.name_or_path}"
    )
    return kind(
        own, run_dir / "discriminator", loss, load_tokenizer(own.model), {}, world=world, stop=stop
    )


class Discriminator:
    """A trainer whose model scores texts: a response's score is what the loss calls its reward, and
    bought labels are its examples."""

    def _make_loader(self) -> None:
        return None

    def _find_checkpoint(self) -> Path | None:
        """It is saved inside the checkpoints of the run it labels for."""
        found = latest_checkpoint(self.run_dir.parent)
        return found / "discriminator" if found else None

    def _build_reference(self) -> Scorer:
        return build_reference(self.config.model, self.policy, training=False, place=self.place)

    def _tokenise(
        self, prompts: list[str], responses: list[list[str]]
    ) -> list[tuple[list[int], list[list[int]]]]:
        """As the data of reward models are: prompt and response apart, each response to its EOS."""
        ids = iter(
            self.tokenizer(
                [*prompts, *(r for of_prompt in responses for r in of_prompt)],
                add_special_tokens=False,
                verbose=False,
            )["input_ids"]
        )
        heads = [next(ids) for _ in prompts]
        limits = self.tokenizer, "keep_end", self.config.max_length, self.config.max_prompt_length
        return [
            truncate(head, [next(ids) for _ in of_prompt], *limits)[:2]
            for head, of_prompt in zip(heads, responses)
        ]

    @torch.no_grad()
    def score_responses(self, prompts: list[str], responses: list[list[str]]) -> list[list[float]]:
        """(prompts, K): the reward of each response."""
        trees = self._tokenise(prompts, responses)
        order = sorted(
            range(len(trees)), key=lambda i: len(trees[i][0]) + sum(map(len, trees[i][1]))
        )
        mine = []
        for rows, n_real in self.world.batches(order, self.config.eval_batch_size):
            batch = lay_out([trees[i] for i in rows], self.layout)
            batch.rejected = (
                batch.chosen
            )  # each response beside itself: what is wanted is the reward of one
            output, _ = compute_loss(
                self.loss, self.policy, self.reference, batch.to(self.policy.device), None, "eval"
            )
            values = iter(output.chosen_rewards.tolist())
            mine += [(i, [next(values) for _ in trees[i][1]]) for i in rows][:n_real]
        found = dict(self.world.gather(mine))
        if not all(math.isfinite(value) for of_prompt in found.values() for value in of_prompt):
            raise NonFiniteLoss(
                "the discriminator's scores are not finite; try a smaller online.discriminator_lr"
            )
        return [found[i] for i in range(len(trees))]

    def learn(self, pairs: list[tuple[str, str, str]], *, epochs: int, seed: list[int]) -> None:
        """pairs: (prompt, better, worse)."""
        trees = self._tokenise(
            [prompt for prompt, _, _ in pairs], [[better, worse] for _, better, worse in pairs]
        )
        store = store_of(
            "bought labels", trees, [[math.nan, math.nan]] * len(pairs), [(0, 1)] * len(pairs)
        )
        self.data["train"] = PreferenceData([store], "pairs", store.name)
        with tqdm(disable=True) as bar:
            for epoch in range(epochs):
                order = np.random.default_rng([*seed, epoch]).permutation(len(pairs))
                for begin in range(0, len(order), self.config.batch_size):
                    examples = order[begin : begin + self.config.batch_size]
                    self.train_step(examples, self._collate(examples), bar)

    def _stop_at_non_finite(self, examples, seen, losses) -> None:
        raise NonFiniteLoss(
            "the discriminator's loss, or its gradient, is not finite; try a smaller"
            " online.discriminator_lr"
        )

    def progress(self) -> dict:
        return {}

    def go_on_from(self, progress: dict) -> None:
        pass
