"""Entry point: `python generate.py model=... datasets=[hh] model.archive=RUN/LATEST/policy.pt`
writes samples of a policy.

`samples_per_prompt` lines for each prompt of the test split, in `generations.jsonl` of the run
folder: {"prompt", "response", "chosen", "sample", ...}. The samples are those that function=eval
would draw.
"""

import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from preflab.settings.command_line import check_command_line, large_imports, run_config
from preflab.settings.refused import errors_in_one_line
from preflab.settings.run_folder import register_resolvers
from utils import ConfigError, check_writable


def main() -> None:
    check_command_line(sys.argv[1:], "generate.py")
    register_resolvers(purpose="generate")
    # Sampling needs prompts only, so any data set will do; these come first, and what the user says
    # wins.
    sys.argv[1:1] = ["function=eval", "loss=sft"]
    run_config(run)


@hydra.main(version_base="1.3", config_path="config", config_name="config")
def run(config: DictConfig) -> None:
    with errors_in_one_line():
        print(f"samples: {generate(config, Path(HydraConfig.get().runtime.output_dir))}")


def generate(config: DictConfig, run_dir: Path) -> Path:
    """Sample responses to `n_eval_examples` test prompts; returns the file."""
    # These import torch, and a mistake on the command line is answered before.
    with large_imports():
        from preflab.checks import check_settings
        from preflab.distributed.console import configure_logging
        from preflab.evaluation.generations import write_generations
        from preflab.evaluation.worklist import expand_archives
        from preflab.execution import load_inputs, register_built_in
        from preflab.serving.checks import check_policy_only
        from preflab.settings.load import validate
        from preflab.settings.values import changed, temperatures
        from preflab.training.registry import find_trainer

    register_built_in()
    configure_logging()
    settings = validate(config)
    if find_trainer(settings.trainer).place is not None:
        raise ConfigError(
            f"trainer={settings.trainer}: generate.py samples in one process; leave it out, or use"
            " train.py function=eval"
        )
    check_policy_only(settings.sampler)
    loss, sources = check_settings(settings)
    archives = expand_archives(settings.model.archive)
    for key, values in (("temperature", temperatures(settings)), ("model.archive", archives)):
        if len(values) > 1:
            raise ConfigError(
                f"{key} gives {len(values)} values, and generate.py samples from one policy at one"
                " temperature; use train.py function=eval"
            )
    one = changed(settings, temperature=temperatures(settings)[0], model={"archive": archives[0]})
    path = run_dir / "generations.jsonl"
    check_writable(run_dir, "local_run_dir")
    inputs = load_inputs(one, sources, loss)
    write_generations(path, one, inputs.tokenizer, inputs.data["test"])
    return path


if __name__ == "__main__":
    main()
