"""How a chat template begins and ends an assistant's turn."""

from dataclasses import dataclass

from preflab.batching.chat_template import chat_settings, render, writes_date
from preflab.readers.messages import Chat
from utils import DataError

# Stands for an answer where the end of a turn is looked up; templates that trim leave it as it is.
ANSWER = "qzxvanswervxzq"


@dataclass(frozen=True)
class TurnEnd:
    """How a template ends an assistant's turn.

    suffix: all that it writes after the last answer. text: the part up to the first special token,
    which is scored; all but trailing white space where there is no special token. token: the id of
    that special token; None where there is none, and EOS follows in training. Samples then end with
    the text, or with EOS.
    """

    suffix: str
    text: str
    token: int | None

    def completes(self, tokenizer, tokens: list[int]) -> bool:
        """Whether the last token of a response completes an end that is plain text. It may hold
        further characters, which the tokenizer joins with the end."""
        if self.token is not None or not self.text:
            return False
        # A token is at least a byte long; a few more keep what decoding does at its begin apart.
        tail = tokens[-len(self.text.encode()) - 4 :]
        before, now = (
            tokenizer.decode(part, skip_special_tokens=True) for part in (tail[:-1], tail)
        )
        return self.text in now and self.text not in before


def turn_end(tokenizer) -> TurnEnd:
    """The end of an assistant's turn in the tokenizer's chat template."""
    key = str((tokenizer.chat_template, chat_settings(tokenizer)))
    known = getattr(tokenizer, "preflab_turn_end", None)
    if known is None or known[0] != key:
        known = tokenizer.preflab_turn_end = (key, _find_turn_end(tokenizer))
    return known[1]


def _find_turn_end(tokenizer) -> TurnEnd:
    question, answer = (
        {"role": role, "content": content}
        for role, content in (("user", "question"), ("assistant", ANSWER))
    )
    where = "model.tokenizer_name_or_path"
    try:
        whole = render(tokenizer, Chat([question, answer]), generation_prompt=False, where=where)
    except DataError:  # a template may ask for a system message
        asked = [{"role": "system", "content": "system"}, question, answer]
        whole = render(tokenizer, Chat(asked), generation_prompt=False, where=where)
    _, found, suffix = whole.rpartition(ANSWER)
    if not found:
        raise DataError(
            f"{where}={tokenizer.name_or_path}: its chat template does not write the assistant's"
            " answer; give a template that does"
        )
    special = {
        token.content: number for number, token in tokenizer.added_tokens_decoder.items()
    } | {tokenizer.eos_token: tokenizer.eos_token_id}
    places = [
        (suffix.find(content), -len(content), content)
        for content in special
        if content.strip() and content in suffix
    ]
    if not places:
        return TurnEnd(suffix, suffix.rstrip(), None)
    place, _, content = min(places)
    return TurnEnd(suffix, suffix[: place + len(content)], special[content])


def _question(tokenizer, options: dict, *, generation_prompt: bool) -> str:
    """A conversation of one message, as the template writes it."""
    chat = Chat([{"role": "user", "content": "question"}], options=options)
    where = "model.tokenizer_name_or_path"
    return render(tokenizer, chat, generation_prompt=generation_prompt, where=where)


def check_room(tokenizer, chat: Chat | str, max_prompt_length: int, where: str) -> None:
    """Raise DataError, at `where`, if a conversation that is cut to `max_prompt_length` tokens
    could lose BOS or what the template writes before an answer. Text may be cut to any length."""
    if isinstance(chat, str):
        return
    known = tokenizer.__dict__.setdefault("preflab_turn_begins", {})
    key = str((tokenizer.chat_template, chat_settings(tokenizer), chat.options))
    if key not in known:
        known[key] = _turn_begin(tokenizer, chat.options)
    n, text = known[key]
    if max_prompt_length < n:
        raise DataError(
            f"{where}: max_prompt_length={max_prompt_length} does not hold what the chat template"
            f" writes before an answer, {text!r}, which with BOS takes {n} tokens; set it to the"
            " length of your prompts, at least to that"
        )


def _turn_begin(tokenizer, options: dict) -> tuple[int, str]:
    """What the template writes before an answer, and its tokens, with BOS where it begins with
    it."""
    try:
        asked, plain = (
            _question(tokenizer, options, generation_prompt=asks) for asks in (True, False)
        )
    except DataError:  # a template for other conversations than of a question
        return 0, ""
    pairs = zip(asked, plain, strict=False)
    shared = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(asked), len(plain)))
    text = asked[shared:]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] if text else []
    bos = tokenizer.bos_token
    return len(ids) + bool(bos and asked.startswith(bos)), text


def describe_chat(tokenizer) -> str:
    """How conversations become tokens here, in a line."""
    turn, settings = turn_end(tokenizer), chat_settings(tokenizer)
    end = repr(turn.text) if turn.token is not None else f"{turn.text!r} and EOS"
    parts = [f"the assistant's turn ends with {end}, which the loss counts"]
    if after := turn.suffix[len(turn.text) :]:
        parts.append(f"{after!r} after it is left out")
    begins = _question(tokenizer, {}, generation_prompt=True)
    bos = tokenizer.bos_token
    parts.append(f"BOS {begins.count(bos) if bos else 0} times in a prompt of one message")
    if writes_date(tokenizer):
        parts.append(f"the template writes a date, chat_date={settings.date}")
    return "; ".join(parts)


def end_of_turn(tokenizer) -> int | None:
    """The id of the special token that ends a turn; None without a template, or without one."""
    turn = known_turn_end(tokenizer)
    return turn.token if turn else None


def known_turn_end(tokenizer) -> TurnEnd | None:
    """The end of a turn; None without a template, or where it cannot be found."""
    if not tokenizer.chat_template:
        return None
    try:
        return turn_end(tokenizer)
    except DataError:  # a template for other conversations than of a question and an answer
        return None
