"""Entry point: DPO on pairs of a risk-averse and a risk-neutral answer, with argparse flags.

    python train_risk_preferences.py --model_name microsoft/phi-2 --dataset risk_averse_dpo.json \\
        --epochs 3 --beta 0.5 --batch_size 4 --lr 1e-5

The flags are translated to a command line of train.py, which is printed and run. The pairs come
from scripts/dpo_data_generate.py; the trained model is RUN/LATEST/hf, for `from_pretrained`. Other
settings of train.py, such as `wandb.enabled=false`, are given at the end.
"""

import argparse
import shlex
import sys
from pathlib import Path

import train
from preflab.settings.overrides import model_overrides, quoted

# The setting of train.py for each flag. Values are passed on as typed, and train.py checks them.
KEYS = {
    "beta": "loss.beta",
    "epochs": "n_epochs",
    "batch_size": "batch_size",
    "lr": "lr",
    "wandb_project": "wandb.project",
    "seed": "seed",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "max_length": "max_length",
    "max_prompt_length": "max_prompt_length",
    "output_dir": "local_run_dir",
}


def main() -> None:
    """Print the command line of train.py, and run it."""
    overrides = translate(sys.argv[1:])
    print(f"python train.py {shlex.join(overrides)}", flush=True)
    sys.argv = [str(Path(__file__).with_name("train.py")), *overrides]
    train.main()


def translate(arguments: list[str]) -> list[str]:
    """The overrides of train.py for the flags of this script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model_name", default="microsoft/phi-2", help="folder, hub name, or name in config/model")
    add("--dataset", required=True, help="pairs: a file, a folder or a hub name")
    add("--epochs", default="3", help="passes over the pairs")
    add("--beta", default="0.5", help="KL penalty; a larger one stays closer to the initial model")
    add("--batch_size", default="4", help="pairs per optimizer step")
    add("--lr", default="1e-5", help="learning rate")
    add("--wandb_project", default="risk-averse-dpo", help="wandb project of the run")
    add("--output_dir", help="the run folder; by default a new one in runs/")
    add("--seed", help="of the order of the pairs and of the samples")
    add("--gradient_accumulation_steps", help="least number of microbatches of a step")
    add("--max_length", help="tokens of prompt and answer together")
    add("--max_prompt_length", help="tokens to which the prompt of a too long pair is cut")
    add("overrides", nargs="*", metavar="KEY=VALUE", help="further settings of train.py")
    given = vars(parser.parse_args(arguments))
    overrides = [
        *model_overrides(given["model_name"]),
        f"datasets=[{quoted(given['dataset'])}]",
        "loss=dpo",
    ]
    overrides += [
        f"{key}={quoted(given[flag])}" for flag, key in KEYS.items() if given[flag] is not None
    ]
    return overrides + given["overrides"]


if __name__ == "__main__":
    main()
