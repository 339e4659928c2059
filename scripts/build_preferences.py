"""Make scored preference data: sample K responses for each prompt from a model, score them, and
write imdb-like files.

    python scripts/build_preferences.py --prompts prompts.jsonl --output data/reviews --k 6 \\
        --n_test 200 model=tiny

writes data/reviews-train.jsonl and data/reviews-test.jsonl with one response per line: {"prompt",
"text", "reward", "ended"}; `ended` is false for a response that the limit on its length cut, which
gets no end token in training. A prompt is text, or a list of chat messages, which goes through the
model's chat template with what "system", "tools" and "chat_template_kwargs" beside it say. The rows
of conversations have these columns too, with the chat_template_kwargs of the config, so that
training on them renders the same prompts. Further arguments are overrides, as for train.py: the
model, its archive, the reward, temperature and seed. Responses are kept in OUTPUT-partial.jsonl as
they come, and the same command continues after an interruption.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from omegaconf import OmegaConf
from tqdm import tqdm

from preflab.batching.chat import PromptText, context_columns, response_text
from preflab.batching.chat_template import ChatSettings, render, set_chat
from preflab.modeling.generation import sample
from preflab.modeling.loading import build_policy, load_tokenizer
from preflab.modeling.response_ends import response_ends
from preflab.readers.conversations import prompt_of
from preflab.readers.messages import Chat
from preflab.rewards.registry import build_reward
from preflab.settings.compose import compose
from preflab.settings.refused import errors_in_one_line
from preflab.settings.values import truncation
from scripts.partial_file import PartialFile
from utils import DataError, atomic_write, content_hash

PROMPTS_AT_A_TIME = 64


def main() -> None:
    arguments, overrides = _parser().parse_known_args()
    with errors_in_one_line():
        config = compose(overrides, arguments.config_dir)
        prompts = _read_prompts(arguments.prompts)
        partial = Path(f"{arguments.output}-partial.jsonl")
        rows = build_rows(config, prompts, arguments.k, arguments.n_test, partial)
        for split, split_rows in zip(("train", "test"), rows, strict=True):
            path = Path(f"{arguments.output}-{split}.jsonl")
            with atomic_write(path) as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in split_rows)
            print(f"{path}: {len(split_rows):,} responses")
        partial.unlink(missing_ok=True)


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


def _read_prompts(path: Path) -> list[str | Chat]:
    """The distinct prompts of a file, texts or conversations."""
    if not path.is_file():
        raise DataError(f"--prompts {path}: no such file")
    prompts = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
            prompt = row["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise DataError(f'{where}: expected a JSON object with a "prompt"') from error
        if not isinstance(prompt, str) or prompt.strip():  # a model may continue nothing too
            prompt = prompt_of(row, where)
        prompts.setdefault(prompt if isinstance(prompt, str) else (prompt.key(),), prompt)
    return list(prompts.values())


def build_rows(
    config, prompts: list, k: int, n_test: int, partial: Path
) -> tuple[list[dict], list[dict]]:
    """The rows of the training and of the test file. partial: where they are kept meanwhile."""
    if not 0 < n_test < len(prompts):
        raise DataError(
            f"--n_test {n_test} must lie between 1 and {len(prompts) - 1},"
            " one less than the number of prompts"
        )
    done = PartialFile(partial, _settings(config, prompts, k))
    if len(done.rows) < k * len(prompts):
        _sample_and_score(config, prompts, k, done)
    n_train = k * (len(prompts) - n_test)
    return done.rows[:n_train], done.rows[n_train:]


def _settings(config, prompts: list, k: int) -> dict:
    """What determines the rows."""
    keys = ("model", "reward", "seed", "temperature", "topp", "top_k", "min_p", "max_new_tokens")
    keys += ("max_length", "max_prompt_length", "chat_template_kwargs", "chat_date")
    chosen = OmegaConf.to_container(OmegaConf.masked_copy(config, keys), resolve=True)
    texts = [one if isinstance(one, str) else json.loads(one.to_json()) for one in prompts]
    return chosen | {"k": k, "prompts": content_hash(json.dumps(texts))}


def _sample_and_score(config, prompts: list, k: int, done: PartialFile) -> None:
    tokenizer = load_tokenizer(config.model)
    values = OmegaConf.to_container(config, resolve=True)
    chat = ChatSettings(values["chat_template_kwargs"] or {}, values["chat_date"])
    set_chat(tokenizer, chat)
    policy = build_policy(config.model, trainable=False)
    score, ends = build_reward(config.reward), response_ends(tokenizer, policy.causal_lm)
    bar = tqdm(total=len(prompts), desc="prompts", unit="prompts", initial=len(done.rows) // k)
    for begin in range(len(done.rows) // k, len(prompts), PROMPTS_AT_A_TIME):
        part = prompts[begin : begin + PROMPTS_AT_A_TIME]
        responses = sample(
            policy,
            tokenizer,
            [tokens for prompt in part for tokens in [_ids(tokenizer, prompt)] * k],
            keys=list(range(k * begin, k * (begin + len(part)))),
            max_new_tokens=config.max_new_tokens or config.max_length - config.max_prompt_length,
            temperature=config.temperature,
            **truncation(config),
            seed=config.seed,
            batch_size=config.eval_batch_size,
        )
        texts = [response_text(tokenizer, tokens) for tokens in responses]
        repeated = [prompt for prompt in part for _ in range(k)]
        rewards = score(list(map(_shown, repeated)), texts)
        done.add(
            [
                {
                    **_columns(prompt, chat.options),
                    "text": text,
                    "reward": reward,
                    "ended": ends.ended(tokens),
                }
                for prompt, text, reward, tokens in zip(
                    repeated, texts, rewards, responses, strict=True
                )
            ]
        )
        bar.update(len(part))
    bar.close()


def _shown(prompt: str | Chat) -> str:
    """A prompt as rewards get it."""
    if isinstance(prompt, str):
        return prompt
    return PromptText(prompt.messages, prompt.tools, prompt.options)


def _columns(prompt: str | Chat, options: dict) -> dict:
    """The columns of a prompt. options: those that the template gets in every conversation."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    chat = replace(prompt, options={**options, **prompt.options})
    return {"prompt": chat.messages, **context_columns(chat)}


def _ids(tokenizer, prompt: str | Chat) -> list[int]:
    if isinstance(prompt, Chat):
        text = render(tokenizer, prompt, generation_prompt=True, where="--prompts")
        return tokenizer(text, add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]


if __name__ == "__main__":
    main()
