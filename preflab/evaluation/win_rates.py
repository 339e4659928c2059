"""Win rates: pairs of responses to the same prompt, judged by a reward, by labels or by an LLM."""

import logging
import math
import re
from collections import defaultdict
from pathlib import Path

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from preflab.batching.chat import prompt_key, prompt_of_columns, transcript
from preflab.reports.run_files import read_config, read_jsonl
from preflab.reports.statistics import share_interval
from preflab.rewards.llm_client import Endpoint
from utils import DataError, atomic_write, first_line

logger = logging.getLogger(__name__)

# Verdicts and counts by name, as each judge below returns them.
Verdicts = tuple[list[dict], dict[str, int]]

QUESTION = (
    "Below are a prompt and two responses to it."
    " Which response is better: the more helpful, correct and fluent one?"
    "\nDo not let the order or the length of the responses decide."
    "\n\nPrompt:\n{prompt}"
    "\n\nResponse A:\n{a}"
    "\n\nResponse B:\n{b}"
    "\n\nAnswer with one word: A, B, or tie."
)


# -------------------------------------------------------------------------------------------- pairs


def merge(path: Path, new: list[dict], read, write) -> None:
    """Add rows to a file, in place of its rows on the same comparisons.

    read: returns the rows of a path. write: returns the text of all rows.
    """
    replaced = {_comparison(row) for row in new}
    rows = [row for row in read(path) if _comparison(row) not in replaced] + new
    with atomic_write(path) as f:
        f.write(write(rows))


def _comparison(row: dict) -> tuple:
    return row.get("checkpoint"), row.get("temperature"), row["against"], row["by"]


def judged_groups(pairs: list[dict]) -> dict[tuple, list[dict]]:
    """The judged pairs of each comparison."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[_comparison(pair)].append(pair)
    return groups


def latest_samples(folder: Path) -> list[dict]:
    """The samples of a run's last evaluation, or all samples of an evaluation of checkpoints.

    Raises DataError if there are none.
    """
    rows = read_jsonl(folder / "samples.jsonl")
    if not rows:
        raise DataError(
            f"{folder} has no samples.jsonl with samples;"
            " give a run folder, or one that function=eval wrote"
        )
    if any(row.get("policy") is None for row in rows):
        raise DataError(f"{folder / 'samples.jsonl'}: a row has no 'policy'; repair or remove it")
    if any("checkpoint" in row for row in rows):
        return rows
    return [row for row in rows if row.get("examples") == rows[-1].get("examples")]


def pair_up(rows: list[dict], against: str) -> list[dict]:
    """Each sample with its opponent: {prompt, policy, opponent, ...}, without samples that have no
    opponent.

    against: "reference", "chosen", or a folder of samples. Raises DataError for anything else, and
    where no sample has an opponent.
    """
    if against in ("reference", "chosen"):
        opponents = [row.get(against) for row in rows]
        rewards = [row.get("reference_reward") if against == "reference" else None for row in rows]
        if all(text is None for text in opponents):
            raise DataError(f"--against {against}: these samples have no {against}")
    elif Path(against).is_dir():
        others = _opponents_in(Path(against), rows)
        opponents = [other and other["policy"] for other in others]
        rewards = [other and other.get("policy_reward") for other in others]
    else:
        raise DataError(
            f"--against {against} is neither reference, nor chosen, nor a folder of samples"
        )
    return [
        {
            "checkpoint": row.get("checkpoint"),
            "temperature": row.get("temperature"),
            "against": against,
            "prompt": prompt_of_columns(row),
            "policy": row["policy"],
            "opponent": opponent,
            "rewards": (row.get("policy_reward") or {}, reward or {}),
        }
        for row, opponent, reward in zip(rows, opponents, rewards, strict=True)
        if opponent is not None
    ]


def _opponents_in(folder: Path, rows: list[dict]) -> list[dict | None]:
    """For each row the sample in another folder with the same prompt, temperature and number."""
    samples = latest_samples(folder)
    by_key = {_sample_key(row): row for row in samples}
    if len(by_key) < len(samples):
        raise DataError(
            f"--against {folder}: several samples there have the same prompt, temperature and"
            " number; give a folder with one checkpoint"
        )
    opponents = [by_key.get(_sample_key(row)) for row in rows]
    if not any(opponents):
        raise DataError(
            f"--against {folder}: no sample there has the prompt, the temperature and the number of"
            " one here"
        )
    return opponents


def _sample_key(row: dict) -> tuple:
    return prompt_key(prompt_of_columns(row)), row.get("temperature"), row.get("sample", 0)


# ------------------------------------------------------------------------------------------- judges


def by_reward(pairs: list[dict], folder: Path, name: str, settings: list[str]) -> Verdicts:
    """The response with the higher score wins.

    A pair with a score that is NaN is not judged. The scores are those of samples.jsonl. Where the
    reward is not among them, or `settings` of the reward (KEY=VALUE) are given, they are computed.
    """
    known = [pair.pop("rewards") for pair in pairs]
    scores = [(ours.get(name), theirs.get(name)) for ours, theirs in known]
    missing = [
        i
        for i, (ours, theirs) in enumerate(known)
        if settings or name not in ours or name not in theirs
    ]
    if missing:
        score = _reward_of(folder, name, settings)
        prompts = [pairs[i]["prompt"] for i in missing]
        computed = [
            score(prompts, [pairs[i][side] for i in missing]) for side in ("policy", "opponent")
        ]
        for i, *both in zip(missing, *computed, strict=True):
            scores[i] = tuple(both)
    verdicts = [
        {
            "verdict": None if a != a or b != b else (1 + (a > b) - (a < b)) / 2,
            "policy_score": a,
            "opponent_score": b,
        }
        for a, b in scores
    ]
    return verdicts, {}


def _reward_of(folder: Path, name: str, settings: list[str]):
    """A reward with the given settings; without any, as in the run in `folder`, or else as in
    config/reward/."""
    from preflab.rewards.registry import all_rewards, build_reward, reward_settings
    from preflab.settings.run_folder import register_resolvers  # here, because it loads torch

    register_resolvers()
    if not settings and (folder / "config.yaml").is_file():
        config = read_config(folder / "config.yaml", complete=False)
        if "reward" in config and "more_rewards" in config:
            rewards = all_rewards(config)
            if name in rewards:
                return build_reward(rewards[name])
    try:
        overrides = OmegaConf.to_container(OmegaConf.from_dotlist(settings))
    except (OmegaConfBaseException, YAMLError) as error:
        raise DataError(f"--reward {' '.join(settings)}: {first_line(error)}") from error
    return build_reward(reward_settings(name, overrides))


def by_labels(pairs: list[dict], labels: Path | None) -> Verdicts:
    """A file of labels decides. Equal texts tie; pairs without a label are not judged.

    Raises DataError for a missing file, a line that is no label, and labels of other pairs only.
    """
    if labels is None or not labels.is_file():
        raise DataError(f"--labels {labels}: no such file")
    known = _read_labels(labels)
    verdicts = []
    for pair in pairs:
        del pair["rewards"]
        default = 0.5 if pair["policy"] == pair["opponent"] else None
        verdict = known.get((pair["prompt"], pair["policy"], pair["opponent"]), default)
        verdicts.append({"verdict": verdict})
    if all(verdict["verdict"] is None for verdict in verdicts):
        raise DataError(f"--labels {labels}: none of its lines is about a pair of these samples")
    return verdicts, {}


def _read_labels(path: Path) -> dict[tuple[str, str, str], float]:
    """The verdict on (prompt, a, b), in both orders: 1 where a wins, 1/2 for a tie."""
    known = {}
    for number, row in enumerate(read_jsonl(path), 1):
        are_texts = all(isinstance(row.get(column), str) for column in ("prompt", "a", "b"))
        if not are_texts or row.get("winner") not in ("a", "b", "tie"):
            raise DataError(
                f'{path}:{number}: expected {{"prompt", "a", "b", "winner": "a" | "b" | "tie"}}'
            )
        verdict = {"a": 1.0, "b": 0.0, "tie": 0.5}[row["winner"]]
        known[row["prompt"], row["a"], row["b"]] = verdict
        known[row["prompt"], row["b"], row["a"]] = 1 - verdict
    return known


def by_llm(pairs: list[dict], endpoint: Endpoint, template: str = QUESTION) -> Verdicts:
    """A language model decides. It sees each pair in both orders. Equal texts tie and are not sent.
    Of a conversation it gets all messages and the tools.

    template: a text with {prompt}, {a} and {b}.
    """
    different = [i for i, pair in enumerate(pairs) if pair["policy"] != pair["opponent"]]
    questions = []
    for i in different:
        prompt, ours, theirs = (pairs[i][key] for key in ("prompt", "policy", "opponent"))
        for a, b in ((ours, theirs), (theirs, ours)):
            questions.append(
                [{"role": "user", "content": fill(template, transcript(prompt), a, b)}]
            )
    result = endpoint.ask(questions, read_verdict, "judge")
    verdicts: list[dict] = [{"verdict": 0.5} for _ in pairs]
    for place, i in enumerate(different):
        first, second = result.answers[2 * place : 2 * place + 2]
        verdicts[i] = {"verdict": both_orders(first, second), "first": first, "second": second}
    for pair in pairs:
        del pair["rewards"]
    for error in dict.fromkeys(result.errors):
        logger.warning("failed: %s", error)
    counts = {
        "requests": result.requests,
        "from the cache": result.from_cache,
        "answers without a verdict": result.unreadable,
        "failed": result.failed,
        "not sent because of the cap": result.unsent,
    }
    return verdicts, counts


def fill(template: str, prompt: str, a: str, b: str) -> str:
    """The template with {prompt}, {a} and {b} replaced. Braces in the texts have no meaning."""
    texts = {"{prompt}": prompt, "{a}": a, "{b}": b}
    return re.sub(r"\{(?:prompt|a|b)\}", lambda match: texts[match[0]], template)


def read_verdict(answer: str) -> str | None:
    """A, B or tie, if the answer is that one word or ends in `verdict: A` or `[[A]]`; else None."""
    match = re.fullmatch(r"\W*(?:response |answer:? )?\W*(A|B|tie)\W*", answer, re.IGNORECASE)
    match = match or re.search(r"(?:\[\[|verdict\W+)(A|B|tie)\W*$", answer, re.IGNORECASE)
    return {"a": "A", "b": "B", "tie": "tie"}[match[1].lower()] if match else None


def both_orders(first: str | None, second: str | None) -> float | None:
    """1 where the policy wins, 0 where it loses, 1/2 for a tie or two contradicting verdicts; None
    if a verdict is missing.

    first: the verdict with the policy as A. second: the verdict with the policy as B.
    """
    if first is None or second is None:
        return None
    balance = {"A": 1, "B": -1, "tie": 0}[first] + {"A": -1, "B": 1, "tie": 0}[second]
    return 0.5 + 0.5 * (balance > 0) - 0.5 * (balance < 0)


# -------------------------------------------------------------------------------------------- rates


def win_rate(pairs: list[dict], by: str) -> dict:
    """The win rate of one comparison, from 0 to 1, with its 95% interval and the counts behind it.

    A tie counts 1/2. The interval (`share_interval`) is over prompts: the samples of one prompt are
    not independent. The rate and the interval are None if no pair was judged.
    """
    judged = [pair for pair in pairs if pair["verdict"] is not None]
    by_prompt = defaultdict(list)
    for pair in judged:
        by_prompt[prompt_key(pair["prompt"])].append(pair["verdict"])
    n, prompts = len(judged), len(by_prompt)
    rate = math.fsum(pair["verdict"] for pair in judged) / n if n else None
    low, high = share_interval(by_prompt.values()) if n else (None, None)
    counts = {
        name: sum(pair["verdict"] == value for pair in judged)
        for name, value in (("wins", 1.0), ("ties", 0.5), ("losses", 0.0))
    }
    if in_both_orders := [pair for pair in judged if "first" in pair]:
        counts["contradictions"] = sum(
            pair["first"] == pair["second"] != "tie" for pair in in_both_orders
        )
    return {
        **{key: pairs[0][key] for key in ("checkpoint", "temperature", "against")},
        "by": by,
        "win_rate": rate,
        "low": low,
        "high": high,
        "pairs": n,
        "prompts": prompts,
        **counts,
        "unjudged": len(pairs) - n,
    }
