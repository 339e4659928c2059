"""Merge a LoRA adapter into its base model, so that `from_pretrained` reads it without peft.

    python scripts/merge_adapter.py --adapter_model_name RUN/LATEST/adapter \\
        --base_model_name BASE --output_name MERGED

The adapter is a folder with adapter_config.json and adapter_model.safetensors. The base is the
model that it was trained on: a folder, a run or a hub name. The output must not exist. The adapter
determines the type of the result: a causal language model, or a sequence classifier with one output
(a reward model). Checkpoints of train.py have the merged model in `hf/` already; this script is for
adapters without a checkpoint, and for those of other programs.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging

from preflab.settings.overrides import fail
from utils import (
    ConfigError,
    PrefLabError,
    atomic_directory,
    model_folder,
)

MODEL_CLASSES = {
    "CAUSAL_LM": (AutoModelForCausalLM, {}),
    "SEQ_CLS": (AutoModelForSequenceClassification, {"num_labels": 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--adapter_model_name", metavar="A", type=Path, required=True, help="folder of the adapter"
    )
    parser.add_argument(
        "--base_model_name", metavar="B", required=True, help="the model it was trained on"
    )
    parser.add_argument(
        "--output_name", metavar="C", type=Path, required=True, help="folder to write"
    )
    arguments = parser.parse_args()
    # transformers would warn about a new head, although the adapter has its weights.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        merge(arguments.adapter_model_name, arguments.base_model_name, arguments.output_name)
    except PrefLabError as error:
        fail(error)
    print(
        f"{arguments.output_name}: {arguments.base_model_name} with"
        f" {arguments.adapter_model_name} merged into it"
    )


def merge(adapter: Path, base: str, output: Path) -> None:
    """Write the merged model and its tokenizer to `output`, complete or not at all, in the dtype of
    the base.

    Raises ConfigError where the adapter is not a LoRA adapter, where names or shapes show that it
    was not trained on the base, and where the output exists.
    """
    if output.exists():
        raise ConfigError(f"--output_name {output} exists; take another name")
    settings, weights = _read_adapter(adapter)
    model = _read_base(base, settings, weights)
    model = _adapted(model, settings, weights, adapter, base).merge_and_unload()
    own = adapter if (adapter / "tokenizer_config.json").is_file() else model_folder(base)
    tokenizer = AutoTokenizer.from_pretrained(own)
    with atomic_directory(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _read_adapter(adapter: Path) -> tuple:
    """The settings of an adapter, and its tensors by name."""
    from peft import PeftConfig
    from safetensors.torch import load_file

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (adapter / name).is_file():
            what = "holds no" if adapter.is_dir() else "is no folder with an"
            raise ConfigError(
                f"--adapter_model_name {adapter} {what} {name}; give the folder of an adapter, such"
                " as RUN/LATEST/adapter"
            )
    try:
        settings = PeftConfig.from_pretrained(adapter)
        weights = load_file(adapter / "adapter_model.safetensors")
    except Exception as error:  # JSON, peft and safetensors raise different errors
        raise ConfigError(
            f"--adapter_model_name {adapter} cannot be read: {str(error).splitlines()[0]}"
        ) from error
    if settings.peft_type != "LORA" or settings.task_type not in MODEL_CLASSES:
        raise ConfigError(
            f"--adapter_model_name {adapter}: an adapter of type {settings.peft_type} for"
            f" {settings.task_type}; accepted: LORA for {' or '.join(MODEL_CLASSES)}"
        )
    return settings, weights


def _read_base(base: str, settings, weights: dict):
    cls, options = MODEL_CLASSES[settings.task_type]
    try:
        model, loading = cls.from_pretrained(
            model_folder(base), dtype="auto", output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"--base_model_name {base} cannot be loaded as {cls.__name__}:"
            f" {str(error).splitlines()[0]}"
        ) from error
    missing = [
        name for name in loading["missing_keys"] if not any(name in saved for saved in weights)
    ]
    if missing:
        raise ConfigError(
            f"--base_model_name {base} has no {', '.join(sorted(missing)[:3])}, and neither has the"
            " adapter; give the model it was trained on"
        )
    return model


def _adapted(model, settings, weights: dict, adapter: Path, base: str):
    """The base with the adapter on it. Every tensor of the adapter must fit, because peft itself
    ignores those that do not."""
    from peft import (
        get_peft_model,
        get_peft_model_state_dict,
        set_peft_model_state_dict,
    )

    try:
        model = get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(
            f"--base_model_name {base} does not fit {adapter}: {str(error).splitlines()[0]}"
        ) from error
    places = {name: tensor.shape for name, tensor in get_peft_model_state_dict(model).items()}
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    if places != shapes:
        [name, *more] = sorted(
            name for name in places.keys() | shapes if places.get(name) != shapes.get(name)
        )
        given, accepted = (
            f"{tuple(of[name])}" if name in of else "none" for of in (shapes, places)
        )
        others = f", and so on for {len(more)} more" if more else ""
        raise ConfigError(
            f"--base_model_name {base} does not fit {adapter}: of {name} the adapter has {given}"
            f" and the base takes {accepted}{others}; give the model it was trained on"
        )
    set_peft_model_state_dict(model, weights)
    return model


if __name__ == "__main__":
    main()
