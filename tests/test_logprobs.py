"""The one log-prob function against a naive float64 computation: values and every parameter's gradient."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, make_model

import logprobs
from batching import collate_sequences
from logprobs import Scorer, pad_by_owner, score_responses, sum_by_owner
from models import disable_dropout
from utils import ConfigError

PAD = 257
FLOAT32_INSIDE = {"gpt_neo", "gemma2"}  # their attention or norms compute in float32 whatever the weights are


def sequences(seed=0):
    """Prompts and responses of uneven lengths, one-token ones among them; ids include the pad and EOS ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [(1, 5), (7, 1), (4, 9), (12, 3)]
    draw = lambda n: torch.randint(0, 258, (n,), generator=generator).tolist()  # noqa: E731
    return [(draw(p), draw(r)) for p, r in lengths]


def naive(model, reference, pairs, kl=None):
    """Each sequence alone, no padding, full float64 log-softmax."""
    logps, reference_logps, kls = [], [], []
    for prompt, response in pairs:
        ids = torch.tensor([prompt + response])
        rows = slice(len(prompt) - 1, -1)
        p = model(input_ids=ids, use_cache=False).logits[0, rows].log_softmax(-1)
        with torch.no_grad():
            q = reference(input_ids=ids, use_cache=False).logits[0, rows].log_softmax(-1)
        targets = torch.tensor(response)[:, None]
        logps.append(p.gather(1, targets).sum())
        reference_logps.append(q.gather(1, targets).sum())
        if kl == "reference||policy":
            kls.append((q.exp() * (q - p)).sum())
        elif kl == "policy||reference":
            kls.append((p.exp() * (p - q)).sum())
    return torch.stack(logps), torch.stack(reference_logps), torch.stack(kls) if kls else None


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("kl", [None, "reference||policy"])
def test_values_and_gradients_match_naive_float64(architecture, kl, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 5 * 258)  # several chunks and a left-over one
    policy, reference = (make_model(architecture, seed=s, dtype=torch.float64) for s in (0, 1))
    batch = collate_sequences(sequences(), PAD)
    scorer = Scorer(policy)
    scorer.check()
    scores = score_responses(scorer, batch, reference=Scorer(reference), kl=kl)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    objective = (scores.logps * weights).sum() + (0 if kl is None else (scores.kl * weights.flip(0)).sum())
    objective.backward()
    ours = grads(policy)
    policy.zero_grad()
    logps, reference_logps, kls = naive(policy, reference, sequences(), kl)
    ((logps * weights).sum() + (0 if kl is None else (kls * weights.flip(0)).sum())).backward()
    theirs = grads(policy)
    rtol = 1e-6 if architecture in FLOAT32_INSIDE else 1e-9
    assert torch.allclose(scores.logps, logps, rtol=rtol)
    assert torch.allclose(scores.reference_logps, reference_logps, rtol=rtol)
    assert scores.logps.min() < -20  # far from uniform, or the comparison would say little
    if kl is not None:
        assert torch.allclose(scores.kl, kls, rtol=10 * rtol) and kls.min() > 0.01
    assert ours.keys() == theirs.keys()
    largest = max(g.abs().max() for g in theirs.values())
    for name in theirs:
        assert (ours[name] - theirs[name]).abs().max() < 10 * rtol * largest, name
    assert all(p.grad is None for p in reference.parameters())


def test_policy_to_reference_kl_is_the_other_direction():
    policy, reference = (make_model("gpt2", seed=s, dtype=torch.float64) for s in (0, 1))
    batch = collate_sequences(sequences(), PAD)
    found = {d: score_responses(Scorer(policy), batch, reference=Scorer(reference), kl=d).kl for d in ("policy||reference", "reference||policy")}
    for direction, kl in found.items():
        assert torch.allclose(kl, naive(policy, reference, sequences(), direction)[2], rtol=1e-9)
    assert not torch.allclose(*found.values(), rtol=1e-2)


def test_float32_is_close_to_float64():
    model = make_model("llama")
    scores = score_responses(Scorer(model), collate_sequences(sequences(), PAD))
    exact = naive(copy.deepcopy(model).double(), copy.deepcopy(model).double(), sequences())[0]
    assert scores.logps.dtype == torch.float64 and scores.token_logps.dtype == torch.float32
    assert torch.allclose(scores.logps, exact, rtol=2e-5, atol=1e-3)


def test_a_wrong_mask_does_not_match():
    """The control: positions shifted by one, or a mask that hides the prompt, must not give the same values."""
    model = make_model("gpt2", dtype=torch.float64)
    exact = naive(model, model, sequences())[0]
    shifted = collate_sequences(sequences(), PAD)
    shifted.positions = shifted.positions + 1
    hidden_prompt = collate_sequences(sequences(), PAD)
    hidden_prompt.attention_mask[:, 0] = 0
    for batch in (shifted, hidden_prompt):
        assert not torch.allclose(score_responses(Scorer(model), batch).logps, exact, rtol=1e-2)


def test_never_more_logits_than_a_chunk(monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 4 * 258)
    model, seen = make_model("llama"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(tuple(output.shape)))
    score_responses(Scorer(model), collate_sequences(sequences(), PAD)).logps.sum().backward()
    n_scored = sum(len(response) for _, response in sequences())
    assert seen and all(len(shape) == 2 and shape[0] <= 4 for shape in seen)
    assert sum(shape[0] for shape in seen) == 2 * n_scored  # once forward, once again in the backward pass


def test_kl_stays_finite_where_softmax_then_log_underflows():
    """With logits in the hundreds a probability is 0 in fp32, its logarithm -inf; log-softmax on both sides is not."""
    policy, reference = (make_model("llama", seed=s, scale=40.0) for s in (0, 1))
    scores = score_responses(Scorer(policy), collate_sequences(sequences(), PAD), reference=Scorer(reference), kl="reference||policy")
    scores.kl.sum().backward()
    assert torch.isfinite(scores.kl).all() and scores.kl.max() > 100
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


def test_a_model_with_an_unknown_step_before_its_logits_is_refused():
    model = make_model("llama")
    forward = model.forward
    model.forward = lambda *args, **kwargs: _halved(forward(*args, **kwargs))
    with pytest.raises(ConfigError, match="not known here"):
        Scorer(model).check()


def _halved(output):
    output.logits = output.logits / 2
    return output


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_dropout_is_off_in_training_mode_too(architecture):
    batch = collate_sequences(sequences(), PAD)
    model = make_model(architecture)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    disable_dropout(model)
    model.train()
    with torch.no_grad():
        first, second = (score_responses(Scorer(model), batch).token_logps for _ in range(2))
    assert torch.equal(first, second)


def test_sums_and_padding_by_owner():
    values, owners = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 0, 1, 2])
    assert sum_by_owner(values, owners, 3).tolist() == [3.0, 4.0, 8.0]
    assert pad_by_owner(values, owners, torch.tensor([2, 1, 1])).tolist() == [[1.0, 2.0], [4.0, 0.0], [8.0, 0.0]]
