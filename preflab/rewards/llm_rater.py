"""Ratings of a response by an LLM behind an OpenAI-compatible endpoint."""

import re
from pathlib import Path

from preflab.batching.chat import transcript
from preflab.rewards.registry import RewardError, Score, register_reward

QUESTION = (
    "Below are an instruction and a response to it. Rate the response twice, each time from 1 to 5."
    "\n\nInstruction following: does it do what is asked, within the limits that are set?"
    " 1: it has nothing to do with the task;"
    "\n2: it takes up a part, and poorly; 3: it meets the goal or the limits, not both;"
    " 4: it is close, with small deviations; 5: it does all of it."
    "\n\nHelpfulness: is it correct, clear and informative, without needless length?"
    " 1: mostly wrong or made up; 2: wrong in parts that matter;"
    "\n3: correct and useful; 4: correct, with much that is useful;"
    " 5: correct, thorough and of great use."
    "\n\nInstruction:\n{prompt}"
    "\n\nResponse:\n{response}"
    "\n\nAnswer with these two lines and nothing else, with a whole number in place of each N:"
    "\nInstruction following: N"
    "\nHelpfulness: N"
)


@register_reward("ultrafeedbackgold", paid=True)
def ultrafeedbackgold(
    *,
    base_url: str,
    model: str,
    cache: str,
    key_env: str = "OPENAI_API_KEY",
    max_requests: int = 1000,
    concurrency: int = 8,
    timeout: float = 60.0,
    retries: int = 4,
    body: dict | None = None,
) -> Score:
    """The mean of two ratings from 1 to 5, for instruction following and for helpfulness, by a
    language model behind an endpoint.

    After UltraFeedback (arXiv:2310.01377), where a rater sees several responses at once; here it
    sees each response alone, in one request, so that a score does not depend on what else is
    scored, and can be cached. The prompt is read too, of a conversation all messages and the tools;
    an empty response is rated like any other.
    The settings are those of `llm_client.Endpoint`. Raises RewardError where a response did not get
    both ratings.
    """
    from preflab.rewards.llm_client import Endpoint, EndpointError

    endpoint = Endpoint(
        base_url,
        model,
        cache=Path(cache),
        key_env=key_env,
        max_requests=max_requests,
        concurrency=concurrency,
        timeout=timeout,
        retries=retries,
        body=body,
    )

    def score(prompts: list[str], responses: list[str]) -> list[float]:
        questions = [
            [{"role": "user", "content": _rating_question(prompt, response)}]
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        try:
            result = endpoint.ask(questions, read_ratings, "rate")
        except EndpointError as error:
            raise RewardError(f"reward.base_url: {error}") from error
        if missing := result.answers.count(None):
            counts = {
                "answers without both ratings": result.unreadable,
                "not sent because of max_requests": result.unsent,
                "failed": result.failed,
            }
            reasons = [f"{reason} {n}" for reason, n in counts.items() if n] + result.errors[-1:]
            raise RewardError(
                f"reward.base_url={base_url}: no ratings for {missing} of {len(responses)}"
                f" responses ({', '.join(reasons)}); the other ratings are cached in {cache}"
            )
        return [sum(ratings) / 2 for ratings in result.answers]

    return score


def _rating_question(prompt: str, response: str) -> str:
    texts = {"{prompt}": transcript(prompt), "{response}": response}
    return re.sub(r"\{(?:prompt|response)\}", lambda slot: texts[slot[0]], QUESTION)


def read_ratings(answer: str) -> tuple[int, int] | None:
    """The two whole numbers from 1 to 5 of an answer; None where one is missing, is another number,
    or is given twice with different values."""
    ratings = []
    for aspect in ("instruction[ _]following", "helpfulness"):
        pattern = rf"{aspect}(?:\W|rating)*?([1-5])(?:/5)?(?![\d.,/-]*\d)"
        values = set(re.findall(pattern, answer, re.IGNORECASE))
        if len(values) != 1:
            return None
        ratings.append(int(*values))
    return tuple(ratings)
