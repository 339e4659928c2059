"""Token ids of conversations, by the tokenizer's chat template.

One rule: the ids of prompt and response together are those of the template applied to the whole
conversation, up to the end of the assistant's turn, which is scored too. What a template writes
after that (a newline, an EOS) no model generates, because sampling stops at the end of the turn.
"""

import json
from dataclasses import replace

from preflab.batching.chat_template import render
from preflab.batching.turn_ends import known_turn_end, turn_end
from preflab.readers.messages import ASSISTANT, Chat, Turns, Unended
from utils import DataError


def conversation_ids(
    tokenizer,
    chat: Chat | list[dict],
    response: str,
    *,
    where: str = "",
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of the assistant's response, its end included."""
    chat = Chat(chat) if isinstance(chat, list) else chat
    [prompt], [[ids]], *_ = conversations_ids(tokenizer, [(chat, [response], where)])
    return prompt, ids


def conversations_ids(
    tokenizer, conversations: list[tuple[Chat, list[str], str]]
) -> tuple[list[list[int]], list[list[list[int]]], list[list[list[bool] | None]], list[list[int]]]:
    """Token ids of prompts, and of the responses to each, their ends included; which tokens of a
    response are the assistant's, None where all are; and the ids of prompts to sample for.

    A tokenizer may join the end of a prompt with the start of an answer, such as two newlines. A
    prompt is then the ids that it shares with all of its conversations, so that its responses share
    them too: a token over the border belongs to the response, and so do the prompt's tokens behind
    the shared ones, which are not the assistant's. To sample is to continue all of the prompt.

    conversations: (prompt, responses, place for messages). Raises DataError where the text of a
    prompt does not begin that of a conversation, or where they share no token.
    """
    # What the template itself refuses comes first: its words say more than ours.
    rendered = [
        render(tokenizer, chat, generation_prompt=True, where=where)
        for chat, _, where in conversations
    ]
    texts, spans = [], []
    for prompt, (chat, responses, where) in zip(rendered, conversations, strict=True):
        texts.append(prompt)
        spans.append(None)
        for response in responses:
            text, of_turns = _whole(tokenizer, chat, prompt, response, where)
            texts.append(text)
            spans.append(of_turns)
    ids = iter(zip(_encode(tokenizer, texts), texts, spans, strict=True))
    prompts, of_prompts, masks, asked = [], [], [], []
    for _, responses, where in conversations:
        whole_prompt = next(ids)[0]
        wholes = [(*next(ids), isinstance(one, Unended)) for one in responses]
        n = min((_n_shared(whole_prompt, whole) for whole, *_ in wholes), default=None)
        if n == 0 and whole_prompt:
            raise DataError(
                f"{where}: the prompt, {whole_prompt!r} as ids, shares no token with the"
                " conversation, because the tokenizer joins all of it with the answer; give a"
                " longer prompt"
            )
        both = [_split(tokenizer, whole_prompt, n, *whole) for whole in wholes]
        prompts.append(whole_prompt[:n])
        of_prompts.append([response for response, _ in both])
        masks.append([mask for _, mask in both])
        asked.append(whole_prompt)
    return prompts, of_prompts, masks, asked


def _n_shared(a: list[int], b: list[int]) -> int:
    """How many ids two lists begin with in common."""
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


def _encode(tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _whole(
    tokenizer, chat: Chat, prompt: str, response: str, where: str
) -> tuple[str, list[tuple[int, int]] | None]:
    """The conversation with a response up to the end of its last turn, and where the assistant's
    turns lie in it; None where the response is a single turn."""
    if not response:  # there is nothing to format
        return prompt, None
    if not isinstance(response, Turns):
        answer = {"role": "assistant", "content": str(response)}
        whole = _with_answer(tokenizer, chat, prompt, answer, where)
        if isinstance(response, Unended):
            whole = whole[: len(whole) - len(turn_end(tokenizer).text)]
        return whole, None
    spans, texts = [], []
    for number, turn in enumerate(response.messages):
        if turn["role"] not in ASSISTANT:
            continue
        before = replace(chat, messages=[*chat.messages, *response.messages[:number]])
        begin = render(tokenizer, before, generation_prompt=True, where=where)
        texts += [begin, _with_answer(tokenizer, before, begin, turn, where)]
        spans.append((len(begin), len(texts[-1])))
    whole = texts[-1]
    if not all(whole.startswith(text) for text in (prompt, *texts)):
        raise DataError(f"{where}: {_no_prefix()}")
    return whole, spans


def _split(
    tokenizer,
    prompt: list[int],
    n_shared: int,
    whole: list[int],
    text: str,
    spans: list[tuple[int, int]] | None,
    unended: bool,
) -> tuple[list[int], list[bool] | None]:
    """The ids of a response, and which of them are the assistant's. n_shared: the ids of the prompt
    that are not the response's."""
    end = turn_end(tokenizer).token
    ends = [] if end is not None or unended else [tokenizer.eos_token_id]
    if whole == prompt and not unended:  # an empty response: the end alone
        ends = [tokenizer.eos_token_id if end is None else end]
    response = whole[n_shared:] + ends
    if spans is None:
        first = _n_shared(prompt, whole) - n_shared
        return response, [False] * first + [True] * (len(response) - first) if first else None
    mask = [False] * (len(response) - len(ends)) + [True] * len(ends)
    for begin, end in spans:
        first = _border(tokenizer, text[:begin], whole)[0] - n_shared
        last = _border(tokenizer, text[:end], whole)[1] - n_shared
        mask[first:last] = [True] * (last - first)
    return response, None if all(mask) else mask


def _border(tokenizer, text: str, whole: list[int]) -> tuple[int, int]:
    """How many of the conversation's tokens the text that begins it has; without and with a token
    that it shares with what follows."""
    [ids] = _encode(tokenizer, [text])
    n = _n_shared(ids, whole)
    return n, n + (n < len(ids))


def _with_answer(tokenizer, chat: Chat, prompt: str, answer: dict, where: str) -> str:
    """The conversation with a message of the assistant, up to the end of its turn."""
    answered = replace(chat, messages=[*chat.messages, answer])
    whole = render(tokenizer, answered, generation_prompt=False, where=where)
    if not whole.startswith(prompt):
        raise DataError(f"{where}: {_no_prefix()}")
    turn = turn_end(tokenizer)
    if not whole.endswith(turn.suffix):
        raise DataError(
            f"{where}: the chat template writes {whole[-40:]!r} at the end of this conversation,"
            f" where it writes {turn.suffix!r} after other answers, so the end of the answer is"
            " not known; check the template, or leave the row out"
        )
    return whole[: len(whole) - len(turn.suffix)] + turn.text


def _no_prefix() -> str:
    return (
        "the chat template cannot be split: the text of the prompt, with its generation prompt,"
        " does not begin that of the conversation with the answer, so it is unclear which tokens"
        " the assistant would generate; change the template (it may drop or rewrite earlier turns)"
    )


# ------------------------------------------------------------------------------------- as text


class PromptText(str):
    """A conversation as text for people and for rewards that read text, with the conversation.

    One message is its content; several are `role: content`, separated by blank lines. Tools and
    options of the template are in `chat` alone.
    """

    __slots__ = ("chat",)

    def __new__(
        cls, messages: list[dict], tools: list | None = None, options: dict | None = None
    ) -> "PromptText":
        blocks = [f"{message['role']}: {_content(message)}" for message in messages]
        text = _content(messages[0]) if len(messages) == 1 else "\n\n".join(blocks)
        self = super().__new__(cls, text)
        self.chat = Chat(messages, tools, options or {})
        return self

    @property
    def messages(self) -> list[dict]:
        return self.chat.messages

    def __reduce__(self):
        return PromptText, (self.chat.messages, self.chat.tools, self.chat.options)


def _content(message: dict) -> str:
    """The text of a message, and of one that calls tools the calls as JSON."""
    calls = message.get("tool_calls")
    return "\n".join(filter(None, [message.get("content"), calls and json.dumps(calls)]))


def transcript(prompt: str) -> str:
    """A prompt as text for a reader who judges the answer: of a conversation also the tools that
    the assistant may call, without which its calls cannot be judged."""
    if not isinstance(prompt, PromptText) or not prompt.chat.tools:
        return str(prompt)
    tools = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in prompt.chat.tools)
    messages = "\n\n".join(f"{one['role']}: {_content(one)}" for one in prompt.messages)
    return f"The assistant may call these tools:\n{tools}\n\n{messages}"


def prompt_text(tokenizer, tokens: list[int], chat: Chat | None) -> str:
    """A prompt for people and rewards: a conversation by its messages, and not by its tokens, whose
    decoded text lacks the markers between them."""
    if chat is not None:
        return PromptText(chat.messages, chat.tools, chat.options)
    return tokenizer.decode(tokens, skip_special_tokens=True)


def prompt_columns(prompt: str) -> dict:
    """A prompt in a row of a file: its text, and of a conversation its messages, and its tools and
    options where it has any."""
    if not isinstance(prompt, PromptText):
        return {"prompt": str(prompt)}
    columns = {"messages": prompt.chat.messages, **context_columns(prompt.chat)}
    return {"prompt": str(prompt), **columns}


def context_columns(chat: Chat) -> dict:
    """The columns beside the messages of a conversation, as data files have them."""
    columns = {"tools": chat.tools, "chat_template_kwargs": chat.options}
    return {name: value for name, value in columns.items() if value}


def prompt_of_columns(row: dict) -> str:
    """The prompt that `prompt_columns` has written to a row."""
    if not row.get("messages"):
        return row["prompt"]
    return PromptText(row["messages"], row.get("tools"), row.get("chat_template_kwargs"))


def chat_of_prompt(prompt: str) -> Chat:
    """The conversation of a prompt; text is what a user says."""
    if isinstance(prompt, PromptText):
        return prompt.chat
    return Chat([{"role": "user", "content": str(prompt)}])


def prompt_key(prompt: str) -> str:
    """Equal for equal prompts. Two conversations may have the same text, and other tools."""
    return prompt.chat.key() if isinstance(prompt, PromptText) else str(prompt)


def response_text(tokenizer, tokens: list[int]) -> str:
    """A response without special tokens, and without the end of a turn, which need not be one."""
    turn = known_turn_end(tokenizer)
    if turn and tokens and tokens[-1] == turn.token:
        tokens = tokens[:-1]
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    # An end that is plain text stands before EOS, or is the last that was sampled; a response that
    # was cut has none.
    if turn and turn.token is None and tokens and tokens[-1] == tokenizer.eos_token_id:
        return text.removesuffix(turn.text)
    if turn and turn.completes(tokenizer, tokens):
        return text.rpartition(turn.text)[0]
    return text
