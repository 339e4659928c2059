"""Reward models: their training, the checkpoints that remain, and that others read what they
are."""

import json

import pytest
import torch
from conftest import read_rows, run_here, small_run, write_jsonl

from preflab.modeling.weights_io import read_archive
from preflab.rewards.registry import build_reward
from preflab.training.learner import STATE


def accuracies(folder) -> dict[int, float]:
    return {
        row["step"]: row["dev/eval_accuracy"]
        for row in read_rows(folder / "metrics.jsonl")
        if row["split"] == "eval"
    }


def test_best_is_the_checkpoint_with_the_highest_accuracy_and_stays(run):
    folder = run(
        "run",
        "loss=bradley_terry",
        "lr=3e-3",
        "n_epochs=6",
        "keep_checkpoints=1",
        "pairing=best_worst",
    )
    by_step = accuracies(folder)
    assert 0 in by_step and len(by_step) > 3  # before the first step too
    saved = {step: accuracy for step, accuracy in by_step.items() if step}
    best = next(
        step for step, accuracy in saved.items() if accuracy == max(saved.values())
    )  # the first of equals
    assert (folder / "BEST").resolve().name == f"step-{best}"
    assert best != max(saved), (
        "the last one is the best here: this run would not tell BEST from LATEST"
    )
    assert sorted(path.name for path in folder.glob("step-*")) == sorted(
        {f"step-{best}", f"step-{max(saved)}"}
    )
    state = torch.load(folder / "BEST" / STATE, weights_only=True)
    assert state["last_eval"]["dev/eval_accuracy"] == saved[best]
    by_run, by_folder = (
        build_reward({"name": "reward_model", "path": str(path)})
        for path in (folder, folder / "BEST" / "hf")
    )
    assert by_run(["prompt number 1"], [" answer"]) == by_folder(["prompt number 1"], [" answer"])
    assert by_run(["prompt number 1"], [" answer"]) != build_reward(
        {"name": "reward_model", "path": str(folder / "LATEST" / "hf")}
    )(["prompt number 1"], [" answer"])


def test_a_policy_has_no_best(run):
    assert not (run("run", "n_examples=16") / "BEST").exists()


def test_a_scalar_head_is_kept_unless_a_new_one_is_asked_for(run):
    first = run("first", "loss=bradley_terry", "n_examples=16")
    archive = f"model.archive={first}"
    trained_head, new_head = (
        run(name, "loss=bradley_terry", "n_examples=8", archive, *more)
        for name, more in (("trained_head", ()), ("new_head", ("model.reinit_head=true",)))
    )
    trained = accuracies(first)[max(accuracies(first))]
    losses = {
        name: next(row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "eval")[
            "loss/eval"
        ]
        for name, folder in (("trained_head", trained_head), ("new_head", new_head))
    }
    last = [row for row in read_rows(first / "metrics.jsonl") if row["split"] == "eval"][-1]
    assert losses["trained_head"] == pytest.approx(last["loss/eval"], abs=1e-6) and losses[
        "new_head"
    ] != pytest.approx(last["loss/eval"], abs=1e-4)
    assert accuracies(trained_head)[0] == trained


@pytest.mark.parametrize("loss", ["bradley_terry", "dpo"])
def test_the_adapter_folder_is_what_peft_reads_and_equals_the_folded_model(run, loss, llama_folder):
    from peft import PeftModel
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    )

    folder = run("run", f"loss={loss}", "model.lora.r=4", "n_examples=32", "lr=1e-2") / "LATEST"
    cls, more = (
        (AutoModelForCausalLM, {})
        if loss == "dpo"
        else (AutoModelForSequenceClassification, {"num_labels": 1})
    )
    ids = torch.arange(1, 9)[None]
    folded = cls.from_pretrained(folder / "hf")(ids).logits
    base = cls.from_pretrained(llama_folder, **more)
    adapted = PeftModel.from_pretrained(base, folder / "adapter").eval()(ids).logits
    assert torch.allclose(adapted, folded, atol=1e-5)
    assert not torch.allclose(
        cls.from_pretrained(llama_folder, **more)(ids).logits, folded, atol=1e-3
    )


def test_a_magnitude_is_the_margin(tmp_path, imdb_dir, llama_folder):
    rows = [
        {
            "question": f"q{i}",
            "response_j": f"good {i}",
            "response_k": f"bad {i}",
            "magnitude": float(i % 3),
        }
        for i in range(20)
    ]
    path = write_jsonl(tmp_path / "pairs.jsonl", rows)
    options = (
        f"datasets=[{path}]",
        "loss=bradley_terry",
        "n_examples=8",
        "test_fraction=0.3",
        "batch_size=8",
    )
    losses = []
    for margin in ("null", "magnitude"):
        folder = tmp_path / margin
        run_here(*small_run(llama_folder, imdb_dir, folder, *options, f"loss.margin={margin}"))
        losses.append(
            next(row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "eval")[
                "loss/eval"
            ]
        )
    assert losses[1] > losses[0] + 0.2  # a margin of 1 on average asks for more
    assert json.loads((folder / "summary.json").read_text())["eval_accuracy"] is not None


def test_a_reward_model_from_a_language_model_has_its_body(run):
    sft = run("sft", "loss=sft", "n_examples=16")
    reward_model = run(
        "rm", "loss=bradley_terry", f"model.archive={sft}", "n_examples=8", "lr=1e-30"
    )
    theirs, ours = (read_archive(folder) for folder in (sft, reward_model))
    shared = theirs.keys() & ours.keys()
    assert (
        len(shared) > 10
        and all(torch.equal(theirs[name], ours[name]) for name in shared)
        and "score.weight" in ours
    )
