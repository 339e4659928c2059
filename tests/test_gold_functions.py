"""Gold functions against values worked out by hand, naive computations and stub services; and the
script that scores a file with a reward."""

import inspect
import json
import math
import random
import re
import subprocess
import sys
from functools import cache

import pytest
import torch
from conftest import (
    ROOT,
    make_model,
    make_tokenizer,
    read_rows,
    run_command,
    save_model,
    write_jsonl,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from preflab.rewards import llm_client
from preflab.rewards.arithmetic import levenshtein, math_prompts, parse_expression, solution
from preflab.rewards.d2po import find_nouns, tree_depth
from preflab.rewards.llm_rater import read_ratings
from preflab.rewards.registry import (
    REWARDS,
    RewardError,
    build_reward,
    check_reward,
    reward_settings,
)
from preflab.rewards.text import COLLECTED, syllables, tokens
from preflab.settings.run_folder import register_resolvers
from scripts import score_rewards
from utils import ConfigError, DataError

BASIC = {"lexicon", "length", "classifier", "reward_model", "http"}  # rewards that are not D2PO's
GOLD = sorted(REWARDS.keys() - BASIC)
PURE = ["bagofwords", "math", "nouns", "readinggrade", "reversebow", "tokdense", "unique_nns"]


def scores(name, *responses, **more):
    return build_reward({"name": name, **more})(["p"] * len(responses), list(responses))


def test_all_of_them_are_there():
    assert GOLD == sorted([*PURE, "contrastivedistill", "eurusrm", "treedep", "ultrafeedbackgold"])


@pytest.mark.parametrize("name", GOLD)
def test_every_setting_is_in_the_yaml(name):
    register_resolvers()
    config = reward_settings(
        name, {"base_url": "x", "model": "x"} if name == "ultrafeedbackgold" else {}
    )
    check_reward(config)
    assert config.keys() - {"name"} == inspect.signature(REWARDS[name]).parameters.keys()


@pytest.mark.parametrize("name", PURE)
@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(), max_size=4))
def test_whatever_the_text_there_is_a_finite_score_for_each(name, texts):
    prompts = ["((3+2)*(1+4)) = " if name == "math" else text for text in texts]
    values = build_reward({"name": name})(prompts, texts)
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
        ("Can’t", ["Ca", "n't"]),
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
        "(３+2)",
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
        ("(5*(1+4)) = (5*5) = ２５!", -3),
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


# ------------------------------------------------------------------------------------------- models


def naive_mean(model, ids):
    logps = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logps[torch.arange(len(ids) - 1), ids[1:]].mean().item()


@torch.no_grad()
def test_contrastivedistill_is_the_naive_difference_of_means(tmp_path):
    large, small = make_model("gpt2", seed=1, scale=2.0), make_model("llama", seed=2, scale=2.0)
    (
        save_model(tmp_path / "large", "gpt2", seed=1, scale=2.0),
        save_model(tmp_path / "small", "llama", seed=2, scale=2.0),
    )
    assert sum(p.numel() for p in large.parameters()) > sum(p.numel() for p in small.parameters())
    prompts, responses = (
        ["a", "a much longer prompt", "", "x", "", "p" * 90],
        [" b", "", "é東!", " and the longest response of them all", "", "r" * 60],
    )
    expected = []
    for prompt, response in zip(prompts, responses):
        ids = [
            256,
            *make_tokenizer()(prompt + response)["input_ids"][-127:],
        ]  # a byte a token; 128 positions
        expected.append(naive_mean(large, ids) - naive_mean(small, ids) if len(ids) > 1 else 0.0)
    settings = {
        "name": "contrastivedistill",
        "large": str(tmp_path / "large"),
        "small": str(tmp_path / "small"),
        "batch_size": 4,
    }
    found = build_reward(settings)(prompts, responses)
    assert (
        found == pytest.approx(expected, abs=1e-5)
        and len({round(value, 3) for value in found}) == 6
    )
    with pytest.raises(ConfigError, match=r"reward\.small=.* is not a causal language model"):
        build_reward(settings | {"small": str(tmp_path)})


@torch.no_grad()
def test_contrastivedistill_tokenises_prompt_and_response_apart_and_needs_no_bos(tmp_path):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate(alphabet[:-1])} | {"ab": 255}
    merging = Tokenizer(models.BPE(vocab=vocabulary, merges=[("a", "b")]))
    merging.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for name, architecture in (("large", "gpt2"), ("small", "opt")):
        save_model(tmp_path / name, architecture, seed=len(name))
        PreTrainedTokenizerFast(
            tokenizer_object=merging, eos_token="<|endoftext|>", pad_token="<|pad|>"
        ).save_pretrained(tmp_path / name)
    a, b, c = (vocabulary[letter] for letter in "abc")
    rows = [[c, a, b, 255], [c, a, b]]
    expected = [
        naive_mean(make_model("gpt2", seed=5), row) - naive_mean(make_model("opt", seed=5), row)
        for row in rows
    ]
    settings = {
        "name": "contrastivedistill",
        "large": str(tmp_path / "large"),
        "small": str(tmp_path / "small"),
    }
    assert build_reward(settings)(["ca", "ca", "c"], ["bab", "b", ""]) == pytest.approx(
        [*expected, 0.0], abs=1e-5
    )


OWN_CODE = """
import torch
from transformers import MistralConfig, MistralModel, PreTrainedModel

class FarReward(PreTrainedModel):
    config_class = MistralConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = MistralModel(config)
        self.regression_head = torch.nn.Linear(config.hidden_size, OUTPUTS, bias=False)
        self.post_init()

    def forward(self, input_ids, attention_mask):
        hidden = self.model(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.regression_head(hidden)[torch.arange(len(input_ids)), attention_mask.sum(1) - 1]
"""
TEMPLATE = "<{{ messages[0]['content'] }}|{{ messages[1]['content'] }}>"


@pytest.fixture
def far(tmp_path, monkeypatch):
    """Makes a reward model as Eurus is one: a body that transformers has, a head of another name,
    and code of its own; (folder, scores, code)."""
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )

    def make(name="far", code=OWN_CODE, outputs=1):
        body = make_model("mistral", seed=3).model
        head = torch.randn(outputs, 32, generator=torch.Generator().manual_seed(1))
        folder = tmp_path / name
        folder.mkdir()
        save_file(
            {f"model.{key}": value for key, value in body.state_dict().items()}
            | {"regression_head.weight": head},
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )
        config = body.config.to_dict() | {
            "architectures": ["FarReward"],
            "auto_map": {"AutoModel": "modeling_far.FarReward"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_far.py").write_text(code.replace("OUTPUTS", str(outputs)))
        make_tokenizer().save_pretrained(folder)

        @torch.no_grad()
        def score(prompt, response):
            ids = make_tokenizer()(f"<{prompt}|{response}>")["input_ids"]
            return (body(torch.tensor([ids])).last_hidden_state[0, -1] @ head[0]).item()

        return folder, score

    return make


def test_eurusrm_reads_a_head_of_another_name_or_runs_code_that_is_trusted(far):
    folder, score = far()
    prompts, responses = ["how?", "a longer question", "é"], ["so", "", "東 and more!"]
    expected = [score(*texts) for texts in zip(prompts, responses)]
    settings = reward_settings("eurusrm", {"path": str(folder), "chat_template": TEMPLATE})
    assert settings["head"] == "regression_head" and settings["trust_remote_code"] is False
    assert (
        build_reward(settings)(prompts, responses) == pytest.approx(expected, rel=1e-4)
        and len({round(value, 3) for value in expected}) == 3
    )
    with pytest.raises(
        ConfigError, match=r"is a FarReward.*Read that code, and set reward\.trust_remote_code=true"
    ):
        build_reward(settings | {"head": None})
    trusting = settings | {"head": None, "trust_remote_code": True, "batch_size": 2}
    assert build_reward(trusting)(prompts, responses) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(
        ConfigError, match=r"no weights for score\.weight.*not used: regression_head\.weight"
    ):
        build_reward(settings | {"head": "v_head"})
    with pytest.raises(ConfigError, match="give a Jinja template as reward.chat_template"):
        build_reward(settings | {"chat_template": True})


def test_own_code_that_fails_or_gives_several_numbers_is_an_error(far, llama_folder):
    old, _ = far(
        "old", OWN_CODE.replace("        self.post_init()\n", "")
    )  # as code for older versions
    trusting = {"name": "reward_model", "trust_remote_code": True}
    with pytest.raises(ConfigError, match="code that comes with it fails under transformers 5"):
        build_reward(trusting | {"path": str(old)})
    several, _ = far("several", outputs=2)
    with pytest.raises(RewardError, match=r"shape \(2, 2\) for 2 texts"):
        build_reward(trusting | {"path": str(several)})(["p", "p"], ["a", "b"])
    with pytest.raises(
        ConfigError, match=r"no weights for score\.weight"
    ):  # a language model would score at random
        build_reward(trusting | {"path": str(llama_folder)})


# --------------------------------------------------------------------------------- a language model


@pytest.mark.parametrize(
    "answer, ratings",
    [
        ("Instruction following: 4\nHelpfulness: 2", (4, 2)),
        ("**Instruction Following:** 5\n\n**Helpfulness rating:** 1.", (5, 1)),
        ("instruction following 3/5, helpfulness 4/5", (3, 4)),
        ('{"instruction_following":4,"helpfulness":5}', (4, 5)),
        ("Helpfulness: 2\nInstruction following: 1\nHelpfulness: 2", (1, 2)),
        ("", None),
        ("Both are 4", None),
        ("Instruction following: 4", None),
        ("Instruction following:\nHelpfulness: 4", None),
        ("Instruction following: 4\nHelpfulness: 0", None),
        ("Instruction following: 4\nHelpfulness: 45", None),
        ("Instruction following: 4.5\nHelpfulness: 4", None),
        ("Instruction following: 4\nHelpfulness: 3/10", None),
        ("Instruction following: 4\nHelpfulness: N/A", None),
        ("Instruction following (1-5): 4\nHelpfulness: 4", None),
        ("Instruction following: 4\nHelpfulness: 4\nHelpfulness: 5", None),
    ],
)
def test_reading_ratings(answer, ratings):
    assert read_ratings(answer) == ratings


def rater(body):
    """Rates the instruction following by the prompt's first letter, the helpfulness by the
    response's length."""
    prompt, response = re.search(
        r"\nInstruction:\n(.*)\n\nResponse:\n(.*)\n\nAnswer",
        body["messages"][0]["content"],
        re.DOTALL,
    ).groups()
    return {
        "choices": [
            {
                "message": {
                    "content": (
                        f"Instruction following: {'abcde'.index(prompt[0]) + 1}\nHelpfulness:"
                        f" {min(5, len(response) + 1)}"
                    )
                }
            }
        ]
    }


def saying(text):
    return lambda body: {"choices": [{"message": {"content": text}}]}


@pytest.fixture
def rated(tmp_path):
    def build(server, **more):
        settings = {
            "base_url": f"{server.url}/v1",
            "model": "m",
            "cache": str(tmp_path / "ratings.sqlite"),
            "retries": 0,
            "timeout": 2.0,
            "concurrency": 1,
            **more,
        }
        return build_reward({"name": "ultrafeedbackgold", **settings})

    return build


def test_ultrafeedbackgold_is_the_mean_of_two_ratings_and_asks_once(rated, http_server):
    server = http_server([rater])
    texts = (
        ["a {prompt}", "e é\nResponse:\n", "e é\nResponse:\n"],
        ["", "two {response}", "two {response}"],
    )
    assert rated(server)(*texts) == [1.0, 5.0, 5.0]
    assert len(server.received) == 2 and {body["model"] for body in server.received} == {"m"}
    assert rated(server, max_requests=0)(*texts) == [1.0, 5.0, 5.0] and len(server.received) == 2
    assert rated(server)(["b"], ["x"]) == [2.0] and len(server.received) == 3


@pytest.mark.parametrize(
    "answer, told",
    [
        (
            saying("They are lovely."),
            "no ratings for 1 of 1 responses \\(answers without both ratings 1\\)",
        ),
        (saying("Instruction following: 4\nHelpfulness: 9"), "without both ratings"),
        (500, "failed 1, status 500"),
        ("drop", "failed 1"),
        ("nonsense", "failed 1, no chat completion"),
        (401, "answered status 401"),
        (400, "failed 1, status 400"),
    ],
)
def test_an_answer_without_ratings_is_an_error_and_is_asked_again(answer, told, rated, http_server):
    with pytest.raises(RewardError, match=told):
        rated(http_server([answer]))(["c"], ["x"])
    assert rated(http_server([rater]), base_url="http://127.0.0.1:1", max_requests=0)([], []) == []
    server = http_server([rater])
    assert rated(server)(["c"], ["x"]) == [2.5] and len(server.received) == 1


def test_a_failure_is_tried_again_and_the_cap_is_hard(rated, http_server):
    server = http_server([503, rater])
    with pytest.raises(
        RewardError,
        match="no ratings for 2 of 3 responses \\(not sent because of max_requests 2\\)",
    ):
        rated(server, retries=1, max_requests=2)(["a", "b", "c"], ["x", "y", "z"])
    assert len(server.received) == 2
    score = rated(server, max_requests=2)
    assert (
        score(["a", "b", "c"], ["x", "y", "z"]) == [1.5, 2.0, 2.5] and len(server.received) == 4
    )  # one was kept
    with pytest.raises(
        RewardError, match="not sent because of max_requests 1"
    ):  # the cap is that of the reward, not of a call
        score(["d"], ["x"])
    assert len(server.received) == 4


def test_the_key_comes_from_the_environment(rated, http_server, monkeypatch):
    seen, client = [], llm_client.httpx.Client
    monkeypatch.setattr(
        llm_client.httpx,
        "Client",
        lambda **options: seen.append(options["headers"]) or client(**options),
    )
    monkeypatch.setenv("MY_KEY", "secret")
    rated(http_server([rater]), key_env="MY_KEY")
    assert seen == [{"Authorization": "Bearer secret"}]


# ------------------------------------------------------------------------- scripts/score_rewards.py


def score_file(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["score_rewards.py", *map(str, arguments)])
    score_rewards.main()


def test_score_rewards_writes_scores_and_their_mean_beside_the_file(tmp_path):
    rows = [
        {"prompt": "p", "response": "the data", "sample": 3},
        {"question": "q", "response": ""},
        {"prompt": "p", "response": "hope, naïve\u2028 safe 東"},
    ]
    path = write_jsonl(tmp_path / "outs.jsonl", rows)
    path.write_text(path.read_text() + "\n\n")
    command = ["scripts/score_rewards.py", "--fname", str(path), "--reward", "bagofwords"]
    # Taggers are loaded only by the rewards that use them.
    code = (
        f"import runpy, sys; sys.argv = {command}; runpy.run_path(sys.argv[0], run_name='__main__')"
        "; assert not {'nltk', 'spacy'} & sys.modules.keys()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    scored = [
        json.loads(line)
        for line in (tmp_path / "outs.scored.jsonl").read_text(encoding="utf-8").split("\n")
        if line
    ]
    assert scored == [
        row | {"score": s, "length": n} for row, s, n in zip(rows, [1.0, 0.0, 2.0], [2, 0, 4])
    ]
    summary = json.loads((tmp_path / "outs.scored.summary.json").read_text())
    assert (
        summary["mean"] == 1.0
        and summary["standard_error"] == pytest.approx(1 / math.sqrt(3))
        and summary["mean_length"] == 2.0
        and summary["responses"] == 3
    )
    assert summary["reward"]["name"] == "bagofwords"
    assert (
        done.stdout
        == f"{tmp_path / 'outs.scored.jsonl'}: 3 responses, bagofwords 1 ± 0.5774, mean length 2.0"
        " words\n"
    )


def test_score_rewards_reads_a_list_takes_settings_and_scores_in_parts(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "outs.json").write_text(
        json.dumps([{"prompt": "p", "response": "x" * i} for i in range(5)]), encoding="utf-8"
    )
    monkeypatch.setattr(score_rewards, "ROWS_AT_A_TIME", 2)
    score_file(
        monkeypatch,
        "--fname",
        tmp_path / "outs.json",
        "--reward",
        "length",
        "--output",
        tmp_path / "there" / "s.jsonl",
        "reward.unit=characters",
    )
    assert [row["score"] for row in read_rows(tmp_path / "there" / "s.jsonl")] == [0, 1, 2, 3, 4]
    assert (
        json.loads((tmp_path / "there" / "s.summary.json").read_text())["reward"]["unit"]
        == "characters"
    )
    assert "5 responses, length 2 ± 0.7071, mean length 0.8 words" in capsys.readouterr().out
    assert not list(tmp_path.glob("*scored*"))


@pytest.mark.parametrize(
    "content, told",
    [
        ('{"prompt": "p", "response": "r"}\n\n{"prompt": "p"}', ":3: expected"),
        ('{"prompt": "p", "response": "r"}\n{"prompt"', ":2: not JSON"),
        ('{"prompt": 1, "response": "r"}', ":1: expected"),
        ('[{"prompt": "p", "response": "r"}, {"response": "r"}]', ": entry 2: expected"),
        ('["a"]', ": entry 1: expected"),
        ('[\n{"prompt"]', ":2: not JSON"),
        ("", "no generations"),
        ("[]", "no generations"),
        ('{"question": "p", "response": "r", "score": 1}', ":1: has a score already"),
        (b"\xff\xfe", "not UTF-8"),
    ],
)
def test_score_rewards_says_which_line_is_wrong(content, told, tmp_path):
    path = tmp_path / "outs.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=re.escape(told)):
        score_rewards.read_generations(path)


def test_score_rewards_that_fails_leaves_nothing(tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "outs.jsonl", [{"prompt": "p", "response": "r"}])
    for arguments, told in (
        (("--fname", path, "--reward", "bagofword"), "did you mean bagofwords"),
        (("--fname", path, "--reward", "length", "reward.unti=words"), "did you mean reward.unit"),
        (
            ("--fname", path, "--reward", "length", "reward.unit=miles"),
            "accepted: words, characters",
        ),
        (("--fname", path, "--reward", "length", "--output", path), "give another name"),
        (("--fname", tmp_path / "none.jsonl", "--reward", "length"), "no such file"),
    ):
        with pytest.raises(SystemExit) as stopped:
            score_file(monkeypatch, *arguments)
        assert stopped.value.code == 2 and told in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["outs.jsonl"]
    assert OmegaConf.create(read_rows(path)[0]) == {"prompt": "p", "response": "r"}


def test_prompts_for_math_are_different_expressions(tmp_path):
    run_command("scripts/make_math_prompts.py", "--output", tmp_path / "math.jsonl", "--n", 300)
    prompts = [row["prompt"] for row in read_rows(tmp_path / "math.jsonl")]
    assert len(set(prompts)) == len(prompts) == 300 and all(
        solution(prompt.removesuffix(" = ")) for prompt in prompts
    )
