"""A LoRA adapter on a base of 4 or 8 bits: what is refused before the base is read, gradients,
resuming, and what a checkpoint holds. What needs bitsandbytes is skipped without it."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import (
    ROOT,
    make_model,
    make_tokenizer,
    read_rows,
    run_command,
    run_here,
    same_weights,
    save_model,
    small_run,
    write_imdb,
)
from safetensors.torch import load_file
from test_models import model_config
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from preflab.batching.packing import Layout, lay_out
from preflab.modeling import quantization
from preflab.modeling.loading import build_policy, build_reference
from preflab.modeling.logprobs import score_responses
from preflab.modeling.weights_io import archive_place
from utils import ConfigError

needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None,
    reason="bitsandbytes is not installed (requirements/quantization.txt)",
)
LORA = {"r": 2, "alpha": 16, "target_modules": "all-linear"}
ON_4_BITS = ("model.quantization=4bit", "model.lora.r=2")


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantized")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    config = AutoConfig.from_pretrained(save_model(folder / "narrow"), **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for weight in model.parameters():
        weight.data.mul_(4)
    model.save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    quantized = save_model(folder / "by others")
    config = json.loads((quantized / "config.json").read_text())
    rounding = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (quantized / "config.json").write_text(json.dumps(config | {"quantization_config": rounding}))
    data = write_imdb(folder / "data")

    def go(name: str, *more: str) -> dict:
        return run_here(
            *small_run(
                folder / "model", data, folder / name, "n_examples=24", "save_every=8",
                "eval_every=100", "sample_during_eval=false", "do_first_eval=false",
                "keep_checkpoints=null", *more,
            )
        )  # fmt: skip

    return folder, go


# ------------------------------------------------------------------------ refused before it is read


@pytest.mark.parametrize(
    "more, says",
    [
        (("model.lora.r=0",), r"4bit cannot be trained itself.*model\.lora\.r=16"),
        (("trainer=FSDPTrainer",), "has no shards and no splits; take trainer=BasicTrainer"),
        (("model.from_scratch=true",), r"model\.from_scratch=true has random weights"),
        (("function=plan",), "function=plan counts no quantised weights"),
        (("reference.update=hard", "reference.every=2"), "reference.update=hard copies"),
        (("model.archive={model}",), r"model\.archive=\S+ cannot be loaded into model\.quant"),
        (("model.reference_archive={model}",), "reference_archive=.* cannot be loaded"),
        (("function=eval", "model.archive={model}"), "whole weights, which would replace"),
        (("model.name_or_path={others}",), "are quantised already; leave"),
        (
            ("model.name_or_path={others}", "model.quantization=null", "model.lora.r=0"),
            "whose weights are quantised cannot be trained itself",
        ),
        (
            ("model.quantization_args={{quant_type: fp4}}",),
            "no such argument; .*bnb_4bit_quant_type",
        ),
        (("model.quantization_args={{bnb_4bit_quant_type: int4}}",), "accepted: nf4, fp4"),
        (("model.quantization_args={{bnb_4bit_use_double_quant: 1}}",), "must be a bool"),
        (
            ("model.quantization=null", "model.quantization_args={{bnb_4bit_quant_type: fp4}}"),
            "is for model.quantization=4bit or 8bit",
        ),
    ],
)
def test_what_a_quantised_base_cannot_do_is_refused(setting, monkeypatch, more, says):
    folder, go = setting
    monkeypatch.setattr(quantization, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    names = {"narrow": folder / "narrow", "model": folder / "model", "others": folder / "by others"}
    with pytest.raises(ConfigError, match=says):
        go("refused", *ON_4_BITS, *(word.format(**names) for word in more))


def test_the_missing_package_is_named(setting, monkeypatch):
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs the package bitsandbytes.*quantization\.txt"):
        setting[1]("missing", *ON_4_BITS)
    assert "bitsandbytes==" in (ROOT / "requirements" / "quantization.txt").read_text()


def test_nothing_is_merged_into_a_quantised_base(setting, tmp_path):
    from peft import LoraConfig, get_peft_model

    folder, _ = setting
    adapted = get_peft_model(make_model("llama"), LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted.save_pretrained(tmp_path / "adapter")
    done = run_command(
        "scripts/merge_adapter.py", "--adapter_model_name", tmp_path / "adapter",
        "--base_model_name", folder / "by others", "--output_name", tmp_path / "out", check=False,
    )  # fmt: skip
    assert done.returncode == 2 and "has quantised weights" in done.stderr


# ------------------------------------------------------------------------------- with bitsandbytes


def _dequantised(model):
    """The values of the quantised weights of a model, by the name of their module."""
    from bitsandbytes import nn
    from bitsandbytes.functional import dequantize_4bit

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear4bit):
            yield name, dequantize_4bit(module.weight.data, module.weight.quant_state)
        elif isinstance(module, nn.Linear8bitLt):
            state = module.state
            codes, scales = (
                (module.weight.data, module.weight.SCB)
                if state.CB is None
                else (state.CB, state.SCB)
            )
            yield name, codes.float() * scales.float()[:, None] / 127


def _round_inputs(module, inputs):
    """Rounds each token's input to float16, and to 255 values by its largest; gradients pass."""
    [x] = inputs
    half = x.detach().half().float()
    scale = half.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 127
    return x + ((half / scale).round() * scale - x.detach())


def _scale_output(module, inputs, output):
    """bitsandbytes takes 6.200124e-5 for 1 / 127^2 = 6.200012e-5, of which the rounding in the next
    layer makes more. Gradients pass."""
    return output + output.detach() * (6.200124e-5 * 127**2 - 1)


@needs_bitsandbytes
@pytest.mark.parametrize("bits, tolerance", [("4bit", 1e-5), ("8bit", 1e-4)])
def test_log_probs_and_gradients_are_those_of_the_rounded_weights(setting, bits, tolerance):
    """8-bit products round their input too. A pass without gradients comes first: packed for a
    CPU's kernel, weights would have no gradients afterwards."""
    folder, _ = setting
    batch = lay_out(
        [([1, 2, 3], [[4, 5, 6, 256], [9, 256]]), ([7, 8], [[8, 9, 256], [3, 256]])],
        Layout("padded", 257),
    )
    policy = build_policy(
        model_config(folder / "model", quantization=bits, quantization_args={}, lora=LORA)
    )
    plain = build_policy(model_config(folder / "model", lora=LORA))
    reference = build_reference(model_config(folder / "model"), policy, training=True)
    with torch.no_grad():
        ours, theirs = (score_responses(scorer, batch).logps for scorer in (policy, reference))
        assert torch.equal(ours, theirs)  # the adapter is zero when it is new
        n_rounded = 0
        for name, values in _dequantised(policy.model):
            weight = plain.model.get_submodule(name).weight
            largest = weight.flatten().view(-1, 64).abs().amax(1).max()
            assert 0 < (values - weight).abs().max() < 0.16 * largest  # half of NF4's widest gap
            weight.copy_(values)
            n_rounded += 1
            if bits == "8bit":
                rounded = plain.model.get_submodule(name)
                rounded.register_forward_pre_hook(_round_inputs)
                rounded.register_forward_hook(_scale_output)
        assert n_rounded == 2 * 7  # all of two blocks, and not the head
        torch.manual_seed(1)
        adapters = [
            {n: p for n, p in s.model.named_parameters() if "lora_" in n} for s in (policy, plain)
        ]
        for name, weight in adapters[0].items():
            weight.copy_(torch.randn_like(weight) / 8)
            adapters[1][name].copy_(weight)
    for scorer in (policy, plain):
        score_responses(scorer, batch).logps.sum().backward()
    ours, theirs = (score_responses(scorer, batch).logps for scorer in (policy, plain))
    assert (ours - theirs).abs().max() < tolerance * theirs.abs().max()
    assert (ours - score_responses(reference, batch).logps).abs().max() > 0.1
    ours, theirs = (torch.cat([p.grad.flatten() for p in of.values()]) for of in adapters)
    assert torch.linalg.vector_norm(ours - theirs) < tolerance * torch.linalg.vector_norm(theirs)


@needs_bitsandbytes
def test_a_run_on_4_bits_resumes_exactly_and_saves_its_adapter(setting):
    folder, go = setting
    go("whole", *ON_4_BITS)
    go("broken", *ON_4_BITS, "n_examples=8")
    go("broken", *ON_4_BITS)
    adapters = [
        load_file(folder / name / "LATEST" / "adapter" / "adapter_model.safetensors")
        for name in ("whole", "broken")
    ]
    assert same_weights(*adapters) and any(value.abs().max() > 0 for value in adapters[0].values())
    latest = folder / "whole" / "LATEST"
    assert (latest / "hf").is_symlink() and (latest / "hf").resolve() == (
        latest / "adapter"
    ).resolve()
    files = {path.name for path in latest.resolve().rglob("*.safetensors")}
    assert files == {"adapter_model.safetensors"}
    assert "adapter/adapter_model.safetensors" in json.loads((latest / "sizes.json").read_text())
    assert AutoTokenizer.from_pretrained(latest / "hf").eos_token
    model = AutoModelForCausalLM.from_pretrained(latest / "hf")  # its base in full precision
    assert any("lora_" in name for name, _ in model.named_parameters())
    assert archive_place(folder / "whole") == Path(folder / "whole" / "LATEST" / "adapter")


@needs_bitsandbytes
def test_an_evaluation_has_the_adapter_on_the_same_base(setting):
    folder, go = setting
    trained = read_rows(folder / "whole" / "metrics.jsonl")[-1]
    assert trained["split"] == "eval"
    archive = f"model.archive={folder / 'whole'}"
    more = (
        "function=eval",
        "sample_during_eval=true",
        "max_new_tokens=4",
        "n_eval_model_samples=2",
    )
    go("measured", archive, *more, "model.quantization=4bit")
    [row] = read_rows(folder / "measured" / "eval.jsonl")
    assert row["loss/eval"] == pytest.approx(trained["loss/eval"], rel=1e-6)
    go("merged", archive, *more)
    [row] = read_rows(folder / "merged" / "eval.jsonl")
    assert row["loss/eval"] != pytest.approx(trained["loss/eval"], rel=1e-6)
