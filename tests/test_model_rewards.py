"""Rewards that are models, against naive computations and stub services."""

import json
import re

import pytest
import torch
from conftest import (
    make_model,
    make_tokenizer,
    save_model,
)
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerFast

from preflab.batching.chat import PromptText
from preflab.rewards import llm_client
from preflab.rewards.llm_rater import read_ratings
from preflab.rewards.registry import (
    RewardError,
    build_reward,
    reward_settings,
)
from utils import ConfigError

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
    for prompt, response in zip(prompts, responses, strict=True):
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
    scores = build_reward(settings)(prompts, responses)
    assert (
        scores == pytest.approx(expected, abs=1e-5)
        and len({round(value, 3) for value in scores}) == 6
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


@pytest.fixture
def short_of_rows(tmp_path):
    """A model of every kind whose tokenizer has a word and a pad token that it has no rows for."""
    tokenizer = make_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["zebra"])
    tokenizer.add_special_tokens({"pad_token": "<far>"})
    model = make_model("llama")
    assert model.config.vocab_size == rows
    model.save_pretrained(tmp_path / "lm")
    model.config.num_labels = 1
    scoring = AutoModelForSequenceClassification.from_config(model.config)
    scoring.save_pretrained(tmp_path / "scoring")
    for kind in ("lm", "scoring"):
        tokenizer.save_pretrained(tmp_path / kind)
    return tmp_path, rows


@pytest.mark.parametrize(
    "name, settings",
    [
        ("reward_model", {"path": "scoring"}),
        ("classifier", {"path": "scoring", "label": "LABEL_0"}),
        ("contrastivedistill", {"large": "lm", "small": "lm"}),
    ],
)
def test_a_token_without_a_row_is_named_and_a_pad_token_alone_is_not(short_of_rows, name, settings):
    folder, rows = short_of_rows
    paths = {key: str(folder / value) for key, value in settings.items() if key != "label"}
    reward = build_reward(settings | paths | {"name": name})
    assert len(reward(["one", "one"], ["more words", "two"])) == 2
    message = rf"token 'zebra' has id {rows}, and the model reward\.\w+=.* has {rows} rows"
    with pytest.raises(ConfigError, match=message):
        reward(["one"], ["a zebra"])


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
    expected = [score(*texts) for texts in zip(prompts, responses, strict=True)]
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
    with pytest.raises(ConfigError, match=r"give a Jinja template as reward\.chat_template"):
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


CHAT = "{% for m in messages %}<{{ m['role'] }}|{{ m['content'] }}>{% endfor %}"
ASKED = [{"role": r, "content": c} for r, c in (("user", "q?"), ("assistant", "a"), ("user", "b"))]
LIMIT = 40


def reward_with_template(folder, n_labels, template):
    """A random model of sequences with the tokenizer of bytes; (settings, naive score of ids)."""
    config = make_model("llama").config
    config.num_labels = n_labels
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    model.score.weight.data.normal_(std=0.1)  # no probability of almost 1
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.chat_template, tokenizer.model_max_length = template, LIMIT
    tokenizer.save_pretrained(folder)

    @torch.no_grad()
    def score(ids):
        logits = model(torch.tensor([ids])).logits[0].double()
        return (logits.softmax(-1)[1] if n_labels == 2 else logits[0]).item()

    common = {"path": str(folder), "batch_size": 2}
    if n_labels == 2:
        own = {"name": "classifier", "label": "LABEL_1", "include_prompt": True}
    else:
        own = {"name": "reward_model", "max_length": LIMIT}
    return common | own, score


@pytest.mark.parametrize("n_labels", [1, 2])
def test_a_conversation_is_scored_by_the_template_of_the_reward(tmp_path, n_labels):
    """By bytes of what the template writes; without one, roles and contents, the answer's too."""
    settings, score = reward_with_template(tmp_path / "chat", n_labels, CHAT)
    none, score_none = reward_with_template(tmp_path / "none", n_labels, None)
    prompts = [PromptText(ASKED), PromptText(ASKED[:1]), "a text", "p" * 60]
    responses = ["x", "a long answer " * 4 + "ends", "y", "and its end"]

    def last(text, *, plain):
        ids = make_tokenizer()(text)["input_ids"]
        if plain and n_labels == 1:  # as a reward model reads text: BOS, the end of it, EOS
            return [256, *ids[-(LIMIT - 2) :], 256]
        return ids[-LIMIT:]

    framed = [
        "<user|q?><assistant|a><user|b><assistant|x>",
        f"<user|q?><assistant|{responses[1]}>",
    ]
    roles = [
        "user: q?\n\nassistant: a\n\nuser: b\n\nassistant: x",
        f"user: q?\n\nassistant: {responses[1]}",
    ]
    texts = [prompt + response for prompt, response in zip(prompts[2:], responses[2:], strict=True)]
    as_chats = [f"<user|{p}><assistant|{r}>" for p, r in zip(prompts, responses, strict=True)][2:]
    for given, chats, others, is_plain in [
        (settings, framed, texts, (False, True)),
        (settings | {"chat_template": True}, framed, as_chats, (False, False)),
        (settings | {"chat_template": False}, roles, texts, (True, True)),
        (none, roles, texts, (True, True)),
        (none | {"chat_template": CHAT}, framed, as_chats, (False, False)),
    ]:
        of = score if given["path"] == settings["path"] else score_none
        ids = [last(text, plain=is_plain[0]) for text in chats]
        ids += [last(text, plain=is_plain[1]) for text in others]
        scores = build_reward(given)(prompts, responses)
        assert scores == pytest.approx(list(map(of, ids)), rel=1e-4, abs=1e-5)
        assert len({round(value, 4) for value in scores}) == len(scores)
    with pytest.raises(ConfigError, match=r"give a Jinja template as reward\.chat_template"):
        build_reward(none | {"chat_template": True})


def test_a_template_of_a_classifier_is_for_prompt_and_response(tmp_path):
    settings, _ = reward_with_template(tmp_path, 2, CHAT)
    with pytest.raises(ConfigError, match=r"set reward\.include_prompt=true too"):
        build_reward(settings | {"include_prompt": False, "chat_template": True})


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
    "answer, message",
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
def test_an_answer_without_ratings_is_an_error_and_is_asked_again(
    answer, message, rated, http_server
):
    with pytest.raises(RewardError, match=message):
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
