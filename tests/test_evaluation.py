"""Sampling, KL estimators, rewards and function=eval."""

import json
import math

import pytest
import torch
from conftest import (
    make_model,
    make_tokenizer,
    read_rows,
    run_command,
    run_here,
    save_model,
    scored_rows,
    small_run,
    write_jsonl,
)
from transformers import AutoConfig, AutoModelForSequenceClassification

import sampling
from evaluation import mean_and_error, sample_kl
from layouts import Layout
from logprobs import Scorer
from rewards import REWARDS, build_reward, register_reward
from sampling import InverseCDF, sample
from utils import ConfigError

PROMPTS = [[256, *b"hello"], [256], [256, *b"a much longer prompt than these"], [256, *b"mid one"]]

PADDED = Layout("padded", 257)


def draw(model, prompts=PROMPTS, **options):
    settings = dict(keys=list(range(len(prompts))), max_new_tokens=12, seed=0, batch_size=4) | options
    return sample(Scorer(model), make_tokenizer(), prompts, **settings)


# -------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama", "mistral", "opt"])
def test_greedy_tokens_are_those_of_plain_generate(architecture):
    """With packed weights and a cache of our own, past the point at which the cache first grows."""
    model = make_model(architecture)
    prompt = PROMPTS[2]
    ids = torch.tensor([prompt])
    plain = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=90, do_sample=False, eos_token_id=None, pad_token_id=257)
    [ours] = sample(Scorer(model), make_tokenizer(), [prompt], keys=[0], max_new_tokens=90, temperature=0)
    expected = plain[0, ids.shape[1] :].tolist()
    assert ours == expected[: expected.index(256) + 1 if 256 in expected else None]


def test_packed_weights_are_there_for_sampling_only(monkeypatch):
    model, packed = make_model("gpt2"), []
    product = sampling._packed_linear
    monkeypatch.setattr(sampling, "_packed_linear", lambda *operands: packed.append(1) or product(*operands))
    before = model(torch.tensor([[1, 2, 3]])).logits
    draw(model)
    assert packed
    packed.clear()
    assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, before) and not packed
    draw(model.double())
    assert not packed  # float64 stays float64


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "opt", "gpt_neox"])
@pytest.mark.parametrize("options", [{}, {"temperature": 0}, {"top_p": 0.9, "temperature": 0.7}])
def test_samples_do_not_depend_on_the_batch_they_are_drawn_in(architecture, options):
    model = make_model(architecture, dtype=torch.float64)
    together, alone = draw(model, **options), draw(model, batch_size=1, **options)
    assert together == alone
    assert draw(model, [PROMPTS[2]], keys=[2], **options) == [together[2]]


def test_samples_follow_the_seed():
    model = make_model("llama")
    assert draw(model) == draw(model) != draw(model, seed=1)


def test_greedy_takes_the_most_likely_token():
    model = make_model("llama", dtype=torch.float64)
    for prompt, response in zip(PROMPTS, draw(model, temperature=0)):
        ids = list(prompt)
        for token in response:
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)


def test_a_response_ends_at_its_first_eos():
    model = make_model("llama", scale=1.0)
    responses = sample(Scorer(model), make_tokenizer(), [[256]] * 300, keys=list(range(300)), max_new_tokens=20, seed=0, batch_size=300)
    ended = [r for r in responses if r[-1] == 256]
    assert ended and all(256 not in r[:-1] for r in responses)
    assert all(len(r) == 20 for r in responses if r[-1] != 256)


def one_step(logits, n=20_000, temperature=1.0, top_p=1.0):
    u = torch.rand(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = InverseCDF(u, temperature, top_p, 0)(torch.zeros(n, 0), torch.tensor([logits]).expand(n, -1))
    return torch.bincount(chosen.argmax(-1), minlength=len(logits)).double() / n


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    logits = [1.0, -1.0, 0.5, 2.0]
    expected = (torch.tensor(logits).double() / temperature).softmax(-1)
    error = 5 * (expected * (1 - expected) / 20_000).sqrt()
    assert ((one_step(logits, temperature=temperature) - expected).abs() < error).all()


def test_top_p_keeps_the_smallest_set_that_holds_the_probability():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert (one_step(logits, top_p=0.7) > 0).tolist() == [True, True, False, False]
    assert one_step(logits, top_p=0.7)[0].item() == pytest.approx(0.5 / 0.8, abs=0.02)
    assert one_step(logits, top_p=0.01).tolist() == [1, 0, 0, 0]


def test_the_ends_of_the_unit_interval_never_pick_an_impossible_token():
    logits = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).expand(2, -1)
    u = torch.tensor([[0.0], [math.nextafter(1, 0)]], dtype=torch.float64)
    for top_p in (1.0, 0.99):
        assert set(InverseCDF(u, 1.0, top_p, 0)(torch.zeros(2, 0), logits).argmax(-1).tolist()) <= {1, 2}


# -------------------------------------------------------------------------------------------------------- KL


def test_kl_estimators_agree_and_are_zero_for_equal_models():
    policy, reference = make_model("llama", scale=2.0), make_model("llama", seed=1, scale=2.0)
    prompts = [[256, 65 + i % 20] for i in range(400)]
    responses = sample(Scorer(policy), make_tokenizer(), prompts, keys=list(range(400)), max_new_tokens=8, seed=3, batch_size=100)
    found = sample_kl(Scorer(policy), Scorer(reference), prompts, responses, 64, PADDED)
    means = {name: mean_and_error(values) for name, values in found.items()}
    assert min(found["kl"]) >= 0 and min(found["kl_k3"]) >= 0 and min(found["kl_k1"]) < 0
    for name in ("kl_k1", "kl_k3"):  # unbiased estimators of the same number
        assert abs(means[name][0] - means["kl"][0]) < 4 * math.hypot(means[name][1], means["kl"][1])
    assert means["kl"][1] < means["kl_k1"][1]
    assert means["kl"][0] > 0.3
    same = sample_kl(Scorer(policy), Scorer(policy), prompts[:5], responses[:5], 2, PADDED)
    assert all(value == 0 for values in same.values() for value in values)


def test_kl_of_one_sample_by_hand():
    policy, reference = make_model("gpt2", dtype=torch.float64), make_model("gpt2", seed=1, dtype=torch.float64)
    prompt, response = [256, 10, 11], [20, 21, 256]
    ids = torch.tensor([prompt + response])
    p, q = (m(ids).logits[0, 2:5].log_softmax(-1) for m in (policy, reference))
    ratio = torch.stack([(p - q)[i, t] for i, t in enumerate(response)])
    found = sample_kl(Scorer(policy), Scorer(reference), [prompt], [response], 1, PADDED)
    assert found["kl"][0] == pytest.approx((p.exp() * (p - q)).sum().item())
    assert found["kl_k1"][0] == pytest.approx(ratio.sum().item())
    assert found["kl_k3"][0] == pytest.approx(((-ratio).exp() - 1 + ratio).sum().item())


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7 / 3)))
    assert mean_and_error([4.0]) == (4.0, None)


# --------------------------------------------------------------------------------------------------- rewards


def test_lexicon_by_hand(tmp_path):
    (tmp_path / "words.json").write_text(json.dumps({"positive": ["good", "great"], "negative": ["bad"]}))
    score = build_reward({"name": "lexicon", "path": str(tmp_path / "words.json"), "scale": 0.5})
    values = score(["good"] * 4, ["Good, great!", "bad", "plain", "goodness badly"])
    assert values == pytest.approx([2 / (1 + math.exp(-1)), 2 / (1 + math.exp(0.5)), 1.0, 1.0])


def classifier_folder(folder, labels):
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", vocab_size=258, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, pad_token_id=257,
                                  id2label=dict(enumerate(labels)), label2id={name: i for i, name in enumerate(labels)})  # fmt: skip
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("labels", [["NEGATIVE", "POSITIVE"], ["a", "POSITIVE", "c"]])
def test_classifier(tmp_path, labels):
    model = classifier_folder(tmp_path / "c", labels)
    texts = ["one", "a longer text", "x", "four"]
    expected = torch.cat([model(torch.tensor([make_tokenizer()(t)["input_ids"]])).logits.softmax(-1) for t in texts])[:, 1]
    common = {"name": "classifier", "path": str(tmp_path / "c"), "label": "POSITIVE", "batch_size": 3}
    assert build_reward(common)(["p"] * 4, texts) == pytest.approx(expected.tolist(), rel=1e-4)
    odds = build_reward(common | {"output": "log_odds"})(["p"] * 4, texts)
    assert odds == pytest.approx((expected / (1 - expected)).log().tolist(), abs=1e-4)
    joined = build_reward(common | {"include_prompt": True})(["on"], ["e"])
    assert joined == pytest.approx(expected[:1].tolist(), rel=1e-4)
    with pytest.raises(ConfigError, match="did you mean POSITIVE"):
        build_reward(common | {"label": "POSITVE"})
    with pytest.raises(ConfigError, match="no text-classification model"):
        build_reward(common | {"path": str(tmp_path)})


@pytest.mark.parametrize("returned, told", [([1.0], "1 scores for 2"), ([1.0, math.nan], "nan for the response")])
def test_a_reward_that_answers_wrongly_is_an_error_never_a_zero(returned, told):
    @register_reward("odd")
    def odd():
        return lambda prompts, responses: returned

    try:
        with pytest.raises(ValueError, match=told):
            build_reward({"name": "odd"})(["p", "p"], ["a", "b"])
    finally:
        del REWARDS["odd"]


# ---------------------------------------------------------------------------------------------- function=eval


def test_eval_of_a_run_writes_beside_it_and_leaves_it_as_it_was(llama_folder, imdb_dir, tmp_path):
    run = tmp_path / "run"
    run_here(*small_run(llama_folder, imdb_dir, run))
    before = {p: p.read_bytes() for p in run.glob("*") if p.is_file()}
    overrides = small_run(llama_folder, imdb_dir, run, "function=eval", f"model.archive={run}/LATEST/policy.pt", "n_eval_examples=6")
    first, second = run_here(*overrides), run_here(*overrides)
    assert {p: p.read_bytes() for p in before} == before
    rows = read_rows(run / "eval-1" / "samples.jsonl")
    assert len(rows) == 6 and rows == read_rows(run / "eval-2" / "samples.jsonl")
    assert first["kl"] == second["kl"] == pytest.approx(sum(row["kl"] for row in rows) / 6)
    for row in rows:
        assert row.keys() >= {"prompt", "policy", "reference", "chosen", "policy_reward", "reference_reward", "kl", "temperature", "examples"}


def test_temperature_is_said_in_the_row(llama_folder, imdb_dir, tmp_path):
    run_here(*small_run(llama_folder, imdb_dir, tmp_path / "run", "function=eval", "temperature=0.25", "topp=0.9"))
    assert {(row["temperature"], row["top_p"]) for row in read_rows(tmp_path / "run" / "samples.jsonl")} == {(0.25, 0.9)}


def test_generate_writes_prompt_and_response_lines(imdb_dir, tmp_path):
    folder = save_model(tmp_path / "model", "gpt2")
    write_jsonl(imdb_dir / "imdb-sft-test.jsonl", scored_rows(6))
    overrides = small_run(folder, imdb_dir, tmp_path / "run", "n_eval_examples=4", "sample_during_eval=false")
    run_command("generate.py", *overrides)
    rows = read_rows(tmp_path / "run" / "generations.jsonl")
    assert len(rows) == 4 and all(row["prompt"].startswith("prompt number") and "response" in row for row in rows)
    refused = run_command("generate.py", *overrides, "temprature=1", check=False)
    assert refused.returncode == 2 and "did you mean temperature" in refused.stderr
