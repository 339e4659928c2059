"""Samples of a page: a card for each prompt, with the texts of all models side by side."""

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import NamedTuple

from preflab.reports.run_files import is_number
from preflab.reports.runs import other_sampler

MAX_TEXTS = 2000  # on a page, beyond its first prompt; about a megabyte


class Origin(NamedTuple):
    """The policy of a sample: the name of its column, its loss and the seed of its training."""

    name: str
    loss: str = ""
    seed: str = ""


@dataclass
class Text:
    """A column of a card. losses, seeds: the runs that it belongs to. gain: reward of the policy's
    sample minus that of the reference's."""

    name: str
    role: str  # reference, policy or data
    text: str
    scores: str = ""
    losses: list[str] = field(default_factory=list)
    seeds: list[str] = field(default_factory=list)
    gain: float | None = None
    kl: float | None = None


@dataclass
class Card:
    """The samples of one prompt, drawn in one way."""

    prompt: str
    sampler: str
    texts: list[Text] = field(default_factory=list)

    def add(self, text: Text) -> None:
        """Add a text; one of the reference or the data that is there gets its losses and seeds."""
        for other in self.texts:
            if text.role != "policy" and (other.role, other.text) == (text.role, text.text):
                other.losses = list(dict.fromkeys([*other.losses, *text.losses]))
                other.seeds = list(dict.fromkeys([*other.seeds, *text.seeds]))
                return
        self.texts.append(text)

    @property
    def in_order(self) -> list[Text]:
        order = ("reference", "policy", "data")
        return sorted(self.texts, key=lambda text: order.index(text.role))


@dataclass
class Samples:
    """Cards, and how many there are without the limit on their number."""

    cards: list[Card]
    n_all: int

    def choices(self) -> dict[str, list[str]]:
        """Losses, seeds and ways to sample with several values, for the filters."""
        policies = [text for card in self.cards for text in card.texts if text.role == "policy"]
        found = {
            "loss": [loss for text in policies for loss in text.losses],
            "seed": [seed for text in policies for seed in text.seeds],
            "temperature": [card.sampler for card in self.cards],
        }
        distinct = {name: list(dict.fromkeys(values)) for name, values in found.items()}
        return {name: values for name, values in distinct.items() if len(values) > 1}


def sample_cards(rows: Iterable[tuple[Origin, dict]], reward: str | None = None) -> Samples:
    """Rows of samples.jsonl with the policy that each is of; one card for each prompt, number of
    its sample and way of sampling. reward: the one whose gain is shown, by default the first."""
    cards: dict[str, Card] = {}
    for origin, row in rows:
        if row.get("policy") is None and row.get("reference") is None:
            continue
        prompt = row.get("prompt", "")
        # Conversations with the same text may have other tools.
        key = [prompt, row.get("tools"), row.get("chat_template_kwargs"), row.get("sample", 0)]
        sampler = other_sampler(row) or "temperature 1"
        card = cards.setdefault(json.dumps([*key, sampler]), Card(prompt, sampler))
        _add(card, origin, row, reward)
    before = accumulate((len(card.texts) for card in cards.values()), initial=0)
    shown = [card for card, n in zip(cards.values(), before, strict=False) if n < MAX_TEXTS]
    return Samples(shown, len(cards))


def _add(card: Card, origin: Origin, row: dict, reward: str | None) -> None:
    of_run = {"losses": [origin.loss], "seeds": [origin.seed]}
    ours, theirs = row.get("policy_reward") or {}, row.get("reference_reward") or {}
    name = reward if reward in ours else next(iter(ours), None)
    known = is_number(ours.get(name)) and is_number(theirs.get(name))
    kl = row.get("kl")
    scores = [_scores(ours)]
    if is_number(kl):
        along = f" along a sample at {sampler}" if (sampler := other_sampler(row)) else ""
        scores.append(f"KL {kl:z.2f}{along}")
    texts = (
        Text("reference", "reference", row.get("reference"), _scores(theirs), **of_run),
        Text(
            origin.name,
            "policy",
            row.get("policy"),
            ", ".join(filter(None, scores)),
            gain=ours[name] - theirs[name] if known else None,
            kl=kl if is_number(kl) else None,
            **of_run,
        ),
        Text("best in the data", "data", row.get("chosen"), **of_run),
    )
    for text in texts:
        if text.text is not None:
            text.text = text.text.strip()
            card.add(text)


def _scores(rewards: dict) -> str:
    numbers = {name: value for name, value in rewards.items() if is_number(value)}
    return ", ".join(f"{name} {value:z.3f}" for name, value in numbers.items())
