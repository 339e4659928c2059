"""Sampling, KL estimators, rewards and function=eval."""

import json
import logging
import math
import re
import shutil
from types import SimpleNamespace

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

from preflab.batching.packing import Layout
from preflab.distributed import signals
from preflab.distributed.process_group import world
from preflab.evaluation import samples as samples_module
from preflab.evaluation.samples import distinct, measure_samples, repetition
from preflab.evaluation.worklist import expand_archives, says_compared_with_itself
from preflab.modeling import packed_linear
from preflab.modeling.generation import InverseCDF, sample
from preflab.modeling.logprobs import Scorer
from preflab.rewards.registry import REWARDS, RewardError, build_reward, register_reward
from preflab.training.metrics import MetricLog
from utils import ConfigError, mean_and_error

PROMPTS = [[256, *b"hello"], [256], [256, *b"a much longer prompt than these"], [256, *b"mid one"]]

PADDED = Layout("padded", 257)


def draw(model, prompts=PROMPTS, **options):
    defaults = {"keys": range(len(prompts)), "max_new_tokens": 12, "seed": 0, "batch_size": 4}
    return sample(Scorer(model), make_tokenizer(), prompts, **defaults | options)


# ----------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("architecture", ["gpt2", "gptj", "llama", "mistral", "opt"])
def test_greedy_tokens_are_those_of_plain_generate(architecture):
    """With packed weights and a cache of our own, past the point at which the cache first grows."""
    model = make_model(architecture)
    prompt = PROMPTS[2]
    ids = torch.tensor([prompt])
    plain = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=90,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=257,
    )
    [ours] = sample(
        Scorer(model), make_tokenizer(), [prompt], keys=[0], max_new_tokens=90, temperature=0
    )
    expected = plain[0, ids.shape[1] :].tolist()
    assert ours == expected[: expected.index(256) + 1 if 256 in expected else None]


def test_packed_weights_are_there_for_sampling_only(monkeypatch):
    model, packed = make_model("gpt2"), []
    product = packed_linear._packed_linear
    monkeypatch.setattr(
        packed_linear, "_packed_linear", lambda *operands: packed.append(1) or product(*operands)
    )
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
    for prompt, response in zip(PROMPTS, draw(model, temperature=0), strict=True):
        ids = list(prompt)
        for token in response:
            assert token == model(torch.tensor([ids])).logits[0, -1].argmax().item()
            ids.append(token)


def test_a_response_ends_at_its_first_eos():
    model = make_model("llama", scale=1.0)
    responses = sample(
        Scorer(model),
        make_tokenizer(),
        [[256]] * 300,
        keys=list(range(300)),
        max_new_tokens=20,
        seed=0,
        batch_size=300,
    )
    ended = [r for r in responses if r[-1] == 256]
    assert ended and all(256 not in r[:-1] for r in responses)
    assert all(len(r) == 20 for r in responses if r[-1] != 256)


def one_step(logits, n=20_000, temperature=1.0, top_p=1.0):
    u = torch.rand(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = InverseCDF(u, temperature, top_p, 0)(
        torch.zeros(n, 0), torch.tensor([logits]).expand(n, -1)
    )
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
        assert set(InverseCDF(u, 1.0, top_p, 0)(torch.zeros(2, 0), logits).argmax(-1).tolist()) <= {
            1,
            2,
        }


# ----------------------------------------------------------------------------------------------- KL


def test_kl_estimators_agree_and_are_zero_for_equal_models():
    policy, reference = make_model("llama", scale=2.0), make_model("llama", seed=1, scale=2.0)
    prompts = [[256, 65 + i % 20] for i in range(400)]
    responses = sample(
        Scorer(policy),
        make_tokenizer(),
        prompts,
        keys=list(range(400)),
        max_new_tokens=8,
        seed=3,
        batch_size=100,
    )
    measured = measure_samples(Scorer(policy), Scorer(reference), prompts, responses, 64, PADDED)
    means = {name: mean_and_error(values) for name, values in measured.items()}
    assert min(measured["kl"]) >= 0 and min(measured["kl_k3"]) >= 0 and min(measured["kl_k1"]) < 0
    for name in ("kl_k1", "kl_k3"):  # unbiased estimators of the same number
        assert abs(means[name][0] - means["kl"][0]) < 4 * math.hypot(means[name][1], means["kl"][1])
    assert means["kl"][1] < means["kl_k1"][1]
    assert means["kl"][0] > 0.3
    same = measure_samples(Scorer(policy), Scorer(policy), prompts[:5], responses[:5], 2, PADDED)
    assert all(value == 0 for name, values in same.items() if name != "entropy" for value in values)
    alone = measure_samples(Scorer(policy), None, prompts[:5], responses[:5], 2, PADDED)
    assert alone.keys() == {"entropy"} and alone["entropy"] == pytest.approx(
        same["entropy"], rel=1e-5
    )


def test_kl_of_one_sample_by_hand():
    policy, reference = (
        make_model("gpt2", dtype=torch.float64),
        make_model("gpt2", seed=1, dtype=torch.float64),
    )
    prompt, response = [256, 10, 11], [20, 21, 256]
    ids = torch.tensor([prompt + response])
    p, q = (m(ids).logits[0, 2:5].log_softmax(-1) for m in (policy, reference))
    ratio = torch.stack([(p - q)[i, t] for i, t in enumerate(response)])
    measured = measure_samples(Scorer(policy), Scorer(reference), [prompt], [response], 1, PADDED)
    assert measured["kl"][0] == pytest.approx((p.exp() * (p - q)).sum().item())
    assert measured["kl_k1"][0] == pytest.approx(ratio.sum().item())
    assert measured["kl_k3"][0] == pytest.approx(((-ratio).exp() - 1 + ratio).sum().item())
    assert measured["entropy"][0] == pytest.approx(-(p.exp() * p).sum(1).mean().item())


def test_mean_and_standard_error():
    assert mean_and_error([1.0, 2.0, 6.0]) == pytest.approx((3.0, math.sqrt(7 / 3)))
    assert mean_and_error([4.0]) == (4.0, None)


def test_repetition_and_distinct_by_hand():
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4, 1]) == pytest.approx(
        1 - 4 / 6
    )  # six 4-grams, the last two were there
    assert repetition([1, 2, 3]) == 0 and repetition([7] * 10) == pytest.approx(1 - 1 / 7)
    assert distinct([[1, 2, 1], [2, 1]], 1) == pytest.approx(2 / 5) and distinct(
        [[1, 2, 1], [2, 1]], 2
    ) == pytest.approx(2 / 3)
    assert distinct([[1]], 2) is None


# ------------------------------------------------------------------------------------------ rewards


def test_lexicon_by_hand(tmp_path):
    (tmp_path / "words.json").write_text(
        json.dumps({"positive": ["good", "great"], "negative": ["bad"]})
    )
    score = build_reward({"name": "lexicon", "path": str(tmp_path / "words.json"), "scale": 0.5})
    values = score(["good"] * 4, ["Good, great!", "bad", "plain", "goodness badly"])
    assert values == pytest.approx([2 / (1 + math.exp(-1)), 2 / (1 + math.exp(0.5)), 1.0, 1.0])


def classifier_folder(folder, labels):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama",
        vocab_size=258,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        pad_token_id=257,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    model = AutoModelForSequenceClassification.from_config(config)
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("labels", [["NEGATIVE", "POSITIVE"], ["a", "POSITIVE", "c"]])
def test_classifier(tmp_path, labels):
    model = classifier_folder(tmp_path / "c", labels)
    texts = ["one", "a longer text", "x", "four"]
    expected = torch.cat(
        [model(torch.tensor([make_tokenizer()(t)["input_ids"]])).logits.softmax(-1) for t in texts]
    )[:, 1]
    common = {
        "name": "classifier",
        "path": str(tmp_path / "c"),
        "label": "POSITIVE",
        "batch_size": 3,
    }
    assert build_reward(common)(["p"] * 4, texts) == pytest.approx(expected.tolist(), rel=1e-4)
    odds = build_reward(common | {"output": "log_odds"})(["p"] * 4, texts)
    assert odds == pytest.approx((expected / (1 - expected)).log().tolist(), abs=1e-4)
    joined = build_reward(common | {"include_prompt": True})(["on"], ["e"])
    assert joined == pytest.approx(expected[:1].tolist(), rel=1e-4)
    with pytest.raises(ConfigError, match="did you mean POSITIVE"):
        build_reward(common | {"label": "POSITVE"})
    with pytest.raises(ConfigError, match="not a text-classification model"):
        build_reward(common | {"path": str(tmp_path)})


def test_lengths():
    assert build_reward({"name": "length", "unit": "words"})(["p", "p"], ["two  words", ""]) == [
        2.0,
        0.0,
    ]
    assert build_reward({"name": "length", "unit": "characters"})(["p"], ["abc d"]) == [5.0]


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_reward_model_scores_the_last_token_of_prompt_and_response(architecture, tmp_path):
    """Against the model run on each text alone; batches of unequal lengths, and a pad that is the
    EOS."""
    save_model(tmp_path / "lm", architecture)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "lm", num_labels=1).eval()
    with torch.no_grad():
        model.score.weight.mul_(20)
    model.save_pretrained(tmp_path / "rm")
    tokenizer = make_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "rm")
    prompts, responses = ["a", "another one", "x y"], [" b", " and a longer response", ""]
    expected = []
    for prompt, response in zip(prompts, responses, strict=True):
        ids = torch.tensor([[256, *tokenizer(prompt + response)["input_ids"], 256]])
        expected.append(
            (model.base_model(ids).last_hidden_state[0, -1] @ model.score.weight[0]).item()
        )
    scores = build_reward({"name": "reward_model", "path": str(tmp_path / "rm"), "batch_size": 2})(
        prompts, responses
    )
    assert scores == pytest.approx(expected, rel=1e-4) and len({round(v, 3) for v in scores}) == 3
    cut = build_reward({"name": "reward_model", "path": str(tmp_path / "rm"), "max_length": 6})(
        prompts[1:2], responses[1:2]
    )
    ids = torch.tensor([[256, *tokenizer("onse")["input_ids"], 256]])
    assert cut == pytest.approx(
        [(model.base_model(ids).last_hidden_state[0, -1] @ model.score.weight[0]).item()], rel=1e-4
    )
    with pytest.raises(ConfigError, match="has none"):
        build_reward({"name": "reward_model", "path": str(tmp_path / "rm"), "chat_template": True})
    classifier_folder(tmp_path / "two", ["a", "b"])
    with pytest.raises(ConfigError, match="has 2 outputs"):
        build_reward({"name": "reward_model", "path": str(tmp_path / "two")})


def test_http_reward_asks_in_batches_and_survives_a_restart(http_server):
    server = http_server(
        [503, "drop", lambda body: {"scores": [len(r) for r in body["responses"]]}]
    )
    score = build_reward(
        {"name": "http", "url": server.url, "batch_size": 2, "backoff": 0.01, "timeout": 5}
    )
    assert score(["p"] * 3, ["a", "bb", "ccc"]) == [1.0, 2.0, 3.0]
    assert [body["responses"] for body in server.received] == [["a", "bb"]] * 3 + [["ccc"]]


@pytest.mark.parametrize(
    "answer, message",
    [
        (500, "in 2 attempts, the last: status 500"),
        ("drop", "in 2 attempts"),
        ("stall", "Timeout"),
        (404, "answered status 404"),
        (lambda _: {"scores": [1]}, "1 scores for 2"),
        (lambda _: {"scores": ["a", 1]}, "expected"),
        (lambda _: {"result": []}, "expected"),
        ("nonsense", "expected"),
        (lambda _: {"scores": [1.0, float("nan")]}, "nan"),
    ],
)
def test_http_reward_that_fails_is_an_error_and_never_a_score(answer, message, http_server):
    server = http_server([answer])
    score = build_reward(
        {"name": "http", "url": server.url, "retries": 1, "backoff": 0.01, "timeout": 0.5}
    )
    with pytest.raises(RewardError, match=message):
        score(["p", "p"], ["a", "b"])


@pytest.mark.parametrize(
    "returned, message", [([1.0], "1 scores for 2"), ([1.0, math.nan], "nan for the response")]
)
def test_a_reward_that_answers_wrongly_is_an_error_never_a_zero(returned, message):
    @register_reward("odd")
    def odd():
        return lambda prompts, responses: returned

    try:
        with pytest.raises(ValueError, match=message):
            build_reward({"name": "odd"})(["p", "p"], ["a", "b"])
    finally:
        del REWARDS["odd"]


# ------------------------------------------------------------------------------------ function=eval


def test_eval_of_a_run_writes_beside_it_and_leaves_it_as_it_was(llama_folder, imdb_dir, tmp_path):
    run = tmp_path / "run"
    run_here(*small_run(llama_folder, imdb_dir, run))
    before = {p: p.read_bytes() for p in run.glob("*") if p.is_file()}
    overrides = small_run(
        llama_folder,
        imdb_dir,
        run,
        "function=eval",
        f"model.archive={run}/LATEST/policy.pt",
        "n_eval_examples=6",
    )
    first, second = run_here(*overrides), run_here(*overrides)
    assert {p: p.read_bytes() for p in before} == before
    rows = read_rows(run / "eval-1" / "samples.jsonl")
    assert len(rows) == 6 and rows == read_rows(run / "eval-2" / "samples.jsonl")
    assert first["kl"] == second["kl"] == pytest.approx(sum(row["kl"] for row in rows) / 6)
    for row in rows:
        assert row.keys() >= {
            "prompt",
            "policy",
            "reference",
            "chosen",
            "policy_reward",
            "reference_reward",
            "kl",
            "temperature",
            "examples",
        }


def test_temperature_is_said_in_the_row(llama_folder, imdb_dir, tmp_path):
    run_here(
        *small_run(
            llama_folder,
            imdb_dir,
            tmp_path / "run",
            "function=eval",
            "temperature=0.25",
            "topp=0.9",
        )
    )
    assert {
        (row["temperature"], row["top_p"]) for row in read_rows(tmp_path / "run" / "samples.jsonl")
    } == {(0.25, 0.9)}


def test_top_k_and_min_p_are_said_in_the_rows_if_they_are_set(llama_folder, imdb_dir, tmp_path):
    runs = {"plain": (), "cut": ("top_k=1", "min_p=0.5"), "greedy": ("temperature=0",)}
    rows, policy = {}, {}
    for name, options in runs.items():
        folder = tmp_path / name
        run_here(*small_run(llama_folder, imdb_dir, folder, "function=eval", *options))
        samples, [row] = (read_rows(folder / f"{file}.jsonl") for file in ("samples", "eval"))
        policy[name] = [sample["policy"] for sample in samples]
        rows[name] = {(r.get("top_k"), r.get("min_p")) for r in (*samples, row)}
    assert rows == {"plain": {(None, None)}, "cut": {(1, 0.5)}, "greedy": {(None, None)}}
    assert policy["cut"] == policy["greedy"] != policy["plain"]


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory, llama_folder):
    """A folder with two trained runs, and the data they were trained on."""
    home = tmp_path_factory.mktemp("two")
    for split, n in (("train", 24), ("test", 8)):
        write_jsonl(home / "data" / f"imdb-sft-{split}.jsonl", scored_rows(n))
    for name, loss in (("a", "dpo"), ("b", "ipo")):
        run_here(
            *small_run(
                llama_folder,
                home / "data",
                home / "sweep" / name,
                f"loss={loss}",
                "keep_checkpoints=null",
                "sample_during_eval=false",
                "save_every=8",
            )
        )
    return home


def evaluate(home, llama_folder, name, *overrides):
    run_here(
        *small_run(
            llama_folder,
            home / "data",
            home / name,
            "function=eval",
            "n_eval_examples=6",
            *overrides,
        )
    )
    return read_rows(home / name / "eval.jsonl"), read_rows(home / name / "samples.jsonl")


def test_a_model_that_is_compared_with_itself_is_said_to_be(two_runs, llama_folder, caplog):
    caplog.set_level(logging.WARNING, "preflab")
    a, b = (str(two_runs / "sweep" / name) for name in "ab")
    evaluate(two_runs, llama_folder, "itself", "n_eval_examples=2", "max_new_tokens=2")
    [message] = [m for m in caplog.messages if "compared with itself" in m]
    assert message.startswith(f"no model.archive, so model.name_or_path={llama_folder} is")
    for archive, reference, same in (
        (None, a, None),
        (a, None, None),
        ([a, f"{b}/LATEST"], a, a),
        ([a, f"{a}/step-1"], f"{a}/LATEST/policy.pt", a),
        ([f"{a}/step-1", b], a, None),
    ):
        model = SimpleNamespace(archive=archive, reference_archive=reference, name_or_path="m")
        remark = says_compared_with_itself(model)
        assert (remark is None) == (same is None)
        assert same is None or remark.startswith(f"model.archive={same}, which is model.reference")


def test_archives_are_lists_patterns_and_folders_of_runs(two_runs):
    a, b = two_runs / "sweep" / "a", two_runs / "sweep" / "b"
    steps = [f"{a}/step-{n}" for n in (1, 2, 3)]
    assert expand_archives(f"{a}/step-*") == steps
    assert expand_archives([f"{a}/step-2", f"{b}/LATEST/policy.pt"]) == [
        steps[1],
        f"{b}/LATEST/policy.pt",
    ]
    assert expand_archives(str(two_runs / "sweep")) == [str(a), str(b)]
    assert expand_archives([f"{a}/*/policy.pt", steps[0]]) == [
        f"{a}/LATEST",
        f"{a}/step-1",
        f"{a}/step-2",
    ]  # LATEST is step-3
    with pytest.raises(ConfigError, match="no match"):
        expand_archives(f"{a}/stop-*")
    with pytest.raises(ConfigError, match=r"without hf, policy\.pt"):
        expand_archives(str(two_runs / "data"))


def test_many_checkpoints_and_temperatures_are_rows(two_runs, llama_folder, monkeypatch):
    """Each as if it had been evaluated alone, whatever the batch size; what was cut short continues
    from its last row."""
    a, b = (str(two_runs / "sweep" / name) for name in "ab")
    many = [
        f"model.archive=[{a}/step-1,{b}]",
        "temperature=[0,1.0]",
        "samples_per_prompt=3",
        "more_rewards=[length,{name: length, as: letters, unit: characters}]",
    ]
    rows, samples = evaluate(two_runs, llama_folder, "many", *many)
    assert [(row["checkpoint"], row["temperature"]) for row in rows] == [
        (f"{a}/step-1", 0),
        (f"{a}/step-1", 1.0),
        (b, 0),
        (b, 1.0),
    ]
    assert [row["training"]["loss"]["name"] for row in rows] == ["dpo", "dpo", "ipo", "ipo"] and [
        row["step"] for row in rows
    ] == [1, 1, 3, 3]
    assert len(samples) == 4 * 6 * 3
    alone, alone_samples = evaluate(
        two_runs, llama_folder, "alone", f"model.archive={b}", "eval_batch_size=5", *many[2:]
    )
    changed = {"checkpoint", "stamp", "name"}
    approx = {
        key: pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value
        for key, value in alone[0].items()
        if key not in changed
    }
    assert {key: value for key, value in rows[3].items() if key not in changed} == approx
    assert [s["policy"] for s in alone_samples] == [s["policy"] for s in samples[-18:]]

    greedy = samples[:18]
    assert all(len({s["policy"] for s in greedy[i : i + 3]}) == 1 for i in range(0, 18, 3)) and [
        s["sample"] for s in greedy[:3]
    ] == [0, 1, 2]
    hot = samples[18:36]
    assert any(len({s["policy"] for s in hot[i : i + 3]}) == 3 for i in range(0, 18, 3))
    means = [
        sum(s["policy_reward"]["lexicon"] for s in hot[i : i + 3]) / 3 for i in range(0, 18, 3)
    ]
    assert (
        rows[1]["samples_eval/policy_reward"],
        rows[1]["samples_eval/policy_reward_se"],
    ) == pytest.approx(mean_and_error(means))
    letters = [len(s["policy"]) for s in hot]
    assert rows[1]["samples_eval/policy_reward[letters]"] == pytest.approx(sum(letters) / 18)
    assert all(s["policy_reward"]["length"] == len(s["policy"].split()) for s in samples)
    assert all((s["policy_tokens"] == 8) or s["policy_ended"] for s in samples)

    # killed after the samples of the third evaluation, before its row
    folder = two_runs / "many"
    (folder / "summary.json").unlink()
    write_jsonl(folder / "eval.jsonl", rows[:2])
    write_jsonl(folder / "samples.jsonl", samples[:54])
    drawn = []
    monkeypatch.setattr(
        samples_module,
        "sample",
        lambda *args, **options: drawn.append(1) or sample(*args, **options),
    )
    again, again_samples = evaluate(two_runs, llama_folder, "many", *many)
    assert (
        again == rows and again_samples == samples and len(drawn) == 4
    )  # policy and reference at two temperatures
    assert not (folder / "eval-1").exists()


def test_accuracy_is_also_by_dataset(llama_folder, imdb_dir, tmp_path):
    pairs = [{"prompt": f"q{i}", "chosen": " yes", "rejected": " no"} for i in range(6)]
    write_jsonl(tmp_path / "own" / "test.jsonl", pairs)
    write_jsonl(tmp_path / "own" / "train.jsonl", pairs)
    common = [
        "function=eval",
        "n_eval_examples=100",
        "sample_during_eval=false",
        f"model.reference_archive={save_model(tmp_path / 'other', seed=1)}",
    ]
    rows = {}
    for name, data in (
        ("both", f"[imdb,{tmp_path / 'own'}]"),
        ("imdb", "[imdb]"),
        ("own", f"[{tmp_path / 'own'}]"),
    ):
        run_here(*small_run(llama_folder, imdb_dir, tmp_path / name, *common, f"datasets={data}"))
        [rows[name]] = read_rows(tmp_path / name / "eval.jsonl")
    by_name = {
        key.split("@")[1]: value
        for key, value in rows["both"].items()
        if key.startswith("loss/eval@")
    }
    assert list(by_name.values()) == pytest.approx(
        [rows["imdb"]["loss/eval"], rows["own"]["loss/eval"]], rel=1e-5
    )
    assert len(set(by_name.values())) == 2 and not any("@" in key for key in rows["imdb"])
    assert rows["both"]["rewards_eval/accuracies"] == pytest.approx(
        (8 * rows["imdb"]["rewards_eval/accuracies"] + 6 * rows["own"]["rewards_eval/accuracies"])
        / 14
    )


def test_a_run_like_a_finished_one_is_skipped_on_request(two_runs, llama_folder, capsys):
    again = small_run(
        llama_folder,
        two_runs / "data",
        two_runs / "again",
        "loss=ipo",
        "keep_checkpoints=null",
        "sample_during_eval=false",
        "save_every=8",
        f"skip_finished={two_runs / 'sweep'}",
    )
    summary = run_here(*again)
    assert f"skipped: {two_runs / 'sweep' / 'b'}" in capsys.readouterr().out
    assert (
        summary == json.loads((two_runs / "sweep" / "b" / "summary.json").read_text())
        and not (two_runs / "again").exists()
    )
    run_here(*again, "seed=5", "n_examples=8")
    assert (two_runs / "again" / "summary.json").exists()
    with pytest.raises(ConfigError, match="no such folder"):
        run_here(*again, "skip_finished=nowhere")


def test_a_failed_run_says_so(llama_folder, imdb_dir, tmp_path):
    @register_reward("odd")
    def odd():
        return lambda prompts, responses: [math.nan] * len(responses)

    try:
        with pytest.raises(RewardError):
            run_here(
                *small_run(
                    llama_folder,
                    imdb_dir,
                    tmp_path / "run",
                    "reward.name=odd",
                    "~reward.path",
                    "~reward.scale",
                )
            )
    finally:
        del REWARDS["odd"]
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "nan for the response" in status["error"]


@pytest.mark.parametrize(
    "override, message",
    [
        ("temperature=[0.5,-1]", "the entry -1 is not a number of at least 0"),
        ("more_rewards=[lexikon]", "did you mean lexicon"),
        ("more_rewards=[lexicon]", "two rewards are called lexicon"),
        ("more_rewards=[{name: length, unti: words}]", "no setting unti"),
        ("model.archive=[]", "names no archive"),
        ("samples_per_prompt=0", "samples_per_prompt=0"),
        ("reward.module=nowhere.py", "no such file"),
    ],
)
def test_bad_settings_of_an_evaluation_are_refused(
    override, message, llama_folder, imdb_dir, tmp_path
):
    with pytest.raises(ConfigError, match=re.escape(message)):
        run_here(*small_run(llama_folder, imdb_dir, tmp_path / "run", "function=eval", override))


def test_training_takes_one_temperature_and_one_archive(llama_folder, imdb_dir, tmp_path):
    for override in ("temperature=[0.5,1]", "model.archive=[a,b]"):
        with pytest.raises(ConfigError, match=override.split("=")[0]):
            run_here(*small_run(llama_folder, imdb_dir, tmp_path / "run", override))


def test_a_reward_of_your_own(llama_folder, imdb_dir, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from rewards import register_reward\n\n\n@register_reward('vowels')\ndef vowels(*,"
        " letters='aeiou'):\n    return lambda prompts, responses: [sum(c in letters for c in r)"
        " for r in responses]\n"
    )
    try:
        more = "more_rewards=[{name: vowels, letters: e}]"
        run_here(
            *small_run(
                llama_folder,
                imdb_dir,
                tmp_path / "run",
                "function=eval",
                f"reward.module={tmp_path / 'mine.py'}",
                more,
            )
        )
        assert all(
            row["policy_reward"]["vowels"] == row["policy"].count("e")
            for row in read_rows(tmp_path / "run" / "samples.jsonl")
        )
    finally:
        REWARDS.pop("vowels", None)


def test_generate_writes_prompt_and_response_lines(imdb_dir, tmp_path):
    folder = save_model(tmp_path / "model", "gpt2")
    write_jsonl(imdb_dir / "imdb-sft-test.jsonl", scored_rows(6))
    overrides = small_run(
        folder, imdb_dir, tmp_path / "run", "n_eval_examples=4", "sample_during_eval=false"
    )
    run_command("generate.py", *overrides)
    rows = read_rows(tmp_path / "run" / "generations.jsonl")
    assert len(rows) == 4 and all(
        row["prompt"].startswith("prompt number") and "response" in row for row in rows
    )
    several = [o for o in overrides if not o.startswith("local_run_dir")] + [
        f"local_run_dir={tmp_path / 'three'}",
        "samples_per_prompt=3",
    ]
    run_command("generate.py", *several)
    three = read_rows(tmp_path / "three" / "generations.jsonl")
    assert [row["sample"] for row in three] == [0, 1, 2] * 4 and [
        row["response"] for row in three[::3]
    ] == [row["response"] for row in rows]
    refused = run_command("generate.py", *overrides, "temperature=[0,1]", check=False)
    assert refused.returncode == 2 and "temperature gives 2 values" in refused.stderr
    refused = run_command("generate.py", *overrides, "temprature=1", check=False)
    assert refused.returncode == 2 and "did you mean temperature" in refused.stderr


def test_a_run_samples_its_reference_once_and_its_policy_at_every_evaluation(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        samples_module,
        "sample",
        lambda *args, **options: drawn.append(options["description"]) or sample(*args, **options),
    )
    folder = run("run")
    rows = read_rows(folder / "samples.jsonl")
    evaluations = sorted({row["examples"] for row in rows})
    assert (
        drawn.count("sample policy") == len(evaluations) > 2
        and drawn.count("sample reference") == 0  # the policy's before the first step
    )
    first, last = (
        [row["reference"] for row in rows if row["examples"] == n]
        for n in (evaluations[0], evaluations[-1])
    )
    assert first == last and [row["policy"] for row in rows[: len(first)]] == first
    drawn.clear()
    later = read_rows(run("later", "do_first_eval=false") / "samples.jsonl")
    assert (
        drawn.count("sample reference") == 1
        and [row["reference"] for row in later][: len(first)] == first
    )


def test_an_evaluation_stops_when_asked_and_the_same_command_continues(
    two_runs, llama_folder, monkeypatch
):
    command = [f"model.archive=[{two_runs}/sweep/a,{two_runs}/sweep/b]", "sample_during_eval=false"]
    write_row = MetricLog.write_at

    def write_and_ask(self, *row):
        write_row(self, *row)
        world().stop.received = 15

    with monkeypatch.context() as patch:
        patch.setattr(MetricLog, "write_at", write_and_ask)
        with pytest.raises(signals.Stopped):
            evaluate(two_runs, llama_folder, "stopped", *command)
    folder = two_runs / "stopped"
    assert (
        len(read_rows(folder / "eval.jsonl")) == 1
        and json.loads((folder / "status.json").read_text())["state"] == "stopped"
    )
    rows, _ = evaluate(two_runs, llama_folder, "stopped", *command)
    assert [row["checkpoint"] for row in rows] == [
        str(two_runs / "sweep" / name) for name in "ab"
    ] and not (folder / "eval-1").exists()


def test_an_evaluation_is_skipped_only_while_its_checkpoints_are_the_same(
    two_runs, llama_folder, capsys
):
    shutil.copytree(two_runs / "sweep" / "a", two_runs / "moving", symlinks=True)
    command = [f"model.archive={two_runs}/moving"]
    evaluate(two_runs, llama_folder, "known", *command)
    again = small_run(
        llama_folder,
        two_runs / "data",
        two_runs / "new",
        "function=eval",
        "n_eval_examples=6",
        *command,
        f"skip_finished={two_runs / 'known'}",
    )
    run_here(*again)
    assert "skipped:" in capsys.readouterr().out and not (two_runs / "new").exists()
    (two_runs / "moving" / "LATEST").unlink()
    (two_runs / "moving" / "LATEST").symlink_to("step-1")
    run_here(*again)
    assert read_rows(two_runs / "new" / "eval.jsonl")[0]["step"] == 1


def test_a_finished_run_that_is_extended_and_dies_is_not_finished(run, monkeypatch):
    folder = run("run")
    with monkeypatch.context() as patch:
        patch.setattr(
            "trainers.build_rewards",
            lambda config: (_ for _ in ()).throw(RewardError("no reward today")),
        )
        with pytest.raises(RewardError):
            run("run", "n_epochs=2")
    assert not (folder / "summary.json").exists()
    run("run", "n_epochs=2")
    assert json.loads((folder / "summary.json").read_text())["examples"] == 48
