"""Weights of response tokens that came with the data, fitted to the tokens of a response."""

from collections.abc import Sequence

from preflab.readers.messages import Unended
from preflab.readers.records import Record
from utils import DataError


def whole_lengths(record: Record, responses: list[list[int]]) -> list[int]:
    """Tokens of each response of a record with its end, before it is cut. responses: their ids as
    tokenised, without the EOS that text gets."""
    text = isinstance(record.prompt, str)
    return [
        len(ids) + (text and not isinstance(response, Unended))
        for ids, response in zip(responses, record.responses, strict=True)
    ]


def fit_weights(weights: Sequence[float], whole: int, kept: int, where: str) -> list[float]:
    """The weights of the tokens that are kept of a response.

    whole, kept: tokens of the response, its end included, before and after it is cut to
    max_length; the weights are those of either. Raises DataError for another number of weights.
    """
    if len(weights) not in (whole, kept):
        cut = f", {kept} of which fit into max_length" if kept < whole else ""
        raise DataError(
            f"{where}: {len(weights)} token weights for a response of {whole} tokens, its end"
            f" included{cut}; they belong to the tokens of one tokenizer and chat template: write"
            " them again with those of this run (scripts/token_weights.py)"
        )
    return list(weights[:kept])
