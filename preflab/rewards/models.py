"""Rewards that are the output of a model: classifiers, reward models, and log-probabilities."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml

from preflab.batching.chat import PromptText, chat_of_prompt, conversation_ids
from preflab.batching.chat_template import ChatSettings, render, set_chat
from preflab.rewards.registry import RewardError, Score, register_reward
from utils import TRAINING_CONFIG, ConfigError, first_line, model_folder, nearest


@register_reward("classifier")
def classifier(
    *,
    path: str,
    label: str,
    output: str = "probability",
    include_prompt: bool = False,
    chat_template: bool | str | None = None,
    batch_size: int = 32,
) -> Score:
    """One label of a text-classification model, by path or hub id.

    label: its name in the model's config.
    output: "probability", or "log_odds" log p/(1-p).
    include_prompt: classify prompt and response together instead of the response alone: one text
        behind the other, of which one that is too long keeps its end.
    chat_template: of prompt and response together, as in reward_model. A conversation without one
        is `role: content` of each message, the response's too, separated by blank lines.
    """
    import torch  # here, so that checking a config stays light

    if output not in ("probability", "log_odds"):
        raise ConfigError(f"reward.output={output!r}; accepted: probability, log_odds")
    tokenizer, model = _load_classifier(path)
    labels = {str(name): int(i) for i, name in model.config.id2label.items()}
    if label not in labels:
        raise ConfigError(
            f"reward.label={label!r} is not a label of {path}; {nearest(label, labels)}"
        )
    if chat_template and not include_prompt:
        raise ConfigError(
            f"reward.chat_template={chat_template} formats prompt and response together; set"
            " reward.include_prompt=true too"
        )
    is_chat = _use_template(tokenizer, chat_template, path)
    if include_prompt:
        tokenizer.truncation_side = "left"
    device = _device()
    model.to(device)
    check = _fit_tokenizer(tokenizer, model, f"reward.path={path}")

    def tokenise(prompt: str, response: str) -> dict[str, list[int]]:
        if include_prompt and is_chat(prompt):
            return {"input_ids": _chat_ids(tokenizer, prompt, response, tokenizer.model_max_length)}
        text = _joined(prompt, response) if include_prompt else response
        return dict(tokenizer(text, truncation=True))

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        rows = [tokenise(*texts) for texts in zip(prompts, responses, strict=True)]
        check([row["input_ids"] for row in rows])
        if any(row.keys() != rows[0].keys() for row in rows):  # conversations and text
            rows = [{"input_ids": row["input_ids"]} for row in rows]
        values = []
        for begin in range(0, len(rows), batch_size):
            inputs = tokenizer.pad(rows[begin : begin + batch_size], return_tensors="pt")
            log_p, log_q = _label_logps(model(**inputs.to(device)).logits, labels[label])
            values.extend((log_p.exp() if output == "probability" else log_p - log_q).tolist())
        return values

    return score


def _load_classifier(path: str) -> tuple:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from preflab.modeling.pretrained import load_complete

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = load_complete(AutoModelForSequenceClassification, path, "reward.path").eval()
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"reward.path={path} is not a text-classification model: {str(error).splitlines()[0]}"
        ) from error
    return tokenizer, model


def _joined(prompt: str, response: str) -> str:
    """Prompt and response as one text."""
    if isinstance(prompt, PromptText):
        return str(PromptText(_answered(prompt, response).messages))
    return prompt + response


def _label_logps(logits, index: int):
    """log p and log (1 - p) of a label, (rows,) each in float64, from logits (rows, labels)."""
    import torch
    from torch.nn.functional import logsigmoid

    logits = logits.double()
    if logits.shape[-1] == 1:  # the single output is the log-odds of the only label
        return logsigmoid(logits[:, 0]), logsigmoid(-logits[:, 0])
    others = torch.arange(logits.shape[-1], device=logits.device) != index
    log_p = logits.log_softmax(-1)[:, index]
    return log_p, logits[:, others].logsumexp(-1) - logits.logsumexp(-1)


@register_reward("reward_model", gold=False)
def reward_model(
    *,
    path: str,
    chat_template: bool | str | None = None,
    max_length: int | None = None,
    batch_size: int = 16,
    head: str | None = None,
    trust_remote_code: bool = False,
) -> Score:
    """The single output of a sequence-classification model for prompt and response together.

    path: a folder, a hub id, or a run of loss=bradley_terry, which gets the ids that it was trained
        on, whatever chat_template says, with the chat_template_kwargs and chat_date of its run.
    chat_template: format the conversation with the template of the model's tokenizer (true), or
        with the given Jinja template; a prompt of text is a user's message. Tools and options that
        the row of a conversation has reach the template. null: conversations by the tokenizer's
        template if it has one, and text as it is. A conversation without a template is `role:
        content` of each message, the response's too, separated by blank lines.
    max_length: tokens that are used, from the end, behind a BOS that the text begins with (null: as
        many as the model takes).
    head: the name of the output layer in the weights, if it is not the name that transformers uses;
        the layer is linear, and the model below it is one that transformers has.
    trust_remote_code: run the code that comes with a model of a class that transformers does not
        have.
    """
    import torch  # here, so that checking a config stays light

    path = str(model_folder(path))
    tokenizer, model = _load_reward_model(path, head, trust_remote_code)
    is_chat = _use_template(tokenizer, chat_template, path)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    check = _fit_tokenizer(tokenizer, model, f"reward.path={path}")
    model.config.pad_token_id = tokenizer.pad_token_id
    limit = max_length or getattr(model.config, "max_position_embeddings", None)
    tokenise = _tokenise_for(Path(path), tokenizer, is_chat)
    device = _device()
    model.to(device)

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        rows = [
            tokenise(tokenizer, *texts, limit) for texts in zip(prompts, responses, strict=True)
        ]
        check(rows)
        values = [0.0] * len(rows)
        for part in _batches_by_length(rows, batch_size):
            inputs = tokenizer.pad({"input_ids": [rows[i] for i in part]}, return_tensors="pt")
            scores = _last_value(model, inputs.to(device)).tolist()
            for i, value in zip(part, scores, strict=True):
                values[i] = value
        return values

    return score


def _use_template(tokenizer, chat_template: bool | str | None, path: str) -> Callable[[str], bool]:
    """Give the tokenizer the template of a setting; returns whether a prompt goes through it.

    Raises ConfigError where the setting asks for a template and there is none.
    """
    if isinstance(chat_template, str):
        tokenizer.chat_template = chat_template
    if chat_template and not tokenizer.chat_template:
        raise ConfigError(
            f"reward.chat_template=true, and the tokenizer of {path} has none;"
            " give a Jinja template as reward.chat_template"
        )
    if chat_template is None and tokenizer.chat_template:
        return lambda prompt: isinstance(prompt, PromptText)
    return lambda prompt: bool(chat_template)


def _tokenise_for(
    path: Path, tokenizer, is_chat: Callable[[str], bool]
) -> Callable[..., list[int]]:
    """How a reward model reads prompt and response: (tokenizer, prompt, response, limit) to ids."""
    if not (path / TRAINING_CONFIG).is_file():
        return lambda tokenizer, prompt, *more: (_chat_ids if is_chat(prompt) else _plain_ids)(
            tokenizer, prompt, *more
        )
    set_chat(tokenizer, _own_chat(path / TRAINING_CONFIG))  # trained here: by the rules of training
    return _own_ids


def _load_reward_model(path: str, head: str | None, trust_remote_code: bool) -> tuple:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            path, truncation_side="left", padding_side="right", trust_remote_code=trust_remote_code
        )
        model = _model_with_one_output(path, head, trust_remote_code).eval()
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"reward.path={path} is not a sequence-classification model:"
            f" {str(error).splitlines()[0]}"
        ) from error
    return tokenizer, model


def _own_chat(file: Path) -> ChatSettings:
    """What the chat template got in the run that trained a model here."""
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    default = ChatSettings()
    return ChatSettings(
        config.get("chat_template_kwargs") or default.options,
        config.get("chat_date") or default.date,
    )


def _answered(prompt: str, response: str):
    """The conversation of a prompt, with the response as the answer of the assistant."""
    chat = chat_of_prompt(prompt)
    answer = {"role": "assistant", "content": response}
    return replace(chat, messages=[*chat.messages, answer])


def _chat_ids(tokenizer, prompt: str, response: str, limit: int | None) -> list[int]:
    """The ids that the template gives the whole conversation, all of its messages."""
    chat = _answered(prompt, response)
    text = render(tokenizer, chat, generation_prompt=False, where="reward.chat_template")
    return _last_ids(tokenizer, tokenizer(text, add_special_tokens=False)["input_ids"], limit)


def _own_ids(tokenizer, prompt: str, response: str, limit: int | None) -> list[int]:
    """As in training here: conversations by the template up to the end of the turn, others as
    text."""
    if not isinstance(prompt, PromptText):
        return _plain_ids(tokenizer, prompt, response, limit)
    before, answer = conversation_ids(tokenizer, prompt.chat, response, where="reward.path")
    return _last_ids(tokenizer, before + answer, limit)


def _last_ids(tokenizer, ids: list[int], limit: int | None) -> list[int]:
    """At most `limit` ids from the end of a conversation, behind BOS where it begins with one."""
    if not limit or len(ids) <= limit:
        return ids
    bos = _bos(tokenizer) if ids[:1] == _bos(tokenizer) else []
    return [*bos, *ids[len(ids) - (limit - len(bos)) :]]


def _plain_ids(tokenizer, prompt: str, response: str, limit: int | None) -> list[int]:
    """As in training: prompt and response are tokenised separately, with BOS first if there is one,
    and EOS last."""
    bos = _bos(tokenizer)
    ids = _separate_ids(tokenizer, prompt, response)
    if limit:
        ids = ids[-(limit - len(bos) - 1) :]
    return [*bos, *ids, tokenizer.eos_token_id]


def _separate_ids(tokenizer, prompt: str, response: str) -> list[int]:
    """The ids of a prompt, of a conversation with the role of the answer, and of a response."""
    prompt = _joined(prompt, "") if isinstance(prompt, PromptText) else prompt
    return [
        token
        for text in (prompt, response)
        for token in tokenizer(text, add_special_tokens=False)["input_ids"]
    ]


def _bos(tokenizer) -> list[int]:
    return [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []


def _fit_tokenizer(tokenizer, model, name: str) -> Callable[[list[list[int]]], None]:
    """What checks tokenised texts for ids that the model has no rows for. Special tokens are
    checked here. name: the setting and the folder, for messages. Raises ConfigError."""
    from preflab.modeling.model_checks import (
        RESIZE,
        check_texts,
        fit_special_tokens,
        vocabulary_rows,
    )

    rows = vocabulary_rows(model.config)
    if rows is None:
        return lambda texts: None
    fit_special_tokens(tokenizer, rows, name, RESIZE)
    return lambda texts: check_texts(texts, tokenizer, rows, name)


def _batches_by_length(rows: list[list[int]], batch_size: int, shortest: int = 0):
    """The positions of the rows of at least `shortest` tokens, in batches of similar length."""
    order = sorted(
        (i for i, row in enumerate(rows) if len(row) >= shortest), key=lambda i: len(rows[i])
    )
    for begin in range(0, len(order), batch_size):
        yield order[begin : begin + batch_size]


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _model_with_one_output(path: str, head: str | None, trust_remote_code: bool):
    import transformers

    from preflab.modeling.pretrained import load_complete

    config, _ = transformers.PreTrainedConfig.get_config_dict(path)
    architecture = (config.get("architectures") or [""])[0]
    own_classes = {
        code.split(".")[-1]: auto_class
        for auto_class, code in config.get("auto_map", {}).items()
        if isinstance(code, str)
    }
    if architecture in own_classes and not hasattr(transformers, architecture) and not head:
        auto_class = own_classes[architecture]
        return _model_with_own_code(path, architecture, auto_class, trust_remote_code)
    renamed = {"num_labels": 1, "key_mapping": {rf"^{re.escape(head)}\.": "score."}} if head else {}
    model = load_complete(
        transformers.AutoModelForSequenceClassification,
        path,
        "reward.path",
        fix="if the output layer has another name, set reward.head to it",
        **renamed,
    )
    if model.config.num_labels != 1:
        raise ConfigError(
            f"reward.path={path} has {model.config.num_labels} outputs, and a reward model has one;"
            " for one label of several use reward=classifier"
        )
    return model


def _model_with_own_code(path: str, architecture: str, auto_class: str, trust_remote_code: bool):
    import transformers

    from preflab.modeling.pretrained import load_complete

    if not trust_remote_code:
        raise ConfigError(
            f"reward.path={path} is a {architecture}, which transformers does not have: it comes"
            " with its own code. Read that code, and set reward.trust_remote_code=true to run it;"
            " or set reward.head to the name of its output layer, if transformers has the model"
            " below that layer"
        )
    try:
        cls = getattr(transformers, auto_class)
        return load_complete(cls, path, "reward.path", trust_remote_code=True)
    except ConfigError:
        raise
    except Exception as error:  # foreign code may raise anything
        raise ConfigError(
            f"reward.path={path}: the code that comes with it fails under transformers"
            f" {transformers.__version__}: {first_line(error)}"
        ) from error


def _last_value(model, inputs):
    """(rows,): the scalar at the last token of each row, in float64. The position comes from the
    mask, because the model's own search fails where padding equals EOS."""
    import torch

    last = inputs["attention_mask"].sum(1) - 1
    head = getattr(model, "score", None)
    if head is None:  # an encoder with its own head, or a model with its own code
        output = model(**inputs)
        values = getattr(output, "logits", output)
        if values.numel() != len(last):
            raise RewardError(
                f"{type(model).__name__} returns an output of shape {tuple(values.shape)} for"
                f" {len(last)} texts; a reward model returns one number per text"
            )
        return values.flatten().double()
    body = model.base_model(
        input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]
    ).last_hidden_state
    return head(body[torch.arange(len(last), device=last.device), last])[:, 0].double()


@register_reward("contrastivedistill")
def contrastivedistill(*, large: str, small: str, batch_size: int = 16) -> Score:
    """The mean log p per token of prompt and response under a large causal LM minus that under a
    small one.

    Tokens are those of training: prompt and response are tokenised separately, with BOS first if
    there is one; each model uses its own tokenizer. Without BOS the first token is not scored. A
    text that is too long for a model is cut to its last tokens. An empty response is scored by its
    prompt, and gets 0 where that is empty too. A conversation goes through the chat template of
    each model, up to the end of the answer's turn; where neither has one, it is `role: content` of
    each message, the response's too.
    """
    large_logps, large_chats = _mean_logps(large, "reward.large", batch_size)
    small_logps, small_chats = _mean_logps(small, "reward.small", batch_size)

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        if large_chats != small_chats and any(isinstance(one, PromptText) for one in prompts):
            with_one, without = ("large", "small") if large_chats else ("small", "large")
            raise RewardError(
                f"contrastivedistill compares two models on one text, and the prompts are"
                f" conversations: reward.{with_one} has a chat template and reward.{without} has"
                " none; give two models with a chat template, or two without"
            )
        both = zip(large_logps(prompts, responses), small_logps(prompts, responses), strict=True)
        return [a - b for a, b in both]

    return score


def _mean_logps(path: str, key: str, batch_size: int) -> tuple[Score, bool]:
    """Mean log p per token under the model at `path`, and whether conversations go through a chat
    template; `key` is the setting that names it."""
    import torch  # here, so that checking a config stays light
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from preflab.batching.packing import Layout, lay_out
    from preflab.modeling.logprobs import Scorer, score_responses
    from preflab.modeling.pretrained import load_complete

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = load_complete(AutoModelForCausalLM, path, key, dtype=torch.float32).eval()
    except ConfigError:
        raise
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={path} is not a causal language model: {str(error).splitlines()[0]}"
        ) from error
    scorer = Scorer(model.to(_device()))
    scorer.check()
    check = _fit_tokenizer(tokenizer, model, f"{key}={path}")
    bos = _bos(tokenizer)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def text_ids(prompt: str, response: str) -> list[int]:
        if isinstance(prompt, PromptText) and tokenizer.chat_template:
            before, answer = conversation_ids(tokenizer, prompt.chat, response, where=key)
            return _last_ids(tokenizer, before + answer, limit)
        ids = _separate_ids(tokenizer, prompt, response)
        return bos + (ids[-(limit - len(bos)) :] if limit else ids)

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        rows = [text_ids(*texts) for texts in zip(prompts, responses, strict=True)]
        check(rows)
        values = [0.0] * len(rows)
        for part in _batches_by_length(rows, batch_size, shortest=2):
            # The first token as prompt, the others as response: those are scored.
            texts = [(rows[i][:1], [rows[i][1:]]) for i in part]
            batch = lay_out(texts, Layout()).to(scorer.device)
            logps = score_responses(scorer, batch).logps
            means = (logps / batch.lengths.to(logps.device)).tolist()
            for i, mean in zip(part, means, strict=True):
                values[i] = mean
        return values

    return score, bool(tokenizer.chat_template)


@register_reward("eurusrm")
def eurusrm(
    *,
    path: str,
    head: str | None = None,
    chat_template: bool | str = True,
    max_length: int | None = None,
    batch_size: int = 16,
    trust_remote_code: bool = False,
) -> Score:
    """Eurus-RM (arXiv:2404.02078), or another reward model of the hub, with prompt and response as
    a chat; see reward_model for the settings.

    An empty response is an empty message of the assistant.
    """
    return reward_model(
        path=path,
        head=head,
        chat_template=chat_template,
        max_length=max_length,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
    )
