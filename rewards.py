"""Rewards that score samples: `score(prompts, responses) -> list[float]`. A new one is one function and one yaml."""

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path

from utils import ConfigError, nearest

Score = Callable[[list[str], list[str]], list[float]]
REWARDS: dict[str, Callable[..., Score]] = {}


def register_reward(name: str):
    """Register a function from the settings of `config/reward/<name>.yaml` to a `Score`."""

    def decorate(function):
        REWARDS[name] = function
        return function

    return decorate


def check_reward(config) -> None:
    """Raise ConfigError for an unknown reward, or settings that do not fit it; loads nothing."""
    settings = dict(config)
    name = settings.pop("name")
    if name not in REWARDS:
        raise ConfigError(f"reward.name={name!r} is not a registered reward; {nearest(str(name), REWARDS)}")
    accepted = inspect.signature(REWARDS[name]).parameters
    unknown = [key for key in settings if key not in accepted]
    if unknown:
        raise ConfigError(f"reward={name} has no setting {', '.join(unknown)}; accepted: {', '.join(accepted)}")
    missing = [k for k, p in accepted.items() if p.default is p.empty and settings.get(k) is None]
    if missing:
        raise ConfigError(f"reward={name} needs {', '.join('reward.' + key for key in missing)}")


def build_reward(config) -> Score:
    """The reward of the `reward` group, wrapped so that a wrong count or a number that is not finite is an error."""
    check_reward(config)
    settings = dict(config)
    name = settings.pop("name")
    score = REWARDS[name](**settings)

    def checked(prompts: list[str], responses: list[str]) -> list[float]:
        values = [float(value) for value in score(prompts, responses)]
        if len(values) != len(responses):
            raise ValueError(f"reward {name} returned {len(values)} scores for {len(responses)} responses")
        for value, response in zip(values, responses):
            if not math.isfinite(value):
                raise ValueError(f"reward {name} returned {value} for the response {response[:80]!r}")
        return values

    return checked


@register_reward("lexicon")
def lexicon(*, path: str, scale: float = 0.5) -> Score:
    """2 S(scale (positive - negative)): counts of sentiment words in the response, in (0, 2), 1 is neutral.

    path: JSON {"positive": [...], "negative": [...]} of lower-case words.
    """
    if not Path(path).is_file():
        raise ConfigError(f"reward.path={path}: no such file; reward=lexicon needs a JSON of positive and negative words")
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
    *, path: str, label: str, output: str = "probability", include_prompt: bool = False, batch_size: int = 32
) -> Score:
    """A label of a text-classification model, by path or hub id.

    label: its name in the model's config; output: "probability", or "log_odds" log p/(1-p); include_prompt: classify
    prompt and response together instead of the response alone.
    """
    import torch  # here, so that checking a config stays light
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if output not in ("probability", "log_odds"):
        raise ConfigError(f"reward.output={output!r}; accepted: probability, log_odds")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(f"reward.path={path} holds no text-classification model: {str(error).splitlines()[0]}") from error
    labels = {str(name): int(i) for i, name in model.config.id2label.items()}
    if label not in labels:
        raise ConfigError(f"reward.label={label!r} is not a label of {path}; {nearest(label, labels)}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        texts = [p + r for p, r in zip(prompts, responses)] if include_prompt else responses
        values = []
        for begin in range(0, len(texts), batch_size):
            inputs = tokenizer(texts[begin : begin + batch_size], padding=True, truncation=True, return_tensors="pt")
            logits = model(**inputs.to(device)).logits.double()
            if logits.shape[-1] == 1:  # one output is the log-odds of the only label
                log_p, log_q = torch.nn.functional.logsigmoid(logits[:, 0]), torch.nn.functional.logsigmoid(-logits[:, 0])
            else:
                log_p = logits.log_softmax(-1)[:, labels[label]]
                others = torch.arange(logits.shape[-1], device=logits.device) != labels[label]
                log_q = logits[:, others].logsumexp(-1) - logits.logsumexp(-1)
            values.extend((log_p.exp() if output == "probability" else log_p - log_q).tolist())
        return values

    return score
