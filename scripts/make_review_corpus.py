"""Short made-up reviews: a prompt of a few words that reveals little of the verdict, and a response
that gives it.

    python scripts/make_review_corpus.py --output DIR

writes train.jsonl and test.jsonl, one {"prompt", "chosen"} per line, and prompts.jsonl, one
{"prompt"} per line. No prompt is in two of the three files. Equal arguments write equal bytes.

A text has a latent tone, good or bad with equal probability, that its prompt does not depend on.
Every word of sentiment agrees with it with probability `AGREE`. A text also has a density, the
share of its sentences that judge rather than describe, so that both the sign and the number of
sentiment words differ between responses to one prompt.

The grammar, in review_grammar.yaml, is text with slots. `{name}` stands for a random entry of the
table `name`, whose slots are filled in turn. A table with the keys "+" and "-" is polarised: the
tone decides which of the two lists is drawn from. A few slots are computed, see `Writer`.
"""

import argparse
import json
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import yaml
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from preflab.settings.refused import errors_in_one_line
from utils import ConfigError, atomic_write, path_argument

AGREE = 0.85
DENSITIES = (0.4, 0.8, 1.0)
SENTENCES = (1, 2, 3, 3, 3)
WORDS = range(8, 39)  # of a response
ENDINGS = ("and", "and", "and", "stop", "stop", "verb", "quality", "item")
PATIENCE = 10_000  # draws in a row without a new prompt, after which there are no more

GRAMMAR = yaml.safe_load(Path(__file__).with_name("review_grammar.yaml").read_text("utf-8"))
ADJECTIVES, HINTS = GRAMMAR["adjectives"], GRAMMAR["hints"]
COMMON, DOMAINS = GRAMMAR["common"], GRAMMAR["domains"]


# -------------------------------------------------------------------------------------- the writing


@dataclass(frozen=True)
class Prompt:
    """The beginning of a review. ending: a key of `prompts`; aspect: the one it names, where the
    ending needs one."""

    text: str
    domain: str
    ending: str
    aspect: str | None = None

    @property
    def plural(self) -> bool:
        """Whether the prompt mentions company, so that the response says "we"."""
        return re.search(r"\b(we|our|with)\b| and I\b", self.text, re.IGNORECASE) is not None


class Writer:
    """Fills the slots of one text. Besides the tables there are computed slots:

    * {aspect} {judged} {how_judged}: "the soup", "the bland soup", "how bland the soup was".
    * {was} agrees with the last aspect.
    * {adj} {adjs} {adj_CLASS}: one or two adjectives for the last aspect, or one for a class.
    * {link}: "and" or "but", as the next word of sentiment agrees with the last one or not.
    * {how} {lead}: a hint at the next word of sentiment, see `HINTS`.
    * {we} {were}: "we were" in company, else "I was".
    """

    def __init__(self, rng: random.Random, domain: str, tone: int = 1, company: bool = False):
        self.rng, self.tone, self.company = rng, tone, company
        self.tables = COMMON | DOMAINS[domain]
        self.used: set[str] = set()  # options drawn so far
        self.sign, self.next_sign = "+", None  # of the last and of the announced word of sentiment
        self.aspect: str | None = None  # the last one, as noun:class

    def fill(self, template: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda slot: self._slot(slot[1]), template)

    def pick(self, options: list[str]) -> str:
        """A random option, not used in this text before as long as there is one."""
        unused = [option for option in options if option not in self.used]
        option = self.rng.choice(unused or options)
        self.used.add(option)
        return option

    def _slot(self, name: str) -> str:
        if name in HINTS:
            self.next_sign = self.next_sign or self._draw_sign()
            return self.pick(HINTS[name][self.next_sign])
        if name.startswith("adj_"):
            return self._adjective(name.removeprefix("adj_"))
        if name in self.computed:
            return self.computed[name](self)
        table = self.tables[name]
        if isinstance(table, dict):
            table = table[self._take_sign()]
        return self.fill(self.pick(table))

    def _aspect(self) -> str:
        self.aspect = self.pick(self.tables["aspects"])
        return f"the {self._noun()}"

    def _noun(self) -> str:
        return self.aspect.split(":")[0]

    def _judged(self) -> str:
        self._aspect()  # the noun is drawn first, since the adjective has to suit it
        return self.fill(f"the {{adj}} {self._noun()}")

    def _how_judged(self) -> str:
        self._aspect()
        return self.fill(f"how {{adj}} the {self._noun()} {{was}}")

    def _adjective(self, thing_class: str) -> str:
        specific = self.rng.random() < 0.6
        return self.pick(ADJECTIVES[thing_class if specific else "any"][self._take_sign()])

    def _link(self) -> str:
        last, self.next_sign = self.sign, self._draw_sign()
        return "and" if self.next_sign == last else "but"

    computed: ClassVar[dict[str, Callable[["Writer"], str]]] = {
        "aspect": _aspect,
        "judged": _judged,
        "how_judged": _how_judged,
        "link": _link,
        "was": lambda self: "were" if self.aspect.endswith(":p") else "was",
        "adj": lambda self: self._adjective(self.aspect.split(":")[1]),
        "adjs": lambda self: self.fill(
            "{adj} {link} {adj}" if self.rng.random() < 0.5 else "{adj}"
        ),
        "we": lambda self: "we" if self.company else "I",
        "were": lambda self: "were" if self.company else "was",
    }

    def _draw_sign(self) -> str:
        agrees = self.rng.random() < AGREE
        return "+" if agrees == (self.tone > 0) else "-"

    def _take_sign(self) -> str:
        """The sign of the word that is written next: the one that a {link} or a hint announced, or
        else a new draw."""
        self.sign, self.next_sign = self.next_sign or self._draw_sign(), None
        return self.sign


def write_prompt(rng: random.Random) -> Prompt:
    """A random beginning of a review, without a word of sentiment."""
    domain, ending = rng.choice(list(DOMAINS)), rng.choice(ENDINGS)
    writer = Writer(rng, domain)
    text = _polish(writer.fill(rng.choice(DOMAINS[domain]["prompts"][ending])))
    return Prompt(_capital(text), domain, ending, writer.aspect)


def write_response(rng: random.Random, prompt: Prompt) -> str:
    """A random continuation of `prompt`, of a length in `WORDS`, with the space that separates it
    from the prompt."""
    while True:
        text = _draft_response(rng, prompt)
        if len(text.split()) in WORDS:
            return text


def _draft_response(rng: random.Random, prompt: Prompt) -> str:
    writer = Writer(rng, prompt.domain, tone=rng.choice((-1, 1)), company=prompt.plural)
    if prompt.aspect:
        writer.aspect = prompt.aspect
        writer.used.add(prompt.aspect)
    density = rng.choice(DENSITIES)
    # The tables (judging, describing) of a sentence, and of the part of one after the prompt.
    clause = ("opinion", "plain")
    opening = clause
    if prompt.ending not in ("and", "stop"):
        opening = (prompt.ending, f"plain_{prompt.ending}")
    sentences = []
    for position in range(rng.choice(SENTENCES)):
        judging, describing = clause if position else opening
        slot = judging if rng.random() < density else describing
        sentence = _polish(writer.fill(f"{{{slot}}}"))
        starts_sentence = position > 0 or prompt.ending == "stop"
        sentences.append(_capital(sentence) if starts_sentence else sentence)
    return " " + ". ".join(sentences) + "."


def _polish(text: str) -> str:
    """With "an" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# ---------------------------------------------------------------------------------------- the files


def make_corpus(n: int, n_prompts: int, seed: int) -> tuple[list[dict], list[dict], list[dict]]:
    """(n training rows, n / 20 test rows, n_prompts prompts). No prompt is in two of them, and the
    last ones are all different."""
    rng = random.Random(seed)
    n_test, taken = n // 20, set()
    bar = tqdm(total=n + n_test + n_prompts, desc="reviews", unit=" texts", delay=2.0)

    def row(prompt: Prompt) -> dict:
        bar.update()
        return {"prompt": prompt.text, "chosen": write_response(rng, prompt)}

    def new_prompt() -> Prompt:
        for _ in range(PATIENCE):
            prompt = write_prompt(rng)
            if prompt.text not in taken:
                return prompt
        raise ConfigError(
            f"--n {n} --n_prompts {n_prompts} needs more prompts than the grammar has; lower them"
        )

    train = [row(write_prompt(rng)) for _ in range(n)]
    taken.update(record["prompt"] for record in train)
    test = [row(new_prompt()) for _ in range(n_test)]
    taken.update(record["prompt"] for record in test)
    prompts = []
    for _ in range(n_prompts):
        prompts.append({"prompt": new_prompt().text})
        taken.add(prompts[-1]["prompt"])
        bar.update()
    bar.close()
    return train, test, prompts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=path_argument, required=True, help="folder to write to")
    parser.add_argument(
        "--n",
        type=int,
        default=40_000,
        help="texts to train on; a twentieth as many are added to test on",
    )
    parser.add_argument("--n_prompts", type=int, default=1_600, help="prompts without a response")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    corpus = make_corpus(args.n, args.n_prompts, args.seed)
    for name, rows in zip(("train", "test", "prompts"), corpus, strict=True):
        with atomic_write(args.output / f"{name}.jsonl") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{args.output / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    with errors_in_one_line():
        main()
