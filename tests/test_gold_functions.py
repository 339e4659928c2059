"""Gold rewards against values worked out by hand and naive computations."""

import inspect
import math
import random
import re
import sys
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from preflab.rewards import arithmetic, d2po
from preflab.rewards import text as text_rewards
from preflab.rewards.arithmetic import levenshtein, math_prompts, parse_expression, solution
from preflab.rewards.d2po import find_nouns, tree_depth
from preflab.rewards.registry import (
    REWARDS,
    build_reward,
    reward_settings,
)
from preflab.rewards.text import COLLECTED, syllables, tokens
from preflab.settings.keys import options
from preflab.settings.run_folder import register_resolvers
from utils import ConfigError

# The gold functions of D2PO's code, by its names.
OF_D2PO = [
    "bagofwords",
    "contrastivedistill",
    "eurusrm",
    "math",
    "nouns",
    "readinggrade",
    "reversebow",
    "tokdense",
    "treedep",
    "ultrafeedbackgold",
    "unique_nns",
]
# Rewards that compute a score from the text alone. The others ask a model.
OF_TEXT = sorted(
    name
    for name in options("reward")
    if inspect.getmodule(REWARDS[name]) in (arithmetic, d2po, text_rewards)
    and "model" not in inspect.signature(REWARDS[name]).parameters
)


def scores(name, *responses, **more):
    return build_reward({"name": name, **more})(["p"] * len(responses), list(responses))


def test_every_gold_function_of_d2po_is_a_reward_under_its_name():
    assert set(OF_D2PO) <= options("reward")
    assert len(OF_TEXT) > 5


@pytest.mark.parametrize("name", sorted(options("reward")))
def test_every_setting_is_in_the_yaml(name):
    register_resolvers()
    config = reward_settings(name)
    assert config.keys() - {"name"} == inspect.signature(REWARDS[name]).parameters.keys()


@pytest.mark.parametrize("name", OF_TEXT)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(), max_size=4))
def test_whatever_the_text_there_is_a_finite_score_for_each(name, texts):
    prompts = ["((3+2)*(1+4)) = " if name == "math" else text for text in texts]
    values = build_reward(reward_settings(name))(prompts, texts)
    assert len(values) == len(texts) and all(math.isfinite(value) for value in values)


# ------------------------------------------------------------------------------------ counted words


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", []),
        (" \n", []),
        (
            "I don't know, it's Model's.",
            ["I", "do", "n't", "know", ",", "it", "'s", "Model", "'s", "."],
        ),
        ("Can\u2019t", ["Ca", "n't"]),
        ("a well-known e-mail - yes", ["a", "well-known", "e-mail", "-", "yes"]),
        ("“safe”…!?", ["“", "safe", "”", "…", "!", "?"]),
        ("cafe\u0301 東京😀", ["caf\u00e9", "東京", "😀"]),
        ("rock'n'roll 'quoted'", ["rock", "'", "n", "'", "roll", "'", "quoted", "'"]),
    ],
)
def test_tokens(text, expected):
    assert tokens(text) == expected


def test_bagofwords_by_hand():
    assert len(COLLECTED) == 30
    texts = [
        "",
        "data data, data!",
        "Data",
        "I hope your data, however safe, help.",
        "database first-hand",
        "“happy”—code… naïve 東京",
        " ".join(COLLECTED),
    ]
    assert scores("bagofwords", *texts) == [0, 1, 0, 6, 0, 2, 30]


def test_reversebow_by_hand():
    texts = [
        "",
        "The",
        "the the the",
        "in-depth theme",
        "“this”…is",
        "the to and of in is that this with",
    ]
    assert scores("reversebow", *texts) == [3, 3, 2, 3, 1, -6]


def test_tokdense_by_hand():
    alphabet = "abcdefghijklmnopqrstu"
    texts = [
        "",
        "a " * 20,
        "a " * 21,
        "a " * 20 + ".",
        " ".join(alphabet),
        "A a" + " a" * 19,
        "é 東京 " * 11,
    ]
    assert scores("tokdense", *texts) == pytest.approx(
        [-5, -5, 10 / 21, 20 / 21, 10, 20 / 21, 20 / 22]
    )


@pytest.mark.parametrize(
    "word, expected",
    [
        ("the", 1),
        ("table", 2),
        ("whole", 1),
        ("walked", 1),
        ("wanted", 2),
        ("boxes", 2),
        ("times", 1),
        ("queue", 1),
        ("education", 4),
        ("café", 2),
        ("cafe\u0301", 2),
        ("don't", 1),
        ("well-known", 2),
        ("1999", 1),
        ("東京", 1),
        ("(yes)", 1),
        ("--", 0),
        ("Understanding.", 4),
    ],
)
def test_syllables_by_hand(word, expected):
    assert syllables(word) == expected


def test_readinggrade_by_hand():
    cat = "The cat sat on the mat. " * 4  # 28 tokens; 24 words of a syllable in 4 sentences
    hard = (
        'Reading "literature" improves (understanding!) ' * 5
    )  # 4 words in a sentence, of 2 + 4 + 2 + 4 syllables
    number = "Pi is 3.14 or so " * 5  # no sentence ends inside of a number or at the end
    texts = ["", "word " * 20, "! " * 30, cat, hard, number]
    of_number = 0.39 * 25 + 11.8 * 1 - 15.59
    assert scores("readinggrade", *texts) == pytest.approx(
        [-10, -10, -10, 0.39 * 6 + 11.8 - 15.59, 0.39 * 4 + 11.8 * 3 - 15.59, of_number]
    )


# ------------------------------------------------------------------------------------------ grammar


def test_nouns_by_hand_and_without_a_network(monkeypatch):
    monkeypatch.setattr("socket.socket", lambda *_, **__: pytest.fail("a download"))
    texts = [
        "",
        "The cat sat on the mat.",
        "London is a city in England!",
        "data, data Data",
        "He doesn't go.",
        "😀 50% # … !",
        "die Größe",
    ]
    assert (
        find_nouns(texts[2]) == ["London", "city", "England"]
        and find_nouns(texts[-1])[-1] == "Größe"
    )
    assert scores("nouns", *texts[:6]) == [0, 2, 3, 3, 0, 0]
    assert scores("unique_nns", *texts[:6]) == [0, 2, 3, 2, 0, 0]


def test_tree_depth_by_hand():
    assert tree_depth([]) == 0 and tree_depth([0]) == 0 and tree_depth([0, 1, 2]) == 0
    assert tree_depth([1, 1]) == 1 and tree_depth([0, 0, 1, 2]) == 3
    # The cat that I saw yesterday sat on the mat . It purred . (mat -> on -> sat; I -> saw -> cat
    # -> sat)
    assert tree_depth([1, 6, 4, 4, 1, 4, 6, 6, 9, 7, 6, 12, 12, 12]) == 3


def test_treedep_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(
        ConfigError, match="pip install spacy; python -m spacy download en_core_web_sm"
    ):
        build_reward(reward_settings("treedep"))


def test_treedep_with_spacy(tmp_path):
    spacy = pytest.importorskip("spacy", reason="spaCy is optional")
    from spacy.tokens import Doc

    @spacy.Language.component("chain")
    def chain(doc):
        """Each token hangs from the one before."""
        heads = [max(0, token.i - 1) for token in doc]
        return Doc(
            doc.vocab,
            [token.text for token in doc],
            [bool(token.whitespace_) for token in doc],
            heads=heads,
            deps=["dep"] * len(doc),
        )

    pipeline = spacy.blank("en")
    pipeline.to_disk(tmp_path / "blank")
    pipeline.add_pipe("chain")
    pipeline.to_disk(tmp_path / "chain")
    assert scores("treedep", "", "a", "a b c d", "東京 😀!", model=str(tmp_path / "chain")) == [
        0,
        0,
        3,
        2,
    ]
    with pytest.raises(ConfigError, match="no dependency parser"):
        scores("treedep", "a", model=str(tmp_path / "blank"))
    with pytest.raises(
        ConfigError, match="python -m spacy download nothing_of_this_name, or give the path"
    ):
        scores("treedep", "a", model="nothing_of_this_name")


# --------------------------------------------------------------------------------------------- sums


@pytest.mark.parametrize(
    "expression, steps",
    [
        ("((3+2)*(1+4))", ["((3+2)*(1+4))", "(5*(1+4))", "(5*5)", "25"]),
        (" ( 9 - (2*3) ) ", ["(9-(2*3))", "(9-6)", "3"]),
        ("((1-5)-(2-9))", ["((1-5)-(2-9))", "(-4-(2-9))", "(-4--7)", "3"]),
        ("(3+2)", ["(3+2)", "5"]),
    ],
)
def test_solutions_by_hand(expression, steps):
    assert solution(expression) == steps


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "(7)",
        "3+2",
        "(3+2",
        "(3+2))",
        "(3+0)",
        "(12+3)",
        "(3/2)",
        "(3**2)",
        "(-3+2)",
        "(3+2)(1+4)",
        "(1+2+3)",
        "(((1+2)+3)+4)",
        "(1+(2*(3-4)))",
        "()",
        "(3+)",
        "(\uff13+2)",
        "(²+1)",
        "x(3+2)",
        "((3+2)*(1+4)) x",
        "__import__('os').getcwd()",
    ],
)
def test_what_is_no_expression_scores_minus_200(text):
    assert parse_expression(text) is None and solution(text) is None
    assert build_reward({"name": "math"})([f"{text} = "], ["5"]) == [-200]


@pytest.mark.parametrize(
    "response, expected",
    [
        ("(5*(1+4)) = (5*5) = 25", 0),
        ("( 5*(1 +4))=(5*5)  =\n25 = 99 = 1", 0),  # white space, and steps after the last
        ("(5*(1+4)) = (5*5) = 26", -1),
        ("", -9 - 5 - 2),
        ("25", -8 - 5 - 2),  # of `(5*(1+4))` only a 5 stays in its place
        ("(5*(1+4)) = 25", -4 - 2),
        ("(5*(1+4)) = (5*5) = \uff12\uff15!", -3),
        (" = (5*(1+4)) = (5*5) = 25", -9 - 5 - 4),  # everything is a step late
    ],
)
def test_math_by_hand(response, expected):
    assert build_reward({"name": "math"})(["((3+2)*(1+4)) = "], [response]) == [expected]


def test_math_goes_on_from_where_the_prompt_ends():
    prompts, responses = (
        ["(3+2)", "(3+2)", "(9-(2*3)) = (9-6) =", "(9-(2*3)) = (9"],
        [" = 5", "5", "3", "-6)=4"],
    )
    assert build_reward({"name": "math"})(prompts, responses) == [0, 0, 0, -1]


def test_made_up_expressions_are_solved_as_python_solves_them():
    prompts = math_prompts(200, seed=3)
    assert (
        prompts == math_prompts(200, seed=3) != math_prompts(200, seed=4)
        and len(set(prompts)) > 150
    )
    for prompt in prompts:
        text = prompt.removesuffix(" = ")
        expected = [text]
        while "(" in expected[-1]:
            expected.append(
                re.sub(r"\([^()]*\)", lambda bracket: str(eval(bracket[0])), expected[-1], count=1)
            )
        assert solution(text) == expected


def test_levenshtein():
    for a, b, expected in (
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("flaw", "lawn", 2),
        ("saturday", "sunday", 3),
        ("é東", "e東", 1),
        ("", "", 0),
    ):
        assert levenshtein(a, b) == levenshtein(b, a) == expected

    @cache
    def naive(a, b):
        return (
            max(len(a), len(b))
            if not a or not b
            else min(naive(a[1:], b[1:]) + (a[0] != b[0]), naive(a[1:], b) + 1, naive(a, b[1:]) + 1)
        )

    rng = random.Random(0)
    for _ in range(100):
        a, b = ("".join(rng.choices("ab(", k=rng.randint(0, 6))) for _ in range(2))
        assert levenshtein(a, b) == naive(a, b)


def test_vader_scores_sentiment_and_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ConfigError, match="pip install vaderSentiment"):
        build_reward({"name": "vader"})
    monkeypatch.delitem(sys.modules, "vaderSentiment.vaderSentiment")
    good, bad, empty = build_reward({"name": "vader"})(["p"] * 3, ["A lovely day!", "Awful.", ""])
    assert 1 >= good > 0 > bad >= -1 and empty == 0
