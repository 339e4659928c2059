"""A reference that follows the policy: its trajectory, where its weights live, its resumption."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import final_weights, read_rows, same_weights, untimed
from torch.distributed.tensor import DTensor

import trainers
from preflab.modeling.fsdp import reshard
from preflab.online.rounds import OnlineTrainer
from preflab.reports.runs import Run
from preflab.reports.tables import summary_table
from preflab.training.learner import Learner
from utils import ConfigError

PLAIN = (
    "layout=padded",
    "optimizer=SGD",
    "lr=0.05",
    "warmup_steps=0",
    "max_grad_norm=1e9",
    "n_epochs=2",
    "n_examples=40",
    "loss.beta=0.5",
    "sample_during_eval=false",
    "do_first_eval=false",
    "model.policy_dtype=float64",
    "model.reference_dtype=float64",
)
EMA = ("reference.update=ema", "reference.rate=0.3")
HARD = ("reference.update=hard", "reference.every=2")
FSDP = "trainer=FSDPTrainer"


@pytest.fixture
def steps(monkeypatch):
    """What the steps of a run see: the learner, and the microbatches of each step."""
    seen = []
    step = Learner.step

    def recording(self, data, microbatches, n_examples):
        if not seen:
            seen.append((self, copy.deepcopy(self.policy.model)))
        seen.append(microbatches)
        return step(self, data, microbatches, n_examples)

    monkeypatch.setattr(Learner, "step", recording)
    return seen


def summed_logps(model, batch):
    """Log-probs of the responses of a padded batch, straight from the model's logits."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logps = logits.log_softmax(-1).flatten(0, 1)[batch.positions]
    tokens = logps.gather(1, batch.targets[:, None]).squeeze(1)
    return torch.zeros(len(batch.lengths), dtype=tokens.dtype).index_add(0, batch.owners, tokens)


def mixing(every, rate):
    """`f(step, policy, reference)`: the reference takes over `rate` of the policy."""

    def sync(step, policy, reference):
        if step % every == 0:
            for p, q in zip(policy.parameters(), reference.parameters(), strict=True):
                q.copy_(rate * p + (1 - rate) * q)

    return sync


def plain_loop(model, steps, sync, beta=0.5, lr=0.05):
    """DPO by SGD, with `sync(step, policy, reference)` after each step."""
    reference = copy.deepcopy(model)
    for number, [(batch, _)] in enumerate(steps, start=1):
        policy_logps = summed_logps(model, batch)
        with torch.no_grad():
            reference_logps = summed_logps(reference, batch)
        d = policy_logps - reference_logps
        loss = -F.logsigmoid(beta * (d[batch.chosen] - d[batch.rejected])).mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= lr * p.grad
            sync(number, model, reference)
    return model, reference


def assert_same_trajectory(folder, learner, policy, reference, bound):
    trained, expected = final_weights(folder), policy.state_dict()
    assert max((trained[name] - expected[name]).abs().max().item() for name in trained) < bound
    ours = dict(learner.reference.model.named_parameters())
    for name, value in reference.named_parameters():
        assert (ours[name] - value).abs().max().item() < bound


@pytest.mark.parametrize(
    "more, every, rate",
    [
        (EMA, 1, 0.3),
        ((*EMA, "reference.every=2"), 2, 0.3),
        (HARD, 2, 1.0),
    ],
)
def test_the_trajectory_of_a_plain_loop(run, steps, more, every, rate):
    folder = run("run", *PLAIN, *more)
    (learner, start), *batches = steps
    assert len(batches) == 5
    frozen, _ = plain_loop(copy.deepcopy(start), batches, lambda *models: None)
    policy, reference = plain_loop(start, batches, mixing(every, rate))
    assert_same_trajectory(folder, learner, policy, reference, 1e-9)
    moved = zip(frozen.parameters(), policy.parameters(), strict=True)
    assert max((a - b).abs().max().item() for a, b in moved) > 1e-5  # the control


def test_the_trajectory_with_the_callback_of_trl(run, steps):
    callbacks = pytest.importorskip(
        "trl.trainer.callbacks", reason="TRL is another harness, and not installed here"
    )
    folder = run("run", *PLAIN, *EMA, "reference.every=2")
    (learner, start), *batches = steps
    pytest.importorskip("accelerate").Accelerator(cpu=True)  # the callback asks for its state
    arguments = SimpleNamespace(ref_model_sync_steps=2, ref_model_mixup_alpha=0.3)

    def sync(step, policy, reference):
        callback = callbacks.SyncRefModelCallback(reference, None)
        callback.on_step_end(arguments, SimpleNamespace(global_step=step), None, model=policy)

    policy, reference = plain_loop(start, batches, sync)
    assert_same_trajectory(folder, learner, policy, reference, 1e-5)


def full(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


@pytest.mark.parametrize(
    "more, every, rate",
    [
        (HARD, 2, 1.0),
        (EMA, 1, 0.3),
        ((*EMA, "trainer=FSDPTrainer"), 1, 0.3),
    ],
)
def test_with_lora_weights_are_mixed_and_not_factors(run, monkeypatch, more, every, rate):
    """The product of two adapters' mean factors is not the mean of their products."""
    step, seen = Learner.step, []

    def recording(self, *arguments):
        metrics = step(self, *arguments)
        reshard(self.policy.model)
        weights = {name: full(p) for name, p in self.policy.model.named_parameters()}
        seen.append((self, weights))
        return metrics

    monkeypatch.setattr(Learner, "step", recording)
    run("run", *PLAIN, *more, "model.lora.r=2", "model.lora.alpha=6")
    learner = seen[0][0]
    assert learner.initial_reference.adapter_off
    expected = {}
    for number, (_, weights) in enumerate(seen, start=1):
        for name, before in weights.items():
            if not name.endswith(".base_layer.weight"):
                continue
            path = name.removesuffix(".base_layer.weight")
            a, b = (weights[f"{path}.lora_{factor}.default.weight"] for factor in "AB")
            own = path.removeprefix("base_model.model.") + ".weight"
            reference = expected.setdefault(own, before)
            if number % every == 0:
                expected[own] = rate * (before + 3 * b @ a) + (1 - rate) * reference
    reshard(learner.reference.model)
    ours = {name: full(p) for name, p in learner.reference.model.named_parameters()}
    assert len(expected) == 14
    for name, value in expected.items():
        assert torch.allclose(ours[name], value, rtol=0, atol=1e-9), name


@pytest.mark.parametrize(
    "more",
    [
        EMA,
        (*HARD, "reference.past=[0.5,0.3]", "model.lora.r=2", "sample_during_eval=false"),
        (*EMA, FSDP, "sample_during_eval=false"),
    ],
)
def test_it_resumes_bit_for_bit(run, monkeypatch, more):
    """Continued with the reference that it was stopped with, also between two updates."""
    more = ("n_epochs=2", "n_examples=40", "eval_every=24", "do_first_eval=false", *more)
    whole = run("whole", *more)
    step = trainers.BasicTrainer.train_step

    def crash(self, *arguments):
        if self.learner.counters.steps == 4:
            raise KeyboardInterrupt
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.BasicTrainer, "train_step", crash)
        with pytest.raises(KeyboardInterrupt):
            run("broken", *more)
    broken = run("broken", *more)
    assert same_weights(final_weights(whole), final_weights(broken))
    if (whole / "samples.jsonl").is_file():
        assert read_rows(whole / "samples.jsonl") == read_rows(broken / "samples.jsonl")
    rows = [untimed(read_rows(folder / "metrics.jsonl")) for folder in (whole, broken)]
    assert rows[0] == rows[1]
    assert (
        not list((whole / "LATEST").glob("*/reference")) and (whole / "LATEST/reference").is_dir()
    )


def test_samples_and_kl_are_compared_with_the_initial_reference(run):
    """After a hard update in the last step, policy and reference are equal; the KL is not 0."""
    folder = run("hard", "n_examples=16", "reference.update=hard", "reference.every=2", "lr=1e-2")
    _, last = (row for row in read_rows(folder / "metrics.jsonl") if row["split"] == "eval")
    assert last["samples_eval/kl"] > 1e-3
    assert last["logratios_eval/chosen"] == pytest.approx(0, abs=1e-6)
    samples = read_rows(folder / "samples.jsonl")
    assert "KL to the initial reference (nats)" in summary_table(Run(folder).latest())
    begin, end = ([r["reference"] for r in samples if r["examples"] == n] for n in (0, 16))
    assert begin == end


def test_a_round_has_the_policy_of_the_round_before(run, monkeypatch):
    before, seen = OnlineTrainer._learn, []

    def recording(self, *arguments):
        learner = self.learner
        models = (learner.reference, learner.initial_reference, learner.policy)
        seen.append([copy.deepcopy(model.model.state_dict()) for model in models])
        return before(self, *arguments)

    monkeypatch.setattr(OnlineTrainer, "_learn", recording)
    run(
        "online",
        "function=online",
        "reward=length",
        "online.rounds=5",
        "online.max_new_tokens=6",
        "batch_size=4",
        "lr=1e-2",
        "online.updates_per_round=2",
        "reference.update=round",
        "reference.every=2",
    )
    assert len(seen) == 5
    for number, (reference, initial, policy) in enumerate(seen, start=1):
        assert same_weights(initial, seen[0][0])
        is_updated = number in (3, 5)
        assert same_weights(reference, policy) == (is_updated or number == 1)
        if not is_updated and number > 1:
            assert same_weights(reference, seen[number - 2][0])


def test_past_policies_are_weighted_in_the_log_probs(run, steps):
    """Against a loop that keeps a copy of the policy of every second step."""
    weights = (0.5, 0.3)
    more = ("reference.update=hard", "reference.every=2", "reference.past=[0.5,0.3]")
    folder = run("run", *PLAIN, *more)
    (learner, start), *batches = steps
    model, initial = start, copy.deepcopy(start)
    past = [initial, initial]
    for number, [(batch, _)] in enumerate(batches, start=1):
        with torch.no_grad():
            reference = 0.2 * summed_logps(initial, batch)
            for weight, policy in zip(weights, past, strict=True):
                reference = reference + weight * summed_logps(policy, batch)
        d = summed_logps(model, batch) - reference
        model.zero_grad()
        (-F.logsigmoid(0.5 * (d[batch.chosen] - d[batch.rejected])).mean()).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.05 * p.grad
        if number % 2 == 0:
            past = [copy.deepcopy(model), past[0]]
    trained, expected = final_weights(folder), model.state_dict()
    assert max((trained[name] - expected[name]).abs().max().item() for name in trained) < 1e-9
    assert learner.initial_reference is None  # nothing is sampled


@pytest.mark.parametrize(
    "more, message",
    [
        ((*EMA, "reference.past=[0.5]"), "is for reference.update=hard and round"),
        ((*HARD, "reference.past=[0.5,0.6]"), "adds up to 1.1"),
        ((*HARD, "reference.past=[0.5]", "loss=tdpo2"), "a weighted sum of log-probs is none"),
        (("reference.update=hard",), "reference.update=hard needs reference.every"),
        (("reference.update=ema",), "needs reference.rate"),
        (("reference.rate=0.5",), "reference.rate=0.5 is for reference.update=ema"),
        (("reference.every=2",), "frozen never updates"),
        (("reference.update=round",), "function=train has none"),
        ((*EMA, "loss=sft"), "loss=sft reads no reference"),
        ((*EMA, "model.reference_dtype=bfloat16"), "rounds small changes"),
        ((*EMA, "reference.cache=true"), "reference.update=ema changes the reference"),
    ],
)
def test_what_cannot_work_is_refused(run, more, message):
    with pytest.raises(ConfigError, match=message):
        run("refused", *more)


def test_another_update_is_another_run(run):
    run("run", "n_examples=8", "sample_during_eval=false", *EMA)
    with pytest.raises(ConfigError, match=r"reference\.rate was 0\.3 and is now 0\.5"):
        run("run", "sample_during_eval=false", "reference.update=ema", "reference.rate=0.5")
