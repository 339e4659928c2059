"""What only a GPU can show: CUDA, NCCL where there are two, bf16, sampling. Skipped elsewhere."""

import json
import os

import pytest
import torch
from conftest import (
    final_weights,
    make_model,
    read_rows,
    run_command,
    run_here,
    save_model,
    small_run,
)

from preflab.batching.packed_attention import check_flex
from preflab.batching.packed_models import SHARING, by_segments_only, enable, window_of
from preflab.modeling.layout_choice import check_sharing
from preflab.modeling.logprobs import Scorer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
two_gpus = pytest.mark.skipif(
    torch.cuda.device_count() < 2,
    reason="fewer than two GPUs here, so NCCL between them was not tried",
)

HIDE = {"CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture
def command(imdb_dir, llama_folder, tmp_path):
    def command(name: str, *more: str) -> list[str]:
        return small_run(llama_folder, imdb_dir, tmp_path / name, "n_epochs=2", *more)

    return command


def losses(folder) -> list[float]:
    return [
        row["loss/train"] for row in read_rows(folder / "metrics.jsonl") if row["split"] == "train"
    ]


CPU_LOSSES: dict[tuple[str, ...], list[float]] = {}


@pytest.fixture
def on_cpu(command, tmp_path):
    """The losses of the same run on the CPU, where it runs once for all tests of a process."""

    def on_cpu(*more: str) -> list[float]:
        if more not in CPU_LOSSES:
            run_command("train.py", *command("cpu", *more), env=os.environ | HIDE)
            CPU_LOSSES[more] = losses(tmp_path / "cpu")
        return CPU_LOSSES[more]

    return on_cpu


@pytest.mark.parametrize("loss", ["dpo", "tdpo2", "sft"])
@pytest.mark.parametrize("trainer", ["BasicTrainer", "FSDPTrainer", "TensorParallelTrainer"])
def test_one_gpu_gives_the_losses_of_the_cpu(command, on_cpu, tmp_path, trainer, loss):
    more = (f"loss={loss}", "optimizer=AdamW")
    expected = on_cpu(*more)
    run_here(*command("gpu", *more, f"trainer={trainer}", "world_size=1"))
    assert losses(tmp_path / "gpu") == pytest.approx(expected, abs=1e-3, rel=1e-3)


@pytest.mark.parametrize("trainer", ["BasicTrainer", "FSDPTrainer"])
def test_bf16_stays_near_fp32_and_its_weights_stay_fp32(command, on_cpu, tmp_path, trainer):
    expected = on_cpu("optimizer=AdamW")
    run_here(
        *command(
            "half",
            f"trainer={trainer}",
            "world_size=1",
            "model.fsdp_policy_mp=bfloat16",
            "optimizer=AdamW",
        )
    )
    assert (
        losses(tmp_path / "half") == pytest.approx(expected, abs=0.1)
        and losses(tmp_path / "half") != expected
    )
    assert all(
        value.dtype == torch.float32
        for value in final_weights(tmp_path / "half").values()
        if value.is_floating_point()
    )


@pytest.mark.parametrize("trainer", ["BasicTrainer", "FSDPTrainer"])
@pytest.mark.parametrize("layout", ["prefix_shared", "packed"])
@pytest.mark.parametrize("more", [(), ("loss=tdpo2",), ("model.fsdp_policy_mp=bfloat16",)])
def test_packed_rows_give_the_losses_of_padded_ones(command, tmp_path, trainer, layout, more):
    run_here(*command("padded", f"trainer={trainer}", "layout=padded", *more))
    run_here(*command("packed", f"trainer={trainer}", f"layout={layout}", *more))
    tolerance = 0.05 if "model.fsdp_policy_mp=bfloat16" in more else 1e-3
    assert losses(tmp_path / "packed") == pytest.approx(
        losses(tmp_path / "padded"), abs=tolerance, rel=tolerance
    )


@pytest.mark.parametrize("flex", [True, False])
@pytest.mark.parametrize("architecture", sorted(SHARING))
def test_every_architecture_shares_prompts_on_a_gpu(architecture, flex):
    model = make_model(architecture).cuda()
    enable(model)
    # Then a GPU attends by segments.
    by_segments = window_of(model.config) is not None or bool(by_segments_only(model))
    assert (flex and by_segments) or check_sharing(Scorer(model), flex).ok


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "heads, kv_heads, head_size", [(12, 12, 64), (8, 2, 128), (8, 8, 80), (4, 4, 16), (3, 1, 256)]
)
def test_flex_attention_has_the_values_and_gradients_of_attention_by_segments(
    heads, kv_heads, head_size, dtype
):
    support = check_flex(heads, kv_heads, head_size, dtype, torch.device("cuda"))
    # In float32, blocks of large head sizes may exceed the shared memory of a card. Runs then
    # attend by segments; but what does compile is right.
    may_not_compile = dtype == torch.float32 and head_size in (80, 256)
    assert support.ok or (may_not_compile and "resource" in support.reason), support.reason


def test_packed_rows_go_through_flex_attention(command, capfd):
    run_here(*command("run", "n_examples=8", "sample_during_eval=false"))
    assert "layout: prefix_shared\n" in capfd.readouterr().out


def test_compiled_blocks_give_the_same_losses(command, tmp_path):
    run_here(*command("plain", "sample_during_eval=false"))
    run_here(*command("compiled", "sample_during_eval=false", "compile=true"))
    assert losses(tmp_path / "compiled") == pytest.approx(
        losses(tmp_path / "plain"), abs=1e-3, rel=1e-3
    )


def test_sampling_and_a_checkpoint(command, tmp_path):
    run_here(*command("run", "trainer=FSDPTrainer", "world_size=1", "n_examples=24"))
    run_here(*command("run", "trainer=FSDPTrainer", "world_size=1"))  # continues
    rows = read_rows(tmp_path / "run" / "samples.jsonl")
    assert rows and all(row["kl"] >= 0 and row["policy_tokens"] > 0 for row in rows)
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["peak_memory_bytes"] > 0


@two_gpus
@pytest.mark.parametrize(
    "more", [(), ("fsdp_cpu_offload=true",), ("activation_checkpointing=true",), ("loss=tdpo2",)]
)
def test_two_gpus_give_the_losses_of_one(command, tmp_path, more):
    run_here(*command("one", "trainer=FSDPTrainer", "world_size=1", "optimizer=AdamW", *more))
    run_command(
        "train.py", *command("two", "trainer=FSDPTrainer", "world_size=2", "optimizer=AdamW", *more)
    )
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-3, rel=1e-3)


@two_gpus
@pytest.mark.parametrize(
    "model", ["llama", "gpt2"]
)  # an LM head of its own, and one that is the embedding
@pytest.mark.parametrize("more", [(), ("loss=tdpo2",), ("loss=bradley_terry",), ("layout=padded",)])
def test_a_model_spread_over_two_gpus_gives_the_losses_of_one(command, tmp_path, model, more):
    folder = save_model(tmp_path / "model", model)
    more = (*more, f"model.name_or_path={folder}", "optimizer=AdamW")
    run_command("train.py", *command("one", *more), env=os.environ | {"CUDA_VISIBLE_DEVICES": "0"})
    run_here(*command("spread", *more))
    assert losses(tmp_path / "spread") == pytest.approx(
        losses(tmp_path / "one"), abs=1e-3, rel=1e-3
    )


@two_gpus
def test_layers_split_over_two_gpus_in_one_process(command, tmp_path):
    run_here(*command("one", "trainer=FSDPTrainer", "world_size=1", "optimizer=AdamW"))
    run_here(*command("split", "trainer=TensorParallelTrainer", "world_size=2", "optimizer=AdamW"))
    assert losses(tmp_path / "split") == pytest.approx(losses(tmp_path / "one"), abs=1e-3, rel=1e-3)
