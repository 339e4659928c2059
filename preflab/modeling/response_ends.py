"""Where a response ends: at an end token, or at an end of a turn that is plain text."""

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from preflab.batching.turn_ends import TurnEnd, end_of_turn, known_turn_end
from utils import ConfigError


@dataclass(frozen=True)
class ResponseEnds:
    """What ends a response of a model.

    tokens: ids, each of which ends it. turn: the end of a turn in the chat template where that is
    text, such as `</turn>`, which the tokenizer may write in any number of tokens; else None.
    """

    tokens: tuple[int, ...]
    turn: TurnEnd | None = None
    tokenizer: Any = field(default=None, repr=False)

    def ended(self, response: list[int]) -> bool:
        """Whether a response has its end, instead of being cut at `max_new_tokens`."""
        return bool(response) and (response[-1] in self.tokens or self.by_text(response))

    def by_text(self, response: list[int]) -> bool:
        """Whether the last token of a response completes an end that is text."""
        return self.turn is not None and self.turn.completes(self.tokenizer, response)

    def cut(self, response: list[int]) -> list[int]:
        """The tokens up to the first end, which is included."""
        for i, token in enumerate(response):
            if token in self.tokens or self.by_text(response[: i + 1]):
                return response[: i + 1]
        return response


def response_ends(tokenizer, model: nn.Module) -> ResponseEnds:
    """What ends a response: the tokenizer's EOS, the tokens of the model's generation config (of
    its config where that has none), and the end of a turn in the chat template.

    A chat model often has several, for example one that ends a turn and one that ends a text.
    model: the transformers model, without a wrapper.
    """
    own = _ids(model.generation_config.eos_token_id)
    if not own and tokenizer.eos_token_id in (ids := _ids(model.config.eos_token_id)):
        own = ids  # a generation config that has none; that of a config may be a class's default
    ends = [tokenizer.eos_token_id, *own, end_of_turn(tokenizer)]
    tokens = tuple(dict.fromkeys(token for token in ends if token is not None))
    turn = known_turn_end(tokenizer)
    if turn is None or turn.token is not None or not turn.text:
        return ResponseEnds(tokens)
    return ResponseEnds(tokens, turn, tokenizer)


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    ids = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(one, int) and not isinstance(one, bool) for one in ids):
        raise ConfigError(
            f"the model's generation_config.json or config.json has eos_token_id={value!r};"
            " expected the id of a token, or a list of ids; correct the file"
        )
    return ids
