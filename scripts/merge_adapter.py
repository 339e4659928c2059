"""Merge a LoRA adapter into its base model, so that `from_pretrained` reads it without peft.

    python scripts/merge_adapter.py --adapter_model_name RUN/LATEST/adapter \\
        --base_model_name BASE --output_name MERGED

The adapter is a folder with adapter_config.json and adapter_model.safetensors. The base is the
model that it was trained on: a folder, a run, a GGUF file or a hub name. The output must not exist.
The adapter determines the type of the result: a causal language model, or a sequence classifier
with one output (a reward model). Checkpoints of train.py have the merged model in `hf/` already;
this script is for adapters without a checkpoint, and for those of other programs.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from transformers.utils import logging

from preflab.modeling.adapters import add_adapter, read_adapter
from preflab.modeling.model_source import ModelSource, model_source
from preflab.modeling.pretrained import forget_gguf
from preflab.modeling.weights_io import readable
from preflab.settings.refused import errors_in_one_line
from utils import ConfigError, atomic_directory, check_writable, model_folder, path_argument

MODEL_CLASSES = {
    "CAUSAL_LM": (AutoModelForCausalLM, {}),
    "SEQ_CLS": (AutoModelForSequenceClassification, {"num_labels": 1}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--adapter_model_name",
        metavar="A",
        type=path_argument,
        required=True,
        help="folder of the adapter",
    )
    parser.add_argument(
        "--base_model_name",
        metavar="B",
        type=lambda text: str(path_argument(text)),
        required=True,
        help="the model it was trained on",
    )
    parser.add_argument(
        "--output_name", metavar="C", type=path_argument, required=True, help="folder to write"
    )
    arguments = parser.parse_args()
    # transformers would warn about a new head, although the adapter has its weights.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with errors_in_one_line():
        merge(arguments.adapter_model_name, arguments.base_model_name, arguments.output_name)
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
    check_writable(output.parent, "--output_name")
    name, base_name = f"--adapter_model_name {adapter}", f"--base_model_name {base}"
    settings, weights = read_adapter(adapter, name)
    source = model_source(str(model_folder(base)), "--base_model_name")
    if source.adapter is not None:
        raise ConfigError(
            f"{base_name} is an adapter itself; merge it into its own base first, and give the"
            " result"
        )
    model = _read_base(base, source, settings, weights)
    model = add_adapter(model, settings, weights, name, base_name).merge_and_unload()
    with readable("--base_model_name", base):
        if (adapter / "tokenizer_config.json").is_file():
            tokenizer = AutoTokenizer.from_pretrained(adapter)
        else:
            tokenizer = AutoTokenizer.from_pretrained(source.path, **source.options)
    with atomic_directory(output) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _read_base(base: str, source: ModelSource, settings, weights: dict):
    cls, options = MODEL_CLASSES[settings.task_type]
    with readable("--base_model_name", base):
        config = AutoConfig.from_pretrained(source.path, **source.options)
        if getattr(config, "quantization_config", None):
            raise ConfigError(
                f"--base_model_name {base} has quantised weights, into which no adapter is merged;"
                " give the model that they were made from"
            )
        model, loading = cls.from_pretrained(
            source.path, dtype="auto", output_loading_info=True, **source.options, **options
        )
    if source.options:
        forget_gguf(model)
    missing = [
        name for name in loading["missing_keys"] if not any(name in saved for saved in weights)
    ]
    if missing:
        raise ConfigError(
            f"--base_model_name {base} has no {', '.join(sorted(missing)[:3])}, and neither has the"
            " adapter; give the model it was trained on"
        )
    return model


if __name__ == "__main__":
    main()
