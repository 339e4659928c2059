"""Make scored preference data: sample K responses for each prompt from a model, score them, write
imdb-like files.

    python scripts/build_preferences.py --prompts prompts.jsonl --output data/reviews --k 6 --n_test
    200 model=tiny

writes data/reviews-train.jsonl and data/reviews-test.jsonl, a line a response: {"prompt", "text",
"reward"}. What stands behind the options is a command line of train.py: the model, its archive, the
reward, temperature and seed.
"""

import argparse
import json
import sys
from pathlib import Path

from hydra import compose, initialize_config_dir

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflab.modeling.generation import sample  # noqa: E402
from preflab.modeling.loading import build_policy, load_tokenizer  # noqa: E402
from preflab.rewards.registry import build_reward  # noqa: E402
from preflab.settings.keys import CONFIG_DIR  # noqa: E402
from preflab.settings.overrides import check_overrides, fail  # noqa: E402
from preflab.settings.run_folder import register_resolvers  # noqa: E402
from utils import DataError, PrefLabError, atomic_write  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=Path, required=True, help='JSON lines with a "prompt" each'
    )
    parser.add_argument(
        "--output", required=True, help="files are named OUTPUT-train.jsonl and OUTPUT-test.jsonl"
    )
    parser.add_argument("--k", type=int, default=6, help="responses a prompt")
    parser.add_argument(
        "--n_test", type=int, default=200, help="the last so many prompts make the test file"
    )
    parser.add_argument(
        "--config-dir", type=Path, help="a folder with reward/ or model/ yamls of your own"
    )
    arguments, overrides = parser.parse_known_args()
    own = arguments.config_dir and arguments.config_dir.resolve()
    register_resolvers()
    try:
        check_overrides([*overrides, *(["--config-dir"] if own else [])])
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            config = compose(
                "config",
                overrides=[*overrides, *([f"hydra.searchpath=[file://{own}]"] if own else [])],
            )
        for path, rows in build(config, _read_prompts(arguments.prompts), arguments).items():
            with atomic_write(path) as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            print(f"{path}: {len(rows):,} responses")
    except PrefLabError as error:
        fail(error)


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


def build(config, prompts: list[str], arguments) -> dict[Path, list[dict]]:
    """Rows of the train and of the test file."""
    if not 0 < arguments.n_test < len(prompts):
        raise DataError(
            f"--n_test {arguments.n_test} must lie between 1 and {len(prompts) - 1}, one less than"
            " the prompts"
        )
    tokenizer = load_tokenizer(config.model)
    policy = build_policy(config.model, trainable=False)
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    ids = [bos + tokens for tokens in tokenizer(prompts, add_special_tokens=False)["input_ids"]]
    k = arguments.k
    responses = sample(
        policy,
        tokenizer,
        [tokens for tokens in ids for _ in range(k)],
        keys=list(range(k * len(prompts))),
        max_new_tokens=config.max_new_tokens or config.max_length - config.max_prompt_length,
        temperature=config.temperature,
        top_p=config.topp,
        seed=config.seed,
        batch_size=config.eval_batch_size,
    )
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in responses]
    repeated = [prompt for prompt in prompts for _ in range(k)]
    rewards = build_reward(config.reward)(repeated, texts)
    rows = [{"prompt": p, "text": t, "reward": r} for p, t, r in zip(repeated, texts, rewards)]
    held_out = set(prompts[-arguments.n_test :])
    return {
        Path(f"{arguments.output}-train.jsonl"): [r for r in rows if r["prompt"] not in held_out],
        Path(f"{arguments.output}-test.jsonl"): [r for r in rows if r["prompt"] in held_out],
    }


if __name__ == "__main__":
    main()
