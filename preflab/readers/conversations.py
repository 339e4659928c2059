"""Prompt and responses of a row, which are texts or conversations.

One rule for every set of columns: the prompt is what the responses share. A column holds the answer
alone, as text or as a message, behind what its prompt column says, or the whole conversation.
"""

from preflab.readers.fields import text
from preflab.readers.messages import (
    CONTEXT,
    Chat,
    chat,
    messages_of,
    split_answer,
    split_turns,
    whole_conversation,
)
from preflab.readers.records import Skip
from utils import DataError


def prompt_of(row: dict, where: str, *, asked: str = "prompt") -> str | Chat:
    """The column that asks: text, or messages."""
    if (messages := messages_of(row, asked, where)) is not None:
        return chat(row, messages, where)
    for column in CONTEXT:
        if row.get(column):
            raise DataError(
                f"{where}: {column!r} is for a chat template, and {asked!r} is text, so it would"
                f" not be read; give {asked!r} as messages, or remove the column"
            )
    return text(row, asked, where)


def conversation_of(
    row: dict, key: str, where: str, *, asked: str = "prompt", may_be_empty: bool = False
) -> tuple[str | Chat, str]:
    """The prompt of a row and the response in a column: texts, or messages whose last is the
    response."""
    messages = whole_conversation(row, key, where, asked=asked, may_be_empty=may_be_empty)
    if messages is None:
        response = text(row, key, where, may_be_empty=may_be_empty)
        return prompt_of(row, where, asked=asked), response
    before, answer = split_answer(messages, key, where)
    return chat(row, before, where), answer


def turns_of(
    row: dict, key: str, where: str, *, asked: str = "prompt", may_be_empty: bool = False
) -> tuple[str | Chat, str]:
    """The prompt of a row and all turns of the assistant in a column."""
    return _split([(row, key, where)], asked, all_turns=True, may_be_empty=may_be_empty)[0]


def response_of(row: dict, key: str, where: str) -> str:
    """A response: text, or the content of the last message."""
    return conversation_of(row, key, where)[1]


def check_pair(row: dict, where: str) -> str | Chat:
    """The prompt of a pair: text, or the messages that both conversations share. Raises Skip where
    its responses are the same."""
    prompt, chosen, rejected = pair_of(row, where)
    if chosen == rejected:
        raise Skip("chosen and rejected identical")
    return prompt


def pair_of(
    row: dict,
    where: str,
    *,
    all_turns: bool = False,
    keys: tuple[str, str] = ("chosen", "rejected"),
    asked: str = "prompt",
) -> tuple[str | Chat, str, str]:
    """Prompt, chosen and rejected response of a row. all_turns: the responses are all turns from
    the first of the assistant's in which the two conversations differ."""
    names = " and ".join(keys)
    if row.get(asked) is None:
        of_chosen, of_rejected = (len(messages_of(row, key, where) or "ab") for key in keys)
        if of_rejected == 1 < of_chosen:
            raise Skip(f"{names} have different prompts")
    both = _split([(row, key, where) for key in keys], asked, all_turns=all_turns)
    prompt = _shared_prompt([prompt for prompt, _ in both], names, where, all_turns=all_turns)
    return prompt, both[0][1], both[1][1]


def list_of(
    responses: list[tuple[dict, str]],
    key: str,
    where: str,
    *,
    asked: str = "prompt",
    all_turns: bool = False,
) -> tuple[str | Chat, list[str]]:
    """The prompt that several responses share, and the responses, of which some may be empty.

    responses: rows with one response each, in the column `key`, and their places. all_turns: as of
    `pair_of`. Raises Skip where the conversations share no prompt.
    """
    rows = [(row, key, place) for row, place in responses]
    both = _split(rows, asked, all_turns=all_turns, may_be_empty=True)
    prompts, texts = ([one[part] for one in both] for part in (0, 1))
    return _shared_prompt(prompts, "responses", where, all_turns=all_turns), texts


def _split(
    rows: list[tuple[dict, str, str]], asked: str, *, all_turns: bool, may_be_empty: bool = False
) -> list[tuple[str | Chat, str]]:
    """Prompt and response of each (row, column of the response, place). all_turns: a prompt ends
    where the conversations differ; of a single one it ends before the assistant's first turn."""
    options = {"asked": asked, "may_be_empty": may_be_empty}
    wholes = []
    if all_turns:
        wholes = [whole_conversation(*row, **options) for row in rows]
    if not all_turns or None in wholes:
        return [conversation_of(*row, **options) for row in rows]
    both = []
    for i, (row, key, where) in enumerate(rows):
        turns = split_turns(wholes[i], wholes[:i] + wholes[i + 1 :], key, where)
        if turns is None:
            names = "chosen and rejected" if len({key for _, key, _ in rows}) > 1 else "responses"
            raise Skip(f"{names} have different prompts")
        both.append((chat(row, turns[0], where), turns[1]))
    return both


def _shared_prompt(
    prompts: list[str | Chat], names: str, where: str, *, all_turns: bool
) -> str | Chat:
    """The prompt that all responses have. Raises Skip where they differ, and DataError where only
    some are conversations."""
    prompt = prompts[0]
    if len(set(map(type, prompts))) > 1:
        raise DataError(
            f"{where}: of {names}, one is text and the other one messages; write all the same way"
        )
    if len({one if isinstance(one, str) else one.key() for one in prompts}) > 1:
        earlier = isinstance(prompt, Chat) and not all_turns
        hint = " (train_on=assistant learns from earlier turns too)" if earlier else ""
        raise Skip(f"{names} have different prompts{hint}")
    return prompt
