"""The labels bought from an oracle. They are on disk before anything learns from them."""

import json
import math
import os
from pathlib import Path

from preflab.batching.chat import prompt_columns, prompt_of_columns
from preflab.distributed.process_group import ALONE, World
from preflab.online.rollouts import Rollouts
from preflab.rewards.registry import RewardError, Score
from utils import DataError, PrefLabError, drop_incomplete_line

# The columns of a line in the ledger.
COLUMNS = {"round", "key", "prompt", "prompt_tokens", "responses", "tokens", "scores", "cost"}


def price(k: int, oracle: str, *, ranks: bool = False) -> int:
    """The labels that an oracle gives for K responses of a prompt.

    oracle: "scores" gives a score for each. "comparisons" says which of two is better: the best and
    the worst of K are found by ceil(3K/2) - 2 of them at most, and no method needs fewer. ranks:
    put all K in order, for which merge insertion (Ford and Johnson, 1959) needs the sum over i <= K
    of ceil(log2(3i/4)) at most.
    """
    if oracle == "scores":
        return k
    if ranks:
        return sum(math.ceil(math.log2(3 * i / 4)) for i in range(2, k + 1))
    return -(-3 * k // 2) - 2


def score_shared(
    world: World, score: Score, prompts: list[str], responses: list[str]
) -> list[float]:
    """`score(prompts, responses)`, (n,), with each rank scoring a part of the texts.

    All ranks raise RewardError if one rank fails.
    """
    try:
        mine, error = score(world.share(prompts), world.share(responses)), ""
    except PrefLabError as failure:
        mine, error = [], str(failure)
    if errors := [message for message in world.gather([error]) if message]:
        raise _everywhere(RewardError(errors[0]))
    return world.gather(mine)


def on_rank_0(world: World, function):
    """The result of `function()`, called on rank 0, on all ranks. They raise RewardError if it
    fails."""

    def attempt():
        try:
            return function(), None
        except PrefLabError as failure:
            return None, str(failure)

    result, error = world.agree(attempt)
    if error is not None:
        raise _everywhere(RewardError(error))
    return result


def _everywhere(error: PrefLabError) -> PrefLabError:
    """Mark an error that all ranks raise."""
    error.everywhere = True
    return error


class Ledger:
    """All bought gold labels, those of some responses to a prompt a line in `labels.jsonl`.

    A line holds the prompt (and its messages, where it is a conversation), the responses (text and
    tokens), their scores, the round, and `cost`, the number of labels it took. It is on disk before
    anything learns from it, and is never bought again: a resumed run reads what was bought after
    its checkpoint.

    budget: the number of labels that may be bought; None for any number. oracle: what a label is,
    see `price`.
    """

    def __init__(
        self, path: Path, budget: int | None, world: World = ALONE, oracle: str = "comparisons"
    ):
        self.path, self.budget, self.world, self.oracle = path, budget, world, oracle
        self.rows: list[dict] = world.agree(lambda: _read_ledger(path))

    @property
    def bought(self) -> int:
        """The number of labels bought so far."""
        return sum(row["cost"] for row in self.rows)

    def bought_until(self, number: int) -> int:
        """The labels bought in round `number` and before."""
        return sum(row["cost"] for row in self.rows if row["round"] <= number)

    def must_have(self, lines: int) -> None:
        """Raise DataError if there are fewer lines than at a checkpoint.

        The missing labels would be paid for twice.
        """
        if len(self.rows) < lines:
            raise DataError(
                f"{self.path} has {len(self.rows)} bought labels, and there were {lines} at the"
                " checkpoint; restore the file, or start in another folder"
            )

    def price(self, k: int, *, ranks: bool = False) -> int:
        """The labels that K responses of a prompt take; ranks: all in order, not only the best and
        the worst."""
        return price(k, self.oracle, ranks=ranks)

    def affords(self, cost: int) -> int | None:
        """How many more lines of this cost fit into the budget; None for any number."""
        return None if self.budget is None else max(0, self.budget - self.bought) // cost

    def of_round(self, number: int) -> list[dict]:
        """The lines of round `number`."""
        return [row for row in self.rows if row["round"] == number]

    def buy(self, rows: list[dict], score: Score, *, ranks: bool = False) -> list[dict]:
        """Score the responses of `rows` with the gold reward, and write them to the ledger.

        rows: as `ledger_row` returns them, all with the same number of responses. ranks: as in
        `price`. Returns them with
        their `scores` and `cost`. Raises RewardError, without buying anything, if the gold reward
        fails or the budget is too small.
        """
        if not rows:
            return []
        cost = self.price(len(rows[0]["responses"]), ranks=ranks)
        room = self.affords(cost)
        if room is not None and len(rows) > room:
            raise RewardError(
                f"{len(rows)} comparisons were to be labelled and the budget has room for {room}"
            )
        scores = on_rank_0(self.world, lambda: self._purchase(rows, score, cost))
        bought = _with_scores(rows, scores, cost)
        self.rows += bought
        return bought

    def _purchase(self, rows: list[dict], score: Score, cost: int) -> list[list[float]]:
        """Score the responses, (rows, K), write the lines to disk, and return the scores."""
        prompts = [row["prompt"] for row in rows for _ in row["responses"]]
        responses = [response for row in rows for response in row["responses"]]
        flat = iter(score(prompts, responses))
        scores = [[next(flat) for _ in row["responses"]] for row in rows]
        bought = _with_scores(rows, scores, cost)
        with open(self.path, "a", encoding="utf-8") as f:
            f.writelines(_line(row) for row in bought)
            f.flush()
            os.fsync(f.fileno())
        return scores


def _with_scores(rows: list[dict], scores: list[list[float]], cost: int) -> list[dict]:
    return [
        row | {"scores": of_row, "cost": cost} for row, of_row in zip(rows, scores, strict=True)
    ]


def _read_ledger(path: Path) -> list[dict]:
    """The lines of the file. A last line without a newline, cut short by a kill, is removed.

    Raises DataError for any other line that is no bought label.
    """
    drop_incomplete_line(path)
    rows = []
    whole = path.read_bytes() if path.is_file() else b""
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
        except ValueError as error:  # of JSON, or of UTF-8
            raise _damaged(path, number, f"the line is not JSON ({error})") from error
        if problem := _problem(row):
            raise _damaged(path, number, problem)
        rows.append(row | {"prompt": prompt_of_columns(row)})
    return rows


def _line(row: dict) -> str:
    """A row as a line of the file, a prompt that is a conversation with its messages."""
    return json.dumps(row | prompt_columns(row["prompt"]), ensure_ascii=False) + "\n"


def _damaged(path: Path, number: int, problem: str) -> DataError:
    return DataError(
        f"{path}:{number}: expected a bought label, with {', '.join(sorted(COLUMNS))}, but"
        f" {problem}; restore the file, because the labels in it were paid for"
    )


def _problem(row) -> str | None:
    """What is wrong with a line of the ledger; None if nothing is."""
    if not isinstance(row, dict):
        return f"the line is {json.dumps(row)[:80]}"
    if missing := sorted(COLUMNS - row.keys()):
        return f"the line has no {', '.join(missing)}"
    for column, minimum in (("round", 0), ("cost", 1)):
        value = row[column]
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            return f"{column} is {value!r} (accepted: whole numbers from {minimum})"
    lists = [row[column] for column in ("responses", "scores", "tokens")]
    if not all(isinstance(values, list) for values in lists) or len({*map(len, lists)}) > 1:
        return "responses, scores and tokens are not lists of the same length"
    if not all(_is_finite_number(score) for score in row["scores"]):
        return f"scores are {row['scores']} (accepted: finite numbers)"
    return None


def _is_finite_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def ledger_row(rollouts: Rollouts, i: int, members: tuple[int, ...]) -> dict:
    """The columns of a ledger line before it is bought: it compares responses `members` of prompt
    `i`."""
    return {
        "round": rollouts.round,
        "key": rollouts.keys[i],
        "prompt": rollouts.prompts[i],
        "prompt_tokens": rollouts.prompt_tokens[i],
        "responses": [rollouts.responses[i][m] for m in members],
        "tokens": [rollouts.tokens[i][m] for m in members],
    }
