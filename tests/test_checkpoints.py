"""What a checkpoint holds, in which precision, how it is written while training continues, and that
archives are found in it."""

import errno
import functools
import json
import shutil
import signal
import threading
from types import SimpleNamespace

import pytest
import torch
from conftest import (
    final_weights,
    make_model,
    read_rows,
    run_here,
    same_weights,
    saved_weights,
    small_run,
    write_imdb,
)
from safetensors.torch import load_file

import trainers
from preflab.checks import _check_archives
from preflab.distributed.process_group import ALONE
from preflab.distributed.signals import Stopped
from preflab.modeling.weights_io import archive_files, read_archive
from preflab.training import checkpointer
from preflab.training import saved_weights as writing
from utils import ConfigError, model_folder

FINAL = 3  # steps of a whole run


@pytest.fixture(scope="module")
def setting(llama_folder, tmp_path_factory):
    """A folder, and what runs three steps in one of its folders and saves after each."""
    folder = tmp_path_factory.mktemp("checkpoints")
    data = write_imdb(folder / "data")

    def go(name: str, *more: str) -> dict:
        return run_here(
            *small_run(
                llama_folder, data, folder / name, "n_examples=24", "save_every=8",
                "eval_every=100", "sample_during_eval=false", "do_first_eval=false",
                "keep_checkpoints=null", *more,
            )
        )  # fmt: skip

    return folder, go


@pytest.fixture(scope="module")
def whole(setting):
    """The folder of a run of three steps with more settings, made once."""
    folder, go = setting

    @functools.cache
    def whole(*more: str):
        name = "whole-" + "-".join(more).replace("=", "_")
        go(name, *more)
        return folder / name

    return whole


@pytest.fixture(scope="module")
def plain(setting):
    """The folder of a run with the defaults, and its summary."""
    folder, go = setting
    return folder / "plain", go("plain")


# ----------------------------------------------------------------------------- what is written


def test_weights_are_written_once(plain):
    run, summary = plain
    step = run / "step-3"
    names = {path.name for path in step.iterdir()}
    assert names == {"hf", "optimizer", "training_state.pt", "sizes.json"}
    weights = sum(tensor.nbytes for tensor in final_weights(run).values())
    on_disk = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
    state = summary["rank_bytes"]["optimizer"]  # RMSprop: as many numbers as weights
    assert summary["checkpoint_bytes"] == on_disk and summary["saves"] == FINAL
    assert weights + state < on_disk < weights + state + 200_000
    assert summary["checkpoint_write_seconds"] > 0 and summary["checkpoint_wait_seconds"] > 0


def test_policy_pt_is_written_when_asked_for(plain, setting):
    folder, go = setting
    go("asked", "save_policy_pt=true")
    archive = torch.load(folder / "asked" / "LATEST" / "policy.pt", weights_only=True)
    assert archive["step_idx"] == FINAL and "loss/eval" in archive["metrics"]
    ours = final_weights(plain[0])
    assert all(torch.equal(archive["state"][name], value) for name, value in ours.items())
    assert same_weights(read_archive(folder / "asked"), archive["state"])


@pytest.mark.parametrize(
    "more, saved, holds_weights",
    [
        (("save_dtype=bfloat16",), torch.bfloat16, True),
        (("save_dtype=float16", "model.lora.r=2"), torch.float16, False),
        (("save_dtype=float16", "save_policy_pt=true"), torch.float16, False),
        (("save_dtype=float32", "model.policy_dtype=bfloat16"), torch.float32, False),
    ],
)
def test_a_run_continues_exactly_whatever_hf_has(setting, whole, more, saved, holds_weights):
    folder, go = setting
    name = "-".join(more).replace("=", "_")
    same = whole(*(word for word in more if not word.startswith("save_")))
    go(name, *more, "n_examples=8")
    first = folder / name / "step-1"
    exact = saved_weights(same / "step-1")
    rounded = saved_weights(first)
    assert {value.dtype for value in rounded.values()} == {saved}
    assert all(torch.equal(rounded[key], exact[key].to(saved)) for key in exact)
    config = json.loads((first / "hf" / "config.json").read_text())
    assert config["dtype"] == str(saved).removeprefix("torch.")
    assert (first / "weights").is_dir() == holds_weights
    if holds_weights:
        assert same_weights(load_file(first / "weights" / "model.safetensors"), exact)
        assert "hf/model.safetensors" not in json.loads((first / "sizes.json").read_text())
        shutil.rmtree(first / "hf")  # it is for others
    go(name, *more)
    exact = final_weights(same)
    rounded = final_weights(folder / name)
    assert all(torch.equal(rounded[key], exact[key].to(saved)) for key in exact)


def test_tied_weights_stay_tied_and_what_does_not_fit_is_an_error(tmp_path):
    model = make_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    before = model.transformer.wte.weight.detach().clone()
    model._keep_in_fp32_modules_strict = {"ln_f"}
    (tmp_path / "more").mkdir()
    writing.round_weights(model, torch.float16, tmp_path)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert torch.equal(model.lm_head.weight, before.half())
    assert model.transformer.ln_f.weight.dtype == torch.float32
    model = make_model("gpt2")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e5
    with pytest.raises(
        ConfigError, match=r"float16 cannot hold .*h\.0\.mlp\.c_fc\.weight.* 1e\+05"
    ):
        writing.round_weights(model, torch.float16, tmp_path / "more")


def test_the_layout_of_earlier_versions_is_continued(setting, whole):
    """policy.pt with the adapter merged, and adapter.pt with torch's names of its weights."""
    folder, go = setting
    go("earlier", "model.lora.r=2", "n_examples=16")
    step = folder / "earlier" / "step-2"
    torch.save({"state": saved_weights(step)}, step / "policy.pt")
    adapter = load_file(step / "adapter" / "adapter_model.safetensors")
    names = {name: name.replace(".weight", ".default.weight") for name in adapter}
    torch.save({names[name]: value for name, value in adapter.items()}, step / "adapter.pt")
    for name in ("adapter", "hf"):
        shutil.rmtree(step / name)
    (step / "sizes.json").unlink()
    go("earlier", "model.lora.r=2")
    runs = folder / "earlier", whole("model.lora.r=2")
    ours, theirs = (run / "LATEST" / "adapter" for run in runs)
    assert same_weights(*(load_file(f / "adapter_model.safetensors") for f in (ours, theirs)))


def test_named_steps_are_written_and_stay(setting):
    folder, go = setting
    go("named", "keep_steps=[1]", "save_every=1000", "keep_checkpoints=1")
    assert sorted(path.name for path in (folder / "named").glob("step-*")) == ["step-1", "step-3"]


# ----------------------------------------------------------------------------- what is found in it


def test_every_name_of_a_checkpoint_is_an_archive(plain, setting):
    run, _ = plain
    names = ("", "LATEST", "LATEST/policy.pt", "step-3/policy.pt", "LATEST/hf")
    for name in names:
        assert same_weights(read_archive(run / name), final_weights(run)), name
        assert model_folder(run / name) in {run / "LATEST/hf", run / "step-3/hf"}, name
    assert not same_weights(read_archive(run / "step-1" / "policy.pt"), final_weights(run))
    _, go = setting
    go("next", f"model.archive={run}/LATEST/policy.pt", "n_examples=8", "lr=1e-30")
    assert same_weights(final_weights(run.parent / "next"), final_weights(run))


def test_what_holds_no_weights_says_what_does(plain, tmp_path):
    run, _ = plain
    for name in ("LATE/policy.pt", "hf/policy.pt"):
        with pytest.raises(ConfigError, match="no such file or folder, nor a checkpoint's weights"):
            archive_files(run / name)
        model = SimpleNamespace(archive=str(run / name), reference_archive=None)
        with pytest.raises(ConfigError, match=rf"model\.archive={run / name}: no such file"):
            _check_archives(SimpleNamespace(function="train", model=model, skip_finished=None))
    with pytest.raises(ConfigError, match=r"give a run folder, a checkpoint such as RUN/LATEST"):
        archive_files(tmp_path)


# -------------------------------------------------------------- written while training continues


def test_training_goes_on_while_a_checkpoint_is_written(plain, setting, monkeypatch):
    """The first save ends only when the next step has been taken, and holds what came before."""
    folder, go = setting
    stepped, train_step, write_hf = (
        threading.Event(),
        trainers.BasicTrainer.train_step,
        writing._write_hf,
    )

    def step(self, *arguments):
        before = self.learner.counters.steps
        train_step(self, *arguments)
        if before == 1:
            stepped.set()

    def write(*arguments):
        assert stepped.wait(timeout=120), "the loop waits for the writer"
        write_hf(*arguments)

    monkeypatch.setattr(trainers.BasicTrainer, "train_step", step)
    monkeypatch.setattr(writing, "_write_hf", write)
    go("beside")
    for n in range(1, FINAL + 1):
        ours, theirs = (run / f"step-{n}" for run in (folder / "beside", plain[0]))
        assert same_weights(saved_weights(ours), saved_weights(theirs))
        shards = (path / "optimizer" / "__0_0.distcp" for path in (ours, theirs))
        assert len({path.read_bytes() for path in shards}) == 1


def test_a_writer_that_fails_stops_the_run(setting, monkeypatch):
    folder, go = setting
    write_hf, failed = writing._write_hf, threading.Event()
    step = trainers.BasicTrainer.train_step

    def write(model, path, files):
        if ".step-2." in str(path):
            failed.set()
            raise OSError(errno.ENOSPC, "No space left on device")
        write_hf(model, path, files)

    def wait_and_step(self, *arguments):
        if self.learner.counters.steps == 2:
            assert failed.wait(timeout=120)
            self.session.checkpointer._saving._thread.join()
        step(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write_hf", write)
        patch.setattr(trainers.BasicTrainer, "train_step", wait_and_step)
        with pytest.raises(OSError, match="No space left"):
            go("full")
    run = folder / "full"
    assert [row["step"] for row in read_rows(run / "metrics.jsonl")] == [1, 2]
    assert (run / "LATEST").resolve().name == "step-1" and not list(run.glob(".step-*"))
    go("full")
    assert (run / "LATEST").resolve().name == "step-3"


def test_a_signal_waits_for_the_writer(plain, setting, monkeypatch):
    folder, go = setting
    stopping, write_hf = threading.Event(), writing._write_hf
    step, finish = trainers.BasicTrainer.train_step, checkpointer.Checkpointer.finish

    def write(*arguments):
        assert stopping.wait(timeout=120)
        write_hf(*arguments)

    def step_until_stopped(self, *arguments):
        if self.learner.counters.steps == 1:
            self.loader.step_back(8)
            raise Stopped(signal.SIGTERM)
        step(self, *arguments)

    def wait(self):
        if self._saving is not None:
            stopping.set()
        finish(self)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "_write_hf", write)
        patch.setattr(trainers.BasicTrainer, "train_step", step_until_stopped)
        patch.setattr(checkpointer.Checkpointer, "finish", wait)
        with pytest.raises(Stopped):
            go("stopped")
    run = folder / "stopped"
    assert (run / "LATEST").resolve().name == "step-1"
    assert same_weights(final_weights(run), saved_weights(plain[0] / "step-1"))
    go("stopped")
    assert same_weights(final_weights(run), final_weights(plain[0]))


def test_old_checkpoints_are_deleted_only_when_the_new_one_is_complete(tmp_path):
    seen = []

    def fill(folder):
        def write():
            seen.append(sorted(path.name for path in tmp_path.glob("step-*")))
            (folder / "file").write_text("content")

        return write

    saves = checkpointer.Checkpointer(tmp_path, ALONE, keep=1, keep_steps=[2])
    for step in (1, 2, 3, 4):
        saves.begin(step, fill)
    saves.finish()
    assert seen == [[], ["step-1"], ["step-2"], ["step-2", "step-3"]]
    assert sorted(path.name for path in tmp_path.glob("step-*")) == ["step-2", "step-4"]
    assert saves.summary()["saves"] == 4
