"""Rewards of a model: classifiers and reward models."""

import re

from preflab.rewards.registry import RewardError, Score, register_reward
from utils import ConfigError, first_line, model_folder, nearest


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


@register_reward("contrastivedistill")
def contrastivedistill(*, large: str, small: str, batch_size: int = 16) -> Score:
    """Mean log p of a token of prompt and response under a large causal LM minus that under a small
    one.

    Tokens as in training: prompt and response apart, BOS in front where there is one; each model
    with its own tokenizer. The first token is not scored where there is no BOS, the last ones are
    kept of a text that is too long for a model, and an empty response is scored by its prompt, 0
    where that is empty as well.
    """
    of_large, of_small = (
        _mean_logps(large, "reward.large", batch_size),
        _mean_logps(small, "reward.small", batch_size),
    )
    return lambda prompts, responses: [
        a - b for a, b in zip(of_large(prompts, responses), of_small(prompts, responses))
    ]


def _mean_logps(path: str, key: str, batch_size: int) -> Score:
    import torch  # here, so that checking a config stays light
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from preflab.batching.packing import Layout, lay_out
    from preflab.modeling.logprobs import Scorer, score_responses

    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={path} holds no causal language model: {str(error).splitlines()[0]}"
        ) from error
    scorer = Scorer(model.to("cuda" if torch.cuda.is_available() else "cpu"))
    scorer.check()
    head = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)

    def ids_of(prompt: str, response: str) -> list[int]:
        ids = (
            tokenizer(prompt, add_special_tokens=False)["input_ids"]
            + tokenizer(response, add_special_tokens=False)["input_ids"]
        )
        return head + (ids[-(limit - len(head)) :] if limit else ids)

    @torch.no_grad()
    def score(prompts: list[str], responses: list[str]) -> list[float]:
        rows = [ids_of(prompt, response) for prompt, response in zip(prompts, responses)]
        values = [0.0] * len(rows)
        order = sorted(
            (i for i, row in enumerate(rows) if len(row) > 1), key=lambda i: len(rows[i])
        )
        for begin in range(0, len(order), batch_size):
            part = order[begin : begin + batch_size]
            batch = lay_out([(rows[i][:1], [rows[i][1:]]) for i in part], Layout()).to(
                scorer.device
            )
            logps = score_responses(scorer, batch).logps
            for i, mean in zip(part, (logps / batch.lengths.to(logps.device)).tolist()):
                values[i] = mean
        return values

    return score


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
    """Eurus-RM (arXiv:2404.02078), or another reward model of the hub: prompt and response as a
    chat; see reward_model for the settings.

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
