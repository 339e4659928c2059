"""Conversations in rows: messages as they are written in data files, checked, and the prompt that
several of them share."""

import json
import re
from dataclasses import dataclass, field

from preflab.readers.fields import text, type_and_value
from preflab.readers.json_text import parse_json
from utils import DataError

JSON_MESSAGES = re.compile(r"\s*(?:\[\s*)?\{")
# What begins as messages, and is not JSON where a quote or the end is missing, or where Python has
# written a list as text.
BEGIN_OF_MESSAGES = re.compile(r"""\s*\[\s*\{\s*(?P<quote>["'])(?:role|content)(?P=quote)\s*:""")
# Fields of a message that templates read; others, such as times, tell no conversations apart.
READ = (
    *("role", "content", "name", "tool_calls", "tool_call_id"),
    *("reasoning_content", "reasoning", "thinking"),
)
SHARE_GPT_ROLES = ("human", "gpt", "system", "user", "assistant", "tool", "function_call")
ASSISTANT = ("assistant", "model")  # the roles of its messages
# Columns beside the messages that the chat template gets.
CONTEXT = ("system", "tools", "chat_template_kwargs")


@dataclass(frozen=True)
class Chat:
    """A prompt that is a conversation.

    messages: {role, content, ...} in order, with any further JSON values of the data. tools: JSON
    schemas of functions that the assistant may call, None without. options: further variables of
    the chat template for this row.
    """

    messages: list[dict]
    tools: list | None = None
    options: dict = field(default_factory=dict)

    def key(self) -> str:
        """Equal for equal conversations, whatever else their messages carry, such as times."""
        read = list(map(read_part, self.messages))
        return json.dumps([read, self.tools, self.options], sort_keys=True)

    def to_json(self) -> str:
        return json.dumps([self.messages, self.tools, self.options])


def read_part(message: dict) -> dict:
    """What templates read of a message."""
    return {name: message[name] for name in READ if name in message}


class Unended(str):
    """A response that was cut where it was written, by a limit on its length: it has no end."""

    __slots__ = ()


class Turns(str):
    """A response of several turns: messages that end with the assistant's, and as text their
    JSON."""

    __slots__ = ("messages",)

    def __new__(cls, messages: list[dict]) -> "Turns":
        self = super().__new__(cls, json.dumps(messages, ensure_ascii=False))
        self.messages = messages
        return self


def messages_of(
    row: dict, key: str, where: str, *, may_be_empty: bool = False, answers_text: bool = False
) -> list[dict] | None:
    """The messages of a column, checked; None where it holds text, or is absent.

    A cell may hold a single message, or either of them as JSON. Fields that no JSON file could hold
    (dates, bytes) are dropped, and so are empty ones, as transformers does. may_be_empty: the
    content of messages may be empty. answers_text: the column answers a prompt of text; then a
    single object as JSON is what the model is to write, and is text.
    """
    value = row.get(key)
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, str) and JSON_MESSAGES.match(value):
        value = _parsed(value, key, where, objects=not answers_text)
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or (value and all(isinstance(one, str) for one in value)):
        return None
    if not value:
        raise DataError(f"{where}: {key!r} is an empty list, expected chat messages")
    return [_message(message, key, where, may_be_empty=may_be_empty) for message in value]


def _parsed(value: str, key: str, where: str, *, objects: bool):
    """JSON that holds messages; else the text itself. objects: also of a single message."""
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError) as error:
        # A list with text behind it is an answer that quotes messages.
        is_prose = getattr(error, "msg", "") == "Extra data"
        if BEGIN_OF_MESSAGES.match(value) and not is_prose:
            raise DataError(
                f"{where}: {key!r} is text that begins as chat messages and is not JSON: {error};"
                " write it with json.dumps, or save the messages as lists"
            ) from error
        return value
    if isinstance(parsed, dict):
        if not objects or not {"role", "content"} <= parsed.keys():
            return value
    elif not all(_is_message(one) for one in parsed if isinstance(one, dict)):
        return value
    return parse_json(value, f"{where}, {key!r}")  # refuses a key given twice


def _is_message(entry: dict) -> bool:
    """Whether an object is a message, or one of the ShareGPT layout, which is refused."""
    is_share_gpt = {"from", "value"} <= entry.keys() and entry["from"] in SHARE_GPT_ROLES
    return "role" in entry or is_share_gpt


def _message(message, key: str, where: str, *, may_be_empty: bool) -> dict:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        received = type_and_value(message)
        raise DataError(f"{where}: a message of {key!r} is {received}, expected {{role, content}}")
    place = f"{where}, a message of {key!r}"
    text(message, "role", place)
    others = {name: value for name, value in message.items() if name not in ("role", "content")}
    further = {name: value for name, value in _plain(others, place).items() if value or value == 0}
    content = message.get("content")
    if content is None and further.get("tool_calls"):
        content = None
    elif isinstance(content, list):
        content = _joined(content, place)
    else:
        may_be_empty |= bool(further.get("tool_calls")) or message["role"] == "tool"
        content = text(message, "content", place, may_be_empty=may_be_empty)
    return {"role": message["role"], "content": content} | further


def _joined(parts: list, place: str) -> str:
    """The text of content that is written as a list of parts."""
    for part in parts:
        if not isinstance(part, dict) or part.get("type", "text") != "text":
            raise DataError(f"{place}: its content has {type_and_value(part)}, expected text only")
    return text({"content": "".join(text(part, "text", place) for part in parts)}, "content", place)


def _plain(value, place: str):
    """A value without what JSON cannot hold. Raises DataError for text that UTF-8 cannot."""
    plain = _json_part(value)
    try:
        json.dumps(plain, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: a field holds half a surrogate pair, which UTF-8 cannot encode; write the"
            " file again with valid Unicode text"
        ) from error
    return plain


def _json_part(value):
    value = value.tolist() if hasattr(value, "tolist") else value
    if isinstance(value, dict):
        parts = {str(name): _json_part(one) for name, one in value.items()}
        return {name: one for name, one in parts.items() if one is not _NOT_JSON}
    if isinstance(value, (list, tuple)):
        return [one for one in map(_json_part, value) if one is not _NOT_JSON]
    return value if value is None or isinstance(value, (str, bool, int, float)) else _NOT_JSON


_NOT_JSON = object()


def chat(row: dict, messages: list[dict], where: str) -> Chat:
    """Messages as a prompt, with the columns of the row that the template gets.

    Raises DataError for a `system` column beside another system message.
    """
    if system := row.get("system"):
        first = {"role": "system", "content": text(row, "system", where)}
        if messages and messages[0]["role"] == "system":
            if messages[0]["content"] != system:
                raise DataError(
                    f"{where}: a 'system' column, and the messages begin with another system"
                    " message; remove one of them"
                )
        else:
            messages = [first, *messages]
    tools = _json_field(row, "tools", list, where)
    options = _json_field(row, "chat_template_kwargs", dict, where) or {}
    return Chat(messages, tools or None, options)


def _json_field(row: dict, key: str, expected: type, where: str):
    value = row.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, str):
        value = parse_json(value, f"{where}, {key!r}")
    if not isinstance(value, expected):
        wanted = "a list of functions" if expected is list else "an object"
        raise DataError(f"{where}: {key!r} is {type_and_value(value)}, expected {wanted}")
    return _plain(value, f"{where}, {key!r}")


def whole_conversation(
    row: dict, key: str, where: str, *, asked: str = "prompt", may_be_empty: bool = False
) -> list[dict] | None:
    """All messages up to and with those of a response column; None where it holds text.

    The column may hold the whole conversation or the answer alone; then those of the column `asked`
    stand before it. What `asked` says must be in the conversation, since it would be lost
    otherwise.
    """
    before = messages_of(row, asked, where)
    answers_text = before is None and row.get(asked) is not None
    messages = messages_of(row, key, where, may_be_empty=may_be_empty, answers_text=answers_text)
    if messages is None:
        return None
    if row.get(asked) is None:
        return messages
    if before is not None:
        starts = range(len(messages) - len(before) + 1)
        if any(_alike(messages[i : i + len(before)], before) for i in starts):
            return messages
        if messages[0]["role"] in ASSISTANT:
            return before + messages
    else:
        prompt = text(row, asked, where)
        if any(_same(message, prompt) for message in messages):
            return messages
        if messages[0]["role"] in ASSISTANT:
            return [{"role": "user", "content": prompt}, *messages]
    raise DataError(
        f"{where}: {asked!r} is not part of the messages of {key!r}, so that one of them would be"
        f" lost; give the whole conversation there, or the answer alone, or remove {asked!r}"
    )


def _alike(a: list[dict], b: list[dict]) -> bool:
    return list(map(read_part, a)) == list(map(read_part, b))


def _same(message: dict, prompt: str) -> bool:
    return (message["content"] or "").strip() == prompt.strip()


def split_answer(messages: list[dict], key: str, where: str) -> tuple[list[dict], str]:
    """The messages before the last, and the last, an assistant's: its content, or a turn where it
    has further fields, such as its reasoning.

    Raises DataError for a conversation that ends otherwise, or that has nothing before it.
    """
    *before, last = messages
    if not before:
        raise DataError(
            f"{where}: no 'prompt', and {key!r} is a single message, expected the messages before"
            " the answer too"
        )
    if last["role"] not in ASSISTANT:
        raise DataError(
            f"{where}: the last message of {key!r} is from role {last['role']!r}, expected the"
            " answer, from role 'assistant'"
        )
    return before, _response([last])


def _response(turns: list[dict]) -> str:
    """Messages as a response: the content of a single one that has nothing else."""
    if len(turns) == 1 and read_part(turns[0]).keys() <= {"role", "content"}:
        return turns[0]["content"]
    return Turns(turns)


def split_turns(
    messages: list[dict], others: list[list[dict]], key: str, where: str
) -> tuple[list[dict], str] | None:
    """The messages before the first in which conversations differ, and all from there on as a
    response; None where they differ in what is not the assistant's.

    others: the conversations beside this one; without any, all turns of the assistant are the
    response.
    """
    split_answer(messages, key, where)
    if others:
        shared = min(_n_alike(messages[:-1], other[:-1]) for other in others)
    else:
        shared = next((i for i, one in enumerate(messages) if one["role"] in ASSISTANT), 0)
    if not shared or messages[shared]["role"] not in ASSISTANT:
        return None
    return messages[:shared], _response(messages[shared:])


def _n_alike(a: list[dict], b: list[dict]) -> int:
    """How many messages two conversations begin with in common."""
    pairs = list(zip(a, b, strict=False))
    return next((i for i, (x, y) in enumerate(pairs) if not _alike([x], [y])), len(pairs))
