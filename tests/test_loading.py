"""What is loaded is what was saved: weights, token ids and positions that do not fit are refused.

The models are built here, with weights far from uniform."""

import re

import pytest
import torch
from conftest import (
    make_model,
    make_tokenizer,
    read_rows,
    run_here,
    same_weights,
    save_model,
    small_run,
    write_jsonl,
)
from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BertConfig,
    BertLMHeadModel,
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    T5Config,
    XLNetConfig,
)

from preflab.modeling.loading import (
    build_policy,
    build_reference,
    load_model,
    load_tokenizer,
)
from preflab.modeling.logprobs import Scorer
from preflab.modeling.model_checks import check_length
from preflab.modeling.weights_io import load_archive
from preflab.rewards.models import classifier, contrastivedistill, reward_model
from preflab.settings.keys import CONFIG_DIR
from utils import ConfigError, DataError

WRAPPERS = (
    "_orig_mod.",
    "module.",
    "model.",
    "module._orig_mod.",
    "_fsdp_wrapped_module.",
    "base_model.model.",
)


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


@pytest.mark.parametrize("content", [b"", b"[]", b"5", b"\x80\x04}.", None])
@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_a_model_is_an_error(tmp_path, file, content):
    path = save_model(tmp_path / "model")
    whole = (path / file).read_bytes()
    (path / file).write_bytes(whole[: len(whole) // 2] if content is None else content)
    load = load_tokenizer if "tokenizer" in file else lambda config: load_model(config, "float32")
    with pytest.raises(ConfigError, match=r"is a folder that cannot be read as such: .") as error:
        load(model_config(path))
    assert "\n" not in str(error.value)
    if file == "model.safetensors":
        with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
            load_archive(make_model("llama"), path)


def test_a_weight_of_another_shape_is_an_error(tmp_path):
    model = make_model("llama")
    state = model.state_dict() | {"model.norm.weight": torch.ones(3)}
    path = folder_with(tmp_path / "shape", model, state)
    expected = r"no weights for model.norm.weight \(\d+,\) \(in the file: \(3,\)\)"
    with pytest.raises(ConfigError, match=expected):
        load_model(model_config(path), "float32")


@pytest.mark.parametrize("more", ["layers.2.mlp.up_proj.weight", "layers.0.self_attn.q_proj.bias"])
def test_weights_of_further_parts_of_the_model_are_refused(tmp_path, more):
    """config.json is then that of another model, which would compute something else."""
    model = make_model("llama")
    state = model.state_dict() | {f"model.{more}": torch.ones(4)}
    with pytest.raises(
        ConfigError, match=rf"^model.name_or_path=.* no place for.*{more}; give the"
    ):
        load_model(model_config(folder_with(tmp_path / "more", model, state)), "float32")


def test_weights_of_another_head_are_named_and_old_buffers_are_not(tmp_path, caplog):
    model = make_model("llama")
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    path = folder_with(tmp_path / "old", model, model.state_dict() | old)
    assert same_weights(load_model(model_config(path), "float32").state_dict(), model.state_dict())
    assert not caplog.records
    value_head = {"v_head.summary.weight": torch.ones(4)}
    path = folder_with(tmp_path / "value", model, model.state_dict() | value_head)
    load_model(model_config(path), "float32")
    assert "has weights that are not used: v_head.summary.weight" in caplog.text


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_damaged_files_of_weights_are_an_error_of_one_line(tmp_path, suffix):
    model = make_model("llama")
    path = folder_with(tmp_path / "half", model, model.state_dict())
    file = path / "model.safetensors"
    if suffix == "bin":
        file.unlink()
        file = path / "pytorch_model.bin"
        torch.save(model.state_dict(), file)
    file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(ConfigError, match=r"model.name_or_path=.*half is a folder that cannot be"):
        load_model(model_config(path), "float32")
    with pytest.raises(ConfigError, match=rf"archive .*{file.name} is"):
        load_archive(model, path)


def test_weights_that_are_not_finite_are_named_as_such(tmp_path):
    model = make_model("llama")
    state = model.state_dict() | {
        "model.norm.weight": torch.full_like(model.model.norm.weight, torch.nan)
    }
    path = folder_with(tmp_path / "nan", model, state)
    with pytest.raises(ConfigError, match="returns logits that are NaN or infinite"):
        build_policy(model_config(path))


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


# -------------------------------------------------------------------------------------- token ids


def pairs_file(folder, texts):
    rows = [
        {"prompt": f"{text} question {i}", "chosen": f" good {i}", "rejected": f" bad {i}"}
        for i, text in enumerate(texts)
    ]
    return write_jsonl(folder / "pairs.jsonl", rows)


def with_tokens(folder, **special):
    """A model of 258 rows whose tokenizer has further tokens."""
    save_model(folder)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(special)
    tokenizer.save_pretrained(folder)
    return folder


def one_step(model, data, run_dir, *more):
    return run_here(
        *small_run(
            model,
            data.parent,
            run_dir,
            f"datasets=[{data}]",
            "n_examples=8",
            "sample_during_eval=false",
            "debug=true",
            *more,
        )
    )


def test_a_token_without_a_row_is_refused_with_file_and_line(tmp_path):
    model = with_tokens(tmp_path / "model", additional_special_tokens=["<|user|>", "<|bot|>"])
    data = pairs_file(tmp_path, [""] * 5 + ["<|bot|>"] + [""] * 20)
    expected = (
        r"pairs\.jsonl:6: the token '<\|bot\|>' has id 259, and the model .* has 258 rows"
        r".*tokenizer_name_or_path"
    )
    with pytest.raises(DataError, match=expected):
        one_step(model, data, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_token_without_a_row_that_no_text_has_does_no_harm(tmp_path):
    data = pairs_file(tmp_path, [""] * 20)
    one_step(save_model(tmp_path / "plain"), data, tmp_path / "expected")
    model = with_tokens(tmp_path / "model", additional_special_tokens=["<|user|>"])
    one_step(model, data, tmp_path / "run")
    losses = [
        [
            row["loss/train"]
            for row in read_rows(tmp_path / name / "metrics.jsonl")
            if "loss/train" in row
        ]
        for name in ("expected", "run")
    ]
    assert losses[0] and losses[0] == losses[1]


@pytest.mark.parametrize("layout", ["padded", "prefix_shared"])
def test_a_pad_token_without_a_row_does_no_harm(tmp_path, layout):
    data = pairs_file(tmp_path, ["", "a longer", ""] * 8)
    more = (f"layout={layout}", "sample_during_eval=true")
    one_step(save_model(tmp_path / "plain"), data, tmp_path / "expected", *more)
    model = with_tokens(tmp_path / "model", pad_token="[PAD]")
    one_step(model, data, tmp_path / "run", *more)
    for name in ("metrics.jsonl", "samples.jsonl"):
        rows = [
            [
                {key: row[key] for key in row if key.startswith(("loss", "response", "policy"))}
                for row in read_rows(tmp_path / folder / name)
            ]
            for folder in ("expected", "run")
        ]
        assert rows[0] and any(rows[0]) and rows[0] == rows[1]


@pytest.mark.parametrize("special", ["bos_token", "eos_token"])
def test_an_end_or_begin_without_a_row_is_refused(tmp_path, special):
    model = with_tokens(tmp_path / "model", **{special: "<|new|>"})
    expected = rf"the {special[:3].upper()} token '<\|new\|>' has id 258, and the model .* 258 rows"
    with pytest.raises(ConfigError, match=expected):
        load_tokenizer(model_config(model), 258)
    assert getattr(load_tokenizer(model_config(model), 259), special) == "<|new|>"


# ------------------------------------------------------------------------------- causal, positions

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 258,
    "bos_token_id": 256,
    "eos_token_id": 256,
    "pad_token_id": 257,
}


def small(config, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_model_that_is_not_causal_is_refused(is_causal):
    gemma = small(Gemma3TextConfig(**SMALL, head_dim=8, use_bidirectional_attention=not is_causal))
    bert = BertLMHeadModel(
        BertConfig(**{k: v for k, v in SMALL.items() if "key_value" not in k}, is_decoder=is_causal)
    ).eval()
    if is_causal:
        Scorer(gemma).check()
        Scorer(bert)._check_causal(*logits_of(bert))
        return
    with pytest.raises(ConfigError, match="Gemma3ForCausalLM is not causal: a later token changes"):
        Scorer(gemma).check()
    with pytest.raises(ConfigError, match="BertLMHeadModel is not causal"):
        Scorer(bert).check()


def logits_of(model):
    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        return ids, model(ids).logits[0]


@pytest.mark.parametrize("config", [BartConfig(), T5Config()], ids=["bart", "t5"])
def test_an_encoder_decoder_is_refused_by_name(tmp_path, config):
    config.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    data = pairs_file(tmp_path, [""] * 20)
    expected = rf"is an encoder-decoder \(model_type={config.model_type}\).*decoder-only"
    with pytest.raises(ConfigError, match=expected):
        one_step(tmp_path / "model", data, tmp_path / "run")


def longrope(original=40):
    factors = {"short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 8.0, 16.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, **factors}
    return Phi3Config(
        **SMALL,
        sliding_window=None,
        max_position_embeddings=128,
        original_max_position_embeddings=original,
        rope_parameters=rope | {"original_max_position_embeddings": original},
    )


def dynamic(original=40):
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    return LlamaConfig(**SMALL, max_position_embeddings=original, rope_parameters=rope)


def logps_beside(model, other_length):
    """Log-probs of a row of 8 tokens beside one of another length, as padded rows have them."""
    width = max(8, other_length)
    ids = torch.zeros(2, width, dtype=torch.long)
    ids[0, :8] = torch.arange(8)
    ids[1, :other_length] = torch.arange(other_length)
    with torch.no_grad():
        return model(ids, attention_mask=(ids > 0).long()).logits[0, :8].log_softmax(-1)


@pytest.mark.parametrize("config", [longrope(), dynamic()], ids=["longrope", "dynamic"])
def test_rotary_embeddings_follow_the_longest_row_beyond_the_original_length_only(config):
    """The reason for the limit, and that it is not lower than it must be."""
    model = small(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)
    alone = logps_beside(model, 8)
    torch.testing.assert_close(logps_beside(model, 40), alone, rtol=0, atol=1e-4)
    assert (logps_beside(model, 41) - alone).abs().max() > 1e-2 or config.model_type == "llama"
    assert (logps_beside(model, 100) - alone).abs().max() > 1e-2


def test_positions_of_minus_one_are_no_limit():
    check_length(XLNetConfig(), "xlnet", 4096)  # its max_position_embeddings is -1
    with pytest.raises(ConfigError, match="exceeds the 2048 positions"):
        check_length(LlamaConfig(max_position_embeddings=2048), "llama", 4096)


def test_a_length_beyond_the_original_length_is_refused(tmp_path):
    data = pairs_file(tmp_path, [""] * 20)
    expected = {
        "longrope": r"exceeds original_max_position_embeddings=40 of .*rope_type=longrope.*most 40",
        "dynamic": "exceeds the 40 positions",
    }
    for config in (longrope(), dynamic()):
        rope_type = config.rope_parameters["rope_type"]
        folder = tmp_path / rope_type
        small(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        with pytest.raises(ConfigError, match="max_length=41 " + expected[rope_type]):
            one_step(folder, data, folder / "run", "max_length=41")
        assert one_step(folder, data, folder / "run", "max_length=40")
