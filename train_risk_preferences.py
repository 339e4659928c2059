"""Entry point: DPO on pairs of a risk-averse and a risk-neutral answer, in the flags that its users
know.

    python train_risk_preferences.py --model_name microsoft/phi-2 --dataset risk_averse_dpo.json
    --epochs 3 --beta 0.5 --batch_size 4 --lr 1e-5

A translation to the command line of train.py, which is printed and then run. The pairs come from
scripts/dpo_data_generate.py; the model is RUN/LATEST/hf, for `from_pretrained`. Anything else is
given as for train.py, at the end: `wandb.enabled=false`, say.
"""

import argparse
import shlex
import sys
from pathlib import Path

import train
from preflab.settings.overrides import model_overrides, quoted

# What a flag is called in train.py; values go there as they were typed, and are checked there.
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
    overrides = translate(sys.argv[1:])
    print(f"python train.py {shlex.join(overrides)}", flush=True)
    sys.argv = [str(Path(__file__).with_name("train.py")), *overrides]
    train.main()


def translate(arguments: list[str]) -> list[str]:
    """The overrides of train.py that stand for flags of ours."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model_name",
        default="microsoft/phi-2",
        help="folder or hub name, or a name in config/model/",
    )
    parser.add_argument("--dataset", required=True, help="pairs: a file, a folder or a hub id")
    parser.add_argument("--epochs", default="3", help="passes over the pairs")
    parser.add_argument(
        "--beta",
        default="0.5",
        help="the larger, the closer to the model that training starts from",
    )
    parser.add_argument("--batch_size", default="4", help="pairs of an optimizer step")
    parser.add_argument("--lr", default="1e-5", help="learning rate")
    parser.add_argument(
        "--wandb_project", default="risk-averse-dpo", help="project the run belongs to at wandb"
    )
    parser.add_argument("--output_dir", help="the run folder; a new one below runs/ by default")
    parser.add_argument("--seed", help="of the order of the pairs and of the samples")
    parser.add_argument(
        "--gradient_accumulation_steps", help="microbatches that batch_size is split into, at least"
    )
    parser.add_argument("--max_length", help="tokens of prompt and answer together")
    parser.add_argument(
        "--max_prompt_length", help="tokens of a prompt that does not fit otherwise"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="further settings of train.py"
    )
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
