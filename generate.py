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

from preflab.settings.command_line import check_command_line
from preflab.settings.overrides import fail
from preflab.settings.run_folder import register_resolvers
from utils import ConfigError, PrefLabError, atomic_write


def main() -> None:
    check_command_line(sys.argv[1:], "generate.py")
    register_resolvers(purpose="generate")
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
    # These import torch, and a mistake on the command line is answered before.
    from preflab.batching.examples import prompts_to_sample
    from preflab.checks import check_config
    from preflab.distributed.console import configure_logging
    from preflab.evaluation.worklist import expand_archives
    from preflab.execution import load_inputs, register_built_in
    from preflab.modeling.generation import sample
    from preflab.modeling.loading import build_policy
    from preflab.settings.values import temperatures
    from preflab.training.registry import find_trainer

    register_built_in()
    configure_logging()
    if find_trainer(config.trainer).place is not None:
        raise ConfigError(
            f"trainer={config.trainer}: generate.py samples in one process; leave it out, or use"
            " train.py function=eval"
        )
    loss, sources = check_config(config)
    archives = expand_archives(config.model.archive)
    for key, values in (("temperature", temperatures(config)), ("model.archive", archives)):
        if len(values) > 1:
            raise ConfigError(
                f"{key} gives {len(values)} values, and generate.py samples from one policy at one"
                " temperature; use train.py function=eval"
            )
    config.temperature, config.model.archive = temperatures(config)[0], archives[0]
    inputs = load_inputs(config, sources, loss)
    prompts = prompts_to_sample(
        inputs.data["test"], config.n_eval_examples, config.max_prompt_length
    )
    drawn = [(prompt, i) for prompt in prompts for i in range(config.samples_per_prompt)]
    responses = sample(
        build_policy(config.model, trainable=False),
        inputs.tokenizer,
        [prompt.tokens for prompt, _ in drawn],
        keys=[(prompt.key, i) if i else prompt.key for prompt, i in drawn],
        max_new_tokens=config.max_new_tokens or config.max_length - config.max_prompt_length,
        temperature=config.temperature,
        top_p=config.topp,
        seed=config.seed,
        batch_size=config.eval_batch_size,
    )
    settings = {"temperature": config.temperature, "top_p": config.topp, "seed": config.seed}
    path = run_dir / "generations.jsonl"
    with atomic_write(path) as f:
        for (prompt, i), response in zip(drawn, responses, strict=True):
            prompt_text, response_text, chosen_text = (
                inputs.tokenizer.decode(tokens, skip_special_tokens=True)
                for tokens in (prompt.tokens, response, prompt.chosen)
            )
            row = {"prompt": prompt_text, "response": response_text, "chosen": chosen_text}
            row |= {"sample": i, **settings}
            f.write(json.dumps(row, ensure_ascii=False) + "\n")
    return path


if __name__ == "__main__":
    main()
