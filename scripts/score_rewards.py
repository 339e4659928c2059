"""Score a file of generations with a reward, and write the scores beside it.

    python scripts/score_rewards.py --fname outs.jsonl --reward NAME [--output FILE] \\
        [reward.key=value ...]

The file has {"prompt" or "question", "response"} on each line, as generate.py writes them, or is a
JSON list of such rows; "messages", or a prompt that is a list of messages, is a conversation, and
"system", "tools" and "chat_template_kwargs" beside it belong to it. A response may be messages too,
the answer alone or the whole conversation.
outs.scored.jsonl gets every row with its "score" and its "length" in words.
outs.scored.summary.json gets the reward's settings, the mean score, its standard error and the mean
length, which are printed too. Scores are kept in outs.scored.partial.jsonl as they come, and the
same command continues after an interruption. NAME is a file of config/reward/.
"""

import argparse
import json
import sys
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflab.batching.chat import PromptText
from preflab.readers.conversations import conversation_of
from preflab.readers.messages import chat, messages_of
from preflab.rewards.registry import build_reward
from preflab.settings.compose import compose
from preflab.settings.load import validate
from preflab.settings.refused import errors_in_one_line
from scripts.partial_file import PartialFile
from utils import DataError, atomic_write, content_hash, mean_and_error, path_argument

ROWS_AT_A_TIME = 256


def main() -> None:
    arguments, overrides = _parser().parse_known_args()
    output = arguments.output or arguments.fname.with_suffix(".scored.jsonl")
    with errors_in_one_line():
        config = compose([*overrides, f"reward={arguments.reward}"], arguments.config_dir)
        validate(config)  # writes each value in its type, and paths from the home folder whole
        if output.resolve() == arguments.fname.resolve():
            raise DataError(
                f"--output {output} is the file of generations itself; give another name"
            )
        rows = read_generations(arguments.fname)
        reward = OmegaConf.to_container(config.reward, resolve=True)
        done = PartialFile(
            output.with_suffix(".partial.jsonl"),
            {"reward": reward, "rows": content_hash(arguments.fname)},
        )
        scored = score_rows(rows, build_reward(config.reward), done)
        summary = {"fname": str(arguments.fname), "reward": reward, **summarise(scored)}
        with atomic_write(output) as f:
            f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in scored)
        with atomic_write(output.with_suffix(".summary.json")) as f:
            f.write(json.dumps(summary, indent=1, ensure_ascii=False) + "\n")
        done.remove()
    error = "" if summary["standard_error"] is None else f" ± {summary['standard_error']:.4g}"
    print(
        f"{output}: {len(scored):,} responses, {arguments.reward} {summary['mean']:.4g}{error},"
        f" mean length {summary['mean_length']:.1f} words"
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--fname", type=path_argument, required=True, help="the file of generations"
    )
    parser.add_argument("--reward", required=True, help="a file of config/reward/")
    parser.add_argument(
        "--output",
        type=path_argument,
        help="default: the name of the file, with the suffix .scored.jsonl",
    )
    parser.add_argument(
        "--config-dir", type=path_argument, help="a folder with your own reward/ yamls"
    )
    return parser


def read_generations(path: Path) -> list[dict]:
    """The rows of a file of JSON lines or of a JSON list. Raises DataError with the line, or the
    position in the list, of the first row that cannot be scored."""
    if not path.is_file():
        raise DataError(f"--fname {path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
        listed = json.loads(text) if text.lstrip().startswith("[") else None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text: {error}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}:{error.lineno}: not JSON: {error}") from error
    if listed is None:
        lines = [(f"{path}:{number}", line) for number, line in enumerate(text.split("\n"), 1)]
        rows = [(where, _parse(line, where)) for where, line in lines if line.strip()]
    else:
        rows = [(f"{path}: entry {number}", row) for number, row in enumerate(listed, 1)]
    if not rows:
        raise DataError(f"{path}: no generations in it")
    for where, row in rows:
        _check_row(row, where)
    return [row for _, row in rows]


def _parse(line: str, where: str):
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error}") from error


def _check_row(row, where: str) -> None:
    prompt, response = _texts(row, where) if isinstance(row, dict) else (None, None)
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise DataError(f'{where}: expected {{"prompt" or "question": text, "response": text}}')
    if taken := row.keys() & {"score", "length"}:
        raise DataError(f"{where}: has a {' and a '.join(sorted(taken))} already; rename it")


def _texts(row: dict, where: str = "") -> tuple:
    """Prompt and response for a reward, a conversation with its messages; None for what is not
    there. The response may be messages too: the answer alone or the whole conversation."""
    asked = next((key for key in ("messages", "prompt") if row.get(key) is not None), "question")
    if isinstance(row.get("response"), (list, dict)):  # text that looks like JSON was sampled
        conversation, response = conversation_of(
            row, "response", where, asked=asked, may_be_empty=True
        )
    elif (messages := messages_of(row, asked, where)) is not None:
        conversation, response = chat(row, messages, where), row.get("response")
    else:
        return row.get(asked), row.get("response")
    return PromptText(conversation.messages, conversation.tools, conversation.options), response


def score_rows(rows: list[dict], score, done: PartialFile) -> list[dict]:
    """The rows, each with its score and its length in words. done: has those of before."""
    n_done = len(done.rows)
    bar = tqdm(total=len(rows), initial=n_done, desc="score", unit="responses", delay=1.0)
    with bar as progress:
        for begin in range(n_done, len(rows), ROWS_AT_A_TIME):
            part = rows[begin : begin + ROWS_AT_A_TIME]
            prompts, responses = map(list, zip(*map(_texts, part), strict=True))
            values = score(prompts, responses)
            done.add(
                [
                    row | {"score": value, "length": len(response.split())}
                    for row, response, value in zip(part, responses, values, strict=True)
                ]
            )
            progress.update(len(part))
    return done.rows


def summarise(scored: list[dict]) -> dict:
    mean, error = mean_and_error(row["score"] for row in scored)
    return {
        "responses": len(scored),
        "mean": mean,
        "standard_error": error,
        "mean_length": sum(row["length"] for row in scored) / len(scored),
    }


if __name__ == "__main__":
    main()
