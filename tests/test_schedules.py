"""Learning rates by step: those of transformers, exact when a run is resumed, and refused where a
run would follow no schedule."""

from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from conftest import final_weights, read_rows, run_here, same_weights, small_run
from transformers import get_scheduler

from preflab import execution
from preflab.batching.loader import Loader
from preflab.training.schedules import DECAYING, SHAPES, Schedule, check_continues
from utils import ConfigError

LR, TOTAL = 3e-4, 50
# Of each schedule, the one of transformers with its arguments.
THEIRS = {
    "constant": ("constant_with_warmup", {}),
    "linear": ("linear", {}),
    "cosine": ("cosine_with_min_lr", {"min_lr": 1e-5}),
    "wsd": ("warmup_stable_decay", {"num_decay_steps": 10, "min_lr_ratio": 1e-5 / LR}),
    "inverse_sqrt": ("inverse_sqrt", {}),
}


def schedule(name: str, *, warmup: int = 5, total: int = TOTAL) -> Schedule:
    has_floor = "1e-05" in str(THEIRS[name][1]) or "ratio" in str(THEIRS[name][1])
    return Schedule(name, LR, 1e-5 if has_floor else 0.0, warmup, total // 5, total)


@pytest.mark.parametrize("warmup", [0, 1, 7])
@pytest.mark.parametrize("name", SHAPES)
def test_learning_rates_are_those_of_transformers(name, warmup):
    theirs, more = THEIRS[name]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=LR)
    other = get_scheduler(theirs, optimizer, warmup, TOTAL, more)
    expected = []
    for _ in range(TOTAL):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        other.step()
    ours = [schedule(name, warmup=warmup).at(step) for step in range(TOTAL)]
    assert ours[warmup:] == pytest.approx(expected[warmup:], rel=1e-12)
    # The warm-up begins above 0, so that no step is lost, and has as many steps.
    assert ours[:warmup] == pytest.approx([LR * i / (warmup + 1) for i in range(1, warmup + 1)])
    assert ours[warmup] == LR
    assert (ours[-1] < LR / 10) == (name in DECAYING)


def test_steps_of_a_run_are_counted_as_they_are_taken():
    for n, batch_size in ((10, 4), (12, 4), (3, 8)):
        for n_epochs, n_examples in ((3, None), (None, 25), (2, 9), (1, 100)):
            limits = {"n_epochs": n_epochs, "n_examples": n_examples}
            loader = Loader(np.arange(n), batch_size=batch_size, seed=0, **limits)
            assert loader.total_steps == sum(1 for _ in loader)


def rates(folder) -> list[float]:
    return [row["lr"] for row in read_rows(folder / "metrics.jsonl") if row["split"] == "train"]


@pytest.fixture
def command(imdb_dir, llama_folder, tmp_path):
    """Overrides of a run of six steps without samples."""

    def command(name: str, *more: str) -> list[str]:
        more = ("sample_during_eval=false", "pairing=all", "n_epochs=null", *more)
        if not any(o.startswith("n_examples") for o in more):
            more = (*more, "n_examples=48")
        return small_run(llama_folder, imdb_dir, tmp_path / name, *more)

    return command


def refuses(command, message: str):
    """A command is refused before a model loads."""
    with (
        mock.patch.object(execution, "_run_here_or_on_workers", side_effect=AssertionError),
        pytest.raises(ConfigError, match=message),
    ):
        run_here(*command)


def test_a_run_resumed_on_its_cosine_is_the_same_run(command, tmp_path):
    cosine = ("lr_schedule=cosine", "warmup_steps=0.3", "lr_min=1e-5")
    run_here(*command("whole", *cosine))
    assert rates(tmp_path / "whole") == pytest.approx(
        [1e-3 / 3, 2e-3 / 3, *(Schedule("cosine", 1e-3, 1e-5, 2, 0, 6).at(i) for i in range(2, 6))]
    )
    step, run = execution.find_trainer("BasicTrainer").train_step, []

    def crash(self, *arguments):
        run.append(self.learner.counters.steps)
        if len(run) == 4:
            raise KeyboardInterrupt
        step(self, *arguments)

    trainer = execution.find_trainer("BasicTrainer")
    with mock.patch.object(trainer, "train_step", crash), pytest.raises(KeyboardInterrupt):
        run_here(*command("broken", *cosine))
    run_here(*command("broken", *cosine))
    assert rates(tmp_path / "broken") == rates(tmp_path / "whole")
    assert same_weights(final_weights(tmp_path / "broken"), final_weights(tmp_path / "whole"))
    refuses(command("broken", *cosine, "n_examples=64"), "over 8 steps gives step 1 the learning")


def test_only_a_schedule_that_stays_what_it_was_can_be_extended(command, tmp_path):
    wsd = ("lr_schedule=wsd", "lr_decay_share=0.4", "warmup_steps=1")
    run_here(*command("whole", *wsd, "n_examples=64"))
    run_here(*command("run", *wsd, "n_examples=48"))
    refuses(command("run", *wsd, "n_examples=64"), "can be extended")
    # Its checkpoints before the decay: as if the run had been stopped there.
    for late in sorted((tmp_path / "run").glob("step-*"))[1:]:
        (late / "sizes.json").unlink()
        for path in sorted(late.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        late.rmdir()
    (tmp_path / "run" / "summary.json").unlink()
    run_here(*command("run", *wsd, "n_examples=64"))
    assert rates(tmp_path / "run") == rates(tmp_path / "whole")
    assert same_weights(final_weights(tmp_path / "run"), final_weights(tmp_path / "whole"))


@pytest.mark.parametrize("name", SHAPES)
def test_an_extension_is_exact_or_refused(name):
    before = schedule(name, total=30)
    now = replace(before, total=60, decay=12)
    for steps in range(0, 31, 5):
        same = all(before.at(i) == now.at(i) for i in range(steps))
        assert same == (steps <= {"linear": 5, "cosine": 5, "wsd": 25}.get(name, 30))
        if same:
            check_continues(before, now, steps)
        else:
            with pytest.raises(ConfigError, match=f"lr_schedule={name} over 60 steps"):
                check_continues(before, now, steps)


@pytest.mark.parametrize(
    "more, message",
    [
        (("lr_schedule=cosin",), "did you mean cosine"),
        (("lr_schedule=linear", "warmup_steps=6"), "6 steps of warm-up do not fit into the 6"),
        (("lr_schedule=wsd", "lr_decay_share=0.9"), "2 steps of warm-up and 6 of decay do not"),
        (("lr_min=1e-5",), "lr_schedule=constant does not end at a learning rate"),
        (("lr_schedule=cosine", "lr_min=1"), "lr_min=1 exceeds lr=0.001"),
        (
            ("warmup_steps=1.5",),
            "warmup_steps=1.5 must be an integer of at least 0, or a number in",
        ),
        (("function=online", "loss=dpo", "lr_schedule=cosine"), "needs the number of steps"),
        (("function=online", "loss=dpo", "warmup_steps=0.1"), "take lr_schedule=constant or inv"),
    ],
)
def test_what_cannot_be_followed_is_refused_before_a_model_loads(command, more, message):
    refuses(command("run", *more), message)
