"""Samples that the runs of a sweep share: equal weights, asked the same, answer the same.

A response depends on the weights, the prompt, the sampling and random numbers that are a function
of seed and key alone. The runs of one process therefore draw those of a common reference once, and
those of a policy before its first step, which equals its reference, not at all.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import torch

from preflab.distributed.process_group import World
from preflab.modeling.logprobs import Scorer
from utils import content_hash

MOST_BYTES = 2**30  # of weights; to hash larger ones takes seconds, and they rarely form sweeps
MOST_DRAWS = 64


class SharedSamples:
    """The newest draws of a process, by the content of what they depend on."""

    def __init__(self):
        self.is_on = False
        self._draws: OrderedDict[str, list[list[int]]] = OrderedDict()

    def draw(
        self,
        scorer: Scorer,
        question: object,
        sample: Callable[[], list[list[int]]],
        world: World,
    ) -> list[list[int]]:
        """`sample()`, or what it returned before for the same weights and the same `question`.

        question: all else that the responses depend on, of a type whose repr says all of it.
        """
        if not self.is_on or world.size > 1 or _n_bytes(scorer) > MOST_BYTES:
            return sample()
        key = content_hash(_weights(scorer), repr(question), str(torch.get_num_threads()))
        if key not in self._draws:
            self._draws[key] = sample()
            while len(self._draws) > MOST_DRAWS:
                self._draws.popitem(last=False)
        self._draws.move_to_end(key)
        return [list(response) for response in self._draws[key]]


def _n_bytes(scorer: Scorer) -> int:
    return sum(p.numel() * p.element_size() for p in scorer.model.parameters())


def _weights(scorer: Scorer) -> str:
    """A hash of a model's class, config, precision, place and weights."""
    model = scorer.model
    digest = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return content_hash(
        type(model).__qualname__,
        scorer.causal_lm.config.to_json_string(),
        scorer.causal_lm.generation_config.to_json_string(),
        f"{scorer.adapter_off} {scorer.autocast} {scorer.mixed} {scorer.device}",
        digest.hexdigest(),
    )


def equal_models(a: Scorer, b: Scorer) -> bool:
    """Whether two models of one process are known to give equal samples: one has the weights of the
    other, or is the other with an adapter that changes nothing yet."""
    if a.autocast != b.autocast or a.device != b.device or a.placed_on or b.placed_on:
        return False
    if a.model is b.model:
        # The one of the two matrices that begins at zero; for embeddings that is the other one.
        adapter = (
            weight
            for name, weight in a.model.named_parameters()
            if ".lora_B." in name or ".lora_embedding_A" in name
        )
        return a.adapter_off == b.adapter_off or not any(weight.any() for weight in adapter)
    if a.causal_lm.generation_config.to_dict() != b.causal_lm.generation_config.to_dict():
        return False
    ours, theirs = (dict(scorer.model.named_parameters()) for scorer in (a, b))
    return ours.keys() == theirs.keys() and all(
        weight.dtype == theirs[name].dtype and torch.equal(weight, theirs[name])
        for name, weight in ours.items()
    )


SHARED = SharedSamples()


def share_samples() -> None:
    """Let all further runs of this process share their samples."""
    SHARED.is_on = True
