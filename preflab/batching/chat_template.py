"""Chat templates: what they get beside the messages, and a conversation as they write it."""

import datetime
import functools
import json
import logging
import re
from dataclasses import dataclass, field

from preflab.readers.messages import Chat
from utils import DataError, first_line

logger = logging.getLogger(__name__)

NOW = re.compile(r"""strftime_now\s*\(\s*(["'])(.*?)\1\s*\)""")


@dataclass(frozen=True)
class ChatSettings:
    """What a chat template gets in every conversation of a run.

    options: its further variables, such as enable_thinking. date: YYYY-MM-DD, what `strftime_now`
    formats, so that a template which writes the date writes the same on every day.
    """

    options: dict = field(default_factory=dict)
    date: str = "2024-07-26"

    def key(self) -> list:
        return [sorted(self.options.items()), self.date]


def chat_of(settings) -> ChatSettings:
    """Those of a run."""
    return ChatSettings(dict(settings.chat_template_kwargs or {}), settings.chat_date)


def set_chat(tokenizer, settings: ChatSettings) -> None:
    """Let all conversations that go through this tokenizer follow the settings."""
    tokenizer.preflab_chat = settings
    if writes_date(tokenizer):
        logger.info(f"the chat template writes a date: chat_date={settings.date}")


def writes_date(tokenizer) -> bool:
    """Whether the chat template reads the date."""
    template = str(tokenizer.chat_template)
    return "strftime_now" in template or "date_string" in template


def chat_settings(tokenizer) -> ChatSettings:
    """What `set_chat` has set, or the defaults."""
    return getattr(tokenizer, "preflab_chat", ChatSettings())


def render(tokenizer, chat: Chat, *, generation_prompt: bool, where: str = "") -> str:
    """A conversation as text. generation_prompt: also write what begins the assistant's answer.

    Raises DataError, at `where`, for what the template refuses, and for a tokenizer without one.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            f"{where}: the prompt is a list of chat messages, but the tokenizer"
            f" {tokenizer.name_or_path} has no chat template; use a chat model's tokenizer"
            " (model.tokenizer_name_or_path) or give prompts as text"
        )
    settings = chat_settings(tokenizer)
    try:
        template = tokenizer.get_chat_template(tools=chat.tools)
        return tokenizer.apply_chat_template(
            chat.messages,
            tools=chat.tools,
            chat_template=_dated(template, settings.date),
            add_generation_prompt=generation_prompt,
            tokenize=False,
            **{**_date_variable(template, settings.date), **settings.options, **chat.options},
        )
    except Exception as error:  # a template is code, and may fail in any way
        raise DataError(
            f"{where}: the chat template of {tokenizer.name_or_path} refuses the conversation:"
            f" {_reason(error)}"
        ) from error


@functools.cache
def _dated(template: str, date: str) -> str:
    """The template with a fixed date in place of each `strftime_now("...")`."""
    day = datetime.date.fromisoformat(date)
    dated = NOW.sub(lambda found: json.dumps(day.strftime(found[2])), template)
    if re.search(r"strftime_now\s*\(", dated):
        raise ValueError(
            "it calls strftime_now with something else than a string, so that no date can be set"
        )
    return dated


def _date_variable(template: str, date: str) -> dict[str, str]:
    """`date_string`, which the templates of Llama 3 read, in their format."""
    if "date_string" not in template:
        return {}
    return {"date_string": datetime.date.fromisoformat(date).strftime("%d %b %Y")}


def _reason(error: Exception) -> str:
    """What a template says: its own words, or the class of the error too."""
    own = type(error).__name__ == "TemplateError"
    return str(error).strip() if own else first_line(error)
