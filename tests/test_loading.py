"""What is loaded is what was saved: weights, token ids and positions that do not fit are refused.

The models are built here, with weights far from uniform."""

import re

import pytest
import torch
from conftest import make_model, make_tokenizer, same_weights, save_model
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from preflab.modeling.loading import build_policy, build_reference, load_model
from preflab.modeling.weights_io import load_archive
from preflab.rewards.models import classifier, contrastivedistill, reward_model
from preflab.settings.keys import CONFIG_DIR
from utils import ConfigError

WRAPPERS = ("_orig_mod.", "module.", "model.", "module._orig_mod.", "_fsdp_wrapped_module.")


def model_config(path, **more):
    defaults = OmegaConf.load(CONFIG_DIR / "config.yaml").model
    return OmegaConf.merge(defaults, {"name_or_path": str(path)}, more)


def folder_with(folder, model, state):
    """A model folder whose weights are `state`."""
    model.config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    save_file({key: w.clone() for key, w in state.items()}, folder / "model.safetensors")
    return folder


def without(state, part):
    smaller = {key: w for key, w in state.items() if part not in key}
    assert len(smaller) < len(state)
    return smaller


# ---------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_prefix_that_all_names_share_is_taken_off(tmp_path, architecture, wrapper):
    model = make_model(architecture, seed=5)
    wrapped = {wrapper + key: w for key, w in model.state_dict().items()}
    path = folder_with(tmp_path / "wrapped", model, wrapped)
    for mapped in (False, True):
        loaded = load_model(model_config(path), "float32", mapped=mapped)
        assert same_weights(loaded.state_dict(), model.state_dict())
    other = make_model(architecture, seed=6)
    load_archive(other, path / "model.safetensors")
    assert same_weights(other.state_dict(), model.state_dict())


def test_a_prefix_of_some_names_is_refused(tmp_path):
    model = make_model("llama")
    state = {
        key.replace("layers.1.", "layers._orig_mod.1."): w for key, w in model.state_dict().items()
    }
    path = folder_with(tmp_path / "partly", model, state)
    with pytest.raises(ConfigError, match=r"no weights for model\.layers\.1\..* and \d+ more"):
        load_model(model_config(path), "float32")


@pytest.mark.parametrize("part", ["lm_head", "embed_tokens", "layers.1.mlp.up_proj", "model.norm"])
def test_missing_weights_are_an_error(tmp_path, part):
    model = make_model("llama")
    path = folder_with(tmp_path / "short", model, without(model.state_dict(), part))
    whole = save_model(tmp_path / "whole")
    policy = build_policy(model_config(whole))
    expected = rf"model.name_or_path={re.escape(str(path))} has no weights for \S*{part}.*random"
    with pytest.raises(ConfigError, match=expected):
        build_policy(model_config(path))
    with pytest.raises(ConfigError, match=expected):
        build_reference(model_config(path), policy, training=True)
    if part == "lm_head":  # a body is what a reward model starts from
        build_policy(model_config(path), scalar_head=True)
    else:
        with pytest.raises(ConfigError, match=expected):
            build_policy(model_config(path), scalar_head=True)
    for key in ("archive", "reference_archive"):
        config = model_config(whole, **{key: str(path)})
        with pytest.raises(ConfigError, match=rf"1 missing from the archive: \S*{part}"):
            build_reference(config, policy, training=True)
    with pytest.raises(ConfigError, match=rf"reward.small=.* has no weights for \S*{part}"):
        contrastivedistill(large=str(whole), small=str(path))


def test_a_weight_of_another_shape_is_an_error(tmp_path):
    model = make_model("llama")
    state = model.state_dict() | {"model.norm.weight": torch.ones(3)}
    path = folder_with(tmp_path / "shape", model, state)
    expected = r"no weights for model.norm.weight \(\d+,\) \(in the file: \(3,\)\)"
    with pytest.raises(ConfigError, match=expected):
        load_model(model_config(path), "float32")


def test_only_a_scalar_head_may_be_new(tmp_path):
    path = save_model(tmp_path / "lm")
    model = load_model(model_config(path), "float32", scalar_head=True)
    assert model.score.weight.shape[0] == 1
    AutoModelForSequenceClassification.from_pretrained(path, num_labels=3).save_pretrained(path)
    with pytest.raises(ConfigError, match=r"score.weight \(1, \d+\) \(in the file: \(3, \d+\)\)"):
        load_model(model_config(path), "float32", scalar_head=True)
    with pytest.raises(ConfigError, match=r"has no weights for lm_head.weight"):
        load_model(model_config(path), "float32")


@pytest.mark.parametrize("saved", ["lm_head.weight", "model.embed_tokens.weight"])
def test_tied_weights_are_saved_once(tmp_path, saved):
    model = make_model("llama", seed=3)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    ids = torch.arange(8)[None]
    expected = model(ids).logits
    state = dict(model.state_dict())
    for name in {"lm_head.weight", "model.embed_tokens.weight"} - {saved}:
        del state[name]
    path = folder_with(tmp_path / "tied", model, state)
    loaded = load_model(model_config(path), "float32")
    assert torch.equal(loaded(ids).logits, expected)


def test_reward_models_have_all_weights(tmp_path):
    body = save_model(tmp_path / "lm")
    with pytest.raises(ConfigError, match=r"reward.path=.* has no weights for score.weight"):
        classifier(path=str(body), label="LABEL_1")
    with pytest.raises(ConfigError, match=r"no weights for score.weight .*set reward.head"):
        reward_model(path=str(body))
    whole = AutoModelForSequenceClassification.from_pretrained(body, num_labels=2)
    whole.config.pad_token_id = 257
    wrapped = {"_orig_mod." + key: w for key, w in whole.state_dict().items()}
    score = classifier(path=str(folder_with(tmp_path / "wrapped", whole, wrapped)), label="LABEL_1")
    whole.save_pretrained(tmp_path / "plain")
    make_tokenizer().save_pretrained(tmp_path / "plain")
    texts = ["a", "b"], ["one two", "three"]
    assert score(*texts) == classifier(path=str(tmp_path / "plain"), label="LABEL_1")(*texts)
