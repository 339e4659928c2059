"""scripts/merge_adapter.py: a merged model computes what base and adapter compute together, and an
adapter that does not fit is refused."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    make_model,
    make_tokenizer,
    run_command,
    run_here,
    save_model,
    small_run,
)
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from utils import ConfigError

sys.path.insert(0, str(ROOT / "scripts"))

from merge_adapter import main, merge

TASKS = {
    "CAUSAL_LM": (AutoModelForCausalLM, {}),
    "SEQ_CLS": (AutoModelForSequenceClassification, {"num_labels": 1}),
}
TEXT = torch.randint(256, (3, 12), generator=torch.Generator().manual_seed(0))


def train_adapter(base: Path, folder: Path, task: str = "CAUSAL_LM", **more) -> Path:
    """An adapter on all linear layers with random values in every tensor, those of a classifier's
    head included."""
    cls, options = TASKS[task]
    torch.manual_seed(1)
    model = get_peft_model(
        cls.from_pretrained(base, **options),
        LoraConfig(r=4, target_modules="all-linear", task_type=task, **more),
    )
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    model.config.pad_token_id = 257  # classifiers look for the last token by it
    return model.eval()(TEXT).logits


@pytest.mark.parametrize("task", sorted(TASKS))
def test_merged_computes_what_base_and_adapter_do(llama_folder, tmp_path, task):
    adapter = train_adapter(llama_folder, tmp_path / "adapter", task)
    merge(adapter, str(llama_folder), tmp_path / "merged")
    cls, options = TASKS[task]
    base = cls.from_pretrained(llama_folder, **options)
    both = logits(PeftModel.from_pretrained(base, adapter))
    merged, info = cls.from_pretrained(tmp_path / "merged", output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(merged), both, rtol=0, atol=1e-5)
    assert (both - logits(cls.from_pretrained(llama_folder, **options))).abs().max() > 0.1
    if task == "SEQ_CLS":  # the head that was trained, not a new one
        trained = load_file(adapter / "adapter_model.safetensors")
        assert torch.equal(merged.score.weight, trained["base_model.model.score.weight"])
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert tokenizer("abc")["input_ids"] == make_tokenizer()("abc")["input_ids"]


@pytest.mark.parametrize("loss", ["dpo", "bradley_terry"])
def test_the_merged_adapter_of_a_checkpoint_equals_its_hf_folder(
    llama_folder, imdb_dir, tmp_path, loss, monkeypatch, capsys
):
    more = (
        "model.lora.r=4",
        f"loss={loss}",
        "n_examples=16",
        "sample_during_eval=false",
        "lr=1e-2",
    )
    run_here(*small_run(llama_folder, imdb_dir, tmp_path / "run", *more))
    arguments = {
        "--adapter_model_name": tmp_path / "run" / "LATEST" / "adapter",
        "--base_model_name": llama_folder,
        "--output_name": tmp_path / "merged",
    }
    monkeypatch.setattr(
        sys,
        "argv",
        ["merge_adapter.py", *(str(word) for pair in arguments.items() for word in pair)],
    )
    main()
    assert capsys.readouterr().out.endswith(
        f"{llama_folder} with {arguments['--adapter_model_name']} merged into it\n"
    )
    ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "merged", tmp_path / "run" / "LATEST" / "hf")
    )
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)
    base = load_file(llama_folder / "model.safetensors")
    assert any(not torch.equal(ours[name], base[name]) for name in ours.keys() & base)


def no_folder(adapter, base):
    shutil.rmtree(adapter)


def no_weights(adapter, base):
    (adapter / "adapter_model.safetensors").unlink()


def no_settings(adapter, base):
    (adapter / "adapter_config.json").write_text("{}")


def broken_weights(adapter, base):
    (adapter / "adapter_model.safetensors").write_bytes(b"nothing")


def another_task(adapter, base):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "TOKEN_CLS"}))


def another_architecture(adapter, base):
    save_model(base, "gpt2")


def fewer_layers(adapter, base):
    model = make_model("llama")
    del model.model.layers[1]
    model.config.num_hidden_layers = 1
    model.save_pretrained(base)


def more_layers(adapter, base):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if ".layers.1." not in name},
        adapter / "adapter_model.safetensors",
    )


def another_width(adapter, base):
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {
            name: value[:, :-1].contiguous() if "lora_A" in name else value
            for name, value in weights.items()
        },
        adapter / "adapter_model.safetensors",
    )


def no_base(adapter, base):
    shutil.rmtree(base)


@pytest.mark.parametrize(
    "damage, message",
    [
        (no_folder, "is no folder with an adapter_config.json"),
        (no_weights, "holds no adapter_model.safetensors"),
        (no_settings, "cannot be read|an adapter of type"),
        (broken_weights, "cannot be read"),
        (another_task, "LORA for TOKEN_CLS; accepted: LORA for CAUSAL_LM or SEQ_CLS"),
        (another_architecture, "does not fit"),
        (fewer_layers, "layers.1.*and the base takes none, and so on for"),
        (more_layers, "layers.1.*the adapter has none"),
        (another_width, r"does not fit .* the adapter has \(4, 63\) and the base takes \(4, 64\)"),
        (no_base, "is neither a folder here nor a name on a reachable hub"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_is_written(
    llama_folder, tmp_path, damage, message
):
    base = shutil.copytree(llama_folder, tmp_path / "base")
    adapter = train_adapter(base, tmp_path / "adapter")
    damage(adapter, base)
    before = set(tmp_path.iterdir())
    with pytest.raises(ConfigError, match=message) as caught:
        merge(adapter, str(base), tmp_path / "merged")
    assert "\n" not in str(caught.value) and set(tmp_path.iterdir()) == before


def test_a_classifier_without_a_trained_head_is_refused(llama_folder, tmp_path):
    adapter = train_adapter(llama_folder, tmp_path / "adapter", "SEQ_CLS")
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "score" not in name},
        adapter / "adapter_model.safetensors",
    )
    with pytest.raises(ConfigError, match=r"has no score\.weight, and neither has the adapter"):
        merge(adapter, str(llama_folder), tmp_path / "merged")


def test_an_output_that_exists_stays(llama_folder, tmp_path):
    (tmp_path / "merged").mkdir()
    adapter = train_adapter(llama_folder, tmp_path / "adapter")
    with pytest.raises(ConfigError, match="exists; take another name"):
        merge(adapter, str(llama_folder), tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_the_command_prints_its_error_in_one_line(tmp_path):
    result = run_command(
        "scripts/merge_adapter.py",
        "--adapter_model_name",
        tmp_path,
        "--base_model_name",
        "x",
        "--output_name",
        tmp_path / "merged",
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
