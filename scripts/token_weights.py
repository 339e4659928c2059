"""Weigh the tokens of preference pairs by two models, for losses that read weights of tokens.

    python scripts/token_weights.py DATA --model NAME --positive ARCHIVE [--negative ARCHIVE] \\
        --method rank|scale|top --output FOLDER [key=value ...]

The reward of a token is log pi+ - log pi-, in nats: pi+ is the model with the weights of
--positive, pi- that with those of --negative, by default the model as it is. A token of a rejected
response has the negative of that. The methods turn rewards r into weights:

    rank    0.7 for the smallest r of a response up to 1.3 for the largest, evenly by rank
    scale   0.7 for r <= -1.5 up to 1.3 for r >= 1.5, linear between (as `rank` from
            the code of TIS-DPO)
    top     1 for the share --share of the tokens with the largest r, at least one, and 0 for the
            others: of a chosen response the best, of a rejected one the worst (as SePO selects)

FOLDER gets train.jsonl and test.jsonl: prompt, chosen, rejected, chosen_token_weights,
rejected_token_weights, and the scores and numbers that the pairs have. Pairs with an empty
response, which data of pairs may not have, are left out and counted. Train with datasets=[FOLDER],
and with the tokenizer, chat template, max_length and max_prompt_length of this command, because the
weights belong to the tokens. Further arguments are overrides, as for train.py.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from preflab.batching.packing import Layout, lay_out
from preflab.batching.token_store import TokenStore
from preflab.checks import check_settings
from preflab.execution import load_inputs, register_built_in
from preflab.modeling.loading import build_policy, build_reference
from preflab.modeling.logprobs import Scorer, score_responses
from preflab.readers.messages import Turns, Unended
from preflab.readers.records import Record
from preflab.settings.compose import compose
from preflab.settings.load import validate
from preflab.settings.overrides import fail, model_overrides, quoted
from preflab.settings.run_folder import register_resolvers
from utils import (
    ConfigError,
    PrefLabError,
    Progress,
    atomic_directory,
    machine_error,
    path_argument,
)

LEAST, MOST = 0.7, 1.3  # weights of `rank` and `scale`
BOUND = 1.5  # reward in nats beyond which `scale` is constant
METHODS = ("rank", "scale", "top")


def main() -> None:
    arguments, overrides = _parser().parse_known_args()
    try:
        if arguments.output.exists():
            raise ConfigError(f"--output {arguments.output} exists; take another name")
        if not 0 < arguments.share <= 1:
            raise ConfigError(f"--share {arguments.share} must be above 0 and at most 1")
        counts = write_weights(arguments, overrides)
    except (PrefLabError, OSError) as error:
        fail(machine_error(error) or error)
    for split, (written, left_out) in counts.items():
        more = f", {left_out:,} with an empty response left out" if left_out else ""
        print(f"{arguments.output}: {written:,} {split} pairs{more}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DATA", help="as in datasets=[...]; it has pairs")
    parser.add_argument(
        "--model", required=True, help="a name in config/model/, a folder or hub id"
    )
    parser.add_argument("--positive", required=True, help="archive of pi+, as model.archive")
    parser.add_argument("--negative", help="archive of pi-; default: the model as it is")
    parser.add_argument("--method", required=True, choices=METHODS)
    parser.add_argument("--share", type=float, default=0.3, help="of tokens that top selects")
    parser.add_argument("--output", type=path_argument, required=True, help="folder to write")
    return parser


def write_weights(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, tuple]:
    """Write the folder, complete or not at all; returns for each split how many pairs are written
    and how many are left out."""
    register_built_in()
    register_resolvers()
    archives = [f"model.archive={quoted(arguments.positive)}"]
    if arguments.negative:
        archives.append(f"model.reference_archive={quoted(arguments.negative)}")
    config = compose(["loss=dpo", *model_overrides(arguments.model), *archives, *overrides])
    config.datasets = [arguments.data]
    settings = validate(config)
    loss, sources = check_settings(settings)
    inputs = load_inputs(settings, sources, loss)
    positive = build_policy(settings.model, trainable=False)
    negative = build_reference(settings.model, positive, training=False, own=True)
    counts = {}
    with atomic_directory(arguments.output) as folder:
        for split, [source] in sources.items():
            [store] = inputs.stores[split]
            rewards = token_rewards(positive, negative, store, inputs.tokenizer.pad_token_id, split)
            with open(folder / f"{split}.jsonl", "w", encoding="utf-8") as f:
                n_written = n_pairs = 0
                for record, of_prompt in zip(source.records(), rewards, strict=True):
                    rows = weighted_rows(record, of_prompt, arguments.method, arguments.share)
                    f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                    n_written, n_pairs = n_written + len(rows), n_pairs + len(record.pairs)
            counts[split] = n_written, n_pairs - n_written
    return counts


@torch.no_grad()
def token_rewards(
    positive: Scorer, negative: Scorer, store: TokenStore, pad_id: int, split: str
) -> Iterator[list[np.ndarray]]:
    """log pi+ - log pi- of each token of the responses of each prompt, (tokens,) each, in order."""
    if store.scored is not None:
        raise ConfigError(
            f"datasets=[{store.name}] has responses with turns of a user in them, whose tokens a"
            " row of text cannot weigh; leave train_on=last"
        )
    ends = np.searchsorted(store.response_prompt, np.arange(len(store.prompts) + 1))
    numbers = range(len(store.prompts))
    for prompt in Progress(numbers, desc=f"weigh {split}", unit=" prompts", delay=2.0):
        spans = store.responses[ends[prompt] : ends[prompt + 1]]
        begin, end = store.prompts[prompt]
        tree = (store.tokens[begin:end], [store.tokens[a:b] for a, b in spans])
        batch = lay_out([tree], Layout("padded", pad_id)).to(positive.device)
        scores = score_responses(positive, batch, reference=negative)
        rewards = (scores.token_logps - scores.reference_token_logps).double().cpu()
        yield [part.numpy() for part in rewards.split(batch.lengths.tolist())]


def weighted_rows(
    record: Record, rewards: list[np.ndarray], method: str, share: float
) -> list[dict]:
    """The pairs of a record as rows with weights. rewards: of the tokens of each response."""
    prompt, more = record.prompt, {}
    if not isinstance(prompt, str):
        more = {"tools": prompt.tools} if prompt.tools else {}
        more |= {"chat_template_kwargs": prompt.options} if prompt.options else {}
        prompt = prompt.messages
    rows = []
    for i, (chosen, rejected) in enumerate(record.pairs):
        if not (record.responses[chosen].strip() and record.responses[rejected].strip()):
            continue
        row = {"prompt": prompt, **more}
        for side, response, sign in (("chosen", chosen, 1), ("rejected", rejected, -1)):
            text = record.responses[response]
            if isinstance(text, (Turns, Unended)):
                raise ConfigError(
                    f"{record.source}: a response of several turns, or one that its writer did not"
                    " end, cannot be written as a row of text; leave such rows out"
                )
            row[side] = text
            weights = weights_of(sign * rewards[response], method, share)
            row[f"{side}_token_weights"] = [round(weight, 4) for weight in weights.tolist()]
            if record.scores and record.scores[response] is not None:
                row[f"score_{side}"] = record.scores[response]
        rows.append(row | {name: values[i] for name, values in record.columns.items()})
    return rows


def weights_of(rewards: np.ndarray, method: str, share: float = 0.3) -> np.ndarray:
    """Weights (tokens,) of the tokens of a response, from their rewards (tokens,) in nats, large
    where a token should count."""
    n = len(rewards)
    order = np.argsort(rewards, kind="stable")
    if method == "scale":
        return LEAST + (np.clip(rewards, -BOUND, BOUND) + BOUND) / (2 * BOUND) * (MOST - LEAST)
    if method == "rank":
        places = np.empty(n)
        places[order] = np.arange(n)
        return LEAST + places / (n - 1) * (MOST - LEAST) if n > 1 else np.ones(1)
    weights = np.zeros(n)
    weights[order[n - max(1, int(share * n)) :]] = 1
    return weights


if __name__ == "__main__":
    main()
