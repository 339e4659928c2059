"""What `model.name_or_path` and archives may name: shards, adapters, GGUF files, run folders."""

import json
import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    final_weights,
    make_model,
    make_tokenizer,
    run_here,
    save_model,
    small_run,
)
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from preflab.batching.packing import Layout, lay_out
from preflab.modeling import model_source as sources
from preflab.modeling.blocks import cast
from preflab.modeling.loading import (
    build_policy,
    build_reference,
    check_model,
    load_model,
    load_tokenizer,
)
from preflab.modeling.model_checks import warn_about_bfloat16
from preflab.modeling.model_source import model_source, weight_files
from preflab.modeling.weights_io import read_archive
from preflab.settings.keys import CONFIG_DIR
from trainers import BasicTrainer
from utils import ConfigError

sys.path.insert(0, str(ROOT / "scripts"))

from merge_adapter import merge

TREES = [([5, 6, 7], [[8, 9, 10], [11]]), ([12, 13], [[14, 15, 16, 17]])]


def settings(folder, **more):
    defaults = OmegaConf.load(CONFIG_DIR / "config.yaml").model
    return OmegaConf.merge(defaults, {"name_or_path": str(folder)}, more)


def saved(folder: Path, **config) -> Path:
    """A folder of a random model with these values in its config."""
    plain = make_model("llama").config.to_dict()
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**plain | config))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def logps(scorer) -> torch.Tensor:
    from preflab.modeling.logprobs import score_responses

    with torch.no_grad():
        return score_responses(scorer, lay_out(TREES, Layout("padded", pad_id=0))).logps


# ------------------------------------------------------------------------------------ by the index


def sharded(folder: Path) -> Path:
    """A model folder of several shards."""
    model = make_model("llama")
    model.save_pretrained(folder, max_shard_size="20KB")
    make_tokenizer().save_pretrained(folder)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    return folder


@pytest.mark.parametrize(
    "leftover",
    ["model-00099-of-00099.safetensors", "consolidated.safetensors"],
)
def test_files_beside_the_index_are_not_read(tmp_path, leftover):
    folder = sharded(tmp_path / "model")
    before = read_archive(folder)
    files = weight_files(settings(folder), None)
    other = {name: torch.zeros_like(value) for name, value in before.items()}
    save_file(other, folder / leftover)
    torch.save(other, folder / "pytorch_model.bin")
    again = read_archive(folder)
    assert all(torch.equal(again[name], value) for name, value in before.items())
    assert weight_files(settings(folder), None) == files


def test_one_file_is_read_before_an_index_as_transformers_does(tmp_path):
    folder = sharded(tmp_path / "model")
    save_file({"lm_head.weight": torch.ones(2)}, folder / "model.safetensors")
    assert list(read_archive(folder)) == ["lm_head.weight"]


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path / "model")
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    for read in (read_archive, lambda path: weight_files(settings(path), None)):
        with pytest.raises(ConfigError, match=shard.name):
            read(folder)


def test_an_index_names_files_beside_it_only(tmp_path):
    folder = sharded(tmp_path / "model")
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["lm_head.weight"] = "../other.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"names \.\./other\.safetensors, which is not a file"):
        read_archive(folder)


# ---------------------------------------------------------------------------------------- adapters


@pytest.fixture(scope="module")
def adapted(tmp_path_factory) -> tuple[Path, Path, torch.Tensor]:
    """A base, an adapter on it, and the log-probs of both together by peft."""
    from peft import LoraConfig, get_peft_model

    from preflab.modeling.logprobs import Scorer

    folder = tmp_path_factory.mktemp("adapted")
    base = save_model(folder / "base")
    torch.manual_seed(3)
    model = get_peft_model(
        make_model("llama").from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder / "adapter")
    return base, folder / "adapter", logps(Scorer(model.eval()))


def test_an_adapter_folder_names_a_model_an_archive_and_a_reference(adapted):
    base, adapter, expected = adapted
    plain = build_policy(settings(base))
    policies = [
        build_policy(settings(adapter)),
        build_policy(settings(base, archive=str(adapter))),
        build_reference(settings(base, reference_archive=str(adapter)), plain, training=True),
    ]
    assert not torch.allclose(logps(plain), expected, atol=1e-2)
    for policy in policies:
        torch.testing.assert_close(logps(policy), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("as_archive", [False, True])
def test_an_adapter_on_a_bfloat16_file_is_merged_in_the_dtype_it_is_used_in(
    adapted, tmp_path, as_archive
):
    base, adapter, _ = adapted
    half = tmp_path / "half"
    make_model("llama").from_pretrained(base, dtype=torch.bfloat16).save_pretrained(half)
    make_tokenizer().save_pretrained(half)
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text()) | {"base_model_name_or_path": str(half)}
    file.write_text(json.dumps(content))
    given = settings(tmp_path / "adapter")
    if as_archive:
        given = settings(half, archive=str(tmp_path / "adapter"))
    loaded = build_policy(given).model.state_dict()
    mapped = build_policy(given, place=lambda scorer, dtype: cast(scorer.model, dtype))
    for name, weight in mapped.model.state_dict().items():
        torch.testing.assert_close(weight, loaded[name], atol=0, rtol=0)


def test_an_adapter_changes_the_key_of_cached_log_probs(adapted):
    base, adapter, _ = adapted
    plain = weight_files(settings(base), None)
    assert set(weight_files(settings(adapter), None)) > set(plain)
    assert set(weight_files(settings(base), adapter)) > set(plain)


def test_an_adapter_whose_base_is_gone_names_both(adapted, tmp_path):
    _, adapter, _ = adapted
    shutil.copytree(adapter, tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text()) | {"base_model_name_or_path": "/nowhere/base"}
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match=r"adapter is an adapter.*=/nowhere/base is not here"):
        model_source(str(tmp_path / "adapter"))


def test_an_adapter_of_another_model_is_refused(adapted, tmp_path):
    _, adapter, _ = adapted
    other = saved(tmp_path / "other", intermediate_size=32)
    with pytest.raises(ConfigError, match=r"model\.archive=.* of base_model.*the adapter has"):
        build_policy(settings(other, archive=str(adapter)))


def test_adapters_on_adapters_and_beside_models_are_refused(adapted, tmp_path):
    base, adapter, _ = adapted
    nested = tmp_path / "nested"
    shutil.copytree(adapter, nested)
    file = nested / "adapter_config.json"
    content = json.loads(file.read_text()) | {"base_model_name_or_path": str(adapter)}
    file.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="which is an adapter too; merge that one"):
        model_source(str(nested))
    shutil.copytree(base, tmp_path / "both")
    shutil.copy(adapter / "adapter_config.json", tmp_path / "both")
    with pytest.raises(ConfigError, match="holds a whole model and an adapter"):
        model_source(str(tmp_path / "both"))
    config = OmegaConf.create({"max_length": 64, "model": settings(adapter, lora={"r": 2})})
    with pytest.raises(ConfigError, match="is an adapter itself"):
        check_model(config, BasicTrainer)


def test_an_exported_adapter_names_the_archive_it_was_trained_on(adapted, tmp_path, imdb_dir):
    base, _, _ = adapted
    torch.manual_seed(5)
    make_model("llama", seed=9).save_pretrained(tmp_path / "archive")
    run_here(
        *small_run(
            base,
            imdb_dir,
            tmp_path / "run",
            f"model.archive={tmp_path / 'archive'}",
            "model.lora.r=2",
            "n_examples=8",
            "sample_during_eval=false",
        )
    )
    content = json.loads((tmp_path / "run" / "LATEST/adapter/adapter_config.json").read_text())
    assert content["base_model_name_or_path"] == str(tmp_path / "archive")


# --------------------------------------------------------------------------------- LoRA everywhere


@pytest.mark.parametrize(
    "targets", [["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head", "q_proj"]]
)
def test_an_adapter_on_embeddings_is_exported_as_it_was_trained(tmp_path, imdb_dir, targets):
    from peft import PeftModel

    from preflab.modeling.logprobs import Scorer

    base = saved(tmp_path / "base", tie_word_embeddings=False)
    run = tmp_path / "run"
    run_here(
        *small_run(
            base,
            imdb_dir,
            run,
            "model.lora.r=4",
            f"model.lora.target_modules={targets}",
            "lr=1e-2",
            "optimizer=AdamW",
            "sample_during_eval=false",
        )
    )
    model = settings(base, lora={"r": 4, "target_modules": targets})
    trained = logps(build_policy(model, checkpoint=run / "LATEST"))
    hf = Scorer(AutoModelForCausalLM.from_pretrained(run / "LATEST" / "hf").eval())
    plain = AutoModelForCausalLM.from_pretrained(base)
    peft = Scorer(PeftModel.from_pretrained(plain, run / "LATEST" / "adapter").eval())
    assert (trained - logps(build_policy(settings(base)))).abs().max() > 1e-3
    for exported in (hf, peft):
        torch.testing.assert_close(logps(exported), trained, atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_on_tied_embeddings_is_refused_before_weights_are_read(tmp_path, target):
    base = saved(tmp_path / "base", tie_word_embeddings=True)
    (base / "model.safetensors").unlink()
    model = settings(base, lora={"r": 2, "target_modules": [target]})
    config = OmegaConf.create({"max_length": 64, "model": model})
    with pytest.raises(ConfigError, match=f"{target} shares its weight with another module"):
        check_model(config, BasicTrainer)


# ------------------------------------------------------------------------------------ GGUF, folders


def write_gguf(path: Path, model, tokenizer) -> None:
    """A llama model in float32, with the tensor names of the format."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(config.vocab_size)
    vocabulary = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_types([1] * len(vocabulary))
    writer.add_token_merges([f"{vocabulary[65]} {vocabulary[66]}"])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        stem, _, suffix = name.rpartition(".")
        array = tensor.float()
        if stem.endswith(("q_proj", "k_proj")):
            heads = config.num_attention_heads
            heads = config.num_key_value_heads if stem.endswith("k_proj") else heads
            halves = array.reshape(heads, 2, -1, array.shape[-1])  # the format's order of rotation
            array = halves.swapaxes(1, 2).reshape(array.shape)
        writer.add_tensor(f"{names.get_name(stem)}.{suffix}", array.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_training_starts_from_the_weights_of_a_gguf_file(tmp_path, imdb_dir):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    model, tokenizer = make_model("llama"), make_tokenizer()
    file = tmp_path / "model" / "tiny.gguf"
    file.parent.mkdir()
    write_gguf(file, model, tokenizer)
    loaded = load_model(settings(file), "float32")
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, atol=0, rtol=0)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    run = tmp_path / "run"
    run_here(
        *small_run(
            file,
            imdb_dir,
            run,
            "n_examples=8",
            "sample_during_eval=false",
            f"model.tokenizer_name_or_path={tmp_path / 'tokenizer'}",
        )
    )
    first = [row for row in map(json.loads, (run / "metrics.jsonl").open()) if row["step"] == 0]
    assert abs(first[0]["loss/eval"] - 0.6931) < 1e-3
    assert final_weights(run).keys() == load_file(run / "LATEST/hf/model.safetensors").keys()
    config = json.loads((run / "LATEST" / "hf" / "config.json").read_text())
    assert "quantization_config" not in config
    assert not (run / "LATEST" / "hf").is_symlink()  # it is not the adapter of a quantised base


def test_an_adapter_on_a_gguf_file_is_an_adapter_like_any_other(tmp_path, imdb_dir):
    """Its base is the file: it is read as a model, and merged, into the weights of hf/."""
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    file = tmp_path / "model" / "tiny.gguf"
    file.parent.mkdir()
    write_gguf(file, make_model("llama"), make_tokenizer())
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    run = tmp_path / "run"
    more = "n_examples=8", "sample_during_eval=false", "model.lora.r=2", "lr=1e-2"
    tokenizer = f"model.tokenizer_name_or_path={tmp_path / 'tokenizer'}"
    run_here(*small_run(file, imdb_dir, run, tokenizer, *more))
    adapter, trained = run / "LATEST/adapter", load_file(run / "LATEST/hf/model.safetensors")
    assert model_source(str(adapter)).options == {"gguf_file": file.name}
    make_tokenizer().save_pretrained(adapter)  # that of the file is not one that can be read
    merge(adapter, str(file), tmp_path / "merged")
    for state in (
        load_model(settings(adapter), "float32").state_dict(),
        load_file(tmp_path / "merged" / "model.safetensors"),
    ):
        for name, weight in trained.items():
            torch.testing.assert_close(state[name], weight, rtol=0, atol=1e-6)
    assert weight_files(settings(adapter), None)[0] == file
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert "quantization_config" not in config


def test_a_file_that_is_no_gguf_file_is_refused_in_a_line(tmp_path, adapted):
    pytest.importorskip("gguf", reason="the package gguf is not installed")
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"nothing of the sort")
    with pytest.raises(ConfigError, match=r"tiny\.gguf is a file that cannot be read as such"):
        load_model(settings(file), "float32")
    with pytest.raises(ConfigError, match=r"tiny\.gguf is a file that cannot be read") as caught:
        merge(adapted[1], str(file), tmp_path / "merged")
    assert "\n" not in str(caught.value) and not (tmp_path / "merged").exists()


def test_a_gguf_file_without_the_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "tiny.gguf").touch()
    monkeypatch.setattr(sources, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install gguf"):
        model_source(str(tmp_path / "tiny.gguf"))


def test_a_run_or_its_file_says_which_folder_to_give(tmp_path):
    hf = tmp_path / "run" / "step-3" / "hf"
    hf.mkdir(parents=True)
    (tmp_path / "run" / "LATEST").symlink_to("step-3")
    (hf.parent / "policy.pt").touch()
    for name, instead in [
        ("run", "run/LATEST/hf"),
        ("run/LATEST", "run/LATEST/hf"),
        ("run/step-3/policy.pt", "run/step-3/hf"),
    ]:
        with pytest.raises(ConfigError, match=f"give {tmp_path / instead}"):
            model_source(str(tmp_path / name))


@pytest.mark.parametrize("named", ["run", "run/LATEST", "run/LATEST/policy.pt"])
def test_a_run_is_no_tokenizer_and_says_which_folder_is(tmp_path, named):
    folder = save_model(tmp_path / "run" / "LATEST" / "hf")
    (folder.parent / "policy.pt").write_bytes(b"")
    model = settings(folder)
    model.tokenizer_name_or_path = str(tmp_path / named)
    with pytest.raises(ConfigError, match=r"holds no tokenizer; give .*run/LATEST/hf"):
        load_tokenizer(model)
    model.tokenizer_name_or_path = str(folder)
    assert load_tokenizer(model).eos_token_id is not None


@pytest.mark.parametrize(
    "capabilities, more, warns",
    [
        ({"avx2": True, "avx512_bf16": False, "amx_bf16": False}, {}, False),
        ({"avx2": True, "avx512_bf16": False}, {"policy_dtype": "bfloat16"}, True),
        ({"avx2": True}, {"fsdp_policy_mp": "bfloat16"}, True),
        ({"amx_bf16": True}, {"policy_dtype": "bfloat16"}, False),
    ],
)
def test_bfloat16_on_a_cpu_without_units_for_it_warns(
    llama_folder, monkeypatch, caplog, capabilities, more, warns
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with caplog.at_level(logging.WARNING):
        warn_about_bfloat16(settings(llama_folder, **more))
    assert ("no units for bfloat16" in caplog.text) == warns
