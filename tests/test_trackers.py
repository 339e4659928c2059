"""Trackers: what they are sent, one id over resumes, and that none blocks or fails a run."""

import json
import sys
import threading
import types

import pytest
from conftest import read_rows, run_here, small_run

from preflab.training import trackers
from preflab.training.trackers import Tracker, check_tracker
from utils import ConfigError


class Recorder(types.ModuleType):
    """A module whose every function notes its name and arguments, and returns the module."""

    def __init__(self, name: str, calls: list):
        super().__init__(name)
        self.calls = calls

    def __getattr__(self, name: str):
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments, **more):
            self.calls.append((name, arguments, more))
            return [] if name == "search_runs" else self

        return call


@pytest.fixture
def fake(monkeypatch):
    """Puts a recording module in the place of a tracking library; returns its calls."""

    def put(*modules: str) -> list:
        calls: list = []
        for module in modules:
            recorder = Recorder(module, calls)
            recorder.__spec__ = types.SimpleNamespace()
            monkeypatch.setitem(sys.modules, module, recorder)
        return calls

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return put


def shown(value) -> str:
    name = type(value).__name__
    return value.to_json() if name == "DataFrame" else name


@pytest.mark.parametrize(
    "tracker, modules, log, finish",
    [
        ("wandb", ["wandb"], "log", "finish"),
        ("trackio", ["trackio"], "log", "finish"),
        ("tensorboard", ["tensorboard", "torch.utils.tensorboard"], "add_scalar", "close"),
        ("mlflow", ["mlflow"], "log_metrics", "end_run"),
    ],
)
def test_a_tracker_gets_rows_config_and_samples(
    fake, imdb_dir, llama_folder, tmp_path, tracker, modules, log, finish
):
    calls = fake(*modules)
    run_dir = tmp_path / "run"
    more = (f"tracker={tracker}", "wandb.enabled=true", "wandb.project=mine", "n_examples=16")
    more += ("minimum_log_interval_secs=0",)
    run_here(*small_run(llama_folder, imdb_dir, run_dir, *more))
    names = [name for name, _, _ in calls]
    assert names[-1] == finish
    rows = read_rows(run_dir / "metrics.jsonl")
    assert names.count(log) >= len(rows) > 3
    sent = json.dumps(calls, default=shown)
    assert "loss/train" in sent and "n_eval_examples" in sent and "prompt number" in sent
    if tracker != "tensorboard":
        assert "mine" in sent
    assert json.loads((run_dir / "tracker.json").read_text())["id"] in sent or (
        tracker == "tensorboard"
    )


def test_a_resumed_run_keeps_its_id(fake, imdb_dir, llama_folder, tmp_path):
    calls = fake("wandb")
    for n in (16, 24):
        more = ("tracker=wandb", "wandb.enabled=true", f"n_examples={n}")
        run_here(*small_run(llama_folder, imdb_dir, tmp_path / "run", *more))
    starts = [more for name, _, more in calls if name == "init"]
    assert len(starts) == 2 and starts[0]["id"] == starts[1]["id"]
    assert all(more["resume"] == "allow" for more in starts)


class Backend:
    """Raises or hangs in one of its methods."""

    def __init__(self, where: str, problem):
        self.where, self.problem = where, problem
        self.do("start")

    def do(self, name: str) -> None:
        if name == self.where:
            self.problem()

    def log(self, numbers: dict, step: int) -> None:
        self.do("log")

    def finish(self) -> None:
        self.do("finish")


@pytest.mark.parametrize("where", ["start", "log", "finish"])
@pytest.mark.parametrize("hangs", [False, True])
def test_a_broken_tracker_is_switched_off_with_one_warning(monkeypatch, caplog, where, hangs):
    released = threading.Event()
    monkeypatch.setattr(trackers, "CALL_SECONDS", 0.05 if hangs else 60.0)
    monkeypatch.setattr(trackers, "FINISH_SECONDS", 0.2 if hangs else 60.0)

    alone = []
    monkeypatch.setattr(trackers, "wait_for_no_library", lambda: alone.append(where))

    def problem():
        if hangs:
            released.wait()
        raise SystemExit("the server\n  is gone")

    tracker = Tracker("fake", lambda: Backend(where, problem))
    for step in range(3):
        tracker.log({"loss": 1.0}, step)
    tracker.finish()
    released.set()
    tracker._thread.join()
    assert not tracker.is_on and bool(alone) is hangs
    [record] = [r for r in caplog.records if "continues without it" in r.message]
    assert ("no answer" if hangs else "the server is gone") in record.message
    tracker.log({"loss": 1.0}, 4)  # goes nowhere


def test_threads_of_a_tracking_library_fail_in_a_line(monkeypatch, caplog):
    seen = []
    monkeypatch.setattr(threading, "excepthook", trackers._ThreadErrors(seen.append))
    for module in ("tensorboard.writer", "somebody"):
        fail: dict = {"__name__": module}
        exec("def fail(): raise OSError(28, 'No space left')", fail)
        thread = threading.Thread(target=fail["fail"])
        thread.start()
        thread.join()
    [other] = seen
    assert other.exc_traceback.tb_next.tb_next.tb_frame.f_globals["__name__"] == "somebody"
    [record] = caplog.records
    assert record.message == "a thread of tensorboard has ended: [Errno 28] No space left"
    assert record.exc_info is None


def test_wandb_cannot_ask_for_a_key_and_an_empty_address_is_none(fake, monkeypatch, tmp_path):
    calls = fake("wandb", "mlflow")
    monkeypatch.setenv("WANDB_SILENT", "false")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    settings = types.SimpleNamespace(wandb=types.SimpleNamespace(entity=None, project="mine"))
    trackers.Wandb(settings, tmp_path, {}, "0123abcd")
    assert trackers.os.environ["WANDB_SILENT"] == "true"
    trackers.Mlflow(settings, tmp_path, {}, "0123abcd")
    [uri] = [arguments for name, arguments, _ in calls if name == "set_tracking_uri"]
    assert uri == ((tmp_path / "mlruns").as_uri(),)


def test_a_missing_package_is_named_before_anything_loads(monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    settings = types.SimpleNamespace(
        tracker="trackio", debug=False, wandb=types.SimpleNamespace(enabled=False)
    )
    with pytest.raises(ConfigError, match="pip install trackio"):
        check_tracker(settings)
    settings.debug = True  # writes to no tracker
    check_tracker(settings)


def test_without_a_tracker_nothing_is_written(run):
    assert not (run("run", "tracker=none", "wandb.enabled=true") / "tracker.json").exists()


@pytest.mark.parametrize("found", ["../../x", "a' OR '", 5, None, "", "0" * 9])
def test_an_id_that_is_none_is_replaced(tmp_path, found):
    path = tmp_path / "tracker.json"
    path.write_text(json.dumps({"id": found}))
    made = trackers._id_of_run(tmp_path)
    assert made != found and made == json.loads(path.read_text())["id"]
    assert trackers._id_of_run(tmp_path) == made  # it stays the same
