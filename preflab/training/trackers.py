"""Experiment trackers beside metrics.jsonl, which never prompt, block or fail a run."""

import contextlib
import importlib.util
import json
import logging
import netrc
import os
import queue
import re
import secrets
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from preflab.distributed.launch import sheltered
from preflab.distributed.process_group import wait_for_no_library
from preflab.reports.runs import read_jsonl
from preflab.settings.schema import Settings
from utils import ConfigError, atomic_write

logger = logging.getLogger(__name__)

CALL_SECONDS = 60  # for one call of a tracker; after that it is switched off
FINISH_SECONDS = 60  # for all that is still to be sent at the end
MAX_SAMPLES = 64  # rows of the table of samples


class Backend(Protocol):
    """A run of a tracking library. Its methods may raise anything and take any time.

    The constructor gets the settings, the run folder, the config to show and an id of the run,
    which is the same when it is resumed.
    """

    def log(self, numbers: dict[str, float], step: int) -> None: ...

    def show(self, pictures: list[Path], samples: list[dict]) -> None:
        """Pictures of the report, and rows of the last evaluation's samples.jsonl."""

    def finish(self) -> None: ...


class Wandb:
    """Weights & Biases: online with a configured key, else in the run folder for `wandb sync`."""

    module = "wandb"

    def __init__(self, settings: Settings, run_dir: Path, config: dict, run_id: str):
        os.environ["WANDB_SILENT"] = "true"  # one that may print asks for a missing key
        if "WANDB_MODE" not in os.environ and not _has_wandb_key():
            os.environ["WANDB_MODE"] = "offline"
        import wandb

        self.wandb = wandb
        self.run = wandb.init(
            entity=settings.wandb.entity,
            project=settings.wandb.project,
            name=run_dir.name,
            id=run_id,
            dir=str(run_dir),
            config=config,
            resume="allow",
            settings=wandb.Settings(init_timeout=30, console="off", x_disable_stats=True),
        )

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.run.log(numbers, step=step)

    def show(self, pictures: list[Path], samples: list[dict]) -> None:
        shown: dict[str, Any] = {path.stem: self.wandb.Image(str(path)) for path in pictures}
        if samples:
            columns, rows = _columns_and_rows(samples)
            shown["samples"] = self.wandb.Table(columns=columns, data=rows)
        self.run.log(shown)

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    """Trackio, on this machine."""

    module = "trackio"

    def __init__(self, settings: Settings, run_dir: Path, config: dict, run_id: str):
        import trackio

        self.trackio = trackio
        name = f"{run_dir.name}-{run_id}"
        trackio.init(project=settings.wandb.project, name=name, config=config, resume="allow")

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.trackio.log(numbers, step=step)

    def show(self, pictures: list[Path], samples: list[dict]) -> None:
        shown: dict[str, Any] = {path.stem: self.trackio.Image(str(path)) for path in pictures}
        if samples:
            import pandas as pd

            columns, rows = _columns_and_rows(samples)
            shown["samples"] = self.trackio.Table(dataframe=pd.DataFrame(rows, columns=columns))
        self.trackio.log(shown)

    def finish(self) -> None:
        self.trackio.finish()


class TensorBoard:
    """Event files in RUN/tensorboard."""

    module = "tensorboard"

    def __init__(self, settings: Settings, run_dir: Path, config: dict, run_id: str):
        from torch.utils.tensorboard import SummaryWriter

        self.make_writer, self.writer = SummaryWriter, None
        self.folder, self.config, self.step = str(run_dir / "tensorboard"), config, 0

    def log(self, numbers: dict[str, float], step: int) -> None:
        if self.writer is None:  # rows of this step and later are from before a resume
            self.writer = self.make_writer(self.folder, purge_step=step)
            self.writer.add_text("config", f"```\n{json.dumps(self.config, indent=1)}\n```", step)
        self.step = step
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)

    def show(self, pictures: list[Path], samples: list[dict]) -> None:
        from matplotlib.image import imread

        if self.writer is None:
            self.writer = self.make_writer(self.folder)
        for path in pictures:
            self.writer.add_image(path.stem, imread(path)[..., :3], self.step, dataformats="HWC")
        for i, sample in enumerate(samples):
            text = f"```\n{json.dumps(sample, indent=1, ensure_ascii=False)}\n```"
            self.writer.add_text(f"samples/{i}", text, self.step)

    def finish(self) -> None:
        if self.writer is not None:
            self.writer.close()


class Mlflow:
    """MLflow: at MLFLOW_TRACKING_URI, else in RUN/mlruns."""

    module = "mlflow"

    def __init__(self, settings: Settings, run_dir: Path, config: dict, run_id: str):
        if is_local := not os.environ.get("MLFLOW_TRACKING_URI"):
            # MLflow 3 refuses its file store without it, and its databases need more packages.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        import mlflow

        self.mlflow = mlflow
        if is_local:
            mlflow.set_tracking_uri((run_dir / "mlruns").resolve().as_uri())
        mlflow.set_experiment(settings.wandb.project)
        # MLflow chooses ids itself, so the run is found again by a tag.
        found = mlflow.search_runs(
            filter_string=f"tags.preflab_id = '{run_id}'", output_format="list"
        )
        earlier = found[0].info.run_id if found else None
        tags = {"preflab_id": run_id}
        mlflow.start_run(run_id=earlier, run_name=run_dir.name, tags=tags)
        mlflow.log_dict(config, "config.json")

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(numbers, step=step)

    def show(self, pictures: list[Path], samples: list[dict]) -> None:
        for path in pictures:
            self.mlflow.log_artifact(str(path))
        if samples:
            self.mlflow.log_dict({"samples": samples}, "samples.json")

    def finish(self) -> None:
        self.mlflow.end_run()


BACKENDS: dict[str, type] = {
    "wandb": Wandb,
    "trackio": Trackio,
    "tensorboard": TensorBoard,
    "mlflow": Mlflow,
}
TRACKERS = (*BACKENDS, "none")


def check_tracker(settings: Settings) -> None:
    """Raise ConfigError if the package of an optional tracker is missing."""
    name = _chosen(settings)
    if name not in (None, "wandb") and importlib.util.find_spec(BACKENDS[name].module) is None:
        raise ConfigError(
            f"tracker={name}: the package {BACKENDS[name].module} is not installed; pip install"
            f" {BACKENDS[name].module}, or set another tracker ({', '.join(TRACKERS)})"
        )


def _chosen(settings: Settings) -> str | None:
    """The tracker of a run; None without one."""
    if settings.debug or settings.tracker == "none":
        return None
    if settings.tracker == "wandb" and not settings.wandb.enabled:
        return None
    return settings.tracker


def start_tracker(settings: Settings, run_dir: Path, config: dict) -> "Tracker | None":
    """The tracker of a run, or None where it is off. config: what it shows as the run's config."""
    if (name := _chosen(settings)) is None:
        return None
    run_id = _id_of_run(run_dir)
    if not isinstance(threading.excepthook, _ThreadErrors):
        threading.excepthook = _ThreadErrors(threading.excepthook)
    return Tracker(name, lambda: BACKENDS[name](settings, run_dir, config, run_id))


def _id_of_run(run_dir: Path) -> str:
    """The id of the run in its tracker, made at its first start and the same ever after. What is
    no id, in a file that is damaged or a stranger's, is not used: trackers make paths of it."""
    path = run_dir / "tracker.json"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))["id"]
        if re.fullmatch(r"[0-9a-f]{8}", found):
            return found
    run_id = secrets.token_hex(4)
    with atomic_write(path) as f:
        json.dump({"id": run_id}, f)
    return run_id


class _ThreadErrors:
    """`threading.excepthook`, with one line for threads of tracking libraries: theirs fail by
    themselves, such as on a full disk."""

    def __init__(self, others: Callable):
        self.others = others

    def __call__(self, failed) -> None:
        modules = {backend.module for backend in BACKENDS.values()}
        frames = traceback.walk_tb(failed.exc_traceback)
        packages = {str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames}
        if not (names := modules & packages):
            self.others(failed)
        else:
            logger.warning(f"a thread of {', '.join(names)} has ended: {_cause(failed.exc_value)}")


def _cause(error: BaseException | None) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    return text[:300] or type(error).__name__


class Tracker:
    """Calls a backend in its own thread, one call after the other.

    A call that raises, or takes longer than CALL_SECONDS, switches the tracker off with one
    warning; the run has its metrics.jsonl in any case. After one that takes too long, the process
    ends without the library's own end, which may wait as long.
    """

    def __init__(self, name: str, start: Callable[[], Backend]):
        self.name, self.is_on = name, True
        self._calls: queue.SimpleQueue = queue.SimpleQueue()
        self._began: float | None = time.monotonic()  # the call that is running
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, args=(start,), daemon=True)
        with sheltered():
            self._thread.start()

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Send the numbers of a row."""
        self._call("log", numbers, step)

    def show_report(self, run_dir: Path) -> None:
        """Send the pictures of the run folder, and samples of its last evaluation."""
        rows = read_jsonl(run_dir / "samples.jsonl")
        last = [row for row in rows if row.get("examples") == rows[-1].get("examples")]
        self._call("show", sorted(run_dir.glob("*.png")), last[:MAX_SAMPLES])

    def finish(self) -> None:
        """Wait until everything is sent, at most FINISH_SECONDS."""
        self._call("finish")
        self._calls.put(None)
        if self.is_on:
            self._thread.join(FINISH_SECONDS)
        if self.is_on and self._thread.is_alive():
            self._leave_alone(FINISH_SECONDS)

    def _call(self, method: str, *arguments) -> None:
        began = self._began
        if self.is_on and began is not None and time.monotonic() - began > CALL_SECONDS:
            self._leave_alone(CALL_SECONDS)
        if self.is_on:
            self._calls.put((method, arguments))

    def _work(self, start: Callable[[], Backend]) -> None:
        verb = "did not start"
        try:
            backend, verb = start(), "stopped"
            self._began = None
            while self.is_on and (call := self._calls.get()) is not None:
                method, arguments = call
                self._began = time.monotonic()
                getattr(backend, method)(*arguments)
                self._began = None
        except BaseException as error:  # of any class, and SystemExit
            self._switch_off(verb, _cause(error))

    def _leave_alone(self, seconds: float) -> None:
        self._switch_off("stopped", f"no answer for {seconds} seconds")
        wait_for_no_library()

    def _switch_off(self, verb: str, cause: str) -> None:
        with self._lock:
            was_on, self.is_on = self.is_on, False
        if was_on:
            logger.warning(f"{self.name} {verb}, the run continues without it: {cause}")


def _columns_and_rows(samples: list[dict]) -> tuple[list[str], list[list]]:
    """Samples as a table of numbers and text."""
    columns = list(dict.fromkeys(name for sample in samples for name in sample))
    return columns, [[_cell(sample.get(name)) for name in columns] for sample in samples]


def _cell(value):
    if value is None or isinstance(value, (str, int, float)):
        return value
    return json.dumps(value, ensure_ascii=False)


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        hosts = netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, netrc.NetrcParseError):
        return False
    return any("wandb" in host for host in hosts)
