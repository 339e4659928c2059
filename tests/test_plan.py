"""function=plan: what it counts is what a run then has."""

import contextlib
import itertools
import json

import pytest
import torch
from conftest import (
    make_model,
    make_tokenizer,
    run_command,
    run_here,
    save_model,
    small_run,
)
from hydra import compose, initialize_config_dir
from transformers import AutoConfig

from preflab.checks import check_settings
from preflab.execution import load_inputs
from preflab.modeling.loading import build_policy
from preflab.modeling.logprobs import score_responses
from preflab.settings.keys import CONFIG_DIR
from preflab.settings.load import validate
from preflab.settings.run_folder import register_resolvers
from preflab.training import memory_plan


def settings_of(overrides):
    register_resolvers()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return validate(compose("config", overrides=[*overrides, "function=plan"]))


def planned(overrides) -> memory_plan.Plan:
    settings = settings_of(overrides)
    loss, sources = check_settings(settings)
    data = load_inputs(settings, sources, loss).data["train"]
    return memory_plan.make_plan(settings, loss, data)


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("optimizer=AdamW", "loss=tdpo2"),
        ("optimizer=SGD", "loss=sft"),
        ("model.lora.r=4",),
        ("loss=bradley_terry",),
        ("trainer=FSDPTrainer", "optimizer=AdamW"),
        ("trainer=FSDPTrainer", "model.policy_dtype=bfloat16"),
    ],
)
def test_state_steps_and_tokens_of_a_real_run(imdb_dir, llama_folder, tmp_path, more):
    overrides = small_run(
        llama_folder,
        imdb_dir,
        tmp_path / "run",
        "n_epochs=2",
        "do_first_eval=false",
        "n_examples=40",
        *more,
    )
    plan = planned(overrides)
    summary = run_here(*overrides)
    assert summary["rank_bytes"] == {
        part: plan.memory[part] for part in ("weights", "gradients", "optimizer")
    }
    assert (plan.steps, plan.examples) == (summary["steps"], summary["examples"])
    without_reference = {"loss=sft", "loss=bradley_terry", "model.lora.r=4"} & set(more)
    assert (plan.memory.get("reference", 0) == 0) == bool(without_reference)


@pytest.mark.parametrize(
    "more, n_models",
    [
        (("reference.update=ema", "reference.rate=0.5"), 2),
        (("reference.update=ema", "reference.rate=0.5", "sample_during_eval=false"), 1),
        (("reference.update=ema", "reference.rate=0.5", "model.lora.r=4"), 1),
        (("reference.update=hard", "reference.every=2", "reference.past=[0.5,0.3]"), 3),
    ],
)
def test_a_reference_that_moves_is_counted_with_the_initial_one(
    imdb_dir, llama_folder, tmp_path, more, n_models
):
    run = small_run(llama_folder, imdb_dir, tmp_path / "run")
    one, several = (planned([*run, *words]).memory["reference"] for words in ((), more))
    assert several == n_models * one


def test_calibration_needs_two_gradients_of_the_head(imdb_dir, llama_folder, tmp_path):
    run = small_run(llama_folder, imdb_dir, tmp_path / "run")
    memory = planned([*run, "loss.calibration=true"]).memory
    assert memory["calibration"] == 2 * 4 * 258 * 32 and "calibration" not in planned(run).memory


def test_two_real_ranks(imdb_dir, llama_folder, tmp_path):
    overrides = small_run(
        llama_folder,
        imdb_dir,
        tmp_path / "run",
        "trainer=FSDPTrainer",
        "world_size=2",
        "optimizer=AdamW",
        "do_first_eval=false",
    )
    plan, alone = planned(overrides), planned([o for o in overrides if "world_size" not in o])
    run_command("train.py", *overrides)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["rank_bytes"] == {
        part: plan.memory[part] for part in ("weights", "gradients", "optimizer")
    }
    for part in ("weights", "gradients", "optimizer"):
        assert 0.5 <= plan.memory[part] / alone.memory[part] < 0.51


@pytest.mark.parametrize("more", [(), ("model.lora.r=4",)])
def test_the_peak_of_a_step_is_that_of_the_allocator(imdb_dir, llama_folder, tmp_path, more):
    """Against every allocation and release of a real forward and backward pass, as the profiler
    sees them. Two microbatches keep the gradients of the first."""
    overrides = small_run(llama_folder, imdb_dir, tmp_path / "run", *more)
    plan, two = planned(overrides), planned([*overrides, "gradient_accumulation_steps=2"])
    model = build_policy(settings_of(overrides).model)
    model.model.train()
    passes = [allocated_peak(model, plan.largest) for _ in range(2)]  # the first makes caches too
    counted = plan.memory["activations"] + plan.memory["gradients"]
    assert counted == pytest.approx(passes[1], rel=0.01)
    assert two.memory["activations"] < plan.memory["activations"]


@pytest.mark.parametrize("more", [(), ("model.lora.r=4",)])
def test_the_heap_grows_with_all_that_a_forward_pass_makes(imdb_dir, llama_folder, tmp_path, more):
    """With LoRA the activations are almost the same, and most of what is made is released."""
    plan = planned(small_run(llama_folder, imdb_dir, tmp_path / "run", *more))
    model = build_policy(settings_of(small_run(llama_folder, imdb_dir, tmp_path, *more)).model)
    model.model.train()
    score_responses(model, plan.largest)  # makes caches too
    with allocations() as sizes:
        scores = score_responses(model, plan.largest)
    made = sum(size for size in sizes if size > 0)
    assert plan.memory["heap"] == pytest.approx(memory_plan.HEAP * made, rel=0.05)
    kept = sum(sizes)
    assert kept < made * (0.6 if more else 0.8) and scores.logps.requires_grad


def allocated_peak(policy, batch) -> int:
    """The most bytes that the allocator has given out at a time during a step."""
    with allocations() as sizes:
        score_responses(policy, batch).logps.sum().backward()
    policy.model.zero_grad()
    return max(itertools.accumulate(sizes))


@contextlib.contextmanager
def allocations():
    """Yields a list that has, after the block, the bytes that the allocator gave out in it, in
    order, negative where they came back."""
    activities, sizes = [torch.profiler.ProfilerActivity.CPU], []
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield sizes
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes += [event.nbytes() for event in sorted(events, key=lambda e: e.start_ns())]


def test_a_model_of_seven_billion_parameters_on_eight_ranks_without_its_weights(imdb_dir, tmp_path):
    AutoConfig.for_model(
        "gpt_neox",
        hidden_size=4096,
        num_hidden_layers=32,
        num_attention_heads=32,
        intermediate_size=16384,
        vocab_size=50432,
        max_position_embeddings=2048,
    ).save_pretrained(tmp_path / "config")
    make_tokenizer().save_pretrained(tmp_path / "config")
    arguments = [
        "function=plan",
        "model=pythia69",
        f"model.name_or_path={tmp_path / 'config'}",
        "trainer=FSDPTrainer",
        "world_size=8",
        "model.fsdp_policy_mp=bfloat16",
    ]
    arguments += [
        "datasets=[imdb]",
        f"data_dir={imdb_dir}",
        f"cache_dir={tmp_path}",
        f"local_run_dir={tmp_path / 'run'}",
        "plan.gpu_gib=80",
    ]
    output = run_command("train.py", *arguments).stdout
    lines = dict(line.rsplit(maxsplit=1) for line in output.splitlines() if len(line.split()) > 1)
    assert lines["parameters"] == "6,857,302,016"  # what the architecture is known to have
    assert float(lines["  weights"].replace(",", "")) == pytest.approx(
        6_857_302_016 * 4 / 8 / 2**20, rel=1e-3
    )
    assert "plan.gpu_gib=80: fits" in output
    assert "does not fit" in run_command("train.py", *arguments[:-1], "plan.gpu_gib=10").stdout
    assert not (tmp_path / "run").exists()


def test_a_split_model(imdb_dir, tmp_path):
    folder = save_model(tmp_path / "model", "gpt_neox")
    overrides = small_run(folder, imdb_dir, tmp_path / "run", "trainer=FSDPTrainer", "world_size=4")
    shards, split = planned(overrides), planned([*overrides, "tensor_parallel_size=2"])
    assert split.ranks == shards.ranks == 4
    # Linear layers are split by two and then sharded by two; embeddings, norms and the bias of a
    # sum only sharded.
    sizes = {name: p.numel() for name, p in make_model("gpt_neox").named_parameters()}
    whole = sum(
        n
        for name, n in sizes.items()
        if "norm" in name
        or "embed_in" in name
        or name.endswith(("attention.dense.bias", "4h_to_h.bias"))
    )
    halved = 4 * (whole // 2 + (sum(sizes.values()) - whole) // 4)
    assert (
        split.memory["weights"] == halved + 4 * 32 // 2
    )  # the 258 rows of the head are 129 each, and 65 of them on rank 0
    assert (
        shards.memory["weights"] == sum(sizes.values()) + 2 * 16 * 4
    )  # a quarter of 258 rows is 65 on rank 0, in both embeddings
    assert split.memory["gathered weights"] < shards.memory["gathered weights"]
