"""Stopped at any step, by any means, and continued: the same bits as never having stopped."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from pkgutil import resolve_name
from unittest import mock

import pytest
import torch
from conftest import (
    ROOT,
    final_weights,
    read_rows,
    run_command,
    run_here,
    same_weights,
    saved_weights,
    small_run,
    untimed,
    write_imdb,
    write_jsonl,
)
from warm_python import Script

import trainers
from preflab.batching import token_store
from preflab.distributed.process_group import World, world
from preflab.distributed.signals import Stopped
from preflab.training import learner
from preflab.training.checkpoints import latest_checkpoint, save_checkpoint
from utils import ConfigError


class CrashError(Exception):
    """What the tests raise in the middle of a run."""


@pytest.fixture
def command(imdb_dir, llama_folder, tmp_path):
    """Overrides of the same run of nine steps in a folder of the given name."""

    def command(name: str, *more: str) -> list[str]:
        return small_run(
            llama_folder, imdb_dir, tmp_path / name, "n_epochs=3", "keep_checkpoints=null", *more
        )

    return command


def take_terminal():
    """The tests may run under nohup, and a child would inherit that SIGHUP is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def assert_same_run(a, b):
    assert same_weights(final_weights(a), final_weights(b))
    assert untimed(read_rows(a / "metrics.jsonl")) == untimed(read_rows(b / "metrics.jsonl"))
    assert read_rows(a / "samples.jsonl") == read_rows(b / "samples.jsonl")


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("loss=tdpo2", "optimizer=AdamW"),
        ("model.lora.r=4",),
        ("loss=bradley_terry",),
        ("loss=bco",),
        ("loss=beta-dpo",),
    ],
)
@pytest.mark.parametrize("stop", [1, 4, 8])
def test_an_exception_at_any_step(command, tmp_path, monkeypatch, stop, more):
    run_here(*command("whole", *more))
    step = trainers.BasicTrainer.train_step

    def crash(self, *arguments):
        if self.learner.counters.steps == stop:
            raise CrashError
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.BasicTrainer, "train_step", crash)
        with pytest.raises(CrashError):
            run_here(*command("broken", *more))
    run_here(*command("broken", *more))
    if more == ("loss=bradley_terry",):
        assert same_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "broken"))
    else:
        assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_the_optimizer_state_is_what_makes_it_exact(command, tmp_path, monkeypatch):
    """The control: continued without the optimizer's state, the run ends elsewhere."""
    run_here(*command("whole"))
    run_here(*command("broken", "n_examples=40"))
    monkeypatch.setattr(torch.optim.RMSprop, "load_state_dict", lambda self, state: None)
    run_here(*command("broken"))
    assert not same_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "broken"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL, signal.SIGHUP])
def test_a_signal_to_a_running_process(command, tmp_path, signum):
    """A child process is signalled at some moment after its first checkpoint, then the same command
    is run again."""
    run_here(*command("whole", "n_epochs=20"))
    broken = tmp_path / "broken"
    child = Script([str(ROOT / "train.py"), *map(str, command("broken", "n_epochs=20"))], ROOT)
    while not list(broken.glob("step-*")) and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(signum)
    _, errors = child.communicate(timeout=120)
    assert child.returncode == (-signum if signum == signal.SIGKILL else 128 + signum), errors
    assert not (broken / "summary.json").exists()
    if signum != signal.SIGKILL:
        assert f"stopped by {signal.Signals(signum).name}" in errors and "continues" in errors
        last = read_rows(broken / "metrics.jsonl")[-1]["step"]
        assert (broken / "LATEST").resolve().name == f"step-{last}"  # saved where it stood
    result = run_command("train.py", *command("broken", "n_epochs=20"))
    assert "continuing" in result.stdout
    assert_same_run(tmp_path / "whole", broken)


# What a signal interrupts: the function, in which of its calls, and the last finished step.
PLACES = {
    "tokenisation": ("preflab.batching.token_store.tokenise", 2, None),
    "reference pass": ("preflab.modeling.reference_cache._logps_of_groups", 2, None),
    "first evaluation": ("preflab.evaluation.held_out.compute_loss", 1, 0),
    "a step": ("preflab.training.learner.compute_loss", 9, 1),
    "evaluation": ("preflab.evaluation.held_out.compute_loss", 3, 2),
    "sampling": ("preflab.modeling.generation.InverseCDF.__call__", 8, 2),
    "saving": ("preflab.training.learner.save_weights", 2, 2),
}


@pytest.fixture(scope="module")
def accumulated(llama_folder, tmp_path_factory):
    """Overrides of the same run of three steps, of two microbatches each, in a given folder, and
    the folder of that run."""
    folder = tmp_path_factory.mktemp("accumulated")
    more = ("n_examples=24", "gradient_accumulation_steps=2", "save_every=8", "eval_batch_size=4")
    more += ("n_eval_model_samples=2", "max_new_tokens=4", "microbatch_tokens=60", "layout=padded")

    def command(run_dir):
        cache = f"cache_dir={run_dir}-cache"
        return small_run(
            llama_folder, folder / "data", run_dir, "keep_checkpoints=null", cache, *more
        )

    write_imdb(folder / "data")
    run_here(*command(folder / "whole"))
    return command, folder / "whole"


@pytest.mark.parametrize("place", PLACES)
def test_a_signal_is_obeyed_between_batches(accumulated, tmp_path, monkeypatch, place):
    """Whatever was going on is undone: the checkpoint is that of the last finished step, and the
    resumed run gives what an uninterrupted one does."""
    command, whole = accumulated
    broken = tmp_path / "broken"
    name, call, last = PLACES[place]
    interrupted = resolve_name(name.rpartition(".")[0])
    function, states = getattr(interrupted, name.rpartition(".")[2]), []

    def with_signal(*arguments, **more):
        torch.rand(())  # as a loss or a reward may
        states.append(torch.get_rng_state())
        if len(states) == call:
            world().stop.received = signal.SIGTERM
        return function(*arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(interrupted, name.rpartition(".")[2], with_signal)
        patch.setattr(token_store, "CHUNK", 4)
        with pytest.raises(Stopped, match="SIGTERM"):
            run_here(*command(broken))
    assert len(states) == call  # nothing of the kind was begun after the signal
    if last is None:
        assert not list(broken.glob("step-*"))
    else:
        assert (broken / "LATEST").resolve().name == f"step-{last}"
        assert json.loads((broken / "status.json").read_text())["state"] == "stopped"
    if last:
        step = f"step-{last}"
        ours, theirs = (torch.load(run / step / learner.STATE) for run in (broken, whole))
        assert ours["loader"] == theirs["loader"] and str(ours["loss"]) == str(theirs["loss"])
        assert ours["counters"]["examples"] == 8 * last
        ours, theirs = (saved_weights(run / step) for run in (broken, whole))
        assert same_weights(ours, theirs)
    if place in ("a step", "evaluation"):  # the first call that is undone is that of the signal
        saved = torch.load(broken / "LATEST" / learner.STATE)["random"]["torch"]
        assert torch.equal(saved, states[-2]) and not torch.equal(saved, states[-1])
    run_here(*command(broken))
    assert_same_run(whole, broken)


def test_a_signal_to_one_rank_stops_all(monkeypatch):
    one_of_two = World(rank=0, size=2)
    monkeypatch.setattr(World, "max", lambda self, values: [15.0])
    with pytest.raises(Stopped, match="SIGTERM"):
        one_of_two.stop_if_asked()
    one_of_two.stop.held = True
    one_of_two.stop_if_asked()


def test_a_run_whose_terminal_is_closed_saves(command, tmp_path):
    """The terminal's end is a SIGHUP, and from then on writing to it fails."""
    ours, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *map(str, command("run", "n_epochs=400"))],
        cwd=ROOT,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    while not list((tmp_path / "run").glob("step-*")) and child.poll() is None:
        if select.select([ours], [], [], 0.05)[0]:
            os.read(ours, 4096)  # a full terminal would stop the run
    os.close(ours)
    assert child.wait(timeout=120) == 128 + signal.SIGHUP
    last = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]["step"]
    assert (tmp_path / "run" / "LATEST").resolve().name == f"step-{last}"
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "stopped"


def test_runs_killed_at_random():
    """A short version of the campaign, which says what it compares."""
    result = run_command("tests/kill_campaign.py", "--kills", 2, "--kinds", "dpo,ranks")
    for kind in ("dpo", "ranks"):
        [row] = [line.split() for line in result.stdout.splitlines() if line.startswith(kind)]
        assert int(row[1]) >= 2 and row[1:3] == [row[1], row[1]] and row[3] == "0"


def test_a_run_saved_before_its_first_step_does_not_evaluate_twice(command, tmp_path, monkeypatch):
    run_here(*command("whole"))

    def stop_at_once(self, examples, microbatches, bar):
        self.loader.load_state_dict({"epoch": 0, "cursor": 0})
        self.session.save()
        raise CrashError

    with monkeypatch.context() as patch:
        patch.setattr(trainers.BasicTrainer, "train_step", stop_at_once)
        with pytest.raises(CrashError):
            run_here(*command("broken"))
    run_here(*command("broken"))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_resume_takes_the_config_of_the_run(command, tmp_path):
    run_here(*command("whole", "seed=3", "loss.beta=0.3"))
    run_here(*command("broken", "seed=3", "loss.beta=0.3", "n_examples=40"))
    result = run_command("train.py", f"resume={tmp_path / 'broken'}", "n_examples=null")
    assert "continuing" in result.stdout and "step 5" in result.stdout
    assert same_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "broken"))
    refused = run_command("train.py", f"resume={tmp_path}", check=False)
    assert refused.returncode == 2 and "no config.yaml" in refused.stderr


def test_a_finished_run_is_left_alone_and_a_longer_one_goes_on(
    command, tmp_path, capsys, monkeypatch
):
    first = run_here(*command("run"))
    with monkeypatch.context() as patch:
        patch.setattr(learner, "build_policy", lambda *a, **k: pytest.fail("a model was loaded"))
        assert run_here(*command("run")) == first
    assert "already finished" in capsys.readouterr().out
    run_here(*command("whole", "n_epochs=4"))
    longer = run_here(*command("run", "n_epochs=4"))
    assert longer["examples"] == 96
    assert same_weights(final_weights(tmp_path / "whole"), final_weights(tmp_path / "run"))


def test_another_run_in_the_same_folder_is_refused(command):
    run_here(*command("run", "n_examples=8"))
    with pytest.raises(ConfigError, match=r"loss\.beta was 0\.1 and is now 0\.7"):
        run_here(*command("run", "loss.beta=0.7"))


# ---------------------------------------------------------------------------------------- the files


def write(content):
    def fill(folder):
        (folder / "policy.pt").write_text(content)

    return fill


def test_a_save_that_dies_leaves_the_previous_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, write("one"), keep=None)

    def dies(folder):
        (folder / "policy.pt").write_text("half")
        raise CrashError

    with pytest.raises(CrashError):
        save_checkpoint(tmp_path, 2, dies, keep=None)
    assert (tmp_path / "LATEST" / "policy.pt").read_text() == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["LATEST", "step-1"]


def test_what_a_killed_save_left_is_cleared_and_never_taken_for_a_checkpoint(tmp_path):
    save_checkpoint(tmp_path, 1, write("one"), keep=None)
    (tmp_path / ".step-2.abc").mkdir()
    assert latest_checkpoint(tmp_path).name == "step-1"
    assert not (tmp_path / ".step-2.abc").exists()


def pairs(n: int, answer: str = "yes") -> list[dict]:
    return [{"prompt": f"q{i}", "chosen": f" {answer}", "rejected": " no"} for i in range(n)]


@pytest.mark.parametrize("function", ["train", "eval"])
def test_a_run_does_not_continue_on_other_data(tmp_path, llama_folder, monkeypatch, function):
    data, run = tmp_path / "pairs", tmp_path / "run"
    original = {"train": pairs(16), "test": pairs(4)}
    for split, rows in original.items():
        write_jsonl(data / f"{split}.jsonl", rows)
    first, more = {
        "train": (["n_examples=8"], ["n_examples=16"]),
        "eval": ([], []),
    }[function]
    common = small_run(llama_folder, tmp_path, run, f"datasets=[{data}]", f"function={function}")
    common += ["n_eval_examples=2", "max_new_tokens=4"]
    run_here(*common, *first)
    before = {file: file.read_bytes() for file in run.rglob("*") if file.is_file()}
    if function == "eval":  # of a finished one, the same command makes another
        (run / "summary.json").unlink()
        del before[run / "summary.json"]
    for split, rows in (("train", pairs(16, "yea")), ("test", pairs(4)[::-1])):
        if function == "eval" and split == "train":
            continue
        write_jsonl(data / f"{split}.jsonl", rows)
        with pytest.raises(ConfigError, match=rf"datasets=\[{data}\] \({split}\) is not what"):
            run_here(*common, *first, *more)
        write_jsonl(data / f"{split}.jsonl", original[split])
    assert {file: file.read_bytes() for file in before} == before
    # What is read, and not where or by which version, is compared.
    (data / "README.md").write_text("changed")
    write_jsonl(data / "train.jsonl", [row | {"comment": 1} for row in original["train"]])
    saved = json.loads((run / "data.json").read_text())
    del saved["test"]["datasets"][0]["content"]  # as of an earlier version
    (run / "data.json").write_text(json.dumps(saved))
    assert run_here(*common, *first, *more)["finished"]
    assert "content" in json.loads((run / "data.json").read_text())["test"]["datasets"][0]


@pytest.mark.parametrize(
    "keep, left",
    [(1, ["step-30"]), (2, ["step-10", "step-30"]), (None, ["step-10", "step-2", "step-30"])],
)
def test_the_newest_checkpoints_are_kept(tmp_path, keep, left):
    for step in (2, 10, 30):
        save_checkpoint(tmp_path, step, write(str(step)), keep=keep)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == left
    assert (tmp_path / "LATEST" / "policy.pt").read_text() == "30"


def test_killed_between_the_checkpoint_and_latest(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, write("one"), keep=1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(CrashError()))
        with pytest.raises(CrashError):
            save_checkpoint(tmp_path, 2, write("two"), keep=1)
    assert (tmp_path / "LATEST" / "policy.pt").read_text() == "one"
    save_checkpoint(tmp_path, 3, write("three"), keep=1)
    assert (tmp_path / "LATEST" / "policy.pt").read_text() == "three"
    assert not [p for p in os.listdir(tmp_path) if p.startswith(".LATEST")]


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, caplog):
    from preflab.settings.run_folder import owned

    monkeypatch.setattr("utils.FileLock.acquire", mock.Mock(side_effect=NotImplementedError))
    with caplog.at_level("WARNING"), owned(tmp_path / "run"):
        (tmp_path / "run" / "file").touch()
    assert "this file system has no locks" in caplog.text
