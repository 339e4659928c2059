"""Samples are the policy's, whatever its folder says beside its weights, and where they end."""

import json
import logging
import shutil

import pytest
import torch
from conftest import make_tokenizer, save_model
from transformers import AutoModelForCausalLM, DynamicCache, LogitsProcessorList

from preflab.modeling import generation
from preflab.modeling.generation import sample
from preflab.modeling.logprobs import Scorer

PROMPT, N = [256, *b"abab"], 12
EVEN = list(range(0, 256, 2))

IGNORED = {
    "repetition_penalty": {"repetition_penalty": 5.0},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "suppress_tokens": {"suppress_tokens": EVEN},
    "begin_suppress_tokens": {"begin_suppress_tokens": EVEN},
    "bad_words": {"bad_words_ids": [[token] for token in EVEN]},
    "sequence_bias": {"sequence_bias": [[[98], 100.0]]},
    "forced_eos": {"forced_eos_token_id": 256},
    "decay": {"exponential_decay_length_penalty": [0, 100.0]},
    "beams": {"num_beams": 3},
    "beam_groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1.0},
    "sequences": {"num_beams": 3, "num_return_sequences": 2},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "dola": {"dola_layers": "high"},
    "guidance": {"guidance_scale": 3.0},
    "stop_strings": {"stop_strings": ["a"]},
    "max_time": {"max_time": 1e-9},
    "dict": {"return_dict_in_generate": True, "output_scores": True},
    "use_cache": {"use_cache": False},
}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def with_values(source, folder, values, file="generation_config.json"):
    """A copy of a model folder with further values in one of its JSON files."""
    shutil.copytree(source, folder)
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return folder


def draw(model, **options):
    prompts = [PROMPT, [256], [256, *b"another prompt"]]
    return sample(
        Scorer(model), make_tokenizer(), prompts, keys=range(3), max_new_tokens=N, **options
    )


def drawn_by_transformers(model):
    """A greedy response by `generate` with the model's own generation config."""
    ids = torch.tensor([PROMPT])
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=N,
        do_sample=False,
        past_key_values=DynamicCache(config=model.config),
        pad_token_id=257,
    )[0].tolist()


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("plain") / "model", "llama")


@pytest.fixture(scope="module")
def plain_samples(plain):
    model = load(plain)
    return draw(model), draw(model, temperature=0), drawn_by_transformers(model)


@pytest.mark.parametrize("name", IGNORED)
def test_a_generation_config_changes_no_sample(plain, plain_samples, tmp_path, name):
    model = load(with_values(plain, tmp_path / "model", IGNORED[name]))
    own = model.generation_config
    assert (draw(model), draw(model, temperature=0)) == plain_samples[:2]
    assert model.generation_config is own  # exported folders keep it
    try:
        theirs = drawn_by_transformers(model)
    except ValueError:
        assert name in ("beam_groups", "contrastive", "dola", "stop_strings")  # refused
        return
    assert theirs != plain_samples[2]


@pytest.mark.parametrize("values", [{"min_new_tokens": N}, {"min_length": N + len(PROMPT)}])
def test_a_response_may_end_before_the_minimum_of_the_model(plain, tmp_path, values):
    free, held = load(plain), load(with_values(plain, tmp_path / "model", values))
    for model in (free, held):
        with torch.no_grad():
            model.lm_head.weight[256] = model.lm_head.weight[:256].mean(0)
            model.lm_head.weight.mul_(0.05)  # every token, and the end, about equally likely
    prompts = [PROMPT] * 200
    options = {"keys": range(200), "max_new_tokens": N, "batch_size": 200}
    ours, theirs = (sample(Scorer(m), make_tokenizer(), prompts, **options) for m in (free, held))
    assert ours == theirs and any(len(response) < N for response in ours)
    [generated] = {
        held.generate(
            torch.tensor([PROMPT]),
            attention_mask=torch.ones(1, len(PROMPT)),
            max_new_tokens=N,
            do_sample=False,
            pad_token_id=257,
            logits_processor=LogitsProcessorList([_EndNow()]),
        ).shape[1]
    }
    assert generated == N + len(PROMPT)


class _EndNow:
    """Makes the end by far the likeliest token."""

    def __call__(self, input_ids, scores):
        return scores.index_fill(1, torch.tensor([256]), 1e4).where(scores > -torch.inf, scores)


def test_use_cache_false_in_the_model_config_changes_no_sample(plain, plain_samples, tmp_path):
    folder = with_values(plain, tmp_path / "model", {"use_cache": False}, "config.json")
    for keeps_generation_config in (True, False):
        if not keeps_generation_config:
            (folder / "generation_config.json").unlink()
        assert draw(load(folder)) == plain_samples[0]


def test_ignored_values_are_logged_once(plain, tmp_path, caplog):
    caplog.set_level(logging.INFO, "preflab")
    generation._log_ignored.cache_clear()
    draw(load(plain))
    assert not caplog.messages
    values = {"repetition_penalty": 1.1, "do_sample": True, "use_cache": False, "num_beams": 1}
    model = load(with_values(plain, tmp_path / "model", values))
    for _ in range(2):
        draw(model)
    [message] = caplog.messages
    assert message.endswith("{'do_sample': True, 'repetition_penalty': 1.1, 'use_cache': False}")
