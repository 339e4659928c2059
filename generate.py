"""Entry point: `python generate.py model=... datasets=[hh] model.archive=RUN/LATEST/policy.pt`
writes samples of a policy.

`samples_per_prompt` lines for each prompt of the test split, in `generations.jsonl` of the run
folder: {"prompt", "response", "chosen", "sample", ...}. The samples are those that function=eval
would draw.
"""

import json
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from preflab.batching.examples import prompts_to_sample
from preflab.checks import check_config
from preflab.evaluation.worklist import expand_archives
from preflab.execution import load_data, register_built_in
from preflab.modeling.generation import sample
from preflab.modeling.loading import build_policy, check_model, load_tokenizer
from preflab.settings.overrides import check_overrides, fail
from preflab.settings.run_folder import register_resolvers
from preflab.settings.values import temperatures
from preflab.training.registry import find_trainer
from utils import ConfigError, PrefLabError, atomic_write


def main() -> None:
    try:
        check_overrides(sys.argv[1:])
    except PrefLabError as error:
        fail(error)
    register_resolvers()
    # Sampling needs prompts only, so any data set will do; these come first, and what the user says
    # wins.
    sys.argv[1:1] = ["function=eval", "loss=sft"]
    run()


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def run(config: DictConfig) -> None:
    try:
        print(f"samples: {generate(config, Path(HydraConfig.get().runtime.output_dir))}")
    except PrefLabError as error:
        fail(error)


def generate(config: DictConfig, run_dir: Path) -> Path:
    """Sample responses to `n_eval_examples` test prompts; returns the file."""
    register_built_in()
    trainer = find_trainer(config.trainer)
    if trainer.place is not None:
        raise ConfigError(
            f"trainer={config.trainer}: generate.py samples in one process; leave it out, or use"
            " train.py function=eval"
        )
    loss, sources = check_config(config)
    for key, values in (
        ("temperature", temperatures(config)),
        ("model.archive", archives := expand_archives(config.model.archive)),
    ):
        if len(values) > 1:
            raise ConfigError(
                f"{key} gives {len(values)} values, and generate.py samples from one policy in one"
                " way; use train.py function=eval"
            )
    config.temperature, config.model.archive = temperatures(config)[0], archives[0]
    check_model(config, trainer)
    tokenizer = load_tokenizer(config.model)
    data = load_data(config, sources, tokenizer, loss)[1]["test"]
    prompts = prompts_to_sample(data, config.n_eval_examples, config.max_prompt_length)
    policy = build_policy(config.model, trainable=False)
    k = config.samples_per_prompt
    drawn = [(p, i) for p in prompts for i in range(k)]
    responses = sample(
        policy,
        tokenizer,
        [p.tokens for p, _ in drawn],
        keys=[(p.key, i) if i else p.key for p, i in drawn],
        max_new_tokens=config.max_new_tokens or config.max_length - config.max_prompt_length,
        temperature=config.temperature,
        top_p=config.topp,
        seed=config.seed,
        batch_size=config.eval_batch_size,
    )
    with atomic_write(run_dir / "generations.jsonl") as f:
        for (prompt, i), response in zip(drawn, responses, strict=True):
            texts = (
                tokenizer.decode(tokens, skip_special_tokens=True)
                for tokens in (prompt.tokens, response, prompt.chosen)
            )
            row = dict(zip(("prompt", "response", "chosen"), texts, strict=True))
            row |= {
                "sample": i,
                "temperature": config.temperature,
                "top_p": config.topp,
                "seed": config.seed,
            }
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    return run_dir / "generations.jsonl"


if __name__ == "__main__":
    main()
