"""Make scored preference data: sample K responses for each prompt from a model, score them, and
write imdb-like files.

    python scripts/build_preferences.py --prompts prompts.jsonl --output data/reviews --k 6 \\
        --n_test 200 model=tiny

writes data/reviews-train.jsonl and data/reviews-test.jsonl with one response per line: {"prompt",
"text", "reward"}. Further arguments are overrides, as for train.py: the model, its archive, the
reward, temperature and seed.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflab.batching.chat import chat_of, set_chat
from preflab.modeling.generation import sample
from preflab.modeling.loading import build_policy, load_tokenizer
from preflab.rewards.registry import build_reward
from preflab.settings.compose import compose
from preflab.settings.overrides import fail
from preflab.settings.values import truncation
from utils import DataError, PrefLabError, atomic_write


def main() -> None:
    arguments, overrides = _parser().parse_known_args()
    try:
        config = compose(overrides, arguments.config_dir)
        prompts = _read_prompts(arguments.prompts)
        rows = build_rows(config, prompts, arguments.k, arguments.n_test)
        for split, split_rows in zip(("train", "test"), rows, strict=True):
            path = Path(f"{arguments.output}-{split}.jsonl")
            with atomic_write(path) as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in split_rows)
            print(f"{path}: {len(split_rows):,} responses")
    except PrefLabError as error:
        fail(error)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, help='JSON lines with a "prompt" each'
    )
    parser.add_argument(
        "--output", required=True, help="the files are OUTPUT-train.jsonl and OUTPUT-test.jsonl"
    )
    parser.add_argument("--k", type=int, default=6, help="responses per prompt")
    parser.add_argument(
        "--n_test", type=int, default=200, help="how many of the last prompts make the test file"
    )
    parser.add_argument(
        "--config-dir", type=Path, help="a folder with your own reward/ or model/ yamls"
    )
    return parser


def _read_prompts(path: Path) -> list[str]:
    if not path.is_file():
        raise DataError(f"--prompts {path}: no such file")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            prompts.append(json.loads(line)["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f'{path}:{number}: expected a JSON object with a "prompt"') from error
    return list(dict.fromkeys(prompts))


def build_rows(config, prompts: list[str], k: int, n_test: int) -> tuple[list[dict], list[dict]]:
    """The rows of the training and of the test file."""
    if not 0 < n_test < len(prompts):
        raise DataError(
            f"--n_test {n_test} must lie between 1 and {len(prompts) - 1},"
            " one less than the number of prompts"
        )
    tokenizer = load_tokenizer(config.model)
    set_chat(tokenizer, chat_of(config))
    policy = build_policy(config.model, trainable=False)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = [bos + tokens for tokens in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    responses = sample(
        policy,
        tokenizer,
        [tokens for tokens in ids for _ in range(k)],
        keys=list(range(k * len(prompts))),
        max_new_tokens=config.max_new_tokens or config.max_length - config.max_prompt_length,
        temperature=config.temperature,
        **truncation(config),
        seed=config.seed,
        batch_size=config.eval_batch_size,
    )
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in responses]
    repeated = [prompt for prompt in prompts for _ in range(k)]
    rewards = build_reward(config.reward)(repeated, texts)
    rows = [
        {"prompt": prompt, "text": text, "reward": reward}
        for prompt, text, reward in zip(repeated, texts, rewards, strict=True)
    ]
    held_out = set(prompts[-n_test:])
    train = [row for row in rows if row["prompt"] not in held_out]
    return train, [row for row in rows if row["prompt"] in held_out]


if __name__ == "__main__":
    main()
