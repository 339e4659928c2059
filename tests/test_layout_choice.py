"""The choice of a layout: FlexAttention and packed rows are tried before they are used."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_model
from test_layouts import settings_of, stand_in
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from preflab.batching import packed_attention
from preflab.batching.packed_attention import Support, check_flex
from preflab.batching.packing import Layout
from preflab.distributed.process_group import ALONE
from preflab.modeling import layout_choice
from preflab.modeling.layout_choice import check_sharing, choose_layout, flex_support
from preflab.modeling.logprobs import Scorer
from utils import ConfigError


def replace_flex(monkeypatch, attention):
    monkeypatch.setattr(packed_attention, "flex_attention_forward", attention)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_is_tried_before_it_is_used(monkeypatch):
    shapes = 4, 2, 16, torch.float32, torch.device("cpu")
    replace_flex(monkeypatch, stand_in)
    assert check_flex(*shapes) == Support(True)

    def too_sharp(*inputs, scaling, **options):
        return stand_in(*inputs, scaling=1.02 * scaling, **options)

    replace_flex(monkeypatch, too_sharp)
    assert "off by" in check_flex(*shapes).reason

    def detached_key(module, query, key, *inputs, **options):
        return stand_in(module, query, key.detach(), *inputs, **options)

    replace_flex(monkeypatch, detached_key)
    assert "fails here (RuntimeError" in check_flex(*shapes).reason

    def nan_gradient(module, query, key, *inputs, **options):
        key = key.clone()
        key.register_hook(lambda gradient: gradient * float("nan"))
        return stand_in(module, query, key, *inputs, **options)

    replace_flex(monkeypatch, nan_gradient)
    assert "off by nan" in check_flex(*shapes).reason
    replace_flex(monkeypatch, lambda *inputs, **options: 1 / 0)
    failed = check_flex(*shapes)
    assert not failed.ok and "fails here (ZeroDivisionError" in failed.reason


def on_gpu(model):
    """As much of a scorer as `flex_support` reads, on a GPU that is not there."""
    return SimpleNamespace(causal_lm=model, model=model, device=torch.device("cuda"), mixed=None)


def test_flex_attention_is_used_where_every_rank_can_and_no_text_exceeds_the_window(monkeypatch):
    llama, windowed = make_model("llama"), make_model("mistral")
    monkeypatch.setattr(layout_choice, "check_flex", lambda *shapes: Support(True))
    assert flex_support(settings_of(), on_gpu(llama), ALONE) == Support(True)
    assert flex_support(settings_of(max_length=16), on_gpu(windowed), ALONE) == Support(True)
    too_long = flex_support(settings_of(), on_gpu(windowed), ALONE)
    assert "windows of 16 tokens, texts of up to max_length=64" in too_long.reason
    another_fails = SimpleNamespace(max=lambda values: [1.0])
    assert "another rank" in flex_support(settings_of(), on_gpu(llama), another_fails).reason
    monkeypatch.setattr(layout_choice, "check_flex", lambda *shapes: Support(False, "no compiler"))
    without = Support(False, "attention segment by segment, slower: no compiler")
    assert flex_support(settings_of(), on_gpu(llama), ALONE) == without
    # On a CPU segments are faster, so there is nothing to report.
    assert flex_support(settings_of(), Scorer(llama), ALONE) == Support(False, "")


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_without_flex_attention_packed_rows_are_still_used(monkeypatch):
    """The choice on a GPU, made on the CPU."""
    model = make_model("llama")
    packed_attention.enable(model)
    slower = Support(False, "slower: no compiler")
    monkeypatch.setattr(layout_choice, "flex_support", lambda *_: slower)
    assert choose_layout(settings_of(), Scorer(model)) == (Layout("prefix_shared"), slower.reason)

    monkeypatch.setattr(layout_choice, "flex_support", lambda *_: Support(True))
    replace_flex(monkeypatch, stand_in)
    expected = Layout("prefix_shared", pad_id=3, flex=True)
    assert choose_layout(settings_of(), Scorer(model), pad_id=3) == (expected, "")

    def ignores_its_mask(module, query, key, value, mask, scaling=None, **options):
        return sdpa_attention_forward(
            module, query, key, value, None, scaling=scaling, is_causal=True
        )

    replace_flex(monkeypatch, ignores_its_mask)
    layout, reason = choose_layout(settings_of(), Scorer(model))
    assert layout == Layout("prefix_shared")
    assert reason.startswith("attention segment by segment, slower: hidden states")
    assert "off by" in reason


def ignore_masks(model):
    def ignoring(module, query, key, value, mask, **options):
        return sdpa_attention_forward(module, query, key, value, None, **options)

    AttentionInterface.register("ignoring", ignoring)
    AttentionMaskInterface.register("ignoring", sdpa_mask)
    model.set_attn_implementation("ignoring")


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_check_at_the_start_finds_a_model_that_ignores_its_mask(architecture):
    model = make_model(architecture)
    packed_attention.enable(model)
    assert check_sharing(Scorer(model)) == Support(True)
    ignore_masks(model)
    assert "off by" in check_sharing(Scorer(model)).reason


def test_attention_that_fails_means_padded_rows_or_an_error(monkeypatch):
    """A kernel that raises, as one may on another GPU."""
    model = make_model("llama")
    packed_attention.enable(model)
    monkeypatch.setattr(packed_attention, "_trees", lambda segments: 1 / 0)
    layout, reason = choose_layout(settings_of(), Scorer(model))
    assert layout.name == "padded" and "fails here (ZeroDivisionError" in reason
    placed = Scorer(model)
    placed.placed_on = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"fails here.*use layout=padded"):
        choose_layout(settings_of(), placed)


def test_the_fastest_supported_layout_is_taken_and_others_refused_by_name():
    model = make_model("llama")
    packed_attention.enable(model)
    assert choose_layout(settings_of(), Scorer(model)) == (Layout("prefix_shared"), "")
    assert choose_layout(settings_of(layout="packed"), Scorer(model)) == (Layout("packed"), "")
    layout, reason = choose_layout(settings_of(), Scorer(make_model("gemma2")))
    assert layout.name == "padded" and "gemma2" in reason
    refused = r"layout=prefix_shared cannot be used.*use layout=padded"
    with pytest.raises(ConfigError, match=refused):
        choose_layout(settings_of(layout="prefix_shared"), Scorer(make_model("gemma2")))
    eager = settings_of(model={"attn_implementation": "eager"})
    layout, reason = choose_layout(eager, Scorer(model))
    assert layout.name == "padded" and "attn_implementation=eager" in reason
    ignore_masks(model)
    assert choose_layout(settings_of(), Scorer(model))[0].name == "padded"
