"""Archives, tokenizers, and models that are refused before or while they load."""

import copy

import pytest
import torch
from conftest import (
    ARCHITECTURES,
    NAMED_AS_ANOTHER,
    make_model,
    make_tokenizer,
    read_rows,
    run_here,
    same_weights,
    save_model,
    small_run,
)
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from preflab.modeling.loading import build_policy, build_reference, load_tokenizer
from preflab.modeling.weights_io import archive_state, load_archive, read_archive
from preflab.settings.keys import CONFIG_DIR
from utils import ConfigError


def model_config(path, **more):
    defaults = OmegaConf.load(CONFIG_DIR / "config.yaml").model
    return OmegaConf.merge(defaults, {"name_or_path": str(path)}, more)


def policy_pt(path, model, **extra_state):
    torch.save(
        {"step_idx": 7, "state": model.state_dict() | extra_state, "metrics": {"loss/eval": 0.5}},
        path,
    )
    return path


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - NAMED_AS_ANOTHER))
def test_archives_of_every_form_load(tmp_path, architecture):
    trained = make_model(architecture, seed=5)
    expected = make_model(architecture, seed=5).state_dict()
    forms = {"policy.pt": policy_pt(tmp_path / "policy.pt", trained)}
    torch.save(trained.state_dict(), tmp_path / "plain.pt")
    trained.save_pretrained(tmp_path / "folder")
    (tmp_path / "run" / "LATEST").mkdir(parents=True)
    policy_pt(tmp_path / "run" / "LATEST" / "policy.pt", trained)
    save_file({key: w.clone() for key, w in expected.items()}, tmp_path / "weights.safetensors")
    forms |= {
        name: tmp_path / name
        for name in ("plain.pt", "folder", "run", "run/LATEST", "weights.safetensors")
    }
    for name, path in forms.items():
        model = make_model(architecture, seed=6)
        assert not same_weights(model.state_dict(), expected)
        load_archive(model, path)
        assert same_weights(model.state_dict(), expected), name


def test_a_saved_archive_uses_the_names_of_published_checkpoints():
    """GPT-NeoX calls its head embed_out there, and so do archives of Pythia models that the
    repository of Rafailov et al. (2023) wrote."""
    model = make_model("gpt_neox")
    head = model.get_output_embeddings().weight
    assert torch.equal(archive_state(model)["embed_out.weight"], head)


def test_archives_of_old_transformers_versions_load(tmp_path):
    """They have causal masks and rotary tables, which are no weights."""
    model = make_model("gpt2", seed=5)
    path = policy_pt(
        tmp_path / "policy.pt",
        model,
        **{
            "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
            "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        },
    )
    other = make_model("gpt2", seed=6)
    load_archive(other, path)
    assert same_weights(other.state_dict(), model.state_dict())
    neox = make_model("gpt_neox", seed=5)
    old = {key.replace("lm_head.", "embed_out."): w for key, w in neox.state_dict().items()}
    torch.save(
        {
            "step_idx": 1,
            "state": old | {"gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(2)},
            "metrics": {},
        },
        path,
    )
    other = make_model("gpt_neox", seed=6)
    load_archive(other, path)
    assert same_weights(other.state_dict(), neox.state_dict())


def test_an_archive_of_another_shape_or_architecture_is_refused_by_tensor_name(tmp_path):
    path = policy_pt(tmp_path / "policy.pt", make_model("gpt2"))
    with pytest.raises(
        ConfigError,
        match=(
            r"does not fit LlamaForCausalLM .*unknown to the model: transformer.*missing from the"
            r" archive"
        ),
    ):
        load_archive(make_model("llama"), path)
    state = make_model("gpt2").state_dict()
    state["transformer.h.1.mlp.c_fc.weight"] = torch.zeros(3, 3)
    torch.save(state, path)
    with pytest.raises(
        ConfigError,
        match=r"1 of another shape: transformer.h.1.mlp.c_fc.weight \(3, 3\) against \(32, 128\)",
    ):
        load_archive(make_model("gpt2"), path)
    del state["transformer.h.1.mlp.c_fc.weight"]
    torch.save(state, path)
    with pytest.raises(ConfigError, match=r"1 missing .*: transformer\.h\.1\.mlp\.c_fc\.weight"):
        load_archive(make_model("gpt2"), path)


class Evil:
    def __reduce__(self):
        return (eval, ("1 + 1",))


def test_an_archive_is_data_and_runs_no_code(tmp_path):
    torch.save({"state": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ConfigError, match="weights_only"):
        read_archive(tmp_path / "evil.pt")
    (tmp_path / "text.pt").write_text("no archive")
    with pytest.raises(ConfigError, match=r"cannot be read|can be read safely"):
        read_archive(tmp_path / "text.pt")
    with pytest.raises(ConfigError, match="no such file"):
        read_archive(tmp_path / "nothing.pt")
    with pytest.raises(ConfigError, match=r"hf, policy\.pt, LATEST"):
        read_archive(tmp_path)


@pytest.mark.parametrize("function, reference_moves", [("train", True), ("eval", False)])
def test_the_archive_is_the_policy_and_in_training_the_reference(
    tmp_path, llama_folder, function, reference_moves
):
    start, trained = make_model("llama", seed=0), make_model("llama", seed=5)
    config = model_config(llama_folder, archive=str(policy_pt(tmp_path / "policy.pt", trained)))
    policy = build_policy(config)
    reference = build_reference(config, policy, training=function == "train")
    assert same_weights(policy.model.state_dict(), trained.state_dict())
    assert same_weights(
        reference.model.state_dict(), (trained if reference_moves else start).state_dict()
    )
    assert not any(p.requires_grad for p in reference.model.parameters())
    config.reference_archive = str(policy_pt(tmp_path / "other.pt", make_model("llama", seed=8)))
    reference = build_reference(config, policy, training=function == "train")
    assert same_weights(reference.model.state_dict(), make_model("llama", seed=8).state_dict())


def test_training_from_an_archive_starts_at_policy_equals_reference(
    tmp_path, llama_folder, imdb_dir
):
    archive = policy_pt(tmp_path / "policy.pt", make_model("llama", seed=5))
    run_here(
        *small_run(
            llama_folder, imdb_dir, tmp_path / "run", f"model.archive={archive}", "n_examples=8"
        )
    )
    run_here(
        *small_run(
            llama_folder, imdb_dir, tmp_path / "eval", f"model.archive={archive}", "function=eval"
        )
    )
    first, evaluated = (read_rows(tmp_path / name / "metrics.jsonl")[0] for name in ("run", "eval"))
    assert first["samples_eval/kl"] == 0
    assert evaluated["samples_eval/kl"] > 1


def test_the_reference_of_lora_is_the_model_with_the_adapter_off(llama_folder):
    config = model_config(llama_folder, lora={"r": 4})
    policy = build_policy(config)
    reference = build_reference(config, policy, training=True)
    assert reference.model is policy.model
    ids = torch.arange(8)[None]
    plain = make_model("llama")(ids).logits
    with torch.no_grad():
        for name, p in policy.model.named_parameters():
            if "lora_B" in name:
                p.add_(0.1)
        with policy.active():
            adapted = policy.causal_lm(ids).logits
        with reference.active():
            off = reference.causal_lm(ids).logits
    assert torch.allclose(off, plain, atol=1e-5) and not torch.allclose(adapted, plain, atol=1e-2)


def test_dtypes(llama_folder):
    config = model_config(llama_folder, policy_dtype="bfloat16", reference_dtype="float64")
    policy = build_policy(config)
    assert {p.dtype for p in policy.model.parameters()} == {torch.bfloat16}
    reference = build_reference(config, policy, training=True)
    assert {p.dtype for p in reference.model.parameters()} == {torch.float64}


def test_from_scratch_is_random_and_follows_the_seed(llama_folder):
    models = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        models.append(
            build_policy(model_config(llama_folder, from_scratch=True)).model.state_dict()
        )
    assert same_weights(models[0], models[1]) and not same_weights(models[0], models[2])
    assert not same_weights(models[0], make_model("llama").state_dict())


def test_a_reward_model_starts_from_a_language_models_archive(tmp_path, llama_folder):
    trained = make_model("llama", seed=5)
    config = model_config(llama_folder, archive=str(policy_pt(tmp_path / "policy.pt", trained)))
    model = build_policy(config, scalar_head=True).model
    assert isinstance(model, AutoModelForSequenceClassification._model_mapping[type(model.config)])
    body = {key: w for key, w in model.state_dict().items() if not key.startswith("score.")}
    expected = {key: w for key, w in trained.state_dict().items() if not key.startswith("lm_head.")}
    assert same_weights(body, expected)


def test_a_tokenizer_without_eos_is_refused_and_a_missing_pad_is_not(tmp_path):
    tokenizer = copy.deepcopy(make_tokenizer())
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path / "padless")
    loaded = load_tokenizer(model_config(tmp_path / "padless"))
    assert loaded.pad_token_id == loaded.eos_token_id
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path / "endless")
    with pytest.raises(ConfigError, match="no EOS token"):
        load_tokenizer(model_config(tmp_path / "endless"))
    save_model(tmp_path / "other", "gpt2")
    config = model_config(tmp_path / "padless", tokenizer_name_or_path=str(tmp_path / "other"))
    assert load_tokenizer(config).pad_token == "<|pad|>"
