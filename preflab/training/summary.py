"""summary.json: the last evaluation of a run, its speed and its memory."""

import json
from pathlib import Path

from preflab.distributed.process_group import World
from preflab.reports.selection import DEV, TEST, number_on
from preflab.settings.schema import Settings
from preflab.settings.values import truncation_columns
from preflab.training.checkpoints import Counters
from preflab.training.profiling import peak_memory
from utils import atomic_write

REWARDS = (
    "policy_reward",
    "policy_reward_se",
    "reference_reward",
    "reference_reward_se",
    "reward_gain",
    "reward_gain_se",
)
KLS = ("kl", "kl_se", "kl_k1", "kl_k3")
SIDES = tuple(number_on(side, "") for side in (DEV, TEST))
MEASURED = ("policy_length", "reference_length", "policy_ended", "entropy", "repetition")


def write_summary(
    run_dir: Path,
    settings: Settings,
    loss_name: str,
    values: dict,
    counters: Counters,
    world: World,
    *,
    temperature: float,
    state_bytes: dict[str, int],
    **more,
) -> dict:
    """Write summary.json on rank 0 and return its content on every rank.

    values: metrics of the last evaluation. state_bytes: bytes of weights, gradients and optimizer
    of a rank. more: further keys.
    """
    samples = {
        key.removeprefix("samples_eval/"): value
        for key, value in values.items()
        if key.startswith("samples_eval/")
    }
    update = settings.reference.update
    rate = counters.examples / counters.train_seconds if counters.train_seconds else None
    summary = {
        "finished": True,
        "function": settings.function,
        "loss": loss_name,
        "reward": settings.reward["name"],
        **{name: samples.get(name) for name in REWARDS + KLS},
        **({} if update == "frozen" else {"reference_update": update}),
        "eval_accuracy": values.get("rewards_eval/accuracies"),
        "eval_loss": values.get("loss/eval"),
        **{name: samples[name] for name in MEASURED if name in samples},
        **{name: value for name, value in values.items() if name.startswith(SIDES)},
        "pairs_per_second": rate,
        "examples": counters.examples,
        "steps": counters.steps,
        "seconds": counters.seconds,
        "seed": settings.seed,
        "temperature": temperature,
        **truncation_columns(settings),
        "peak_memory_bytes": int(world.max([float(peak_memory())])[0]),
        "trainer": settings.trainer,
        "ranks": world.size,
        "rank_bytes": state_bytes,
        **more,
    }
    if world.rank == 0:
        with atomic_write(run_dir / "summary.json") as f:
            json.dump(summary, f, indent=1)
    return summary
