"""A trainer in a file outside the project: the one that docs/extending.md shows, on two ranks, and
one that declares nothing but its processes."""

import json
import re
from types import SimpleNamespace

import pytest
from conftest import (
    ROOT,
    final_weights,
    read_rows,
    run_command,
    run_here,
    run_on_ranks,
    same_weights,
    save_model,
    scored_rows,
    small_run,
    write_jsonl,
)

from preflab.training.registry import find_trainer
from utils import ConfigError

WEIGHTS = 5e-5  # RMSprop moves weights by about 0.1, and rounding is a part of each small step
PLAIN = """
from trainers import BasicTrainer, Placement


class PlainTrainer(BasicTrainer):
    placement = Placement(one_process_per_device=True, settings=frozenset({"world_size"}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Data, a model, and the trainer of docs/extending.md in its own file."""
    folder = tmp_path_factory.mktemp("user trainer")
    for split, n in (("train", 24), ("test", 7)):
        write_jsonl(folder / "data" / f"imdb-sft-{split}.jsonl", scored_rows(n))
    save_model(folder / "model")
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    [block] = re.findall(r"```python\n(# my_trainers\.py\n.*?)```", page, flags=re.DOTALL)
    (folder / "my_trainers.py").write_text(block, encoding="utf-8")
    (folder / "plain.py").write_text(PLAIN, encoding="utf-8")
    return folder


def ddp(folder) -> tuple[str, ...]:
    return (f"trainer='{folder}/my_trainers.py:DDPTrainer'", "world_size=2")


def command(folder, name: str, *more: str) -> list[str]:
    options = ["n_eval_examples=7", "n_eval_model_samples=5", "batch_size=8", *more]
    return small_run(folder / "model", folder / "data", folder / name, *options)


def train(folder, name: str, *more: str):
    """One run in its own process; returns its folder and what it printed."""
    return folder / name, run_command("train.py", *command(folder, name, *more)).stdout


def largest_difference(a, b) -> float:
    ours, theirs = final_weights(a), final_weights(b)
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


ONLINE = (
    "function=online",
    "reward=length",
    "reward.unit=characters",
    "online.rounds=2",
    "online.prompts_per_round=4",
    "online.eval_every=2",
)


@pytest.fixture(scope="module")
def one_process(folder):
    run_here(*command(folder, "one", "n_epochs=2"))
    return folder / "one"


@pytest.fixture(scope="module")
def two_ranks(folder):
    """Runs that need two ranks, in folders of their names; returns that of `ddp`."""
    plain = (f"trainer='{folder}/plain.py:PlainTrainer'", "world_size=2")
    commands = [
        command(folder, "ddp", "n_epochs=2", *ddp(folder)),
        command(folder, "parts", "n_epochs=1", *ddp(folder)),
        command(folder, "plain", "n_epochs=2", *plain),
        command(folder, "online-ddp", *ONLINE, *ddp(folder)),
    ]
    run_on_ranks(2, folder, commands)
    return folder / "ddp"


def test_two_ranks_reach_the_weights_and_samples_of_one_process(folder, one_process, two_ranks):
    assert json.loads((two_ranks / "summary.json").read_text())["ranks"] == 2
    assert largest_difference(two_ranks, one_process) < WEIGHTS
    run_here(*command(folder, "other", "n_epochs=2", "seed=1"))  # what a difference looks like
    assert largest_difference(folder / "other", one_process) > 100 * WEIGHTS
    ours, theirs = (read_rows(run / "samples.jsonl") for run in (two_ranks, one_process))
    assert [row["prompt"] for row in ours] == [row["prompt"] for row in theirs]


def test_a_resumed_run_is_the_whole_run(folder, two_ranks):
    """Every rank reads what rank 0 alone has written. The second half is a command that starts its
    ranks itself."""
    parts, printed = train(folder, "parts", "n_epochs=2", *ddp(folder))
    assert "continuing" in printed
    assert same_weights(final_weights(parts), final_weights(two_ranks))


def test_gradients_are_summed_where_the_backward_pass_does_not(folder, one_process, two_ranks):
    assert largest_difference(folder / "plain", one_process) < WEIGHTS


def test_the_plan_counts_the_ranks(folder):
    _, printed = train(folder, "plan", "function=plan", *ddp(folder))
    assert re.search(r"^ranks +2$", printed, flags=re.MULTILINE)
    assert not (folder / "plan").exists()


def test_online_rounds_on_two_ranks(folder, two_ranks):
    one, two = folder / "online-one", folder / "online-ddp"
    run_here(*command(folder, "online-one", *ONLINE))
    texts = [
        [row["responses"] for row in read_rows(run / "rollouts.jsonl") if row["round"] == 1]
        for run in (one, two)
    ]
    assert texts[0] == texts[1]
    assert largest_difference(two, one) < WEIGHTS


@pytest.mark.parametrize(
    "name, message",
    [
        ("FSDPTrainr", "FSDPTrainer"),
        ("no_such_module.Trainer", "cannot be imported"),
        ("FOLDER/plain.py:Other", "has no class Other"),
        ("FOLDER/losses_only.py:Thing", "declares no placement"),
    ],
)
def test_a_trainer_that_is_none_is_refused(folder, name, message):
    (folder / "losses_only.py").write_text("class Thing:\n    pass\n")
    with pytest.raises(ConfigError, match=message):
        find_trainer(name.replace("FOLDER", str(folder)))


def test_a_setting_of_another_placement_is_refused(folder):
    from preflab.modeling.parallelism import check_placement_settings

    trainer = find_trainer(f"{folder}/my_trainers.py:DDPTrainer")
    settings = SimpleNamespace(
        world_size=None, fsdp_shard_size=None, tensor_parallel_size=2, fsdp_cpu_offload=False
    )
    with pytest.raises(ConfigError, match="tensor_parallel_size=2 is for trainer=FSDPTrainer"):
        check_placement_settings(trainer, settings)
