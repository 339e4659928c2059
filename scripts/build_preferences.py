"""Make scored preference data: sample K responses for each prompt from a model, score them, and
write imdb-like files.

    python scripts/build_preferences.py --prompts prompts.jsonl --output data/reviews --k 6 \\
        --n_test 200 model=tiny

writes data/reviews-train.jsonl and data/reviews-test.jsonl with one response per line: {"prompt",
"text", "reward", "ended"}; `ended` is false for a response that the limit on its length cut, which
gets no end token in training. A prompt is text, or a list of chat messages, which goes through the
model's chat template with what "system", "tools" and "chat_template_kwargs" beside it say. The rows
of conversations have these columns too, with the chat_template_kwargs of the config, so that
training on them renders the same prompts. A prompt of more than max_prompt_length tokens keeps its
end, as in evaluations, and the number of such prompts is printed. Further arguments are overrides,
as for train.py: the model, its archive, the reward, temperature and seed. Responses are kept in
OUTPUT-partial.jsonl as they come, and the same command continues after an interruption.
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
from preflab.batching.chat_template import chat_of, render, set_chat
from preflab.batching.truncation import prompt_to_ask
from preflab.batching.turn_ends import check_room
from preflab.modeling.generation import sample
from preflab.modeling.loading import build_policy, check_model, load_tokenizer
from preflab.modeling.model_checks import check_texts
from preflab.modeling.response_ends import response_ends
from preflab.readers.conversations import prompt_of
from preflab.readers.json_text import decode, parse_json
from preflab.readers.messages import Chat
from preflab.rewards.registry import build_reward
from preflab.serving.checks import check_policy_only
from preflab.serving.sampler import ServedModel, weights_stamp
from preflab.settings.compose import compose
from preflab.settings.load import load_settings, validate
from preflab.settings.refused import errors_in_one_line
from preflab.settings.schema import Settings
from preflab.settings.values import changed, temperatures, truncation
from scripts.partial_file import PartialFile
from trainers import BasicTrainer
from utils import ConfigError, DataError, atomic_write, content_hash, path_argument

PROMPTS_AT_A_TIME = 64


def main() -> None:
    arguments, overrides = _parser().parse_known_args()
    with errors_in_one_line():
        config = compose(overrides, arguments.config_dir)
        # Writes each value in its type, and paths from the home folder whole.
        settings = validate(config)
        check_policy_only(settings.sampler)
        prompts = _read_prompts(arguments.prompts)
        partial = Path(f"{arguments.output}-partial.jsonl")
        rows = build_rows(config, prompts, arguments.k, arguments.n_test, partial)
        for split, split_rows in zip(("train", "test"), rows, strict=True):
            path = Path(f"{arguments.output}-{split}.jsonl")
            with atomic_write(path) as f:
                f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in split_rows)
            print(f"{path}: {len(split_rows):,} responses")
        partial.unlink(missing_ok=True)
        _kept(partial).unlink(missing_ok=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--prompts", type=path_argument, required=True, help='JSON lines with a "prompt" each'
    )
    parser.add_argument(
        "--output",
        type=path_argument,
        required=True,
        help="the files are OUTPUT-train.jsonl and OUTPUT-test.jsonl",
    )
    parser.add_argument("--k", type=int, default=6, help="responses per prompt")
    parser.add_argument(
        "--n_test", type=int, default=200, help="how many of the last prompts make the test file"
    )
    parser.add_argument(
        "--config-dir", type=path_argument, help="a folder with your own reward/ or model/ yamls"
    )
    return parser


def _read_prompts(path: Path) -> list[str | Chat]:
    """The distinct prompts of a file, texts or conversations."""
    if not path.is_file():
        raise DataError(f"--prompts {path}: no such file")
    prompts = {}
    # Not splitlines, which breaks a line at characters that JSON strings may hold.
    for number, line in enumerate(decode(path.read_bytes(), str(path)).split("\n"), 1):
        where = f"{path}:{number}"
        row = parse_json(line, where) if line.strip() else None
        if line.strip() and (not isinstance(row, dict) or "prompt" not in row):
            raise DataError(f'{where}: expected a JSON object with a "prompt"')
        if row is None:
            continue
        prompt = row["prompt"]
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
    if config.sampler.url is not None:
        chosen["sampler"] = {"server": config.sampler.server, "model": config.sampler.model}
    return chosen | {"k": k, "prompts": content_hash(json.dumps(texts))}


def _sample_and_score(config, prompts: list, k: int, done: PartialFile) -> None:
    settings = load_settings(config)
    [temperature, *more] = temperatures(settings)
    if more:
        raise ConfigError("temperature gives several values, and the files are of one; give one")
    room = settings.max_length - settings.max_prompt_length
    n_new = settings.max_new_tokens or room
    if n_new < 1:
        raise ConfigError(
            f"max_prompt_length={settings.max_prompt_length} must be smaller than"
            f" max_length={settings.max_length}, or no room is left for a response"
        )
    longest = max(settings.max_length, settings.max_prompt_length + n_new)
    rows = check_model(changed(settings, max_length=longest), BasicTrainer)
    tokenizer = load_tokenizer(settings.model, rows)
    set_chat(tokenizer, chat_of(settings))
    ids = _ids_to_ask(settings, tokenizer, rows, prompts)
    policy = build_policy(settings.model, trainable=False)
    draw = _served_policy(settings, done.path) or sample
    score, ends = build_reward(config.reward), response_ends(tokenizer, policy.causal_lm)
    bar = tqdm(total=len(prompts), desc="prompts", unit="prompts", initial=len(done.rows) // k)
    for begin in range(len(done.rows) // k, len(prompts), PROMPTS_AT_A_TIME):
        part = prompts[begin : begin + PROMPTS_AT_A_TIME]
        responses = draw(
            policy,
            tokenizer,
            [tokens for tokens in ids[begin : begin + len(part)] for _ in range(k)],
            keys=list(range(k * begin, k * (begin + len(part)))),
            max_new_tokens=n_new,
            temperature=temperature,
            **truncation(settings),
            seed=settings.seed,
            batch_size=settings.eval_batch_size,
        )
        texts = [response_text(tokenizer, tokens) for tokens in responses]
        repeated = [prompt for prompt in part for _ in range(k)]
        rewards = score(list(map(_shown, repeated)), texts)
        options = chat_of(settings).options
        done.add(
            [
                {
                    **_columns(prompt, options),
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


def _served_policy(settings: Settings, partial: Path) -> ServedModel | None:
    """The policy on a server, which then samples it, if there is one."""
    if settings.sampler.url is None:
        return None
    return ServedModel(
        settings.sampler,
        name=settings.sampler.model,
        of="policy",
        stamp=weights_stamp(settings.model, settings.model.archive),
        store=_kept(partial),
    )


def _kept(partial: Path) -> Path:
    """The file of the responses of a server that have no rewards yet."""
    return partial.with_name(partial.name.replace("-partial.jsonl", "-partial-served.jsonl"))


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


def _ids_to_ask(settings, tokenizer, rows: int | None, prompts: list) -> list[list[int]]:
    """The tokens that responses are sampled behind, as in evaluations. rows: of the embedding.

    Prints how many prompts are cut. Raises ConfigError for a token without a row.
    """
    limit = settings.max_prompt_length
    whole = [_ids(tokenizer, prompt, limit) for prompt in prompts]
    if rows is not None:
        check_texts(whole, tokenizer, rows, settings.model.name_or_path)
    if cut := sum(len(ids) > limit for ids in whole):
        print(
            f"{cut:,} of {len(whole):,} prompts are longer than max_prompt_length={limit} tokens:"
            " responses continue their end"
        )
    # A user's own file keeps the end of its prompts in training too.
    return [
        prompt_to_ask(ids, limit, "keep_end", tokenizer.bos_token_id, chat=isinstance(prompt, Chat))
        for ids, prompt in zip(whole, prompts, strict=True)
    ]


def _ids(tokenizer, prompt: str | Chat, limit: int) -> list[int]:
    """All tokens of a prompt."""
    if isinstance(prompt, Chat):
        text = render(tokenizer, prompt, generation_prompt=True, where="--prompts")
        check_room(tokenizer, prompt, limit, "--prompts")
        return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    return bos + tokenizer(prompt, add_special_tokens=False, verbose=False)["input_ids"]


if __name__ == "__main__":
    main()
