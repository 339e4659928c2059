"""The one log-prob function against a naive float64 computation: values and every parameter's
gradient."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from transformers import AutoConfig, AutoModelForCausalLM

from preflab.batching.packed_models import enable
from preflab.batching.packing import LAYOUTS, Layout, lay_out
from preflab.modeling import fused_head
from preflab.modeling.fused_head import LinearLogProbs
from preflab.modeling.loading import disable_dropout
from preflab.modeling.logprobs import Scorer, score_responses, sum_by_owner
from preflab.objective.types import NEEDS
from utils import ConfigError

PADDED = Layout("padded", 257)
# Their attention or norms compute in float32 whatever the dtype of the weights.
FLOAT32_INSIDE = {"cohere2", "gpt_neo", "gemma", "gemma2", "gemma3_text", "mpt"}


def sequences(seed=0):
    """Prompts and responses of uneven lengths, one-token ones among them; ids include the pad and
    EOS ids."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [(1, 5), (7, 1), (4, 9), (12, 3)]
    draw = lambda n: torch.randint(0, 258, (n,), generator=generator).tolist()  # noqa: E731
    return [(draw(p), draw(r)) for p, r in lengths]


def trees():
    return [(prompt, [response]) for prompt, response in sequences()]


def naive(model, reference, pairs, kl=None):
    """Each sequence alone, no padding, full float64 log-softmax: sums of log-probs and KL."""
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


def weighted_sum(weights, logps, kl):
    """A scalar whose gradient reaches every log-prob, and every KL if there is one, differently."""
    total = (logps * weights).sum()
    return total if kl is None else total + (kl * weights.flip(0)).sum()


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
@pytest.mark.parametrize("kl", [None, "reference||policy"])
def test_values_and_gradients_match_naive_float64(architecture, kl, monkeypatch):
    monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", 5 * 258)  # several chunks and a left-over one
    policy, reference = (make_model(architecture, seed=s, dtype=torch.float64) for s in (0, 1))
    batch = lay_out(trees(), PADDED)
    scorer = Scorer(policy)
    scorer.check()
    scores = score_responses(scorer, batch, reference=Scorer(reference), kl=kl)
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7], dtype=torch.float64)
    weighted_sum(weights, scores.logps, scores.kl).backward()
    ours = grads(policy)
    policy.zero_grad()
    logps, reference_logps, kls = naive(policy, reference, sequences(), kl)
    weighted_sum(weights, logps, kls).backward()
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
    batch = lay_out(trees(), PADDED)
    both = {
        direction: score_responses(
            Scorer(policy), batch, reference=Scorer(reference), kl=direction
        ).kl
        for direction in ("policy||reference", "reference||policy")
    }
    for direction, kl in both.items():
        _, _, expected = naive(policy, reference, sequences(), direction)
        assert torch.allclose(kl, expected, rtol=1e-9)
    assert not torch.allclose(*both.values(), rtol=1e-2)


def test_float32_is_close_to_float64():
    model = make_model("llama")
    scores = score_responses(Scorer(model), lay_out(trees(), PADDED))
    exact = naive(copy.deepcopy(model).double(), copy.deepcopy(model).double(), sequences())[0]
    assert scores.logps.dtype == torch.float64 and scores.token_logps.dtype == torch.float32
    assert torch.allclose(scores.logps, exact, rtol=2e-5, atol=1e-3)


def test_a_wrong_mask_does_not_match():
    """The control: positions shifted by one, or a mask that hides the prompt, must not give the
    same values."""
    model = make_model("gpt2", dtype=torch.float64)
    exact = naive(model, model, sequences())[0]
    shifted = lay_out(trees(), Layout("padded", 257, last_tokens=True))
    shifted.positions = shifted.positions + 1
    hidden_prompt = lay_out(trees(), PADDED)
    hidden_prompt.attention_mask[:, 0] = 0
    for batch in (shifted, hidden_prompt):
        assert not torch.allclose(score_responses(Scorer(model), batch).logps, exact, rtol=1e-2)


def test_never_more_logits_than_a_chunk(monkeypatch):
    monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", 4 * 258)
    monkeypatch.setattr(fused_head, "SAVED_ELEMENTS", 0)
    model, shapes, linear = make_model("llama"), [], fused_head._linear

    def recording(hidden, *head):
        shapes.append(hidden.shape)
        return linear(hidden, *head)

    monkeypatch.setattr(fused_head, "_linear", recording)
    score_responses(Scorer(model), lay_out(trees(), PADDED)).logps.sum().backward()
    n_scored = sum(len(response) for _, response in sequences())
    assert shapes and all(len(shape) == 2 and shape[0] <= 4 for shape in shapes)
    # each token once in the forward and once in the backward pass
    assert sum(shape[0] for shape in shapes) == 2 * n_scored


HEAD = {"tokens": 11, "width": 6, "vocabulary": 40}


def head_inputs(bias: bool, dtype=torch.float64, seed=0):
    """Hidden states, weight and bias of the policy, the targets, and the same of a reference."""
    generator = torch.Generator().manual_seed(seed)
    n, d, v = HEAD.values()

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    ours = [normal(n, d), normal(v, d), normal(v) if bias else None]
    theirs = [normal(n, d), normal(v, d), normal(v) if bias else None]
    targets = torch.randint(v, (n,), generator=generator)
    return [t if t is None else t.requires_grad_() for t in ours], targets, theirs


def by_autograd(ours, targets, theirs, kl, step=lambda logits: logits):
    """Log-probs, KL and entropy by autograd through the whole log-softmax.

    step: what the architecture does to the logits.
    """
    p, q = (step(torch.nn.functional.linear(h, w, b)).log_softmax(-1) for h, w, b in (ours, theirs))
    logps = p.gather(1, targets[:, None])[:, 0]
    entropy = -(p.exp() * p).sum(1)
    if kl == "reference||policy":
        return logps, (q.exp() * (q - p)).sum(1), entropy
    return logps, (p.exp() * (p - q)).sum(1) if kl else None, entropy


@pytest.mark.parametrize("kl", [None, "reference||policy", "policy||reference"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 50])  # of a chunk
@pytest.mark.parametrize("saved", [True, False])  # or recomputed in the backward pass
def test_the_fused_head_equals_autograd(kl, bias, rows, saved, monkeypatch):
    monkeypatch.setattr(fused_head, "SAVED_ELEMENTS", 10**9 if saved else 0)
    monkeypatch.setattr(
        fused_head, "CHUNK_ELEMENTS", rows * HEAD["vocabulary"] * (1 if kl is None else 4)
    )
    ours, targets, theirs = head_inputs(bias)
    fused = LinearLogProbs.apply(*ours, targets, *(theirs if kl else (None,) * 3), kl, True)
    logps, token_kl, entropy, reference_logps, _ = fused
    expected_logps, expected_kl, expected_entropy = by_autograd(ours, targets, theirs, kl)
    assert torch.allclose(logps, expected_logps, rtol=1e-11, atol=1e-12)
    assert torch.allclose(entropy, expected_entropy, rtol=1e-11, atol=1e-12)
    assert not entropy.requires_grad
    if kl is None:
        assert token_kl is None and expected_kl is None
    else:
        expected_reference_logps, _, _ = by_autograd(theirs, targets, ours, None)
        assert torch.allclose(token_kl, expected_kl, rtol=1e-11, atol=1e-12)
        assert torch.allclose(reference_logps, expected_reference_logps, rtol=1e-11)
    weights = torch.linspace(-2, 1, len(targets), dtype=torch.float64)
    inputs = [t for t in ours if t is not None]
    expected = torch.autograd.grad(weighted_sum(weights, expected_logps, expected_kl), inputs)
    value = weighted_sum(weights, logps, token_kl)
    for _ in range(2):  # the second backward pass must not read what the first overwrote
        for a, b in zip(
            torch.autograd.grad(value, inputs, retain_graph=True), expected, strict=True
        ):
            assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kl", [None, "reference||policy", "policy||reference"])
@pytest.mark.parametrize("scale, cap", [(0.25, None), (1.0, 3.0), (0.5, 2.0)])
@pytest.mark.parametrize("saved", [True, False])
def test_the_fused_head_scales_and_caps(kl, scale, cap, saved, monkeypatch):
    """As Cohere, Granite and Gemma do, against autograd."""
    monkeypatch.setattr(fused_head, "SAVED_ELEMENTS", 10**9 if saved else 0)
    monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", 4 * HEAD["vocabulary"])

    def step(logits):
        return scale * logits if cap is None else cap * torch.tanh(scale * logits / cap)

    ours, targets, theirs = head_inputs(True)
    steps = (fused_head.LogitStep(scale, cap),) * 2
    fused = LinearLogProbs.apply(
        *ours, targets, *(theirs if kl else (None,) * 3), kl, True, True, False, steps
    )
    expected = by_autograd(ours, targets, theirs, kl, step)
    for actual, right in zip(fused, expected, strict=False):
        assert right is None or torch.allclose(actual, right, rtol=1e-11, atol=1e-12)
    weights = torch.linspace(-2, 1, len(targets), dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad(weighted_sum(weights, *fused[:2]), ours),
        torch.autograd.grad(weighted_sum(weights, *expected[:2]), ours),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    # Without the step, or with another one, it does not match.
    other = LinearLogProbs.apply(*ours, targets, *(None,) * 3, None, True)
    assert not torch.allclose(other[0], expected[0], rtol=1e-3)


def test_many_chunks_in_bf16_are_as_exact_as_one(monkeypatch):
    """The gradient of the head's weight and bias is summed over chunks in fp32, although the
    weights are in bf16."""
    monkeypatch.setitem(HEAD, "tokens", 2000)
    ours, targets, _ = head_inputs(True)
    exact = torch.autograd.grad(by_autograd(ours, targets, ours, None)[0].sum(), ours[1:])
    half = [t.detach().bfloat16().requires_grad_() for t in ours]
    errors = []
    for rows in (2000, 4):
        monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", rows * HEAD["vocabulary"])
        logps, *_ = LinearLogProbs.apply(*half, targets, None, None, None, None, False)
        rounded = torch.autograd.grad(logps.sum(), half[1:])
        assert all(grad.dtype == torch.bfloat16 for grad in rounded)
        errors.append(
            [((a - b).norm() / b.norm()).item() for a, b in zip(rounded, exact, strict=True)]
        )
    one_chunk, many_chunks = errors
    assert all(many < 1.2 * one for one, many in zip(one_chunk, many_chunks, strict=True))


def test_the_fused_head_leaves_frozen_weights_alone():
    """LoRA: the head's weight has no gradient, its input has."""
    (hidden, weight, _), targets, _ = head_inputs(False)
    weight = weight.detach()
    logps, *_ = LinearLogProbs.apply(hidden, weight, None, targets, None, None, None, None, False)
    logps.sum().backward()
    head = (hidden, weight, None)
    expected_logps, _, _ = by_autograd(head, targets, head_inputs(False)[2], None)
    [expected] = torch.autograd.grad(expected_logps.sum(), hidden)
    assert torch.allclose(hidden.grad, expected, rtol=1e-10) and weight.grad is None


def test_the_log_of_a_probability_that_underflows_is_finite():
    """softmax then log would be -inf; the log-sum-exp is not."""
    hidden, weight = torch.tensor([[300.0]], requires_grad=True), torch.tensor([[1.0], [-1.0]])
    logp = LinearLogProbs.apply(
        hidden, weight, None, torch.tensor([1]), None, None, None, None, False
    )[0]
    assert logp.item() == -600.0
    logp.sum().backward()
    assert hidden.grad.item() == -2.0


@pytest.mark.parametrize("kl", [None, "reference||policy"])
def test_other_heads_go_through_their_own_module(kl):
    """A head that is not a plain linear layer gives the same numbers by the general path."""
    policy, reference = (make_model("llama", seed=s, dtype=torch.float64) for s in (0, 1))
    batch = lay_out(trees(), PADDED)
    fused = score_responses(Scorer(policy), batch, reference=Scorer(reference), kl=kl, entropy=True)
    ours = grads_of(policy, fused.logps.sum() + (0 if kl is None else fused.kl.sum()))

    class Scaled(torch.nn.Linear):
        base_layer = None  # as adapters on the head have

    policy.lm_head.__class__ = Scaled
    assert Scorer(policy).plain_head() is None
    general = score_responses(
        Scorer(policy), batch, reference=Scorer(reference), kl=kl, entropy=True
    )
    theirs = grads_of(policy, general.logps.sum() + (0 if kl is None else general.kl.sum()))
    assert torch.allclose(fused.logps, general.logps, rtol=1e-10)
    assert torch.allclose(fused.token_entropy, general.token_entropy, rtol=1e-10)
    assert kl is None or torch.allclose(fused.kl, general.kl, rtol=1e-10)
    assert max((ours[name] - theirs[name]).abs().max() for name in theirs) < 1e-8


def grads_of(model, loss):
    model.zero_grad()
    loss.backward()
    return grads(model)


def test_entropy_is_that_of_the_whole_distribution():
    model = make_model("gpt2", dtype=torch.float64)
    scores = score_responses(Scorer(model), lay_out(trees(), PADDED), entropy=True)
    expected = []
    for prompt, response in sequences():
        logits = model(input_ids=torch.tensor([prompt + response])).logits
        p = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        expected.append(-(p.exp() * p).sum(-1))
    assert torch.allclose(scores.token_entropy, torch.cat(expected), rtol=1e-9)


def test_kl_stays_finite_where_softmax_then_log_underflows():
    """With logits in the hundreds a probability is 0 in fp32, its logarithm -inf; log-softmax on
    both sides is not."""
    policy, reference = (make_model("llama", seed=s, scale=40.0) for s in (0, 1))
    scores = score_responses(
        Scorer(policy),
        lay_out(trees(), PADDED),
        reference=Scorer(reference),
        kl="reference||policy",
    )
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
    batch = lay_out(trees(), PADDED)
    model = make_model(architecture)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    disable_dropout(model)
    model.train()
    with torch.no_grad():
        first, second = (score_responses(Scorer(model), batch).token_logps for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_loss_reads_per_token_is_padded_by_response(layout):
    """Against each response scored alone, in layouts that order tokens differently."""
    trees = [(prompt, [response, response[:1]]) for prompt, response in sequences()]
    scorer = Scorer(make_model("llama").double())
    enable(scorer.causal_lm)  # packed rows, which are no option of the library
    batch = lay_out(trees, Layout(layout, 257))
    padded = NEEDS["token_logps"].take(score_responses(scorer, batch), batch)
    responses = [(prompt, r) for prompt, of_prompt in trees for r in of_prompt]
    assert padded.shape == (len(responses), max(len(r) for _, r in responses))
    for row, (prompt, response) in zip(padded, responses, strict=True):
        alone = score_responses(scorer, lay_out([(prompt, [response])], PADDED)).token_logps
        n = len(response)
        torch.testing.assert_close(row[:n], alone.double(), rtol=1e-9, atol=1e-9)
        assert not row[n:].any()


def test_sums_by_owner():
    values, owners = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 0, 1, 2])
    assert sum_by_owner(values, owners, 3).tolist() == [3.0, 4.0, 8.0]


def test_a_body_that_the_class_names_wrongly():
    """Llama4ForCausalLM, whose `base_model_prefix` is no part of it."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama4_text", hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=64, intermediate_size_mlp=64,
        num_local_experts=2, vocab_size=258, pad_token_id=257, attention_chunk_size=64,
    )  # fmt: skip
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0, 0.3)
    expected, *_ = naive(model, model, sequences())
    scores = score_responses(Scorer(model), lay_out(trees(), PADDED))
    assert torch.allclose(scores.logps, expected, atol=1e-6)
