"""Packed and prefix-shared rows against every response alone in float64: values and every parameter's gradient."""

import copy

import pytest
import torch
from conftest import ARCHITECTURES, ROOT, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

import attention
import logprobs
from attention import allowed_pairs, block_mask, describe_tokens
from layouts import LAYOUTS, Layout, lay_out
from logprobs import Scorer, score_responses
from models import choose_layout, fuse_activations, known_layouts, sharing_problem
from utils import ConfigError

PACKED = [name for name in LAYOUTS if name != "padded"]
SHARING = sorted(attention.SHARING)
# Lengths of prompts and of their responses: prompts of one token, responses of one (nothing to feed), several, one alone.
# The longest go beyond the attention windows of the models that have one.
LENGTHS = [(1, (5, 1)), (12, (3, 9, 7)), (20, (30, 25)), (4, (1, 1)), (7, (6,)), (2, (1, 8))]
FLOAT32_INSIDE = {"gpt_neo", "gptj"}  # their own attention, to which ours is compared, computes in float32


def draw(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(0, 258, (n,), generator=generator).tolist()
    return [(ids(prompt), [ids(n) for n in responses]) for prompt, responses in lengths]


def naive(model, trees):
    """Each response alone behind its prompt, by the untouched model: log-probs of its tokens, in one row."""
    logps = []
    for prompt, responses in trees:
        for response in responses:
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(logps)


def ready(model):
    attention.enable(model)
    fuse_activations(model)
    return model


def objective(token_logps):
    return (token_logps * torch.linspace(-1, 2, len(token_logps))).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def largest_difference(ours, theirs):
    assert ours.keys() == theirs.keys()
    scale = max(g.abs().max() for g in theirs.values())
    return max((ours[name] - theirs[name]).abs().max().item() for name in theirs) / scale.item()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("architecture", SHARING)
def test_values_and_gradients_match_each_response_alone(architecture, layout, monkeypatch):
    monkeypatch.setattr(logprobs, "CHUNK_ELEMENTS", 9 * 258)  # several chunks of the head and a left-over one
    plain = make_model(architecture, dtype=torch.float64)
    model = ready(copy.deepcopy(plain))
    expected = naive(plain, draw())
    scores = score_responses(Scorer(model), lay_out(draw(), Layout(layout)))
    assert torch.allclose(scores.token_logps, expected, rtol=1e-6 if architecture in FLOAT32_INSIDE else 1e-9)
    ours, theirs = gradients(model, objective(scores.token_logps)), gradients(plain, objective(expected))
    assert largest_difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("architecture", SHARING)
def test_a_wrong_mask_does_not_match(architecture):
    """The control: responses that see each other, and a prompt without its first half, must be told apart."""
    plain = make_model(architecture, dtype=torch.float64)
    model = ready(copy.deepcopy(plain))
    expected = naive(plain, draw())
    seeing, cut = (lay_out(draw(), Layout("prefix_shared")) for _ in range(2))
    begin, prompt, at, length = seeing.segments[0, 0].T
    one = [(b, prompt[begin == b][0], at[begin == b][0], length[begin == b].sum()) for b in begin.unique()]
    seeing.segments = torch.tensor(one)[None, None]
    cut.position_ids = cut.position_ids + 1
    for batch in (seeing, cut) if architecture in LEARNED_POSITIONS else (seeing,):
        wrong = score_responses(Scorer(model), batch).token_logps
        assert (wrong - expected).abs().max() > 1e-2  # where right ones agree to 1e-9


LEARNED_POSITIONS = {"gpt2", "gpt_neo", "opt"}  # rotary ones do not change when all of them are shifted


@pytest.mark.parametrize("architecture", SHARING)
def test_segments_equal_the_dense_mask(architecture):
    """The same row with the dense mask written out, through transformers' own attention."""
    plain = make_model(architecture, dtype=torch.float64)
    if attention.window_of(plain.config) is not None:
        pytest.skip("a dense mask replaces the window of some layers only")
    batch = lay_out(draw(), Layout("prefix_shared"))
    segments = score_responses(Scorer(ready(copy.deepcopy(plain))), batch).token_logps
    allowed = allowed_pairs(batch.segments, batch.input_ids.shape[1])
    batch.segments, batch.position_ids = None, None
    batch.attention_mask = torch.zeros(allowed.shape, dtype=torch.float64).masked_fill(~allowed, torch.finfo(torch.float64).min)[None, None]
    positions = describe_tokens(lay_out(draw(), Layout("prefix_shared")).segments, batch.input_ids.shape[1])[2][None]
    body = getattr(plain, plain.base_model_prefix)
    states = body(input_ids=batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions, use_cache=False).last_hidden_state
    dense = plain.get_output_embeddings()(states[0, batch.positions]).log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    assert torch.allclose(segments, dense, rtol=1e-6 if architecture in FLOAT32_INSIDE else 1e-9)


@pytest.mark.parametrize("architecture", ["mistral", "qwen2", "gpt_neo"])
def test_windows_are_counted_in_positions_not_in_places(architecture):
    """The last response of a tree is further than a window away from its prompt in the row, but not in its own text."""
    plain = make_model(architecture, dtype=torch.float64)
    assert attention.window_of(plain.config) == 16
    for lengths in ([(6, (9, 9, 9))], [(14, (12, 3, 20))]):
        trees = draw(lengths)
        ours = score_responses(Scorer(ready(copy.deepcopy(plain))), lay_out(trees, Layout("prefix_shared"))).token_logps
        assert torch.allclose(ours, naive(plain, trees), rtol=1e-6)


@pytest.mark.parametrize("name", PACKED)
def test_flex_attention_gets_the_same_mask(name):
    """What a GPU gets: the block mask allows exactly what the dense mask does, and the compiled-free run of it agrees."""
    batch = lay_out(draw(), Layout(name))
    n = batch.input_ids.shape[1]
    blocks = block_mask(batch.segments, n, torch.device("cpu"))
    rows, columns = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    assert torch.equal(blocks.mask_mod(0, 0, rows, columns), allowed_pairs(batch.segments, n))
    model = ready(make_model("llama", dtype=torch.float64))
    segments = score_responses(Scorer(model), batch).token_logps
    query = torch.randn(1, 2, n, 16, dtype=torch.float64)
    from torch.nn.attention.flex_attention import flex_attention

    module = model.model.layers[0].self_attn
    key = value = query[:, :1]
    ours, _ = attention.segment_attention(module, query, key, value, batch.segments, scaling=0.25)
    flex = flex_attention(query, key, value, block_mask=blocks, scale=0.25, enable_gqa=True)
    assert torch.allclose(ours, flex.transpose(1, 2), rtol=1e-9, atol=1e-12) and torch.isfinite(segments).all()


@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=5),
    st.sampled_from(LAYOUTS), st.booleans(),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_every_scored_token_is_predicted_from_what_is_before_it(lengths, layout, last_tokens):
    """Whatever the lengths: targets are the responses, positions hold the token before, and every row begins with a prompt."""
    n = iter(range(10**6))
    trees = [([next(n) for _ in range(prompt)], [[next(n) for _ in range(r)] for r in responses]) for prompt, responses in lengths]
    batch = lay_out(trees, Layout(layout, pad_id=-1, last_tokens=last_tokens))
    flat = batch.input_ids.flatten()
    responses = [(prompt, response) for prompt, of_prompt in trees for response in of_prompt]
    assert batch.targets.tolist() == [token for _, response in responses for token in response]
    before = [token for prompt, response in responses for token in (prompt + response)[len(prompt) - 1 : -1]]
    assert flat[batch.positions].tolist() == before
    assert batch.lengths.tolist() == [len(response) for _, response in responses]
    assert batch.owners.tolist() == [i for i, (_, response) in enumerate(responses) for _ in response]
    if last_tokens:
        assert flat[batch.ends].tolist() == [response[-1] for _, response in responses]
    fed = sum(len(response) - (not last_tokens) for _, response in responses)
    prompts = sum(len(prompt) * (1 if layout == "prefix_shared" else len(of_prompt)) for prompt, of_prompt in trees)
    assert batch.n_tokens == fed + prompts
    if layout == "padded":
        assert (flat >= 0).sum() == batch.n_tokens == batch.attention_mask.sum()
    else:
        assert flat.numel() == batch.n_tokens and (flat >= 0).all()
        assert torch.equal(batch.position_ids[0], describe_tokens(batch.segments, flat.numel())[2])


def test_a_shared_prompt_is_fed_once():
    trees = [([1] * 50, [[2] * 3, [3] * 4])]
    assert {name: lay_out(trees, Layout(name)).n_tokens for name in LAYOUTS} == {"prefix_shared": 55, "packed": 105, "padded": 105}


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_check_at_the_start_finds_a_model_that_ignores_its_mask(architecture):
    model = make_model(architecture)
    attention.enable(model)
    assert sharing_problem(Scorer(model)) is None
    ignore_masks(model)
    assert "off by" in sharing_problem(Scorer(model))


def test_attention_that_fails_is_padded_or_told(monkeypatch):
    """A kernel that raises, as one may on a GPU of another make."""
    model = make_model("llama")
    attention.enable(model)
    monkeypatch.setattr(attention, "_trees", lambda segments: 1 / 0)
    name, why = choose_layout(settings_of(), Scorer(model))
    assert name == "padded" and "fails here (ZeroDivisionError" in why
    placed = Scorer(model)
    placed.placed_on = torch.device("cpu")
    with pytest.raises(ConfigError, match="fails here.*use layout=padded"):
        choose_layout(settings_of(), placed)


def ignore_masks(model):
    ignoring = lambda module, query, key, value, mask, **more: sdpa_attention_forward(module, query, key, value, None, **more)
    AttentionInterface.register("ignoring", ignoring)
    AttentionMaskInterface.register("ignoring", sdpa_mask)
    model.set_attn_implementation("ignoring")


def settings_of(**more):
    model = {"attn_implementation": None, **more.pop("model", {})}
    return OmegaConf.create({"layout": "auto", "max_length": 64, "model": model, **more})


def test_the_fastest_supported_layout_is_taken_and_others_refused_by_name():
    model = make_model("llama")
    attention.enable(model)
    assert choose_layout(settings_of(), Scorer(model)) == ("prefix_shared", "")
    assert choose_layout(settings_of(layout="packed"), Scorer(model)) == ("packed", "")
    name, why = choose_layout(settings_of(), Scorer(make_model("gemma2")))
    assert name == "padded" and "gemma2" in why
    with pytest.raises(ConfigError, match="layout=prefix_shared cannot be had.*use layout=padded"):
        choose_layout(settings_of(layout="prefix_shared"), Scorer(make_model("gemma2")))
    name, why = choose_layout(settings_of(model={"attn_implementation": "eager"}), Scorer(model))
    assert name == "padded" and "attn_implementation=eager" in why
    ignore_masks(model)
    assert choose_layout(settings_of(), Scorer(model))[0] == "padded"


def test_windows_shorter_than_the_rows_are_padded_on_a_gpu():
    config = make_model("mistral").config
    assert known_layouts(settings_of(), config, torch.device("cpu"))[0] == LAYOUTS
    names, why = known_layouts(settings_of(), config, torch.device("cuda"))
    assert names == ("padded",) and "windows of 16 tokens" in why
    assert known_layouts(settings_of(max_length=16), config, torch.device("cuda"))[0] == LAYOUTS


def test_generation_is_what_it_was():
    """With our attention enabled, a model without segments attends as before: greedy tokens are the same."""
    for architecture in ("gpt2", "gptj", "llama", "mistral"):
        plain = make_model(architecture)
        model = ready(copy.deepcopy(plain))
        ids = torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        options = dict(attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=257)
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


# ------------------------------------------------------------------------------------------------------ the docs' table

MARKS = "<!-- layouts: `python tests/test_layouts.py` writes this table -->\n", "<!-- end -->"


def supported(architecture: str, device: str) -> str:
    """The layouts that can be had, by what the code says of this architecture and, on this CPU, by what it computes."""
    model = make_model(architecture)
    names, _ = known_layouts(settings_of(), model.config, torch.device(device))
    if names != ("padded",):
        attention.enable(model)
        assert sharing_problem(Scorer(model)) is None
    return ", ".join(names)


def table() -> str:
    lines = ["| architecture | attention window | on a CPU | on a GPU |", "| --- | --- | --- | --- |"]
    for architecture in sorted(ARCHITECTURES):
        window = attention.window_of(make_model(architecture).config)
        lines.append(f"| {architecture} | {'yes' if window else 'no'} | {supported(architecture, 'cpu')} | {supported(architecture, 'cuda')} |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_what_the_code_does():
    text = (ROOT / "docs" / "details.md").read_text(encoding="utf-8")
    assert text.split(MARKS[0])[1].split(MARKS[1])[0] == table()
    assert attention.SHARING < set(ARCHITECTURES)  # all of them are tested here, and one that cannot share


if __name__ == "__main__":
    docs = ROOT / "docs" / "details.md"
    before, rest = docs.read_text(encoding="utf-8").split(MARKS[0])
    docs.write_text(before + MARKS[0] + table() + MARKS[1] + rest.split(MARKS[1])[1], encoding="utf-8")
