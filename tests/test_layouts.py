"""Packed and prefix-shared rows against every response alone in float64: values and every
parameter's gradient."""

import copy
import itertools

import pytest
import torch
from conftest import ARCHITECTURES, ROOT, make_model
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from preflab.batching import packed_attention, packed_models, short_rows
from preflab.batching.packed_attention import (
    allowed_pairs,
    block_mask,
    block_table,
    describe_tokens,
)
from preflab.batching.packing import LAYOUTS, Layout, lay_out
from preflab.modeling import fused_head
from preflab.modeling.blocks import find_blocks
from preflab.modeling.layout_choice import (
    check_sharing,
    known_layouts,
)
from preflab.modeling.loading import fuse_activations
from preflab.modeling.logprobs import Scorer, score_responses

PACKED = [name for name in LAYOUTS if name != "padded"]
SHARING = [
    name
    for name in sorted(ARCHITECTURES)
    if make_model(name).config.model_type in packed_models.SHARING
]
FLEX = [
    name
    for name in SHARING
    if packed_models.window_of(make_model(name).config) is None
    and not packed_models.by_segments_only(make_model(name))
]
ALIBI = {"bloom", "falcon_rw", "mpt"}
WINDOWED = [
    name for name in SHARING if packed_models.window_of(make_model(name).config) is not None
]
# Lengths of prompts and of their responses: prompts of one token, responses of one (no input),
# several responses, a single one. The longest exceed the attention windows of the models that have
# one.
LENGTHS = [(1, (5, 1)), (12, (3, 9, 7)), (20, (30, 25)), (4, (1, 1)), (7, (6,)), (2, (1, 8))]
# Their own attention, to which ours is compared, computes in float32.
FLOAT32_INSIDE = {"bloom", "gemma2", "gpt_neo", "gptj", "mpt"}
LEARNED_POSITIONS = {"gpt2", "gpt_neo", "opt"}


def draw(lengths=LENGTHS, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(0, 258, (n,), generator=generator).tolist()

    return [(ids(prompt), [ids(n) for n in responses]) for prompt, responses in lengths]


def naive(model, trees):
    """Each response alone behind its prompt, by the untouched model: log-probs of its tokens, in
    one row."""
    logps = []
    for prompt, responses in trees:
        for response in responses:
            logits = model(input_ids=torch.tensor([prompt + response]), use_cache=False).logits
            logits = logits[0, len(prompt) - 1 : -1]
            logps.append(logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0])
    return torch.cat(logps)


def ready(model):
    packed_models.enable(model)
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


@pytest.mark.parametrize(
    "layout, short",
    [*((layout, 64) for layout in LAYOUTS), ("prefix_shared", 20), ("prefix_shared", 0)],
)
@pytest.mark.parametrize("architecture", SHARING)
def test_values_and_gradients_match_each_response_alone(architecture, layout, short, monkeypatch):
    """Rows of up to `short` tokens attend in groups: here all, some, or none."""
    monkeypatch.setattr(short_rows, "LONGEST", short)
    # Several chunks of the head, and a smaller last one.
    monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", 9 * 258)
    plain = make_model(architecture, dtype=torch.float64)
    model = ready(copy.deepcopy(plain))
    expected = naive(plain, draw())
    scores = score_responses(Scorer(model), lay_out(draw(), Layout(layout)))
    assert torch.allclose(
        scores.token_logps, expected, rtol=1e-6 if architecture in FLOAT32_INSIDE else 1e-9
    )
    ours, theirs = (
        gradients(model, objective(scores.token_logps)),
        gradients(plain, objective(expected)),
    )
    assert largest_difference(ours, theirs) < 1e-6


@pytest.mark.parametrize("architecture", SHARING)
def test_a_wrong_mask_does_not_match(architecture):
    """The control: responses that see each other, and shifted positions, must be detected."""
    plain = make_model(architecture, dtype=torch.float64)
    model = ready(copy.deepcopy(plain))
    expected = naive(plain, draw())
    seeing, shifted = (lay_out(draw(), Layout("prefix_shared")) for _ in range(2))
    begin, prompt, response_begin, length = seeing.segments[0, 0].T
    merged = []  # all responses of a prompt as one
    for b in begin.unique():
        own = begin == b
        merged.append((b, prompt[own][0], response_begin[own][0], length[own].sum()))
    seeing.segments = torch.tensor(merged)[None, None]
    shifted.position_ids = shifted.position_ids + 1
    # Rotary positions give the same when all of them are shifted.
    for batch in (seeing, shifted) if architecture in LEARNED_POSITIONS else (seeing,):
        wrong = score_responses(Scorer(model), batch).token_logps
        assert (wrong - expected).abs().max() > 1e-2  # where right ones agree to 1e-9


@pytest.mark.parametrize("architecture", SHARING)
def test_segments_equal_the_dense_mask(architecture):
    """The same row with the dense mask written out, through transformers' own attention."""
    plain = make_model(architecture, dtype=torch.float64)
    if architecture in WINDOWED or architecture in ALIBI:
        pytest.skip("one dense mask does not fit all layers, or the model makes biases of its mask")
    batch = lay_out(draw(), Layout("prefix_shared"))
    segments = score_responses(Scorer(ready(copy.deepcopy(plain))), batch).token_logps
    allowed = allowed_pairs(batch.segments, batch.input_ids.shape[1])
    _, _, positions = describe_tokens(batch.segments, batch.input_ids.shape[1])
    mask = torch.zeros(allowed.shape, dtype=torch.float64)
    mask = mask.masked_fill(~allowed, torch.finfo(torch.float64).min)
    body = getattr(plain, plain.base_model_prefix)
    states = body(
        input_ids=batch.input_ids,
        attention_mask=mask[None, None],
        position_ids=positions[None],
        use_cache=False,
    ).last_hidden_state
    logits = Scorer(plain).logits(states[0, batch.positions])
    dense = logits.log_softmax(-1).gather(1, batch.targets[:, None])[:, 0]
    assert torch.allclose(segments, dense, rtol=1e-6 if architecture in FLOAT32_INSIDE else 1e-9)


@pytest.mark.parametrize("architecture", WINDOWED)
def test_windows_are_counted_in_positions_not_in_places(architecture):
    """The last response of a tree is further than a window away from its prompt in the row, but not
    in its own text."""
    plain = make_model(architecture, dtype=torch.float64)
    assert packed_models.window_of(plain.config) == 16
    for lengths in ([(6, (9, 9, 9))], [(14, (12, 3, 20))]):
        trees = draw(lengths)
        ours = score_responses(
            Scorer(ready(copy.deepcopy(plain))), lay_out(trees, Layout("prefix_shared"))
        ).token_logps
        assert torch.allclose(ours, naive(plain, trees), rtol=1e-6)


def draw_states(trees, heads, kv_heads, dtype):
    """Segments of a packed row, and a query, key and value of its tokens."""
    segments, n = [], 0
    for prompt, responses in trees:
        begins = itertools.accumulate(responses, initial=n + prompt)
        segments += [[n, prompt, *part] for part in zip(begins, responses, strict=False)]
        n += prompt + sum(responses)
    generator = torch.Generator().manual_seed(n)
    states = [
        torch.randn(1, n, h, 8, generator=generator, dtype=dtype).transpose(1, 2)
        for h in (heads, kv_heads, kv_heads)
    ]
    return torch.tensor(segments)[None, None], states


def attention_module(heads, kv_heads):
    module = torch.nn.Module().eval()
    module.num_key_value_groups = heads // kv_heads
    return module


TREES = st.lists(
    st.tuples(st.integers(1, 9), st.lists(st.integers(0, 9), min_size=1, max_size=4)),
    min_size=1,
    max_size=6,
)


@given(TREES, st.sampled_from([None, 3, 7]), st.sampled_from([4, 2, 1]), st.integers(0, 20))
@settings(max_examples=100, deadline=None)
def test_attention_equals_the_dense_mask(trees, window, kv_heads, short):
    """Values and gradients in float64: rows in groups beside long ones, windows, shared heads,
    responses without tokens."""
    segments, states = draw_states(trees, 4, kv_heads, torch.float64)
    query, key, value = (state.requires_grad_() for state in states)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(short_rows, "LONGEST", short)
        short_rows._find_places.cache_clear()
        ours, _ = packed_attention.segment_attention(
            attention_module(4, kv_heads),
            *states,
            segments,
            scaling=0.3,
            sliding_window=window,
        )
    short_rows._find_places.cache_clear()
    repeated = (tensor.repeat_interleave(4 // kv_heads, dim=1) for tensor in (key, value))
    mask = allowed_pairs(segments, query.shape[2], window)
    dense = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3)
    weight = torch.linspace(-1, 2, ours.numel(), dtype=torch.float64).view_as(ours)
    results = [
        (output, *torch.autograd.grad((output * weight).sum(), (query, key, value)))
        for output in (ours, dense.transpose(1, 2))
    ]
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_short_texts_get_the_same_bits_whatever_stands_beside_them(dtype):
    """A prompt, and a response to it: alone, with other responses, in rows of other texts. Cached
    log-probs of the reference then equal those of the policy at the start."""
    trees = [(3, (5,)), (9, (20, 4, 12)), (12, (3, 30)), (2, (70, 6)), (5, (1, 16, 16, 2))]
    segments, states = draw_states(trees, 4, 2, dtype)
    module = attention_module(4, 2)

    def attend(segments, states):
        return packed_attention.segment_attention(module, *states, segments, scaling=0.3)[0][0]

    together = attend(segments, states)
    for begin, prompt, response, length in segments[0, 0].tolist():
        if prompt + length > short_rows.LONGEST:
            continue
        tokens = [*range(begin, begin + prompt), *range(response, response + length)]
        alone = torch.tensor([[[[0, prompt, prompt, length]]]])
        own = attend(alone, [state[:, :, tokens] for state in states])
        assert torch.equal(own[prompt:], together[tokens[prompt:]])
        if begin + prompt == response:
            assert torch.equal(own[:prompt], together[tokens[:prompt]])


@pytest.mark.parametrize("name", PACKED)
def test_flex_attention_gets_the_same_mask(name):
    """What a GPU gets: the block mask allows exactly what the dense mask does."""
    batch = lay_out(draw(), Layout(name))
    n = batch.input_ids.shape[1]
    blocks = block_mask(block_table(batch.segments, n), torch.device("cpu"))
    rows, columns = torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij")
    assert torch.equal(blocks.mask_mod(0, 0, rows, columns), allowed_pairs(batch.segments, n))


def test_rows_without_further_responses_need_no_mask(monkeypatch):
    monkeypatch.setattr(packed_attention, "causal_mask", None)
    model, trees = ready(make_model("llama")), draw([(12, (9,)), (5, (4,))])
    for layout in PACKED:
        assert torch.isfinite(
            score_responses(Scorer(model), lay_out(trees, Layout(layout))).token_logps
        ).all()


@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(PACKED),
    st.integers(0, 5),
)
@settings(max_examples=80, deadline=None)
def test_blocks_are_those_with_an_allowed_pair_and_no_others(lengths, name, beyond):
    segments, size = lay_out(draw(lengths), Layout(name)).segments, 4
    # Tokens behind the last segment form one more tree.
    n = int((segments[..., 2] + segments[..., 3]).max()) + beyond
    width = -(-n // size) * size
    allowed = torch.zeros(width, width, dtype=torch.bool)
    allowed[:n, :n] = allowed_pairs(segments, n)
    expected = allowed.view(width // size, size, width // size, size).any(3).any(1)
    blocks = block_mask(block_table(segments, n, size), torch.device("cpu"), size)
    assert torch.equal(blocks.to_dense()[0, 0].bool(), expected)


def stand_in(module, query, key, value, mask, scaling=None, **options):
    """FlexAttention where it cannot be compiled: uncompiled without gradients, which is all it has
    on a CPU, and else the same function of the same block mask."""
    assert query.dtype == key.dtype == value.dtype  # or torch 2.11 refuses
    options = {"scale": scaling, "enable_gqa": True}
    if torch.is_grad_enabled() and query.requires_grad:
        rows, columns = torch.meshgrid(*[torch.arange(query.shape[2])] * 2, indexing="ij")
        allowed = mask.mask_mod(0, 0, rows, columns)
        output = scaled_dot_product_attention(query, key, value, attn_mask=allowed, **options)
    else:
        output = flex_attention(query, key, value, block_mask=mask, **options)
    return output.transpose(1, 2).contiguous(), None


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("architecture", FLEX)
def test_rows_with_a_block_mask_match_each_response_alone(architecture, monkeypatch):
    monkeypatch.setattr(packed_attention, "flex_attention_forward", stand_in)
    plain = make_model(architecture, dtype=torch.float64)
    model = ready(copy.deepcopy(plain))
    expected = naive(plain, draw())
    batch = lay_out(draw(), Layout("prefix_shared", flex=True)).to("cpu")
    scores = score_responses(Scorer(model), batch)
    assert batch.blocks is not None
    assert torch.allclose(
        scores.token_logps, expected, rtol=1e-6 if architecture in FLOAT32_INSIDE else 1e-9
    )
    ours, theirs = (
        gradients(model, objective(scores.token_logps)),
        gradients(plain, objective(expected)),
    )
    assert largest_difference(ours, theirs) < 1e-6
    assert check_sharing(Scorer(model), flex=True).ok


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("architecture", FLEX)
def test_rows_with_a_block_mask_in_bf16(architecture, monkeypatch):
    """Where autocast leaves queries, keys and values in different dtypes, which FlexAttention does
    not take in torch 2.11."""
    monkeypatch.setattr(packed_attention, "flex_attention_forward", stand_in)
    model = ready(make_model(architecture, scale=1.0))
    with torch.no_grad():
        flex, segments, full = (
            score_responses(
                Scorer(model, autocast=dtype), lay_out(draw(), Layout("prefix_shared", flex=flex))
            ).token_logps
            for flex, dtype in ((True, torch.bfloat16), (False, torch.bfloat16), (True, None))
        )
    assert (flex - segments).abs().max() <= max(0.02, (segments - full).abs().max())


def test_compiled_flex_attention_gives_what_attention_by_segments_gives():
    """What a GPU runs, forward: torch has no backward pass of it for a CPU."""
    batch = lay_out(draw(), Layout("prefix_shared"))
    n, module = batch.input_ids.shape[1], torch.nn.Module().eval()
    module.num_key_value_groups = 2
    query, key, value = (
        torch.randn(1, heads, n, 16, generator=torch.Generator().manual_seed(heads))
        for heads in (4, 2, 2)
    )
    with torch.no_grad():
        blocks = block_mask(block_table(batch.segments, n), torch.device("cpu"))
        segments, flex = (
            packed_attention.segment_attention(module, query, key, value, mask, scaling=0.25)[0]
            for mask in (batch.segments, blocks)
        )
    assert torch.allclose(segments, flex, rtol=1e-5, atol=1e-6)


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)),
        min_size=1,
        max_size=5,
    ),
    st.sampled_from(LAYOUTS),
    st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_every_scored_token_is_predicted_from_what_is_before_it(lengths, layout, last_tokens):
    """Whatever the lengths: targets are the responses, positions hold the token before, and every
    row begins with a prompt."""
    n = iter(range(10**6))
    trees = [
        ([next(n) for _ in range(prompt)], [[next(n) for _ in range(r)] for r in responses])
        for prompt, responses in lengths
    ]
    batch = lay_out(trees, Layout(layout, pad_id=-1, last_tokens=last_tokens))
    flat = batch.input_ids.flatten()
    responses = [(prompt, response) for prompt, of_prompt in trees for response in of_prompt]
    assert batch.targets.tolist() == [token for _, response in responses for token in response]
    before = [
        token
        for prompt, response in responses
        for token in (prompt + response)[len(prompt) - 1 : -1]
    ]
    assert flat[batch.positions].tolist() == before
    assert batch.lengths.tolist() == [len(response) for _, response in responses]
    assert batch.owners.tolist() == [
        i for i, (_, response) in enumerate(responses) for _ in response
    ]
    if last_tokens:
        assert flat[batch.ends].tolist() == [response[-1] for _, response in responses]
    fed = sum(len(response) - (not last_tokens) for _, response in responses)
    prompts = sum(
        len(prompt) * (1 if layout == "prefix_shared" else len(of_prompt))
        for prompt, of_prompt in trees
    )
    assert batch.n_tokens == fed + prompts
    if layout == "padded":
        assert (flat >= 0).sum() == batch.n_tokens == batch.attention_mask.sum()
    else:
        assert flat.numel() == batch.n_tokens and (flat >= 0).all()
        assert torch.equal(batch.position_ids[0], describe_tokens(batch.segments, flat.numel())[2])


def test_a_shared_prompt_is_fed_once():
    trees = [([1] * 50, [[2] * 3, [3] * 4])]
    assert {name: lay_out(trees, Layout(name)).n_tokens for name in LAYOUTS} == {
        "prefix_shared": 55,
        "packed": 105,
        "padded": 105,
    }


def settings_of(**more):
    model = {"attn_implementation": None, "trust_remote_code": False, **more.pop("model", {})}
    return OmegaConf.create({"layout": "auto", "max_length": 64, "model": model, **more})


def test_generation_does_not_change():
    """With our attention enabled, a model attends as before without segments: greedy tokens are the
    same."""
    for architecture in ("bloom", "falcon_rw", "gemma2", "gpt2", "gptj", "gpt_oss", "llama", "mpt"):
        plain = make_model(architecture)
        model = ready(copy.deepcopy(plain))
        ids = torch.randint(0, 256, (3, 7), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        options = {"attention_mask": mask, "max_new_tokens": 12}
        options |= {"do_sample": False, "pad_token_id": 257}
        assert torch.equal(model.generate(ids, **options), plain.generate(ids, **options))


# ---------------------------------------------------------------------------------- the docs' table

MARKS = "<!-- layouts: `python tests/test_layouts.py` writes this table -->\n", "<!-- end -->"


def supported(architecture: str) -> str:
    """The layouts that an architecture is known to support, checked by what it computes here."""
    model = make_model(architecture)
    names, _ = known_layouts(settings_of(), model.config)
    if names != ("padded",):
        packed_models.enable(model)
        assert check_sharing(Scorer(model)).ok
    return ", ".join(names)


def table() -> str:
    lines = [
        "| architecture | `block_name` | layouts | by | attention window"
        " | on a GPU, packed rows attend by |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for architecture in sorted(ARCHITECTURES):
        model = make_model(architecture)
        if model.config.model_type != architecture:
            continue  # a kind of an architecture that has a line
        window = packed_models.window_of(model.config)
        names = supported(architecture)
        by = "tests" if architecture in packed_models.SHARING else "the trial at the start"
        attention = "FlexAttention"
        if names == "padded":
            attention = ""
        elif packed_models.by_segments_only(model):
            attention = "segments"
        elif window:
            attention = "segments, FlexAttention if no text exceeds the window"
        block = type(find_blocks(model, None)[0]).__name__
        row = [architecture, block, names, by, "yes" if window else "no", attention]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def test_the_table_in_the_docs_is_what_the_code_does():
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert text.split(MARKS[0])[1].split(MARKS[1])[0] == table()
    # All of them are tested here, and others.
    assert set(ARCHITECTURES) > packed_models.SHARING
    assert supported("starcoder2") != supported("lfm2") == "padded"


if __name__ == "__main__":
    docs = ROOT / "docs" / "models.md"
    before, rest = docs.read_text(encoding="utf-8").split(MARKS[0])
    after = rest.split(MARKS[1])[1]
    docs.write_text(before + MARKS[0] + table() + MARKS[1] + after, encoding="utf-8")
