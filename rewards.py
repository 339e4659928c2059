"""Rewards that score samples: `score(prompts, responses) -> list[float]`. A new one is one function
and one yaml."""

import inspect
import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from omegaconf import OmegaConf

from utils import (
    ConfigError,
    PrefLabError,
    content_hash,
    first_line,
    load_module,
    model_folder,
    nearest,
)

Score = Callable[[list[str], list[str]], list[float]]
REWARDS: dict[str, Callable[..., Score]] = {}
CONFIG_DIR = Path(__file__).resolve().parent / "config" / "reward"


def register_reward(name: str, *, gold: bool = True, paid: bool = False):
    """Register a function from the settings of `config/reward/<name>.yaml` to a `Score`.

    gold: its labels count against a budget in online learning; not so those of a model that stands
    in for the oracle. paid: every question costs money, so it is not asked for the log alone.
    """

    def decorate(function):
        function.is_gold, function.is_paid = gold, paid
        REWARDS[name] = function
        return function

    return decorate


class RewardError(PrefLabError):
    """A reward that gave no usable scores: a failure is never taken for a score."""


def reward_settings(name, settings: dict | None = None) -> dict:
    """The settings of config/reward/NAME.yaml with `settings` in place of some of them. Raises
    ConfigError for an unknown name."""
    path = CONFIG_DIR / f"{name}.yaml"
    if not path.is_file() and name in REWARDS:  # of a file of the user's own
        return {"name": name, **(settings or {})}
    if not path.is_file():
        raise ConfigError(
            f"{name!r} is no reward;"
            f" {nearest(str(name), [p.stem for p in CONFIG_DIR.glob('*.yaml')])}"
        )
    return OmegaConf.to_container(
        OmegaConf.merge(OmegaConf.load(path), settings or {}), resolve=True
    )


def all_rewards(config) -> dict[str, dict]:
    """Settings of `reward`, and of every entry of `more_rewards`, by the name that its scores go
    by: `as`, or its own."""
    if config.reward.get("module"):
        load_module(config.reward["module"], "reward.module")
    found = {}
    for entry in (config.reward, *(config.more_rewards or ())):
        if (
            not isinstance(entry, str)
            and not OmegaConf.is_dict(entry)
            and not isinstance(entry, dict)
        ):
            raise ConfigError(
                f"more_rewards: {entry!r} is neither a name nor {{name: NAME, setting: value}}"
            )
        entry = {"name": entry} if isinstance(entry, str) else dict(entry)
        if "name" not in entry:
            raise ConfigError(
                f"more_rewards: {entry} has no name; give a file of config/reward/, or {{name:"
                " NAME, setting: value}"
            )
        called = entry.pop("as", entry["name"])
        if called in found:
            raise ConfigError(
                f"two rewards are called {called}; tell them apart: more_rewards=[{{name:"
                f" {entry['name']}, as: another_name}}]"
            )
        found[called] = (
            entry
            if not found
            else reward_settings(
                entry["name"], {key: value for key, value in entry.items() if key != "name"}
            )
        )
    return found


def check_reward(config) -> None:
    """Raise ConfigError for an unknown reward, or settings that do not fit it; loads nothing but
    `module`."""
    settings = dict(config)
    name, module = settings.pop("name"), settings.pop("module", None)
    if module:
        load_module(module, "reward.module")
    if name not in REWARDS:
        raise ConfigError(
            f"reward.name={name!r} is not a registered reward; {nearest(str(name), REWARDS)}"
        )
    accepted = inspect.signature(REWARDS[name]).parameters
    unknown = [key for key in settings if key not in accepted]
    if unknown:
        raise ConfigError(
            f"reward={name} has no setting {', '.join(unknown)}; accepted: {', '.join(accepted)}"
        )
    missing = [k for k, p in accepted.items() if p.default is p.empty and settings.get(k) is None]
    if missing:
        raise ConfigError(f"reward={name} needs {', '.join('reward.' + key for key in missing)}")


def build_rewards(config) -> dict[str, Score]:
    """`reward` first, then `more_rewards`, by name."""
    return {name: build_reward(settings) for name, settings in all_rewards(config).items()}


def build_reward(config) -> Score:
    """The reward of these settings, wrapped so that a wrong count or a number that is not finite is
    a RewardError."""
    check_reward(config)
    settings = dict(config)
    name = settings.pop("name")
    settings.pop("module", None)
    score = REWARDS[name](**settings)

    def checked(prompts: list[str], responses: list[str]) -> list[float]:
        try:
            values = [float(value) for value in score(prompts, responses)]
        except PrefLabError:
            raise
        except (
            Exception
        ) as error:  # of a reward of the user's own, say: whatever it is, there are no scores
            raise RewardError(
                f"reward {name} failed on {len(responses)} responses: {type(error).__name__}:"
                f" {error}"
            ) from error
        if len(values) != len(responses):
            raise RewardError(
                f"reward {name} returned {len(values)} scores for {len(responses)} responses"
            )
        for value, response in zip(values, responses):
            if not math.isfinite(value):
                raise RewardError(
                    f"reward {name} returned {value} for the response {response[:80]!r}"
                )
        return values

    if hasattr(score, "learn"):
        checked.learn = score.learn
    return checked


@register_reward("lexicon")
def lexicon(*, path: str, scale: float = 0.5) -> Score:
    """2 S(scale (positive - negative)): counts of sentiment words in the response, in (0, 2), 1 is
    neutral.

    path: JSON {"positive": [...], "negative": [...]} of lower-case words.
    """
    if not Path(path).is_file():
        raise ConfigError(
            f"reward.path={path}: no such file; reward=lexicon needs a JSON of positive and"
            " negative words"
        )
    words = json.loads(Path(path).read_text(encoding="utf-8"))
    positive, negative = frozenset(words["positive"]), frozenset(words["negative"])

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        values = []
        for response in responses:
            tokens = re.findall(r"[a-z']+", response.lower())
            balance = sum(t in positive for t in tokens) - sum(t in negative for t in tokens)
            values.append(2 / (1 + math.exp(-scale * balance)))
        return values

    return score


@register_reward("classifier")
def classifier(
    *,
    path: str,
    label: str,
    output: str = "probability",
    include_prompt: bool = False,
    batch_size: int = 32,
) -> Score:
    """A label of a text-classification model, by path or hub id.

    label: its name in the model's config; output: "probability", or "log_odds" log p/(1-p);
    include_prompt: classify prompt and response together instead of the response alone.
    """
    import torch  # here, so that checking a config stays light
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if output not in ("probability", "log_odds"):
        raise ConfigError(f"reward.output={output!r}; accepted: probability, log_odds")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"reward.path={path} holds no text-classification model: {str(error).splitlines()[0]}"
        ) from error
    labels = {str(name): int(i) for i, name in model.config.id2label.items()}
    if label not in labels:
        raise ConfigError(
            f"reward.label={label!r} is not a label of {path}; {nearest(label, labels)}"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        texts = [p + r for p, r in zip(prompts, responses)] if include_prompt else responses
        values = []
        for begin in range(0, len(texts), batch_size):
            inputs = tokenizer(
                texts[begin : begin + batch_size],
                padding=True,
                truncation=True,
                return_tensors="pt",
            )
            logits = model(**inputs.to(device)).logits.double()
            if logits.shape[-1] == 1:  # one output is the log-odds of the only label
                log_p, log_q = (
                    torch.nn.functional.logsigmoid(logits[:, 0]),
                    torch.nn.functional.logsigmoid(-logits[:, 0]),
                )
            else:
                log_p = logits.log_softmax(-1)[:, labels[label]]
                others = torch.arange(logits.shape[-1], device=logits.device) != labels[label]
                log_q = logits[:, others].logsumexp(-1) - logits.logsumexp(-1)
            values.extend((log_p.exp() if output == "probability" else log_p - log_q).tolist())
        return values

    return score


@register_reward("length")
def length(*, unit: str = "words") -> Score:
    """How long the response is: unit "words" (runs of non-space) or "characters"."""
    units = {"words": lambda text: len(text.split()), "characters": len}
    if unit not in units:
        raise ConfigError(f"reward.unit={unit!r}; accepted: {', '.join(units)}")
    return lambda prompts, responses: [float(units[unit](response)) for response in responses]


@register_reward("reward_model", gold=False)
def reward_model(
    *,
    path: str,
    chat_template: bool | str = False,
    max_length: int | None = None,
    batch_size: int = 16,
    head: str | None = None,
    trust_remote_code: bool = False,
) -> Score:
    """The one output of a sequence-classification model for prompt and response together.

    path: a folder, a hub id, or a run of loss=bradley_terry; chat_template: prompt and response as
    a user's and an assistant's message, in the form of the model's tokenizer, or of the Jinja
    template given; max_length: tokens kept, of the end (null: what the model takes); head: what the
    weights call the linear layer with the output, on top of a body that transformers knows, where
    it has a name of its own (null: as transformers names it); trust_remote_code: run the code that
    comes with a model of a class that transformers does not have.
    """
    import torch  # here, so that checking a config stays light
    from transformers import AutoTokenizer

    path = str(model_folder(path))
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, truncation_side="left", padding_side="right", trust_remote_code=trust_remote_code
        )
        model = _network_with_one_output(path, head, trust_remote_code).eval()
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"reward.path={path} holds no sequence-classification model:"
            f" {str(error).splitlines()[0]}"
        ) from error
    if isinstance(chat_template, str):
        tokenizer.chat_template = chat_template
    if chat_template and not tokenizer.chat_template:
        raise ConfigError(
            f"reward.chat_template=true, and the tokenizer of {path} has none; give a Jinja"
            " template as reward.chat_template"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    limit = max_length or getattr(model.config, "max_position_embeddings", None)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    def ids_of(prompt: str, response: str) -> list[int]:
        if chat_template:
            messages = [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": response},
            ]
            ids = tokenizer(
                tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False
            )["input_ids"]
            return ids[-limit:] if limit else ids
        # As in training: prompt and response apart, BOS in front where there is one, EOS behind.
        head = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        ids = (
            tokenizer(prompt, add_special_tokens=False)["input_ids"]
            + tokenizer(response, add_special_tokens=False)["input_ids"]
        )
        return head + (ids[-(limit - len(head) - 1) :] if limit else ids) + [tokenizer.eos_token_id]

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        rows = [ids_of(prompt, response) for prompt, response in zip(prompts, responses)]
        values = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            inputs = tokenizer.pad({"input_ids": [rows[i] for i in part]}, return_tensors="pt").to(
                device
            )
            for i, value in zip(part, _last_value(model, inputs).tolist()):
                values[i] = value
        return values

    return score


def _network_with_one_output(path: str, head: str | None, trust_remote_code: bool):
    import transformers

    config, _ = transformers.PreTrainedConfig.get_config_dict(path)
    kind = (config.get("architectures") or [""])[0]
    own = {
        code.split(".")[-1]: auto
        for auto, code in config.get("auto_map", {}).items()
        if isinstance(code, str)
    }
    if kind in own and not hasattr(transformers, kind) and not head:
        if not trust_remote_code:
            raise ConfigError(
                f"reward.path={path} is a {kind}, which transformers does not have: it comes with"
                " code of its own. Read that code, and set reward.trust_remote_code=true to run"
                " it; or set reward.head to the name of its output layer, if all else is of a"
                " known model"
            )
        try:
            return getattr(transformers, own[kind]).from_pretrained(path, trust_remote_code=True)
        except Exception as error:  # whatever strangers' code may raise
            raise ConfigError(
                f"reward.path={path}: the code that comes with it fails under transformers"
                f" {transformers.__version__}: {first_line(error)}"
            ) from error
    renamed = {"num_labels": 1, "key_mapping": {rf"^{re.escape(head)}\.": "score."}} if head else {}
    model, found = transformers.AutoModelForSequenceClassification.from_pretrained(
        path, output_loading_info=True, **renamed
    )
    if found["missing_keys"]:  # they would be random numbers
        unused = ", ".join(sorted(found["unexpected_keys"])[:5]) or "none"
        raise ConfigError(
            f"reward.path={path} has no weights for {', '.join(sorted(found['missing_keys'])[:5])};"
            f" reward.head takes another name of the output layer (weights without a use: {unused})"
        )
    if model.config.num_labels != 1:
        raise ConfigError(
            f"reward.path={path} has {model.config.num_labels} outputs, and a reward model has one;"
            " reward=classifier reads a label"
        )
    return model


def _last_value(model, inputs):
    """(rows,): the scalar at the last token of each row, found from the mask: a pad that equals EOS
    would mislead the model's own search."""
    import torch

    last = inputs["attention_mask"].sum(1) - 1
    head = getattr(model, "score", None)
    if head is None:  # an encoder with a head of its own, or a model with code of its own
        output = model(**inputs)
        values = getattr(output, "logits", output)
        if values.numel() != len(last):
            raise RewardError(
                f"{type(model).__name__} gives an output of shape {tuple(values.shape)} for"
                f" {len(last)} texts, and a reward model gives a number each"
            )
        return values.flatten().double()
    body = model.base_model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).last_hidden_state
    return head(body[torch.arange(len(last), device=last.device), last])[:, 0].double()


@register_reward("http", gold=False)
def http(
    *,
    url: str,
    token_env: str = "REWARD_TOKEN",
    batch_size: int = 64,
    timeout: float = 60.0,
    retries: int = 5,
    backoff: float = 0.5,
) -> Score:
    """A scoring service: POST {"prompts": [...], "responses": [...]} to URL/predict, which answers
    {"scores": [...]}.

    Online learning asks URL/train instead, once a round, with the responses of each prompt as a
    list of their own, the `round` and an `id`; the answer is {"scores": [[...]], "pairs": [[better,
    worse] or null], "labels_bought": n, "room": for how many prompts there can be labels from now
    on, or null}. A service that learns answers an `id` that it knows as it did before, so that an
    attempt may be repeated.

    token_env: environment variable with a bearer token, if the service wants one; timeout: seconds
    of an attempt; retries: further attempts after a timeout, a lost connection or a status 408, 429
    or 5xx, with waits that double from `backoff` seconds. Then, or on any other answer,
    RewardError.
    """
    import logging

    import httpx

    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request otherwise
    token = os.environ.get(token_env)
    client = httpx.Client(
        base_url=url.rstrip("/"),
        timeout=timeout,
        headers={"Authorization": f"Bearer {token}"} if token else {},
    )

    def post(path: str, payload: dict, read: Callable[[dict], object]):
        for attempt in range(retries + 1):
            try:
                response = client.post(path, json=payload)
                told = f"status {response.status_code}: {response.text[:200]}"
                if response.status_code not in (408, 429) and response.status_code < 500:
                    break
            except httpx.RequestError as error:
                told = f"{type(error).__name__}: {error}"
            if attempt < retries:
                time.sleep(backoff * 2**attempt)
        else:
            raise RewardError(
                f"reward.url={url} gave no scores in {retries + 1} attempts, the last: {told}"
            )
        try:
            assert response.status_code == 200
            return read(response.json())
        except (ValueError, LookupError, TypeError, AssertionError) as error:
            raise RewardError(
                f'reward.url={url}{path} answered {told}; expected {{"scores": [numbers]}}'
            ) from error

    def numbers(scores: list) -> list[float]:
        assert all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in scores)
        return scores

    def learn(run: str, number: int, prompts: list[str], responses: list[list[str]]) -> dict:
        """The labels of the responses, (prompts, K), of a round of a run."""
        payload = {"round": number, "prompts": prompts, "responses": responses}

        def read(answer: dict) -> dict:
            assert all(math.isfinite(s) for scores in answer["scores"] for s in numbers(scores))
            assert list(map(len, answer["scores"])) == list(map(len, responses)) and len(
                answer["pairs"]
            ) == len(prompts)
            assert all(
                pair is None or ({*pair} <= {*range(len(of))} and len({*pair}) == 2)
                for pair, of in zip(answer["pairs"], responses)
            )
            assert answer["room"] is None or answer["room"] >= 0
            return answer | {"labels_bought": int(answer["labels_bought"])}

        return post("/train", payload | {"id": content_hash(run, json.dumps(payload))}, read)

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        values = []
        for begin in range(0, len(responses), batch_size):
            part = slice(begin, begin + batch_size)
            scores = post(
                "/predict",
                {"prompts": prompts[part], "responses": responses[part]},
                lambda answer: numbers(answer["scores"]),
            )
            if len(scores) != len(responses[part]):
                raise RewardError(
                    f"reward.url={url} answered {len(scores)} scores for {len(responses[part])}"
                    " responses"
                )
            values += scores
        return values

    score.learn = learn
    return score


# noqa: E402, F401  (here, for it takes from above what it registers with; so REWARDS is complete
# whoever imports this)
import gold_functions
