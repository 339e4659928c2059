"""Short made-up reviews: a few words of prompt that say little of the verdict, and a response that
gives it.

    python scripts/make_review_corpus.py --output DIR

writes train.jsonl and test.jsonl, {"prompt", "chosen"} a line, and prompts.jsonl, {"prompt"} a
line. No prompt is in two of the three files. Equal arguments write equal bytes.

A text has a latent tone, good or bad with equal chance, that its prompt does not know; every word
of sentiment agrees with it with probability `AGREE`. A text also has a density, the share of its
sentences that judge rather than describe, so that both the sign and the number of sentiment words
differ between responses to one prompt.

The grammar is text with slots. `{name}` stands for a random entry of the table `name`, filled in
turn. A table with the keys "+" and "-" is polarised: the tone decides which of the two is drawn
from. A few slots are code, see `Writer`.
"""

import argparse
import json
import random
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils import ConfigError, atomic_write

AGREE = 0.85
DENSITIES = (0.4, 0.8, 1.0)
SENTENCES = (1, 2, 3, 3, 3)
WORDS = range(8, 39)
# Draws in a row that give no new prompt before the space of prompts counts as used up.
PATIENCE = 10_000


# -------------------------------------------------------------------------------------- the grammar

# What may be said of a kind of thing; "any" suits them all.
ADJECTIVES = {
    "any": {
        "+": (
            "wonderful great good excellent lovely superb brilliant fantastic amazing perfect"
            " delightful impressive terrific"
        ),
        "-": (
            "terrible awful poor horrible dreadful disappointing mediocre dismal lousy bad abysmal"
            " unpleasant"
        ),
    },
    "story": {
        "+": "gripping moving touching funny clever fascinating memorable thrilling witty charming",
        "-": (
            "boring dull tedious predictable forgettable shallow tiresome pointless lifeless"
            " confusing"
        ),
    },
    "craft": {
        "+": "beautiful elegant graceful inspired polished captivating",
        "-": "clumsy dull lifeless sloppy weak awkward",
    },
    "people": {
        "+": "friendly polite helpful kind attentive gracious",
        "-": "rude careless unhelpful surly grumpy impatient",
    },
    "food": {
        "+": "delicious tasty fresh flavourful tender heavenly",
        "-": "bland stale soggy greasy burnt tasteless",
    },
    "drink": {
        "+": "delicious tasty flavourful heavenly",
        "-": "bland bitter stale watery tasteless",
    },
    "device": {
        "+": "reliable sturdy sleek handy smooth elegant",
        "-": "flimsy sluggish faulty unreliable clunky ugly",
    },
    "place": {
        "+": "cosy comfortable spotless peaceful charming stylish",
        "-": "dirty noisy shabby dingy cramped uncomfortable",
    },
}
ADJECTIVES = {
    kind: {sign: words.split() for sign, words in pair.items()} for kind, pair in ADJECTIVES.items()
}

# Words that are no sentiment themselves, but promise the sign of the next word that is. They make
# the difference between good and bad words easy to learn; without them a small model mixes the two
# at random.
HINTS = {
    "how": {"+": ["truly", "wonderfully", "simply"], "-": ["rather", "painfully", "sadly"]},
    "lead": {
        "+": ["luckily,", "to my delight,", "as hoped,"],
        "-": ["sadly,", "to my dismay,", "as feared,"],
    },
}

COMMON = {
    "who": [
        "my sister",
        "my brother",
        "my mother",
        "my father",
        "my wife",
        "my husband",
        "my cousin",
        "my uncle",
        "my aunt",
        "my daughter",
        "my son",
        "a friend",
        "two friends",
        "a colleague",
        "my neighbour",
        "the whole family",
    ],
    "when": [
        "last night",
        "last week",
        "last month",
        "yesterday",
        "on Friday",
        "on Saturday",
        "on Sunday",
        "on Tuesday",
        "in May",
        "in June",
        "in October",
        "this spring",
        "this autumn",
        "over the holidays",
        "two weeks ago",
    ],
    "day": [
        "a birthday",
        "an anniversary",
        "a rainy weekend",
        "a quiet Sunday",
        "a family evening",
        "a short break",
    ],
    "number": ["two", "three", "four", "five", "six"],
    "felt": {
        "+": ["loved", "enjoyed", "adored", "admired"],
        "-": ["hated", "disliked", "regretted", "despised"],
    },
    "mood": {
        "+": ["delighted", "impressed", "charmed", "thrilled", "pleased"],
        "-": ["annoyed", "disappointed", "bored", "frustrated", "irritated"],
    },
    "opinion": [
        "{aspect} {was} {adjs}",
        "{lead} {aspect} {was} {adjs}",
        "{aspect} {was} {how} {adj}",
        "I thought {aspect} {was} {adjs}",
        "{we} found {aspect} {adjs}",
        "{aspect} {was} {adj}, {link} {aspect} {was} {adj}",
        "{aspect} {was} {adj}, {link} {we} {felt} {object}",
        "{we} {felt} {object}",
        "{lead} {we} {felt} {object}",
        "{we} {felt} {object}, {link} {aspect} {was} {adj}",
        "{aspect} left me {mood}",
        "it was a {whole}",
        "{verdict}",
        "{verdict}",
    ],
    # How a response goes on when the prompt stops before a verb, before an adjective, or before a
    # thing.
    "verb": [
        "{was} {adjs}",
        "{was} {how} {adj}",
        "{was} {adj}, {link} {aspect} {was} {adj}",
        "left me {mood}",
    ],
    "plain_verb": [
        "{was} about what {we} expected",
        "{was} the first thing {we} talked about",
        "{was} new to me",
        "{was} not what {we} came for",
        "reminded me of somewhere else",
    ],
    "quality": [
        "{adjs}",
        "{how} {adj}",
        "{adj}, {link} {aspect} {was} {adj}",
        "{adj}, {link} {we} {felt} {object}",
    ],
    "plain_quality": [
        "about what {we} expected",
        "much the same as before",
        "not what {we} had in mind",
    ],
    "item": ["{judged}", "{judged} {link} {judged}", "{how_judged}"],
    "plain_item": ["{aspect}", "{aspect} and {aspect}"],
}

# A domain's tables. aspects: what a review speaks of, "noun:kind", with ":p" for a plural. Prompts
# are keyed by how they end: "and" wants a clause, "stop" a sentence, "verb" a predicate of the
# aspect, "quality" an adjective, "item" a thing.
DOMAINS = {
    "film": {
        "thing": [
            "film",
            "movie",
            "comedy",
            "drama",
            "thriller",
            "documentary",
            "western",
            "mystery",
        ],
        "about": [
            "a lost dog",
            "a lighthouse",
            "two brothers",
            "a village school",
            "a train robbery",
            "a retired spy",
            "a travelling circus",
            "a chess player",
            "an island",
            "a small bakery",
            "a mountain rescue",
            "a stolen painting",
        ],
        "aspects": [
            "acting:craft",
            "plot:story",
            "story:story",
            "ending:story",
            "script:story",
            "music:craft",
            "dialogue:story",
            "camera work:craft",
            "pacing:craft",
            "jokes:story:p",
            "characters:story:p",
            "costumes:craft:p",
        ],
        "whole": ["{adj_story} film", "{adj_story} story", "{adj_story} way to spend an evening"],
        "object": ["it", "every scene", "the first hour", "the second half", "the last scene"],
        "verdict": {
            "+": [
                "I would recommend it to anyone",
                "it is a masterpiece",
                "it was a joy to watch",
                "it is a little gem",
                "{we} laughed and {were} happy all the way home",
            ],
            "-": [
                "it was a waste of an evening",
                "it is a complete mess",
                "it was a chore to sit through",
                "I would avoid it",
                "{we} left early and complained",
            ],
        },
        "plain": [
            "it runs for about {number} hours",
            "the story begins in {town}",
            "most of it takes place in {town}",
            "it is about {about}",
            "there are {number} songs in it",
            "the lead plays {job}",
            "{we} saw it with subtitles",
            "the second part moves to {town}",
            "a narrator explains the rest",
            "it was filmed in black and white",
            "{we} thought about it on the way home",
            "the camera stays on {job} for most of it",
        ],
        "town": [
            "a fishing village",
            "the desert",
            "a northern city",
            "an old theatre",
            "a snowy town",
            "a farm",
        ],
        "job": [
            "a teacher",
            "a doctor",
            "a detective",
            "a young singer",
            "a bus driver",
            "a widowed painter",
        ],
        "prompts": {
            "and": [
                "I watched this {thing} {when} with {who} and",
                "I saw this {thing} about {about} {when} and",
                "We rented this {thing} for {day} and",
                "{who} and I saw this {thing} {when} and",
                "{who} put this {thing} on {when} and",
            ],
            "stop": [
                "This {thing} is about {about}.",
                "I saw this {thing} {when} with {who}.",
                "A {thing} about {job} and {about}.",
                "We watched this {thing} about {about} {when}.",
            ],
            "verb": [
                "{aspect} in this {thing} about {about}",
                "In this {thing} about {about}, {aspect}",
            ],
            "quality": [
                "I saw this {thing} {when} and {aspect} {was}",
                "For a {thing} about {about}, {aspect} {was}",
            ],
            "item": [
                "What I remember about this {thing} is",
                "What {who} noticed in this {thing} was",
                "The first thing I noticed in this {thing} was",
            ],
        },
    },
    "restaurant": {
        "thing": [
            "restaurant",
            "cafe",
            "diner",
            "bistro",
            "pizzeria",
            "noodle bar",
            "tea room",
            "bakery",
        ],
        "dish": [
            "soup",
            "pasta",
            "salad",
            "bread",
            "rice",
            "chicken",
            "curry",
            "cake",
            "pie",
            "coffee",
        ],
        "aspects": [
            "soup:drink",
            "pasta:food",
            "tea:drink",
            "bread:food",
            "chicken:food",
            "curry:food",
            "dessert:food",
            "coffee:drink",
            "noodles:food:p",
            "vegetables:food:p",
            "waiter:people",
            "service:people",
            "staff:people",
            "dining room:place",
            "terrace:place",
        ],
        "whole": ["{adj_food} meal", "{adj_food} lunch", "{adj_place} place", "{adj_any} evening"],
        "object": ["the place", "every dish", "the evening", "the meal", "the visit"],
        "verdict": {
            "+": [
                "I would recommend it to anyone",
                "it is a little gem",
                "the meal was a treat",
                "{we} went home happy",
                "it was a pleasure to eat here",
            ],
            "-": [
                "the meal was a waste of money",
                "the evening was a disaster",
                "I would avoid it",
                "{we} complained and went home hungry",
                "it was a mistake to eat here",
            ],
        },
        "plain": [
            "{we} sat {seat}",
            "the menu has {number} pages",
            "{we} ordered the {dish} and the {dish}",
            "there were {number} chairs at the table",
            "the {dish} came with {side}",
            "the kitchen closes at ten",
            "the bill came on a small tray",
            "they serve {dish} until noon",
            "I had the {dish} with {side}",
            "the walls are covered with {wall}",
            "it is a short walk from {spot}",
        ],
        "seat": ["by the window", "near the kitchen", "outside", "at the bar", "in the back room"],
        "side": ["rice", "lemon", "green beans", "potatoes", "a side of bread", "herbs"],
        "wall": ["old maps", "photographs", "blue tiles", "paintings of boats"],
        "spot": [
            "the station",
            "the harbour",
            "the park",
            "the market",
            "the library",
            "the old bridge",
        ],
        "prompts": {
            "and": [
                "The waiter brought our {dish} and",
                "We had {dish} at this {thing} {when} and",
                "I ate at this {thing} {when} with {who} and",
                "{who} and I tried the {thing} near {spot} and",
                "We booked this {thing} for {day} and",
                "I ordered the {dish} and the {dish} {when} and",
            ],
            "stop": [
                "We went to this {thing} {when} with {who}.",
                "This {thing} is close to {spot}.",
                "I had lunch at the {thing} near {spot} {when}.",
                "{who} took me to this {thing} {when}.",
            ],
            "verb": [
                "{aspect} at this {thing} near {spot}",
                "At the {thing} near {spot}, {aspect}",
            ],
            "quality": [
                "We ate at this {thing} {when} and {aspect} {was}",
                "At the {thing} near {spot}, {aspect} {was}",
            ],
            "item": [
                "What I remember about the {thing} near {spot} is",
                "What {who} noticed at this {thing} was",
            ],
        },
    },
    "book": {
        "thing": [
            "novel",
            "book",
            "mystery",
            "biography",
            "memoir",
            "story collection",
            "fantasy",
            "history",
        ],
        "about": [
            "a sea voyage",
            "a stolen letter",
            "a family farm",
            "two sisters",
            "a lost city",
            "a clockmaker",
            "a royal court",
            "a long winter",
            "a young botanist",
            "a railway town",
            "a missing map",
            "an old orchard",
        ],
        "aspects": [
            "plot:story",
            "story:story",
            "ending:story",
            "prose:craft",
            "opening:story",
            "dialogue:story",
            "narrator:story",
            "writing:craft",
            "translation:craft",
            "chapters:story:p",
            "characters:story:p",
            "descriptions:craft:p",
        ],
        "whole": ["{adj_story} book", "{adj_story} story", "{adj_story} read"],
        "object": ["it", "every page", "the first part", "the middle part", "the last chapter"],
        "verdict": {
            "+": [
                "I would recommend it to anyone",
                "it is a masterpiece",
                "it was a joy to read",
                "it is a treasure",
                "it was a pleasure from the first page",
            ],
            "-": [
                "it was a waste of a weekend",
                "it is a complete mess",
                "it was a chore to finish",
                "I would avoid it",
                "the last part was a letdown",
            ],
        },
        "plain": [
            "it has about {number} hundred pages",
            "the story begins in {place}",
            "it is about {about}",
            "each chapter follows {person}",
            "the second part moves to {place}",
            "the author writes about {about}",
            "there is a map on the first page",
            "I read it in {number} days",
            "it is told by {person}",
            "the copy came from the library",
            "there are {number} parts in all",
        ],
        "place": [
            "a port town",
            "the mountains",
            "a quiet valley",
            "the capital",
            "a boarding school",
            "an old mill",
        ],
        "person": [
            "a sailor",
            "a widow",
            "a young clerk",
            "a gardener",
            "an old judge",
            "a runaway",
        ],
        "prompts": {
            "and": [
                "I read this {thing} {when} and",
                "{who} gave me this {thing} about {about} and",
                "I picked up this {thing} about {about} and",
                "I took this {thing} along for {day} and",
                "{who} lent me this {thing} {when} and",
                "Our book club chose this {thing} {when} and",
            ],
            "stop": [
                "This {thing} is about {about}.",
                "I finished this {thing} {when}.",
                "A {thing} about {person} and {about}.",
                "I read this {thing} about {about} {when}.",
            ],
            "verb": [
                "{aspect} of this {thing} about {about}",
                "In this {thing} about {about}, {aspect}",
            ],
            "quality": [
                "I read this {thing} {when} and {aspect} {was}",
                "For a {thing} about {about}, {aspect} {was}",
            ],
            "item": [
                "What I remember about this {thing} is",
                "What {who} noticed in this {thing} was",
            ],
        },
    },
    "gadget": {
        "thing": [
            "phone",
            "tablet",
            "laptop",
            "camera",
            "watch",
            "printer",
            "speaker",
            "radio",
            "recorder",
            "headset",
        ],
        "use": [
            "work",
            "school",
            "travel",
            "the kitchen",
            "the office",
            "long trips",
            "my studio",
            "the garden",
        ],
        "aspects": [
            "screen:device",
            "battery:device",
            "hinge:device",
            "case:device",
            "menu:device",
            "design:device",
            "charger:device",
            "power switch:device",
            "support team:people",
            "buttons:device:p",
            "cables:device:p",
            "controls:device:p",
        ],
        "whole": ["{adj_device} machine", "{adj_device} design", "{adj_any} purchase"],
        "object": ["it", "the design", "the new buttons", "the sound", "the whole thing"],
        "verdict": {
            "+": [
                "I would recommend it to anyone",
                "it works beautifully",
                "it is a pleasure to use",
                "it was worth every coin",
                "I am happy with it",
            ],
            "-": [
                "it was a waste of money",
                "it broke after {number} days",
                "I would avoid it",
                "it was a mistake to buy it",
                "I asked for a refund",
            ],
        },
        "plain": [
            "it came in a {colour} box",
            "it weighs about as much as a book",
            "I use it for {use}",
            "the cable is {number} feet long",
            "it arrived after {number} days",
            "it comes with {number} covers",
            "the manual has {number} pages",
            "there is a {colour} light on the side",
            "mine is the {colour} one",
            "I keep it next to my desk",
            "it charges overnight",
            "I bought it for {use}",
        ],
        "colour": ["blue", "grey", "white", "black", "green", "red"],
        "prompts": {
            "and": [
                "I bought this {thing} {when} for {use} and",
                "{who} gave me this {thing} {when} and",
                "I ordered the {colour} {thing} {when} and",
                "My old {thing} stopped {when} and",
                "I have used this {thing} for {number} weeks and",
                "We needed a {colour} {thing} for {use} and",
            ],
            "stop": [
                "I bought this {thing} for {use} {when}.",
                "This {thing} replaced my old one {when}.",
                "{who} and I share this {colour} {thing}.",
                "I use the {colour} {thing} for {use}.",
            ],
            "verb": ["{aspect} of this {thing} for {use}", "On the {colour} {thing}, {aspect}"],
            "quality": [
                "I bought this {thing} {when} and {aspect} {was}",
                "On the {colour} {thing} for {use}, {aspect} {was}",
            ],
            "item": [
                "What I noticed about the {colour} {thing} was",
                "What {who} noticed about this {thing} was",
            ],
        },
    },
    "hotel": {
        "thing": ["hotel", "guest house", "inn", "hostel", "cottage", "lodge", "cabin", "resort"],
        "aspects": [
            "room:place",
            "bathroom:place",
            "lobby:place",
            "garden:place",
            "breakfast:food",
            "bed:place",
            "staff:people",
            "manager:people",
            "balcony:place",
            "rooms:place:p",
            "gardens:place:p",
            "corridors:place:p",
        ],
        "whole": ["{adj_place} place", "{adj_any} stay", "{adj_place} spot for a short break"],
        "object": ["the place", "the stay", "the room", "the mornings", "the visit"],
        "verdict": {
            "+": [
                "I would recommend it to anyone",
                "it is a little gem",
                "{we} slept well and woke up happy",
                "it was a pleasure to stay here",
                "the whole stay was a treat",
            ],
            "-": [
                "the whole stay was a nightmare",
                "it was a waste of money",
                "I would avoid it",
                "{we} complained and left early",
                "it was a mistake to stay here",
            ],
        },
        "plain": [
            "the room was on the {floor} floor",
            "breakfast starts at seven",
            "the window looks out on {view}",
            "there are {number} rooms on each floor",
            "{we} stayed for {number} nights",
            "it is a short walk from {spot}",
            "the bus stops near the door",
            "{we} parked behind the building",
            "there is a desk and a lamp in the corner",
            "there were {number} towels in the bathroom",
            "you can see {view} from the stairs",
        ],
        "floor": ["first", "second", "third", "top"],
        "view": [
            "the harbour",
            "a courtyard",
            "the hills",
            "the main street",
            "the lake",
            "a row of trees",
        ],
        "spot": [
            "the station",
            "the beach",
            "the museum",
            "the old town",
            "the market",
            "the ferry",
        ],
        "prompts": {
            "and": [
                "We stayed at this {thing} {when} and",
                "I booked this {thing} near {spot} for {day} and",
                "{who} and I stayed at this {thing} {when} and",
                "We arrived at the {thing} near {spot} {when} and",
                "We spent {number} nights at this {thing} and",
            ],
            "stop": [
                "We stayed at this {thing} for {number} nights.",
                "This {thing} is close to {spot}.",
                "I stayed here {when} with {who}.",
                "We chose the {thing} near {spot} for {day}.",
            ],
            "verb": [
                "{aspect} at this {thing} near {spot}",
                "At the {thing} near {spot}, {aspect}",
            ],
            "quality": [
                "We stayed at this {thing} {when} and {aspect} {was}",
                "At the {thing} near {spot}, {aspect} {was}",
            ],
            "item": [
                "What I remember about the {thing} near {spot} is",
                "What {who} noticed at this {thing} was",
            ],
        },
    },
    "concert": {
        "thing": [
            "concert",
            "show",
            "play",
            "opera",
            "musical",
            "recital",
            "ballet",
            "jazz evening",
        ],
        "aspects": [
            "singing:craft",
            "orchestra:craft",
            "stage design:craft",
            "sound:craft",
            "first act:story",
            "second act:story",
            "finale:story",
            "hall:place",
            "ushers:people:p",
            "soloists:craft:p",
            "costumes:craft:p",
        ],
        "whole": ["{adj_story} evening", "{adj_craft} performance", "{adj_any} night out"],
        "object": ["it", "every minute", "the first part", "the final song", "the evening"],
        "verdict": {
            "+": [
                "I would recommend it to anyone",
                "it was a triumph",
                "it was a joy to hear",
                "{we} cheered at the end",
                "{we} came home happy",
            ],
            "-": [
                "it was a waste of an evening",
                "it was a disaster",
                "I would avoid it",
                "it was a chore to sit through",
                "the second half was a letdown",
            ],
        },
        "plain": [
            "it lasted about {number} hours",
            "{we} sat in the {row} row",
            "there were {number} musicians on stage",
            "there was a break after {number} songs",
            "the doors opened at seven",
            "the programme had {number} pages",
            "the curtain was {colour}",
            "they played {number} pieces",
            "the hall is next to {spot}",
            "the tickets came by post",
            "{we} walked home past {spot}",
        ],
        "row": ["first", "second", "third", "last", "middle"],
        "colour": ["red", "blue", "green", "grey", "black"],
        "spot": [
            "the station",
            "the river",
            "the museum",
            "the park",
            "the market",
            "the town hall",
        ],
        "prompts": {
            "and": [
                "I went to this {thing} {when} with {who} and",
                "We had tickets for the {thing} near {spot} and",
                "{who} and I saw this {thing} {when} and",
                "We saw the {thing} by {spot} for {day} and",
                "{who} took me to the {thing} {when} and",
            ],
            "stop": [
                "I went to this {thing} {when} with {who}.",
                "The {thing} was in a hall near {spot}.",
                "We saw this {thing} by {spot} {when}.",
                "{who} had {number} tickets for this {thing}.",
            ],
            "verb": [
                "{aspect} at this {thing} near {spot}",
                "At the {thing} near {spot}, {aspect}",
            ],
            "quality": [
                "I saw this {thing} {when} and {aspect} {was}",
                "At the {thing} by {spot}, {aspect} {was}",
            ],
            "item": [
                "What I remember about the {thing} near {spot} is",
                "What {who} noticed at this {thing} was",
            ],
        },
    },
}
ENDINGS = ("and", "and", "and", "stop", "stop", "verb", "quality", "item")


# -------------------------------------------------------------------------------------- the writing


@dataclass(frozen=True)
class Prompt:
    """The beginning of a review. ending: a key of `prompts`; aspect: the entry it speaks of, where
    the ending needs one."""

    text: str
    domain: str
    ending: str
    aspect: str | None = None

    @property
    def plural(self) -> bool:
        """Whether the prompt speaks of company, so that a response may say "we"."""
        return re.search(r"\b(we|our|with)\b| and I\b", self.text, re.IGNORECASE) is not None


class Writer:
    """Fills the slots of one text. Besides the tables it knows:

    {aspect} {judged} {how_judged}: "the soup", "the bland soup", "how bland the soup was"; {was}
    agrees with the last of them {adj} {adjs} {adj_KIND}: one or two adjectives for the last aspect,
    or one for a kind of thing {link}: "and" or "but", as the next word of sentiment agrees with the
    last one or not {how} {lead}: a hint of the next word of sentiment, see `HINTS`
    {we} {were}: "we were" in company, else "I was"
    """

    def __init__(self, rng: random.Random, domain: str, tone: int = 1, company: bool = False):
        self.rng, self.tone, self.company = rng, tone, company
        self.tables = COMMON | DOMAINS[domain]
        self.used: set[str] = set()
        self.sign, self.next_sign = "+", None
        self.aspect: str | None = None

    def fill(self, template: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda slot: self._slot(slot[1]), template)

    def pick(self, options: list[str]) -> str:
        """A random option, one not yet used in this text as long as there is one."""
        option = self.rng.choice(
            [option for option in options if option not in self.used] or options
        )
        self.used.add(option)
        return option

    def _slot(self, name: str) -> str:
        if name == "aspect":
            self.aspect = self.pick(self.tables["aspects"])
            return "the " + self.aspect.split(":")[0]
        if name in ("judged", "how_judged"):
            # The noun is drawn first, since the adjective has to suit it.
            noun = self._slot("aspect").removeprefix("the ")
            return self.fill(
                f"the {{adj}} {noun}" if name == "judged" else f"how {{adj}} the {noun} {{was}}"
            )
        if name == "was":
            return "were" if self.aspect.endswith(":p") else "was"
        if name == "adj":
            return self._adjective(self.aspect.split(":")[1])
        if name == "adjs":
            return self.fill("{adj} {link} {adj}" if self.rng.random() < 0.5 else "{adj}")
        if name.startswith("adj_"):
            return self._adjective(name.removeprefix("adj_"))
        if name in HINTS:
            self.next_sign = self.next_sign or self._draw_sign()
            return self.pick(HINTS[name][self.next_sign])
        if name == "link":
            last, self.next_sign = self.sign, self._draw_sign()
            return "and" if self.next_sign == last else "but"
        if name in ("we", "were"):
            return {"we": ("I", "we"), "were": ("was", "were")}[name][self.company]
        table = self.tables[name]
        if isinstance(table, dict):
            table = table[self._take_sign()]
        return self.fill(self.pick(table))

    def _adjective(self, kind: str) -> str:
        return self.pick(ADJECTIVES[kind if self.rng.random() < 0.6 else "any"][self._take_sign()])

    def _draw_sign(self) -> str:
        agrees = self.rng.random() < AGREE
        return "+" if agrees == (self.tone > 0) else "-"

    def _take_sign(self) -> str:
        """The sign of the word about to be written: the one that a {link} has promised, else a
        fresh one."""
        self.sign, self.next_sign = self.next_sign or self._draw_sign(), None
        return self.sign


def write_prompt(rng: random.Random) -> Prompt:
    """A random beginning of a review; it holds no word of sentiment."""
    domain, ending = rng.choice(list(DOMAINS)), rng.choice(ENDINGS)
    writer = Writer(rng, domain)
    text = _polish(writer.fill(rng.choice(DOMAINS[domain]["prompts"][ending])))
    return Prompt(_capital(text), domain, ending, writer.aspect)


def write_response(rng: random.Random, prompt: Prompt) -> str:
    """A random continuation of `prompt`, of a length in `WORDS`, with the space that parts it from
    the prompt."""
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
    # What a sentence of the text, or its part after the prompt, is called in the tables: (judging,
    # describing).
    clause = ("opinion", "plain")
    opening = (
        clause if prompt.ending in ("and", "stop") else (prompt.ending, f"plain_{prompt.ending}")
    )
    sentences = []
    for position in range(rng.choice(SENTENCES)):
        judging, describing = clause if position else opening
        sentence = _polish(writer.fill(f"{{{judging if rng.random() < density else describing}}}"))
        sentences.append(
            sentence if position == 0 and prompt.ending != "stop" else _capital(sentence)
        )
    return " " + ". ".join(sentences) + "."


def _polish(text: str) -> str:
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# ---------------------------------------------------------------------------------------- the files


def make_corpus(n: int, n_prompts: int, seed: int) -> tuple[list[dict], list[dict], list[dict]]:
    """(n training rows, n / 20 test rows, n_prompts prompts), no prompt in two of them, the last
    ones all different."""
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
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument(
        "--n",
        type=int,
        default=40_000,
        help="texts to train on; a twentieth of it comes on top to test on",
    )
    parser.add_argument("--n_prompts", type=int, default=1_600, help="prompts without a response")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name, rows in zip(
        ("train", "test", "prompts"), make_corpus(args.n, args.n_prompts, args.seed)
    ):
        with atomic_write(args.output / f"{name}.jsonl") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{args.output / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main()
