"""The files of a run folder, checked when they are read: a disk or an editor may have damaged them.

Each error names the file, and the line where there is one.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from utils import DataError, first_line, json_lines

Check = Callable[[Any], bool]


def is_number(value: Any) -> bool:
    """Whether a value of a row can be plotted: an int or a float, neither NaN nor infinite."""
    return _is_numeric(value) and math.isfinite(value)


def _is_numeric(value: Any) -> bool:
    """Whether a value is a float, or an integer that fits into one."""
    is_int = isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63
    return is_int or isinstance(value, float)


def _is_text(value: Any) -> bool:
    """Whether a value is a text that can be written: JSON can escape half of a character."""
    try:
        return isinstance(value, str) and bool(value.encode() or True)
    except UnicodeEncodeError:
        return False


def _is_scores(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_numeric, value.values()))


def _is_training(value: Any) -> bool:
    loss = value.get("loss") or {} if isinstance(value, dict) else None
    return isinstance(loss, dict) and (loss.get("name") is None or _is_text(loss["name"]))


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(message, dict)
        and _is_text(message.get("role"))
        and (message.get("content") is None or _is_text(message["content"]))
        for message in value
    )


def _is_list_with(*keys: str) -> Check:
    return lambda value: (
        isinstance(value, list)
        and all(isinstance(item, dict) and item.keys() >= set(keys) for item in value)
    )


# What a column holds where it is not null; the names of metrics have a slash, and hold numbers.
COLUMNS: dict[str, Check] = {
    **dict.fromkeys(("split", "prompt", "policy", "reference", "chosen"), _is_text),
    **dict.fromkeys(("checkpoint", "stamp", "run", "name", "against", "by", "id"), _is_text),
    **dict.fromkeys(("examples", "step", "round", "request", "temperature", "kl"), _is_numeric),
    **dict.fromkeys(("sample", "policy_tokens", "win_rate", "low", "high"), _is_numeric),
    **dict.fromkeys(("top_p", "top_k", "min_p"), _is_numeric),
    **dict.fromkeys((f"length_controlled_{key}" for key in ("rate", "low", "high")), _is_numeric),
    **dict.fromkeys(("wins", "ties", "losses", "contradictions", "unjudged"), _is_numeric),
    **dict.fromkeys(("policy_reward", "reference_reward"), _is_scores),
    "training": _is_training,
    "messages": _is_messages,
    "updates": _is_list_with("loss", "settings", "cosine", "chosen", "rejected", "x", "y"),
    "clusters": _is_list_with("name", "center", "losses"),
}
SUMMARY_NUMBERS = (
    *("policy_reward", "reference_reward", "reward_gain", "kl", "eval_accuracy", "eval_loss"),
    *("pairs_per_second", "examples", "policy_length", "rounds", "labels_bought"),
)
COUNTS = (
    *("rows", "prompts", "responses", "pairs", "empty_responses"),
    *("truncated_prompts", "truncated_responses"),
)
WRONG_TYPES = (KeyError, TypeError, AttributeError, ValueError)  # UnicodeDecodeError among them

# Columns of the rows of a file that are there, and not null.
REQUIRED = {
    "metrics.jsonl": ("split",),
    "eval.jsonl": ("name", "temperature"),
    "samples.jsonl": ("prompt",),
    "served_samples.jsonl": ("key", "tokens"),
    "judgements.jsonl": ("against", "by"),
    "winrates.json": ("against", "by"),
    "atlas.jsonl": ("stamp", "baseline", "pairs", "updates", "clusters"),
    "answers.jsonl": ("id", "request", "answer"),
}


def read_jsonl(path: Path, damaged: list[str] | None = None) -> list[dict]:
    """Rows of a JSON-lines file, and [] if there is no file.

    A last line that a running or killed process has not completed is left out. Raises DataError for
    any other line that is not JSON, or not a row of a file of this name; with a list `damaged`,
    what is wrong with it is appended there, and the line is left out.
    """
    return [row for _, row in read_lines(path, damaged)]


def read_lines(path: Path, damaged: list[str] | None = None) -> list[tuple[str, dict]]:
    """The lines of a file with their rows, as `read_jsonl` reads them."""
    read = []
    lines = json_lines(path) if path.is_file() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            problem = _problem(row, path.name)
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            problem = f"not JSON: {error}. Only the last line may be incomplete"
        if problem and damaged is None:
            raise DataError(f"{path}:{number}: {problem}; repair or remove this one.")
        if problem:
            damaged.append(f"{path}:{number}: {problem}; this row is left out.")
        else:
            read.append((line, row))
    return read


def _problem(row: Any, file: str) -> str:
    """Why an object is no row of a file of this name; empty if it is one."""
    if not isinstance(row, dict):
        return f"expected an object, not {_short(row)}"
    required = REQUIRED.get(file, ())
    if row.get("split") in ("train", "eval"):
        required += ("examples",)
    for column in required:
        if row.get(column) is None:
            return f"the row has no {column!r}"
    for column, value in row.items():
        check = COLUMNS.get(column, _is_numeric if "/" in column else None)
        if check and value is not None and not check(value):
            return f"{column!r} is {_short(value)}, which it cannot be"
    return ""


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:60]}..."


def read_json(path: Path) -> Any:
    """The content of a JSON file, and {} if there is no file. Raises DataError if it is not
    JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}; restore the file, or delete it") from error


def read_winrates(path: Path) -> list[dict]:
    """The entries of winrates.json; [] if there is no file. Raises DataError for anything else."""
    rates = read_json(path) or []
    if not isinstance(rates, list):
        raise _not_written(path, "it holds no list")
    for rate in rates:
        if problem := _problem(rate, path.name):
            raise _not_written(path, problem)
    return rates


def read_summary(folder: Path) -> dict:
    """summary.json of a run folder; {} if there is none. Raises DataError for values that no run
    writes."""
    content = _read_object(folder / "summary.json")
    for key, value in content.items():
        is_optional = key not in ("rounds", "labels_bought")
        named = key.removesuffix("_se") in SUMMARY_NUMBERS or key.startswith("seconds")
        if named and not (_is_numeric(value) or (value is None and is_optional)):
            raise _not_written(folder / "summary.json", f"{key!r} is {_short(value)}")
    return content


def read_status(folder: Path) -> dict:
    """status.json of a run folder; {} if there is none. Raises DataError for another content."""
    content = _read_object(folder / "status.json")
    if not isinstance(content.get("state", ""), str):
        raise _not_written(folder / "status.json", f"'state' is {_short(content['state'])}")
    return content


def read_starts(folder: Path) -> list[dict]:
    """The starts of a run that provenance.json names; [] if there is none. Raises DataError for
    another content."""
    starts = _read_object(folder / "provenance.json").get("starts", [])
    if not isinstance(starts, list) or not all(map(_is_start, starts)):
        raise _not_written(folder / "provenance.json", "'starts' is no list of starts")
    return starts


def _is_start(start: Any) -> bool:
    return isinstance(start, dict) and isinstance(start.get("criterion") or {}, dict)


def read_data(folder: Path) -> dict:
    """data.json of a run folder; {} if there is none. Raises DataError for another content."""
    content = _read_object(folder / "data.json")
    for split, of_split in content.items():
        try:
            is_whole = all(map(_is_counts, of_split.get("datasets", [])))
            is_whole &= all(map(_is_histogram, of_split.get("histograms", {}).values()))
        except (AttributeError, KeyError, TypeError):
            is_whole = False
        if not is_whole:
            raise _not_written(folder / "data.json", f"in {split!r}")
    return content


def _is_counts(counts: dict) -> bool:
    numbers = [value for key, value in counts.items() if key in COUNTS]
    texts = [counts["name"], counts["split"], counts.get("content", "")]
    numbers += counts.get("skipped", {}).values()
    return all(map(_is_numeric, numbers)) and all(map(_is_text, texts))


def _is_histogram(histogram: dict) -> bool:
    edges, counts = histogram["edges"], histogram["counts"]
    return len(edges) == len(counts) + 1 and all(map(is_number, [*edges, *counts]))


def read_config(path: Path, *, resolve: bool = True, complete: bool = True) -> DictConfig:
    """The config.yaml of a run. Raises DataError for what is no such config.

    resolve: whether a reference to a key or a variable that is not there is refused too. complete:
    whether settings of another type, or without a loss, are.
    """
    try:
        config = OmegaConf.load(path)
        plain = OmegaConf.to_container(config, resolve=resolve)
        json.dumps(plain, ensure_ascii=False, default=str).encode()  # no half of a character
        is_config = isinstance(plain, dict)
        if complete:
            groups = [plain.get(key) or {} for key in ("loss", "reward", "online", "model")]
            is_config = isinstance(plain["loss"]["name"], str)
            is_config &= all(isinstance(group, dict) for group in groups)
    except (OmegaConfBaseException, YAMLError, OSError, RecursionError, *WRONG_TYPES) as error:
        raise DataError(_no_config(path, first_line(error))) from error
    if not is_config:
        raise DataError(_no_config(path, "loss.name or a group of settings has another type"))
    return config


def _no_config(path: Path, problem: str) -> str:
    return f"{path}: not the config of a run: {problem}; restore the file"


def read_service_state(path: Path) -> dict:
    """state.json of a service. Raises DataError for another content."""
    state = _read_object(path)
    numbers = [state.get(key) for key in ("requests", "steps")]
    if not all(map(_is_numeric, numbers)) or not isinstance(state.get("labels"), dict):
        raise _not_written(path, "it needs numbers of requests and steps, and labels")
    return state


def _read_object(path: Path) -> dict:
    content = read_json(path)
    if not isinstance(content, dict):
        raise _not_written(path, "it holds no object")
    return content


def _not_written(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path}: not what was written there: {problem}; restore the file, or delete it"
    )
