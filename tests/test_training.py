"""The training loop: step-0 values, the gradient of one big batch, seeds, LoRA, refusals."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import (
    final_weights,
    losses_to_run,
    make_pictures,
    read_rows,
    run_here,
    same_weights,
    save_model,
    scored_rows,
    small_run,
    write_jsonl,
)
from transformers import AutoModelForCausalLM, AutoTokenizer

from preflab.batching.loader import epoch_order
from preflab.objective.registry import LOSSES
from preflab.training import learner
from utils import ConfigError, DataError

LOSS_NAMES = losses_to_run()
# Losses that read numbers which scored responses do not have: the columns of `weighted_pairs`.
WITH_COLUMNS = ("xpo", "tis-dpo", "sepo")
# What every loss is at policy = reference when all score gaps are 0.5 (scored_rows with two
# responses a prompt).
AT_START = {
    "dpo": math.log(2),
    "tdpo": math.log(2),
    "tdpo1": math.log(2),
    "tdpo2": math.log(2),
    "soft-label": math.log(2),
    "ipo": 25.0,
    "cal-dpo": math.log(2) + 50,
    "robust": math.log(2),
    "dpop": math.log(2),
    "sigmoid_norm": math.log(2),
    "aot": math.log(2),
    "beta-dpo": math.log(2),
    "hinge": 1.0,
    "sppo": 50.0,
    "nca": 2 * math.log(2),
    "bco": 2 * math.log(2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "kto": 0.5,
    "odpo": math.log(1 + math.exp(math.log(0.5))),
}


def weights_close(a, b, tolerance):
    assert a.keys() == b.keys()
    return all(torch.allclose(a[key], b[key], rtol=tolerance, atol=tolerance) for key in a)


def weighted_pairs(n: int) -> list[dict]:
    """Pairs with a weight for each token (a byte, and EOS), and whose chosen response may be the
    reference's."""
    texts = {"chosen": " yes!", "rejected": " well, no"}
    weights = {
        f"{side}_token_weights": [1 + 0.5 * (t % 2) for t in range(len(text) + 1)]
        for side, text in texts.items()
    }
    return [
        {"prompt": f"prompt number {i}", "from_reference": i % 2} | texts | weights
        for i in range(n)
    ]


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_every_loss_trains_and_starts_where_it_must(run, imdb_dir, name):
    weighted = imdb_dir / "weighted"
    for split, n in (("train", 24), ("test", 8)):
        write_jsonl(imdb_dir / f"imdb-sft-{split}.jsonl", scored_rows(n, k=2))
        write_jsonl(weighted / f"{split}.jsonl", weighted_pairs(n))
    more = [f"datasets=[{weighted}]"] if name in WITH_COLUMNS else []
    folder = run("run", f"loss={name}", "lr=1e-4", "n_epochs=2", *more)
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[0]["split"] == "eval" and rows[0]["examples"] == 0
    n = 96 if LOSSES[name].examples == "responses" else 48
    assert rows[-1]["split"] == "eval" and rows[-1]["examples"] == n
    assert [row["step"] for row in rows if row["split"] == "train"] == list(range(1, n // 8 + 1))
    if name in AT_START:
        first = next(row for row in rows if row["split"] == "train")
        assert rows[0]["loss/eval"] == pytest.approx(AT_START[name], rel=1e-9)
        assert first["loss/train"] == pytest.approx(AT_START[name], rel=1e-9)
        assert rows[0]["logratios_eval/chosen"] == rows[0]["logratios_eval/rejected"] == 0
        assert rows[0]["rewards_eval/accuracies"] == 0.5  # all ties
        assert rows[0]["samples_eval/kl"] == 0
    # and it learns; the target of alpha-dpo grows with the gap, and so may its loss
    key, sign = ("rewards_eval/margins", -1) if name == "alpha-dpo" else ("loss/eval", 1)
    assert sign * rows[-1][key] < sign * rows[0][key]
    make_pictures(folder)


def test_steps_are_profiled_and_stay_what_they_are(run):
    plain, profiled = (
        run("plain", "n_examples=40"),
        run("profiled", "n_examples=40", "profile_steps=2"),
    )
    events = json.loads((profiled / "profile.json").read_text())["traceEvents"]
    assert sum(event["name"] == "ProfilerStep#2" for event in events) >= 1 and any(
        "backward" in event["name"].lower() for event in events
    )
    assert (
        "aten::" in (profiled / "profile.txt").read_text() and not (plain / "profile.json").exists()
    )
    assert weights_close(final_weights(plain), final_weights(profiled), 0)


@pytest.mark.parametrize(
    "settings", [("loss=dpo",), ("loss=tdpo2",), ("loss=sft",), ("loss=dpo", "model.lora.r=4")]
)
def test_accumulation_gives_the_gradient_of_one_big_batch(run, settings):
    """24 pairs (or prompts) by 10, so that the last batch of 4 splits unevenly; float64, so that
    nothing hides."""
    exact = (
        "batch_size=10",
        "model.policy_dtype=float64",
        "model.reference_dtype=float64",
        "sample_during_eval=false",
        *settings,
    )
    one = run("one", *exact)
    five = run("five", *exact, "gradient_accumulation_steps=5")
    assert weights_close(final_weights(one), final_weights(five), 1e-9)
    for a, b in zip(
        read_rows(one / "metrics.jsonl"), read_rows(five / "metrics.jsonl"), strict=True
    ):
        assert a[f"loss/{a['split']}"] == pytest.approx(b[f"loss/{b['split']}"], rel=1e-9)
        assert a.get("grad_norm", 0) == pytest.approx(b.get("grad_norm", 0), rel=1e-9)
    # The control: a mean over microbatches of unequal size would be another gradient.
    smaller = run("smaller", *exact, "batch_size=9")
    assert not weights_close(final_weights(one), final_weights(smaller), 1e-6)


def test_seed_changes_the_data_order_and_the_same_seed_repeats_the_run(run):
    a, b, c = run("a", "seed=0"), run("b", "seed=0"), run("c", "seed=1")
    assert same_weights(final_weights(a), final_weights(b))
    assert not same_weights(final_weights(a), final_weights(c))
    first = [
        next(
            row["logps_train/chosen"]
            for row in read_rows(f / "metrics.jsonl")
            if row["split"] == "train"
        )
        for f in (a, b, c)
    ]
    assert first[0] == first[1] != first[2]


def test_evaluation_sees_the_same_examples_whatever_the_seed(run):
    at_start = [
        read_rows(run(f"seed{s}", f"seed={s}", "n_eval_examples=5") / "metrics.jsonl")[0]
        for s in (0, 1)
    ]
    assert at_start[0]["logps_eval/chosen"] == at_start[1]["logps_eval/chosen"]


def test_evaluation_schedule_and_last_partial_batch(run):
    rows = read_rows(
        run("run", "pairing=all", "batch_size=50", "eval_every=60", "sample_during_eval=false")
        / "metrics.jsonl"
    )
    assert [row["examples"] for row in rows if row["split"] == "train"] == [
        50,
        100,
        144,
    ]  # 24 prompts of 6 pairs
    assert [row["examples"] for row in rows if row["split"] == "eval"] == [0, 100, 144]
    rows = read_rows(run("unasked", "n_examples=20", "do_first_eval=false") / "metrics.jsonl")
    assert [row["examples"] for row in rows if row["split"] == "eval"] == [16, 20]


def test_learning_rate_warms_up_then_stays(run):
    rows = read_rows(
        run("run", "warmup_steps=4", "pairing=all", "lr=1e-3", "n_examples=64") / "metrics.jsonl"
    )
    rates = [row["lr"] for row in rows if row["split"] == "train"]
    assert rates == pytest.approx([2e-4, 4e-4, 6e-4, 8e-4, 1e-3, 1e-3, 1e-3, 1e-3])


def test_gradient_is_clipped(run):
    tight = read_rows(
        run("tight", "max_grad_norm=1e-3", "optimizer=SGD", "lr=1.0") / "metrics.jsonl"
    )
    norms = [row["grad_norm"] for row in tight if row["split"] == "train"]
    start, end = (
        run(
            name,
            "optimizer=SGD",
            f"lr={lr}",
            "warmup_steps=0",
            "n_examples=8",
            "max_grad_norm=1e-3",
        )
        for name, lr in (("x", 1e-30), ("y", 1.0))
    )
    moved = math.sqrt(
        sum(
            (final_weights(end)[k] - w).double().pow(2).sum().item()
            for k, w in final_weights(start).items()
            if k != "lm_head.weight"
        )
    )
    assert min(norms) > 1e-3  # logged before clipping
    assert moved <= 1.001e-3


def test_activation_checkpointing_does_not_change_what_is_computed(run):
    exact = ("model.policy_dtype=float64", "model.reference_dtype=float64")
    assert weights_close(
        final_weights(run("plain", *exact)),
        final_weights(run("other", *exact, "activation_checkpointing=true")),
        1e-8,
    )


def test_compiling_does_not_change_what_is_computed(run):
    settings = (
        "optimizer=SGD",
        "lr=0.1",
        "sample_during_eval=false",
        "n_examples=16",
        "layout=padded",
    )
    plain, compiled = (
        final_weights(run(f"{compile}", *settings, f"compile={compile}"))
        for compile in (False, True)
    )
    assert not same_weights(plain, compiled)  # other kernels
    assert weights_close(plain, compiled, 1e-5)


def test_mixed_precision_keeps_full_precision_weights(run):
    folder = run("run", "model.fsdp_policy_mp=bfloat16")
    assert {w.dtype for w in final_weights(folder).values()} == {torch.float32}
    row = read_rows(folder / "metrics.jsonl")[0]
    assert row["loss/eval"] == pytest.approx(
        math.log(2), rel=1e-9
    )  # policy and reference compute alike
    assert not same_weights(final_weights(folder), final_weights(run("full")))


def test_a_loss_that_needs_no_reference_builds_none(run, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a reference was built")

    monkeypatch.setattr("preflab.training.reference.build_reference", refuse)
    run("sft", "loss=sft")
    run("free", "loss=dpo", "loss.reference_free=true")
    with pytest.raises(AssertionError, match="was built"):
        run("dpo", "loss=dpo")


def test_lora_trains_the_adapter_alone_and_saves_a_plain_model(run, llama_folder):
    folder = run("run", "model.lora.r=4", "n_epochs=3")
    rows = read_rows(folder / "metrics.jsonl")
    # The reference's log-probs are computed in other batches, whose float32 sums of some 100 nats
    # may be rounded otherwise, depending on the processor.
    assert rows[0]["loss/eval"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["loss/eval"] < 0.69 and rows[-1]["samples_eval/kl"] > 0
    start = AutoModelForCausalLM.from_pretrained(llama_folder).state_dict()
    moved = {key for key, w in final_weights(folder).items() if not torch.equal(w, start[key])}
    assert moved and all("proj" in key for key in moved)
    # The saved model is the policy: evaluated as a plain archive it gives the run's own last
    # numbers.
    again = run(
        "eval", "function=eval", f"model.archive={folder}/LATEST/policy.pt", "n_eval_examples=8"
    )
    assert read_rows(again / "metrics.jsonl")[0]["loss/eval"] == pytest.approx(
        rows[-1]["loss/eval"], rel=1e-4
    )


def test_saved_folder_loads_and_generates(run):
    folder = run("run")
    model = AutoModelForCausalLM.from_pretrained(folder / "LATEST" / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "LATEST" / "hf")
    assert same_weights(model.state_dict(), final_weights(folder))
    output = model.generate(**tokenizer("prompt", return_tensors="pt"), max_new_tokens=3)
    assert output.shape[1] > len(tokenizer("prompt")["input_ids"])


def test_reward_model_is_a_sequence_classifier(run):
    folder = run("run", "loss=bradley_terry", "n_epochs=8", "lr=3e-4", "pairing=best_worst")
    rows = read_rows(folder / "metrics.jsonl")
    assert rows[-1]["rewards_eval/accuracies"] > 0.9
    assert not (folder / "samples.jsonl").exists()
    assert "score.weight" in final_weights(folder)


def test_a_loss_that_is_no_number_stops_with_the_examples_and_the_last_good_weights(run, tmp_path):
    bad = int(epoch_order(np.arange(24), 0, 0)[20])  # met in the third step of eight
    (tmp_path / "explodes.py").write_text(
        "import torch\nfrom losses import LossOutput, register_loss\n"
        "@register_loss('explodes', reads={'reference'})\n"
        "def explodes(pair, *, beta: float, label_smoothing: float, reference_free: bool):\n"
        "    losses = beta * (pair.rejected_logratio - pair.chosen_logratio)\n"
        "    examples = pair.names.examples if len(pair.names) else []\n"
        f"    bad = torch.tensor([e == {bad} for e in examples] or [False])\n"
        "    return LossOutput(losses + torch.where(bad, float('nan'), 0.0))\n"
    )
    message = (
        rf"loss of step 3 is not finite, from .*imdb-sft-train.jsonl:\d+ \(example {bad}\);.*LATEST"
    )
    try:
        with pytest.raises(learner.NonFiniteLossError, match=message):
            run(
                "run",
                "loss.name=explodes",
                f"loss.module={tmp_path / 'explodes.py'}",
                "do_first_eval=false",
                "eval_every=1000",
            )
    finally:
        LOSSES.pop("explodes", None)
    assert [row["step"] for row in read_rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2]
    weights = final_weights(tmp_path / "run")
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    good = run("good", "n_examples=16", "do_first_eval=false", "loss.beta=0.1")
    assert not same_weights(
        weights, final_weights(good)
    )  # another loss: the weights were really trained
    state = torch.load(tmp_path / "run" / "LATEST" / "training_state.pt", weights_only=True)
    assert state["loader"] == {
        "epoch": 0,
        "cursor": 16,
    }  # a resumed run meets the same examples again


def test_debug_writes_no_checkpoint(run):
    folder = run("run", "debug=true")
    assert not list(folder.glob("step-*")) and not (folder / "LATEST").exists()
    assert (folder / "metrics.jsonl").exists() and not (folder / "wandb").exists()


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ("batch_size=9", "gradient_accumulation_steps=2"),
            "divisible by gradient_accumulation_steps.world_size=2; try 8 or 10",
        ),
        (("max_prompt_length=64",), "must be smaller than max_length=64"),
        (("max_new_tokens=40",), "exceed max_length=64"),
        (("max_length=500",), "exceeds the 128 positions"),
        (("optimizer=RMSProp",), "did you mean RMSprop"),
        (("trainer=BasicTraner",), "did you mean BasicTrainer"),
        (("function=evaluate",), "accepted: eval, train|did you mean eval"),
        (("n_epochs=null",), "would never end"),
        (("topp=0",), r"\(0, 1\]"),
        (("temperature=-1",), "at least 0"),
        (("lr=0",), "train nothing"),
        (("eval_every=0",), "at least 1"),
        (("model.policy_dtype=fp32",), "model.policy_dtype=fp32"),
        (("model.name_or_path=null",), "name_or_path is not set"),
        (
            ("model.name_or_path=/nowhere/model",),
            "model.name_or_path=/nowhere/model: no such folder",
        ),
        (("model.archive=/nowhere/policy.pt",), "no such file or folder"),
        (("datasets=imdb",), "in brackets"),
        (("world_size=2", "batch_size=8"), "needs a distributed trainer"),
        (("loss=bradley_terry", "loss.margin=magnitude"), "column 'magnitude'"),
        (("reward=classifier",), "needs reward.path"),
        (("model.lora.r=2", "model.lora.target_modules=[nothing_like_it]"), "target_modules"),
    ],
)
def test_bad_settings_are_refused_with_what_to_change(run, overrides, message):
    with pytest.raises((ConfigError, DataError), match=message):
        run("run", *overrides)


def test_scores_are_asked_for_before_a_model_loads(run, tmp_path, monkeypatch):
    monkeypatch.setattr(learner, "build_policy", lambda *a, **k: pytest.fail("a model was loaded"))
    pairs = write_jsonl(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(9)],
    )
    with pytest.raises(ConfigError, match="loss=odpo needs scores"):
        run("run", "loss=odpo", f"datasets=[{pairs}]")
    rows = scored_rows(24)
    write_jsonl(
        tmp_path / "data" / "imdb-sft-train.jsonl",
        [row | {"reward": row["reward"] - 1} for row in rows],
    )
    with pytest.raises(DataError, match=r"imdb-sft-train\.jsonl:.*correct the data"):
        run("run", "loss=odpo", "loss.ratio=true")


def test_several_datasets_are_mixed(run, tmp_path):
    pairs = write_jsonl(
        tmp_path / "pairs.jsonl",
        [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(40)],
    )
    folder = run("run", f"datasets=[imdb,{pairs}]", "test_fraction=0.25")
    rows = [row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "train"]
    assert 24 < rows[-1]["examples"] < 64


@pytest.mark.parametrize("architecture", ["gpt2", "gpt_neox", "opt", "gptj", "gpt_neo", "phi"])
def test_other_architectures_train_sample_and_save(imdb_dir, tmp_path, architecture):
    folder = save_model(tmp_path / "model", architecture, scale=1.0)
    summary = run_here(
        *small_run(folder, imdb_dir, tmp_path / "run", "loss=tdpo2", "n_examples=16")
    )
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["loss/eval"] == pytest.approx(math.log(2), rel=1e-9)
    assert summary["kl"] >= 0 and summary["examples"] == 16
