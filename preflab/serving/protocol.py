"""Requests for a response, and what servers answer: token ids where they give them, else text that
is tokenised here.

The fields are those of the completions of vLLM (entrypoints/openai/completion/protocol.py), SGLang
(srt/entrypoints/openai/protocol.py) and transformers (cli/serving/completion.py).
"""

import functools
import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

from preflab.modeling.response_ends import ResponseEnds

FINISHED = ("stop", "length")


class WrongAnswerError(ValueError):
    """An answer that is no response to what was asked; another attempt would give the same."""


@dataclass(frozen=True)
class Limits:
    """How responses are drawn. temperature 0 is greedy; None turns top_k or min_p off."""

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    min_p: float | None = None


@dataclass(frozen=True)
class Completion:
    """A response in token ids, with its end token if it ended, and the server's log-prob of each of
    them, where it gave those."""

    tokens: list[int]
    logps: list[float] | None


@dataclass(frozen=True)
class Protocol:
    """What a server of one type is asked, by a tokenizer and the ends of the responses.

    takes_ids: prompts are token ids, and the answer may have those of the response and their
    log-probs. Else both are text.
    """

    takes_ids: bool
    tokenizer: Any
    ends: ResponseEnds

    def body(self, model: str | None, prompt: list[int], limits: Limits, seed: int) -> dict:
        """The request for one response to a prompt of token ids. Raises WrongAnswerError for a
        prompt that no text stands for.

        Everything that chooses tokens is said: servers take what is missing from the model's
        generation config.
        """
        named = {} if model is None else {"model": model}
        asked = {
            "max_tokens": limits.max_new_tokens,
            "temperature": limits.temperature,
            "top_p": limits.top_p,
            "seed": seed,
        }
        if self.takes_ids:
            return named | {"prompt": prompt, "n": 1} | asked | self._extras(limits)
        config = json.dumps(self._generation_config(limits), sort_keys=True)
        text = {"prompt": self._as_text(prompt), "stream": True}
        return named | text | {"generation_config": config} | asked

    def _extras(self, limits: Limits) -> dict:
        """Fields that vLLM and SGLang have beside those of OpenAI; each ignores those of the
        other."""
        return {
            "top_k": limits.top_k or -1,
            "min_p": limits.min_p or 0.0,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "stop_token_ids": list(self.ends.tokens),
            "stop": [self.ends.turn.text] if self.ends.turn else [],
            "include_stop_str_in_output": True,  # vLLM
            "no_stop_trim": True,  # SGLang
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # vLLM before it had return_token_ids
            "logprobs": 0,  # of the sampled tokens alone
        }

    def _generation_config(self, limits: Limits) -> dict:
        """What `transformers serve` samples by: it takes the rest of a request from the model's
        own generation config, where sampling is off."""
        return {
            "do_sample": limits.temperature > 0,
            "num_beams": 1,
            "top_k": limits.top_k or 0,
            "min_p": limits.min_p or 0.0,
            "typical_p": 1.0,
            "repetition_penalty": 1.0,
            "eos_token_id": list(self.ends.tokens),
            "pad_token_id": self.tokenizer.pad_token_id,
        }

    def _as_text(self, prompt: list[int]) -> str:
        """The text that a server's tokenizer turns into these ids."""
        text = self.tokenizer.decode(prompt, skip_special_tokens=False)
        bos = self.tokenizer.bos_token
        for candidate in (text, text.removeprefix(bos) if bos else text):
            if self.tokenizer(candidate)["input_ids"] == prompt:
                return candidate
        raise WrongAnswerError(
            f"the prompt {text[:60]!r} has other token ids here than its text has in the tokenizer,"
            " and this server takes text; use one that takes token ids, such as vLLM"
        )

    def check_ends(self) -> None:
        """Raise WrongAnswerError where the text of a response would not say by what it ended."""
        if not self.takes_ids and (len(self.ends.tokens) != 1 or self.ends.turn is not None):
            ends = self.tokenizer.convert_ids_to_tokens(list(self.ends.tokens))
            ends += [self.ends.turn.text] if self.ends.turn else []
            raise WrongAnswerError(
                f"a response may end with any of {', '.join(ends)}, and this server's text does not"
                " say with which; use one that gives token ids, such as vLLM"
            )

    def read(self, answer: Any, prompt: list[int], limits: Limits) -> Completion:
        """The response of an answer, checked against what was asked. Raises WrongAnswerError."""
        try:
            choices, usage = answer["choices"], answer["usage"]
            if len(choices) != 1:
                raise WrongAnswerError(f"{len(choices)} choices, and one was asked for")
            [choice] = choices
            reason, n_read = choice["finish_reason"], usage["prompt_tokens"]
            tokens = self._tokens(choice, usage)
        except WrongAnswerError:
            raise
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise WrongAnswerError(
                f"no completion ({type(error).__name__}: {error}); expected choices with a text and"
                " a finish_reason, and usage"
            ) from error
        if reason not in FINISHED:
            raise WrongAnswerError(f"finish_reason {reason!r}; accepted: {', '.join(FINISHED)}")
        if n_read != len(prompt) or choice.get("prompt_token_ids") not in (None, prompt):
            raise WrongAnswerError(
                f"it read the prompt as {n_read} tokens, and here it has {len(prompt)} (or others):"
                " it has another tokenizer"
            )
        self._check_end(tokens, reason, limits)
        logps = _logps(choice, len(tokens))
        cut = self.ends.cut(tokens)
        return Completion(cut, None if logps is None else logps[: len(cut)])

    def _tokens(self, choice: dict, usage: dict) -> list[int]:
        """The ids of a response, with that of its end."""
        ids = choice.get("token_ids")
        if ids is None:
            ids = _ids_of_logprobs(choice)
        if ids is None:
            return self._tokenised(choice, usage["completion_tokens"])
        if not all(type(i) is int and 0 <= i < len(self.tokenizer) for i in ids):  # True is none
            raise WrongAnswerError("token ids that the tokenizer does not have")
        stop = choice.get("stop_reason", choice.get("matched_stop"))
        if choice["finish_reason"] == "stop" and stop in self.ends.tokens:
            return list(ids) if ids and ids[-1] == stop else [*ids, stop]
        return list(ids)

    def _tokenised(self, choice: dict, n_tokens: int) -> list[int]:
        """The ids of a response that came as text, in pieces of one token if it was streamed. They
        are those that were sampled only if there are as many, and if they are the text again."""
        text, pieces = choice["text"], choice.get("pieces") or [None]
        plain = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        for ids in ([self._id_of_piece.get(piece) for piece in pieces], plain):
            # An end has no text; at the last token that was allowed, the reason is the length.
            if len(ids) == n_tokens - 1 and len(self.ends.tokens) == 1:
                ids = [*ids, self.ends.tokens[0]]
            if len(ids) != n_tokens or None in ids:
                continue
            if self.tokenizer.decode(ids, skip_special_tokens=not self.takes_ids) == text:
                return ids
        raise WrongAnswerError(
            f"a response of {n_tokens} tokens as text, which has {len(plain)} here: its token ids"
            " are not known; use a server that gives them, such as vLLM from 0.10.2 on"
        )

    @functools.cached_property
    def _id_of_piece(self) -> dict[str | None, int]:
        """The id of each text that one token alone stands for."""
        special = set(self.tokenizer.all_special_ids)
        ids = [i for i in range(len(self.tokenizer)) if i not in special]
        texts = self.tokenizer.batch_decode([[i] for i in ids])
        counts = Counter(texts)
        return {text: i for text, i in zip(texts, ids, strict=True) if counts[text] == 1}

    def _check_end(self, tokens: list[int], reason: str, limits: Limits) -> None:
        n, most = len(tokens), limits.max_new_tokens
        if n > most or (reason == "length" and n != most):
            raise WrongAnswerError(
                f"a response of {n} tokens that ended by {reason}, and max_tokens is {most}; the"
                " server's context must hold max_length tokens"
            )
        if reason == "stop" and not self.ends.ended(self.ends.cut(tokens)):
            raise WrongAnswerError(
                "a response that stopped without an end token of the model here: the server stops"
                " at others"
            )


def _ids_of_logprobs(choice: dict) -> list[int] | None:
    """The ids in tokens that are written as token_id:NUMBER."""
    tokens = (choice.get("logprobs") or {}).get("tokens") or []
    numbers = [token.removeprefix("token_id:") for token in tokens]
    is_number = [t != n and n.isdigit() for t, n in zip(tokens, numbers, strict=True)]
    return [int(number) for number in numbers] if tokens and all(is_number) else None


def _logps(choice: dict, n_tokens: int) -> list[float] | None:
    """The log-probs of the tokens; an end that the server left out has none."""
    logps = choice.get("logprobs")
    if isinstance(logps, dict):
        logps = logps.get("token_logprobs")
    if logps is None:
        return None
    if not isinstance(logps, list):
        raise WrongAnswerError(f"log-probs that are no list: {str(logps)[:60]}")
    numbers = [value for value in logps if type(value) in (float, int)]
    if n_tokens - len(numbers) not in (0, 1) or len(numbers) != len(logps):
        raise WrongAnswerError(f"{len(numbers)} log-probs of {n_tokens} tokens")
    return list(logps)
