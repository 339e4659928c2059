"""BOS, EOS and the cuts that make a prompt and its responses fit into max_length."""

from collections.abc import Sequence


def truncate(
    prompt: list[int],
    responses: list[list[int]],
    tokenizer,
    truncation: str,
    max_length: int,
    max_prompt_length: int,
    *,
    chat: bool = False,
    unended: Sequence[bool] | None = None,
) -> tuple[list[int], list[list[int]], tuple[bool, list[bool]]]:
    """Add BOS and EOS and cut to length. All responses of a prompt share one truncation of it.

    chat: the ids are those of a conversation, which has what begins and ends it; its prompt keeps
    BOS and its end, with what the template writes before an answer. unended: which responses were
    cut before they came here, none by default.

    The prompt is cut to max_prompt_length only when it and the longest response do not fit into
    max_length; then each response is cut to the remaining length. A response that was cut has no
    end. Returns prompt, responses, (prompt was cut, [response was cut]).
    """
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ended = [not cut for cut in unended or [False] * len(responses)]
    if chat:
        truncation = "keep_end"
        bos = bos if prompt[:1] == bos else []
        prompt = prompt[len(bos) :]
    else:
        eos = [tokenizer.eos_token_id]
        responses = [
            response + (eos if ends else [])
            for response, ends in zip(responses, ended, strict=True)
        ]
    longest = max(map(len, responses))
    prompt_cut = False
    if len(bos) + len(prompt) + longest > max_length:
        whole, prompt = prompt, cut_prompt(prompt, max_prompt_length - len(bos), truncation)
        prompt_cut = len(prompt) < len(whole)
    prompt = [*bos, *prompt]
    room = max_length - len(prompt)
    cuts = [
        len(response) > room or not ends for response, ends in zip(responses, ended, strict=True)
    ]
    return prompt, [response[:room] for response in responses], (prompt_cut, cuts)


def prompt_to_ask(
    prompt: list[int], limit: int, truncation: str, bos: int | None, *, chat: bool
) -> list[int]:
    """At most `limit` tokens of a prompt, which begins with BOS if there is one, to sample behind.
    BOS stays where the end is kept, and of a conversation the end always is. bos: its id."""
    if len(prompt) <= limit:
        return prompt
    truncation = "keep_end" if chat else truncation
    head = 1 if truncation == "keep_end" and prompt[0] == bos else 0
    return [*prompt[:head], *cut_prompt(prompt[head:], limit - head, truncation)]


def cut_prompt(prompt, limit: int, truncation: str):
    """At most `limit` tokens of the prompt: its start ("keep_start") or its end ("keep_end")."""
    if len(prompt) <= limit:
        return prompt
    return prompt[:limit] if truncation == "keep_start" else prompt[len(prompt) - limit :]
