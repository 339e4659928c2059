"""The weights of a checkpoint for other programs: policy.pt, hf/ and, with LoRA, adapter/."""

import tempfile
from pathlib import Path

import torch

from preflab.distributed.process_group import World
from preflab.modeling.loading import skeleton
from preflab.modeling.logprobs import Scorer
from preflab.modeling.placed_weights import full_weights
from preflab.modeling.weights_io import archive_state
from preflab.settings.schema import Settings
from preflab.training.model_card import write_model_card
from utils import model_folder

SHARD = "2GB"  # the largest file of hf/; a whole file is in memory while it is written


def save_weights(
    settings: Settings,
    policy: Scorer,
    tokenizer,
    folder: Path,
    *,
    world: World,
    trained: list[str],
    scalar_head: bool,
    step: int,
    metrics: dict,
) -> None:
    """Write policy.pt and hf/ with unsharded weights. Every rank calls it, rank 0 writes.

    trained: names of the trained parameters. step, metrics: stored in policy.pt. With LoRA the
    adapter is merged into policy.pt and hf/, and adapter.pt and adapter/ hold it alone; training
    continues from adapter.pt.
    """
    with tempfile.TemporaryDirectory(dir=folder, prefix=".weights-") as scratch:
        adapter = hasattr(policy.model, "peft_config")
        state = full_weights(policy, Path(scratch), keep=world.rank == 0, alias=not adapter)
        if world.rank > 0:
            return
        if adapter:
            torch.save({name: state[name] for name in trained}, folder / "adapter.pt")
        model = skeleton(settings.model, scalar_head=scalar_head)
        model.load_state_dict(state, assign=True)
        model.tie_weights()
        if adapter:
            if start := settings.model.archive:  # what the adapter was trained on
                model.active_peft_config.base_model_name_or_path = str(model_folder(start))
            model.save_pretrained(folder / "adapter")
            model = model.merge_and_unload()
        if not scalar_head:
            model.generation_config = policy.causal_lm.generation_config
        archive = {
            "step_idx": step,
            "state": archive_state(model),
            "metrics": {key: value for key, value in metrics.items() if value is not None},
        }
        torch.save(archive, folder / "policy.pt")
        model.save_pretrained(folder / "hf", max_shard_size=SHARD)
        tokenizer.save_pretrained(folder / "hf")
        write_model_card(folder / "hf", settings, step, metrics)
