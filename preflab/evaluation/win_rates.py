"""Win rates: pairs of responses to the same prompt, judged by a reward, by labels or by an LLM."""

import math
import re
import sys
from collections import defaultdict
from pathlib import Path

from omegaconf import OmegaConf

from preflab.reports.runs import read_jsonl
from preflab.rewards.llm_client import Endpoint
from utils import DataError, atomic_write

QUESTION = """Below are a prompt and two responses to it. Which response is better: the more helpful, correct and fluent one?
Do not let the order or the length of the responses decide.

Prompt:
{prompt}

Response A:
{a}

Response B:
{b}

Answer with one word: A, B, or tie."""


def merge(path: Path, new: list[dict], read, write) -> None:
    """Put rows into a file in place of those of the same comparison."""
    done = {_comparison(row) for row in new}
    rows = [row for row in read(path) if _comparison(row) not in done] + new
    with atomic_write(path) as f:
        f.write(write(rows))


def _comparison(row: dict) -> tuple:
    return row.get("checkpoint"), row.get("temperature"), row["against"], row["by"]


def judged_groups(pairs: list[dict]) -> dict[tuple, list[dict]]:
    groups = defaultdict(list)
    for pair in pairs:
        groups[_comparison(pair)].append(pair)
    return groups


def latest_samples(folder: Path) -> list[dict]:
    """The samples of a run's last evaluation, or all of an evaluation of checkpoints. Raises
    DataError if there are none."""
    rows = read_jsonl(folder / "samples.jsonl")
    if not rows:
        raise DataError(
            f"{folder}: no samples.jsonl with samples there; give a run folder, or one that"
            " function=eval wrote"
        )
    if any("checkpoint" in row for row in rows):
        return rows
    return [row for row in rows if row["examples"] == rows[-1]["examples"]]


def pair_up(rows: list[dict], against: str) -> list[dict]:
    """Each sample with its opponent: {prompt, policy, opponent, ...}."""
    if against in ("reference", "chosen"):
        opponents = [row.get(against) for row in rows]
        rewards = [row.get("reference_reward") if against == "reference" else None for row in rows]
        if all(text is None for text in opponents):
            raise DataError(f"--against {against}: these samples come without it")
    elif Path(against).is_dir():
        others = latest_samples(Path(against))
        theirs = {_place(row): row for row in others}
        if len(theirs) < len(others):
            raise DataError(
                f"--against {against}: several samples there have the same prompt, temperature and"
                " number; give a folder with one checkpoint"
            )
        found = [theirs.get(_place(row)) for row in rows]
        if not any(found):
            raise DataError(
                f"--against {against}: no sample there has the prompt, the temperature and the"
                " number of one here"
            )
        opponents = [other and other["policy"] for other in found]
        rewards = [other and other["policy_reward"] for other in found]
    else:
        raise DataError(
            f"--against {against} is neither reference, nor chosen, nor a folder of samples"
        )
    return [
        {
            "checkpoint": row.get("checkpoint"),
            "temperature": row.get("temperature"),
            "against": against,
            "prompt": row["prompt"],
            "policy": row["policy"],
            "opponent": opponent,
            "rewards": (row.get("policy_reward") or {}, reward or {}),
        }
        for row, opponent, reward in zip(rows, opponents, rewards)
        if opponent is not None
    ]


def _place(row: dict) -> tuple:
    return row["prompt"], row.get("temperature"), row.get("sample", 0)


def by_reward(pairs: list[dict], arguments) -> tuple[list[dict], dict, str]:
    """The higher score wins. Scores are those of samples.jsonl, or computed where a reward is not
    among them."""
    name, *settings = arguments.reward
    given = [pair.pop("rewards") for pair in pairs]
    stored = [not settings and name in ours and name in theirs for ours, theirs in given]
    scores = [(ours.get(name), theirs.get(name)) for ours, theirs in given]
    if missing := [i for i, known in enumerate(stored) if not known]:
        score = _reward_of(arguments.folder, name, settings)
        prompts = [pairs[i]["prompt"] for i in missing]
        for i, *both in zip(
            missing,
            *(score(prompts, [pairs[i][side] for i in missing]) for side in ("policy", "opponent")),
        ):
            scores[i] = tuple(both)
    verdicts = [
        {"verdict": (1 + (a > b) - (a < b)) / 2, "policy_score": a, "opponent_score": b}
        for a, b in scores
    ]
    return verdicts, {}, f"reward {' '.join(arguments.reward)}"


def _reward_of(folder: Path, name: str, settings: list[str]):
    """A reward with the settings given; without any, as the run in the folder had it, else as
    config/reward/ has it."""
    from preflab.rewards.registry import all_rewards, build_reward, reward_settings
    from preflab.settings.run_folder import register_resolvers  # these load torch

    register_resolvers()
    config = (
        OmegaConf.load(folder / "config.yaml")
        if (folder / "config.yaml").is_file() and not settings
        else None
    )
    of_run = (
        all_rewards(config)
        if config is not None and "reward" in config and "more_rewards" in config
        else {}
    )
    return build_reward(
        of_run.get(name)
        or reward_settings(name, OmegaConf.to_container(OmegaConf.from_dotlist(settings)))
    )


def by_labels(pairs: list[dict], arguments) -> tuple[list[dict], dict, str]:
    """A file of somebody's labels; equal texts are a tie, and pairs without a label stay
    unjudged."""
    if arguments.labels is None or not arguments.labels.is_file():
        raise DataError(f"--labels {arguments.labels}: no such file")
    known = {}
    for number, row in enumerate(read_jsonl(arguments.labels), 1):
        if (
            not isinstance(row, dict)
            or not {"prompt", "a", "b"} <= row.keys()
            or row.get("winner") not in ("a", "b", "tie")
        ):
            raise DataError(
                f'{arguments.labels}:{number}: expected {{"prompt", "a", "b", "winner": "a" | "b" |'
                ' "tie"}'
            )
        value = {"a": 1.0, "b": 0.0, "tie": 0.5}[row["winner"]]
        known[row["prompt"], row["a"], row["b"]] = value
        known[row["prompt"], row["b"], row["a"]] = 1 - value
    verdicts = []
    for pair in pairs:
        del pair["rewards"]
        same = 0.5 if pair["policy"] == pair["opponent"] else None
        verdicts.append(
            {"verdict": known.get((pair["prompt"], pair["policy"], pair["opponent"]), same)}
        )
    if all(verdict["verdict"] is None for verdict in verdicts):
        raise DataError(
            f"--labels {arguments.labels}: none of its lines is about a pair of {arguments.folder}"
        )
    return verdicts, {}, f"labels {arguments.labels.name}"


def by_llm(pairs: list[dict], arguments) -> tuple[list[dict], dict, str]:
    """A language model, asked about (policy, opponent) and about (opponent, policy); equal texts
    are a tie, unasked."""
    if not arguments.url or not arguments.model:
        raise DataError("--by llm needs --url and --model")
    if arguments.question and not arguments.question.is_file():
        raise DataError(f"--question {arguments.question}: no such file")
    template = arguments.question.read_text(encoding="utf-8") if arguments.question else QUESTION
    if missing := [place for place in ("{prompt}", "{a}", "{b}") if place not in template]:
        raise DataError(f"--question {arguments.question} has no {', '.join(missing)}")
    differ = [i for i, pair in enumerate(pairs) if pair["policy"] != pair["opponent"]]
    orders = [
        (pairs[i]["prompt"], *texts)
        for i in differ
        for texts in (
            (pairs[i]["policy"], pairs[i]["opponent"]),
            (pairs[i]["opponent"], pairs[i]["policy"]),
        )
    ]
    endpoint = Endpoint(
        arguments.url,
        arguments.model,
        cache=arguments.cache,
        key_env=arguments.key_env,
        max_requests=arguments.max_requests,
        concurrency=arguments.concurrency,
        timeout=arguments.timeout,
        retries=arguments.retries,
    )
    asked = endpoint.ask(
        [[{"role": "user", "content": fill(template, *texts)}] for texts in orders],
        read_verdict,
        "judge",
    )
    verdicts: list[dict] = [{"verdict": 0.5} for _ in pairs]
    for place, i in enumerate(differ):
        first, second = asked.answers[2 * place : 2 * place + 2]
        verdicts[i] = {"verdict": both_orders(first, second), "first": first, "second": second}
    for pair in pairs:
        del pair["rewards"]
    counts = {
        "requests": asked.requests,
        "from the cache": asked.from_cache,
        "answers that name nobody": asked.refused,
        "failed": asked.failed,
        "left by the cap": asked.unasked,
    }
    for told in dict.fromkeys(asked.errors):
        print(f"failed: {told}", file=sys.stderr)
    return verdicts, counts, f"llm {arguments.model}"


def fill(template: str, prompt: str, a: str, b: str) -> str:
    """The template with its three places filled, whatever braces the texts hold."""
    texts = {"{prompt}": prompt, "{a}": a, "{b}": b}
    return re.sub(r"\{(?:prompt|a|b)\}", lambda match: texts[match[0]], template)


def read_verdict(answer: str) -> str | None:
    """A, B or tie, where the answer is that one word or ends in `verdict: A` or `[[A]]`; None for
    anything else."""
    found = re.fullmatch(
        r"\W*(?:response |answer:? )?\W*(A|B|tie)\W*", answer, re.IGNORECASE
    ) or re.search(r"(?:\[\[|verdict\W+)(A|B|tie)\W*$", answer, re.IGNORECASE)
    return {"a": "A", "b": "B", "tie": "tie"}[found[1].lower()] if found else None


def both_orders(first: str | None, second: str | None) -> float | None:
    """1 where the policy wins, 1/2 for a tie or two verdicts that contradict each other; None when
    one is missing.

    first: with the policy as A; second: with the policy as B.
    """
    if first is None or second is None:
        return None
    balance = {"A": 1, "B": -1, "tie": 0}[first] + {"A": -1, "B": 1, "tie": 0}[second]
    return 0.5 + 0.5 * (balance > 0) - 0.5 * (balance < 0)


JUDGES = {"reward": by_reward, "labels": by_labels, "llm": by_llm}


def win_rate(pairs: list[dict], by: str) -> dict:
    """Of the pairs of one comparison: counts, the rate (a tie is 1/2; None if nothing was judged)
    and its 95% interval."""
    judged = [pair for pair in pairs if pair["verdict"] is not None]
    n, prompts = len(judged), len({pair["prompt"] for pair in judged})
    rate = math.fsum(pair["verdict"] for pair in judged) / n if n else None
    low, high = wilson(rate, prompts) if n else (None, None)
    orders = [pair for pair in judged if "first" in pair]
    contradictions = sum(pair["first"] == pair["second"] != "tie" for pair in orders)
    counts = {
        name: sum(pair["verdict"] == value for pair in judged)
        for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))
    }
    where = {key: pairs[0][key] for key in ("checkpoint", "temperature", "against")}
    more = {"contradictions": contradictions} if orders else {}
    return where | {
        "by": by,
        "win_rate": rate,
        "low": low,
        "high": high,
        "pairs": n,
        "prompts": prompts,
        **counts,
        **more,
        "unjudged": len(pairs) - n,
    }


def wilson(rate: float, n: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Wilson's score interval of a share of n trials (Wilson 1927; 95% by default)."""
    middle, spread = (
        rate + z * z / (2 * n),
        z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)),
    )
    low, high = (middle - spread) / (1 + z * z / n), (middle + spread) / (1 + z * z / n)
    return max(0.0, low), min(1.0, high)


def table(rates: list[dict]) -> str:
    lines = []
    for rate in rates:
        where = " ".join(
            str(part)
            for part in (
                rate["checkpoint"],
                f"T={rate['temperature']}",
                f"against {rate['against']}, by {rate['by']}",
            )
            if part is not None
        )
        told = (
            f"{rate['win_rate']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
            if rate["pairs"]
            else "nothing judged"
        )
        counts = ", ".join(
            f"{rate[key]} {key}"
            for key in ("wins", "ties", "losses", "contradictions", "unjudged")
            if rate.get(key)
        )
        lines.append(f"{where}: {told}; {counts}")
    return "\n".join(lines)
