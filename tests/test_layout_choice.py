"""The choice of a layout: FlexAttention and packed rows are tried before they are used."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ARCHITECTURES, make_model
from test_layouts import settings_of, stand_in
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.models.llama import modeling_llama

from preflab.batching import packed_attention, packed_models
from preflab.batching.packed_attention import Support, check_flex
from preflab.batching.packing import Layout
from preflab.distributed.process_group import ALONE
from preflab.modeling import architecture_trial, layout_choice
from preflab.modeling.architecture_trial import supports_packed_rows
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
    packed_models.enable(model)
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
    packed_models.enable(model)
    assert check_sharing(Scorer(model)) == Support(True)
    ignore_masks(model)
    assert "off by" in check_sharing(Scorer(model)).reason


def test_attention_that_fails_means_padded_rows_or_an_error(monkeypatch):
    """A kernel that raises, as one may on another GPU."""
    model = make_model("llama")
    packed_models.enable(model)
    monkeypatch.setattr(packed_attention, "split_trees", lambda segments: 1 / 0)
    layout, reason = choose_layout(settings_of(), Scorer(model))
    assert layout.name == "padded" and "fails here (ZeroDivisionError" in reason
    placed = Scorer(model)
    placed.placed_on = torch.device("cpu")
    with pytest.raises(ConfigError, match=r"fails here.*use layout=padded"):
        choose_layout(settings_of(), placed)


def test_the_fastest_supported_layout_is_taken_and_others_refused_by_name():
    model = make_model("llama")
    packed_models.enable(model)
    assert choose_layout(settings_of(), Scorer(model)) == (Layout("prefix_shared"), "")
    assert choose_layout(settings_of(layout="packed"), Scorer(model)) == (Layout("packed"), "")
    layout, reason = choose_layout(settings_of(), Scorer(make_model("lfm2")))
    assert layout.name == "padded" and "lfm2 is not among" in reason
    refused = r"layout=prefix_shared cannot be used.*use layout=padded"
    with pytest.raises(ConfigError, match=refused):
        choose_layout(settings_of(layout="prefix_shared"), Scorer(make_model("lfm2")))
    eager = settings_of(model={"attn_implementation": "eager"})
    layout, reason = choose_layout(eager, Scorer(model))
    assert layout.name == "padded" and "attn_implementation=eager" in reason
    ignore_masks(model)
    assert choose_layout(settings_of(), Scorer(model))[0].name == "padded"


# ------------------------------------------------------- the trial of an architecture without tests


@pytest.fixture
def no_tests(monkeypatch):
    """No architecture is in SHARING, and none has been tried."""
    monkeypatch.setattr(architecture_trial, "SHARING", set())
    monkeypatch.setattr(architecture_trial, "_results", {})


# Every way to attend, windows in all and in some layers, learned positions, and a mixture.
TRIED = "bloom falcon_rw gemma2 gpt2 gpt_neo gpt_oss gptj mistral mpt phi3 qwen2_moe starcoder2"


@pytest.mark.parametrize("architecture", TRIED.split())
def test_the_trial_passes_what_the_tests_pass(architecture, no_tests):
    before = torch.random.get_rng_state()
    assert supports_packed_rows(make_config(architecture)) == Support(True)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_trial_is_small_whatever_the_model(no_tests, monkeypatch):
    """Two models of real sizes: an 80-layer Llama, and a mixture with frozen parameters."""
    large = {"hidden_size": 8192, "num_attention_heads": 64, "num_hidden_layers": 80}
    kinds = ["full_attention"] * 70 + ["sliding_attention"] * 10
    for config in (
        make_config("qwen2", **large, layer_types=kinds, use_sliding_window=True),
        AutoConfig.for_model("ernie4_5_moe"),
    ):
        small = architecture_trial.small_config(config)
        kept, all_kinds = (getattr(c, "layer_types", ()) for c in (small, config))
        assert set(kept) == set(all_kinds)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(small)
        assert model.num_parameters() < 10_000_000
    small_mixture = make_config("ernie4_5_moe", hidden_size=32, num_attention_heads=2)
    assert supports_packed_rows(small_mixture) == Support(True)
    monkeypatch.setattr(architecture_trial, "SMALL", 1000)
    monkeypatch.setattr(architecture_trial, "_results", {})
    assert "its small model has" in supports_packed_rows(small_mixture).reason


def make_config(architecture, **more):
    return AutoConfig.for_model(
        **({"model_type": architecture} | ARCHITECTURES.get(architecture, {}) | more)
    )


def test_the_trial_refuses_states_that_flow_from_response_to_response(no_tests):
    """A recurrence and a convolution over the row; no attention mask stops them."""
    small = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    for config in (
        make_config("falcon_h1", **small, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_head=16),
        make_config("lfm2", **small, layer_types=["conv", "full_attention"], num_hidden_layers=2),
    ):
        result = supports_packed_rows(config)
        assert not result.ok and "gives other" in result.reason, result


def places_not_positions(forward):
    """Rotary embeddings of places in the row, whatever position_ids say."""

    def changed(self, x, position_ids, **options):
        places = torch.arange(position_ids.shape[1], device=x.device)[None]
        return forward(self, x, places, **options)

    return changed


def by_length_of_the_row(forward):
    """Rotary embeddings that are scaled where a row passes the positions of the model."""

    def changed(self, x, position_ids, **options):
        is_long = position_ids.shape[1] > self.config.max_position_embeddings
        return forward(self, x, position_ids / 2 if is_long else position_ids, **options)

    return changed


@pytest.mark.parametrize("change", [places_not_positions, by_length_of_the_row])
def test_the_trial_refuses_positions_that_depend_on_the_row(change, no_tests, monkeypatch):
    rotary = modeling_llama.LlamaRotaryEmbedding
    monkeypatch.setattr(rotary, "forward", change(rotary.forward))
    result = supports_packed_rows(make_config("llama"))
    assert not result.ok and "gives other log-probs" in result.reason


def test_the_trial_refuses_a_window_that_only_the_mask_has(no_tests, monkeypatch):
    """Packed rows bring their own mask, so the window would be lost in texts that pass it."""
    attention = modeling_llama.LlamaAttention
    forward = attention.forward

    def masked(self, hidden_states, attention_mask=None, **options):
        if attention_mask is None or attention_mask.dtype == torch.bool:
            n = hidden_states.shape[1]
            band = torch.ones(n, n, dtype=torch.bool).tril().triu(1 - self.config.local_window)
            attention_mask = band if attention_mask is None else attention_mask & band
        return forward(self, hidden_states, attention_mask=attention_mask, **options)

    monkeypatch.setattr(attention, "forward", masked)
    config = make_config("llama", local_window=48)
    result = supports_packed_rows(config)
    assert not result.ok and "gives other log-probs" in result.reason

    # Under a name that does not say what it is, the model itself shows it, at the run's length.
    config = make_config("llama", vocab_size=258)
    type(config).local_window = 30
    try:
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(4 if parameter.ndim > 1 else 1)
        packed_models.enable(model)
        monkeypatch.setattr(layout_choice, "supports_packed_rows", lambda *_: Support(True))
        layout, reason = choose_layout(settings_of(max_length=128), Scorer(model))
    finally:
        del type(config).local_window
    assert layout.name == "padded" and "off by" in reason


def test_the_trial_refuses_attention_that_is_right_and_cannot_learn(no_tests, monkeypatch):
    """Values alone would pass."""
    by_segments = packed_attention._by_segments

    def detached(module, query, key, value, *inputs, **options):
        return by_segments(module, query, (key + key.detach()) / 2, value, *inputs, **options)

    monkeypatch.setattr(packed_attention, "_by_segments", detached)
    result = supports_packed_rows(make_config("llama"))
    assert not result.ok and "gives other gradients" in result.reason


def test_code_of_a_model_folder_is_tried_whatever_its_name(no_tests, monkeypatch):
    monkeypatch.setattr(architecture_trial, "SHARING", {"llama"})
    monkeypatch.setattr(architecture_trial, "_try_architecture", lambda *_: Support(False, "tried"))
    config = make_config("llama", auto_map={"AutoModelForCausalLM": "modeling.Llama"})
    assert supports_packed_rows(config, trust_remote_code=False) == Support(True)
    assert supports_packed_rows(config, trust_remote_code=True).reason == "tried"


def test_an_architecture_is_tried_once(no_tests, monkeypatch):
    tried = []
    monkeypatch.setattr(
        architecture_trial, "_try_architecture", lambda *_: tried.append(1) or Support(True)
    )
    model = make_model("llama")
    assert supports_packed_rows(model.config).ok
    packed_models.enable(model)
    assert choose_layout(settings_of(), Scorer(model)) == (Layout("prefix_shared"), "")
    assert tried == [1]
