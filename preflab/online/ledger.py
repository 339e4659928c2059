"""What was bought of an oracle: on the disk before anything learns from it."""

import json
import os
from pathlib import Path

from preflab.distributed.process_group import ALONE, World
from preflab.online.rollouts import Rollouts
from preflab.rewards.registry import RewardError, Score
from utils import DataError, PrefLabError

LINE = {
    "round",
    "key",
    "prompt",
    "prompt_tokens",
    "responses",
    "tokens",
    "scores",
    "cost",
}  # of the ledger


def score_shared(
    world: World, score: Score, prompts: list[str], responses: list[str]
) -> list[float]:
    """`score(prompts, responses)`, a part on each rank; where it fails on one, all raise."""
    try:
        mine, error = score(world.share(prompts), world.share(responses)), ""
    except PrefLabError as failure:
        mine, error = [], str(failure)
    if failed := [told for told in world.gather([error]) if told]:
        raise _everywhere(RewardError(failed[0]))
    return world.gather(mine)


def on_rank_0(world: World, function):
    """What `function()` returns on rank 0, on all ranks; where it fails, all raise."""

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
    error.everywhere = True
    return error


class Ledger:
    """Every gold label bought, a line each in `labels.jsonl`: on the disk before anything learns
    from it, and never bought again.

    A line holds what was compared (text and tokens), its scores and the round; `cost` is how many
    labels it took. A resumed run finds in it what was bought after its checkpoint.
    """

    def __init__(self, path: Path, budget: int | None, world: World = ALONE):
        self.path, self.budget, self.world = path, budget, world
        self.rows: list[dict] = world.agree(lambda: _read_ledger(path))

    @property
    def bought(self) -> int:
        return sum(row["cost"] for row in self.rows)

    def bought_until(self, number: int) -> int:
        """Labels bought in this round and before."""
        return sum(row["cost"] for row in self.rows if row["round"] <= number)

    def must_have(self, lines: int) -> None:
        """Refuse to go on with less than a checkpoint knew of: what is missing was paid for, and
        would be paid for again."""
        if len(self.rows) < lines:
            raise DataError(
                f"{self.path} has {len(self.rows)} bought labels, and there were {lines} at the"
                " checkpoint; restore the file, or start in another folder"
            )

    def affords(self, cost: int) -> int | None:
        """How many more comparisons of this cost the budget has room for; None for any number."""
        return None if self.budget is None else max(0, self.budget - self.bought) // cost

    def of_round(self, number: int) -> list[dict]:
        return [row for row in self.rows if row["round"] == number]

    def buy(self, wanted: list[dict], score: Score) -> list[dict]:
        """Have the gold score the responses of `wanted`, and write that down; returns the rows with
        their `scores`.

        Raises RewardError where the gold fails, or the budget has no room: nothing is bought then.
        """
        if not wanted:
            return []
        cost = len(wanted[0]["responses"]) - 1
        room = self.affords(cost)
        if room is not None and len(wanted) > room:
            raise RewardError(
                f"{len(wanted)} labels were to be bought and the budget has room for {room}"
            )

        def purchase() -> list[list[float]]:
            flat = score(
                [row["prompt"] for row in wanted for _ in row["responses"]],
                [r for row in wanted for r in row["responses"]],
            )
            scores = iter(flat)
            bought = [[next(scores) for _ in row["responses"]] for row in wanted]
            with open(self.path, "a", encoding="utf-8") as f:
                f.writelines(
                    json.dumps(row | {"scores": s, "cost": cost}, ensure_ascii=False) + "\n"
                    for row, s in zip(wanted, bought)
                )
                f.flush()
                os.fsync(f.fileno())
            return bought

        bought = [
            row | {"scores": s, "cost": cost}
            for row, s in zip(wanted, on_rank_0(self.world, purchase))
        ]
        self.rows += bought
        return bought


def _read_ledger(path: Path) -> list[dict]:
    """The lines there are; a last one that a kill cut short is taken off."""
    content = path.read_bytes() if path.is_file() else b""
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        os.truncate(path, len(whole))
    rows = []
    for number, line in enumerate(whole.decode("utf-8").split("\n")[:-1], 1):
        try:
            rows.append(json.loads(line))
            assert isinstance(rows[-1]["cost"], int) and rows[-1]["cost"] >= 1
            assert LINE <= rows[-1].keys() and len(rows[-1]["responses"]) == len(
                rows[-1]["scores"]
            ) == len(rows[-1]["tokens"])
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError, AssertionError) as error:
            raise DataError(
                f"{path}:{number}: expected a bought label, with {', '.join(sorted(LINE))}; restore"
                " the file, for what it counts was paid for"
            ) from error
    return rows


def ledger_row(rollouts: Rollouts, i: int, members: tuple[int, ...]) -> dict:
    """What a ledger line says of some responses of prompt i."""
    return {
        "round": rollouts.round,
        "key": rollouts.keys[i],
        "prompt": rollouts.prompts[i],
        "prompt_tokens": rollouts.prompt_tokens[i],
        "responses": [rollouts.responses[i][m] for m in members],
        "tokens": [rollouts.tokens[i][m] for m in members],
    }
