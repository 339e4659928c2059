"""Kills runs at random moments, continues them, and compares them with uninterrupted ones.

    python tests/kill_campaign.py --kills 100 --seed 0                # of each kind
    python tests/kill_campaign.py --kills 20 --kinds d2po,shared
    python tests/kill_campaign.py --ranks                             # see below

A third of the kills comes after a random time, a third at a random operation on a file, and a third
during a save; every fourth is a SIGTERM, which a run obeys, and the others are SIGKILLs. A run that
was killed one to three times is continued to its end; it survives if its
weights, samples, rollouts and metrics are those of the uninterrupted run, bit for bit, nothing half
written remains, and no label was bought twice or beyond the budget. A folder that is lost is kept,
and its difference printed.

Processes are forked from this one, which has imported everything, so that a kill takes a second or
two. The same seed chooses the same kills; those after a time hit what runs then.

`--ranks` starts real commands of two ranks. One of them dies in each phase, is stopped for a
minute, or finds its port taken; after each, no process may remain and the run must continue.
"""

import argparse
import contextlib
import gc
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import tqdm
from conftest import (
    ROOT,
    make_model,
    make_tokenizer,
    read_rows,
    run_here,
    same_weights,
    saved_weights,
    small_run,
    write_imdb,
)

from preflab.distributed.process_group import world
from preflab.distributed.signals import Stopped

# A gold that is paid for: letters a to m in a response.
GOLD = """
from rewards import register_reward

@register_reward("letters", gold=True)
def letters():
    def score(prompts, responses):
        return [float(sum(c in "abcdefghijklm" for c in r.lower())) for r in responses]
    return score
"""
BUDGET = 20
HEAD = f"{'kind':8}{'kills':>8}{'survived':>10}{'lost':>6}"
OFFLINE = ("n_epochs=2", "save_every=16", "eval_batch_size=4", "microbatch_tokens=200")
ONLINE = (
    "function=online",
    "reward=length",
    "~reward.unit",
    "reward.name=letters",
    "online.rounds=4",
    "online.prompts_per_round=8",
    "online.eval_every=2",
    "online.save_every=1",
    "online.initial_labels=6",
    "online.discriminator=bradley_terry",
    "online.relabel_every=16",
    "online.relabels=4",
    f"online.budget={BUDGET}",
    "batch_size=4",
    "optimizer=AdamW",
)


@dataclass(frozen=True)
class Kind:
    """What is killed. runs: overrides of each process of a try, by the name of its run folder;
    ranks: processes of one run."""

    runs: dict[str, tuple[str, ...]]
    ranks: int = 1


KINDS = {
    "dpo": Kind({"run": OFFLINE}),
    "tdpo2": Kind({"run": (*OFFLINE, "loss=tdpo2", "optimizer=AdamW")}),
    "lora": Kind({"run": (*OFFLINE, "model.lora.r=4", "optimizer=AdamW")}),
    "d2po": Kind({"run": ONLINE}),
    "ranks": Kind({"run": (*OFFLINE, "trainer=FSDPTrainer", "world_size=2")}, ranks=2),
    "shared": Kind({"one": OFFLINE, "two": (*OFFLINE, "seed=1")}),
}


class Campaign:
    """Runs in a folder, with the models and the data that all of them read."""

    def __init__(self, folder: Path, seed: int):
        self.folder, self.random, self.ports = folder, random.Random(seed), random.Random()
        for name in ("llama", "gpt2"):
            make_model(name, scale=1.0 if name == "gpt2" else 4.0).save_pretrained(folder / name)
            make_tokenizer().save_pretrained(folder / name)
        write_imdb(folder / "data")
        (folder / "gold.py").write_text(GOLD)

    def command(self, kind: Kind, folder: Path, name: str) -> list[str]:
        """Overrides of a run of a kind in `folder`, all of whose runs share a new cache."""
        is_online = "function=online" in kind.runs[name]
        more = [f"reward.module={self.folder / 'gold.py'}"] if is_online else []
        more.append(f"cache_dir={folder / 'cache'}")
        model = self.folder / ("gpt2" if is_online else "llama")
        return small_run(
            model, self.folder / "data", folder / name, *kind.runs[name], "max_new_tokens=6", *more
        )

    def run(self, kind: Kind, folder: Path, doom: "Doom | None" = None) -> "Outcome":
        """Fork the processes of a try, and wait for all of them."""
        folder.mkdir(parents=True, exist_ok=True)
        port, outcome = self._free_port(), Outcome()
        for name in kind.runs:
            for rank in range(kind.ranks):
                number = len(outcome.pids)
                mine = doom if doom is not None and doom.process in (number, None) else None
                environment = _environment(rank, kind.ranks, port) if kind.ranks > 1 else {}
                command = self.command(kind, folder, name)
                pid = os.fork()
                if pid == 0:
                    _child(command, environment, folder, f"{name}-{rank}", mine)
                outcome.pids.append(pid)
        outcome.wait(folder, kind.ranks)
        return outcome

    def _free_port(self) -> int:
        """A port that no other program is given by chance: systems choose higher ones."""
        while True:
            port = self.ports.randrange(10_000, 32_000)
            with socket.socket() as probe, contextlib.suppress(OSError):
                probe.bind(("localhost", port))
                return port

    def try_once(self, name: str, whole: "Whole", number: int) -> tuple[int, list[str]]:
        """Kill a run of a kind some times and continue it. Returns the kills, and what is lost."""
        kind, folder = KINDS[name], self.folder / f"{name}-{number}"
        kills, problems = 0, []
        for _ in range(self.random.randint(1, 3)):
            outcome = self.run(kind, folder, self._doom(kind, whole))
            kills += outcome.killed > 0
            problems += outcome.problems if not outcome.killed else []
        problems += self.run(kind, folder).problems
        for run in kind.runs:
            problems += differences(whole.folder / run, folder / run)
        if not problems:
            shutil.rmtree(folder)
        return kills, problems

    def _doom(self, kind: Kind, whole: "Whole") -> "Doom":
        processes = range(len(kind.runs) * kind.ranks)
        process = self.random.choice([None, *processes] if len(processes) > 1 else [0])
        by = self.random.choice(("time", "file", "save"))
        return Doom(
            process,
            seconds=self.random.uniform(0, whole.seconds) if by == "time" else None,
            operation=self.random.randint(1, whole.operations) if by == "file" else None,
            save=self.random.randint(1, whole.saves) if by == "save" else None,
            delay=self.random.uniform(0, 0.08),
            signum=self.random.choice((signal.SIGTERM, *[signal.SIGKILL] * 3)),
        )


@dataclass(frozen=True)
class Doom:
    """When a process kills itself. process: its number, None for all of a try. seconds: after its
    start. operation: at which operation on a file of the try. save: in which save, `delay` seconds
    after it began. signum: what it sends to itself."""

    process: int | None
    seconds: float | None
    operation: int | None
    save: int | None
    delay: float
    signum: int

    def strike(self, seconds: float = 0.0) -> None:
        """Send the signal, now or later."""
        if not seconds:
            os.kill(os.getpid(), self.signum)
            return
        timer = threading.Timer(seconds, os.kill, (os.getpid(), self.signum))
        timer.daemon = True
        timer.start()


@dataclass
class Whole:
    """An uninterrupted run of a kind: the folder, and how long it took in three units."""

    folder: Path
    seconds: float
    operations: int
    saves: int


@dataclass
class Outcome:
    """How the processes of a try ended."""

    pids: list[int] = field(default_factory=list)
    killed: int = 0
    problems: list[str] = field(default_factory=list)

    def wait(self, folder: Path, ranks: int) -> None:
        """Wait for all; one that takes ten minutes is a problem. As torchrun does, kill the ranks
        that are there some seconds after another has died: they may wait for it to join them."""
        timer = threading.Timer(600, self._kill_all)
        timer.start()
        running = set(self.pids)
        while running:
            pid, status = os.wait()
            running.discard(pid)
            code = os.waitstatus_to_exitcode(status)
            if code and ranks > 1 and running:
                timer.cancel()
                timer = threading.Timer(5, self._kill, (running,))
                timer.start()
            self.killed += code in (-signal.SIGKILL, 128 + signal.SIGTERM)
            if code not in (0, -signal.SIGKILL, 128 + signal.SIGTERM):
                self.problems.append(f"a process ended with {code}, see {folder}/*.log")
        timer.cancel()

    def _kill_all(self) -> None:
        self.problems.append("a process did not end")
        self._kill(set(self.pids))

    def _kill(self, pids: set[int]) -> None:
        for pid in set(pids):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _environment(rank: int, ranks: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
    numbers["MASTER_PORT"] = port
    return {key: str(value) for key, value in numbers.items()} | {"MASTER_ADDR": "localhost"}


def _child(command: list[str], environment: dict, folder: Path, name: str, doom: Doom | None):
    """Run in a forked process, which ends here."""
    code = 1
    try:
        os.environ |= environment
        with open(folder / f"{name}.log", "ab") as log:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
        signal.signal(signal.SIGTERM, lambda signum, _: setattr(world().stop, "received", signum))
        counts = {"operations": 0, "saves": 0}
        watch_files(folder, counts, doom)
        if doom is not None and doom.seconds is not None:
            doom.strike(doom.seconds)
        run_here(*command)
        if doom is None and name.endswith("-0"):
            (folder / "counts").write_text(f"{counts['operations']} {counts['saves']}")
        code = 0
    except Stopped as stopped:
        code = 128 + stopped.signum
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def watch_files(folder: Path, counts: dict[str, int], doom: Doom | None) -> None:
    """Count the operations of this process on files in `folder`, and kill it at that of `doom`."""
    inside = str(folder)

    def hook(event: str, arguments: tuple) -> None:
        if not event.startswith(("open", "os.", "shutil.")) or not arguments:
            return
        path = arguments[0]
        if isinstance(path, os.PathLike):
            path = os.fspath(path)
        if not isinstance(path, str) or not path.startswith(inside):
            return
        counts["operations"] += 1
        if event == "os.mkdir" and os.path.basename(path).startswith(".step-"):
            counts["saves"] += 1
            if doom is not None and doom.save == counts["saves"]:
                doom.strike(doom.delay)
        if doom is not None and doom.operation == counts["operations"]:
            doom.strike()

    sys.addaudithook(hook)


# ---------------------------------------------------------------------------------------- comparing


def differences(whole: Path, run: Path) -> list[str]:
    """What a run that was killed has else than an uninterrupted one."""
    if not (run / "summary.json").is_file():
        return [f"{run} is not finished"]
    problems = []
    for inside in ("", "discriminator"):
        if (whole / "LATEST" / inside / "hf").is_dir() and not same_weights(
            *(saved_weights(folder / "LATEST" / inside) for folder in (whole, run))
        ):
            problems.append(f"{run / 'LATEST' / inside}: other weights")
    for name in ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "labels.jsonl"):
        if (whole / name).is_file() != (run / name).is_file():
            problems.append(f"{run / name} is there in one run only")
        elif (whole / name).is_file() and _rows(whole / name) != _rows(run / name):
            problems.append(f"{run / name}: other rows")
    problems += [f"{path} remains" for path in run.glob(".step-*")]
    if (run / "labels.jsonl").is_file():
        rows = read_rows(run / "labels.jsonl")
        bought = [(row["key"], row["round"], *row["responses"]) for row in rows]
        if len(bought) != len(set(bought)) or sum(row["cost"] for row in rows) > BUDGET:
            problems.append(f"{run / 'labels.jsonl'}: a label was paid for twice, or too many")
    return problems


def _rows(path: Path) -> list[dict]:
    """Rows without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if "second" not in key} for row in read_rows(path)
    ]


def campaign(names: Iterable[str], kills: int, seed: int, folder: Path) -> dict[str, list[int]]:
    """Kill runs of some kinds, at least `kills` times each. Returns kills, survived and lost."""
    runs, counts = Campaign(folder, seed), {}
    print(HEAD, flush=True)
    tqdm.tqdm.monitor_interval = 0  # a process with threads should not fork
    gc.freeze()  # what was imported: no run has to look through it
    for name in names:
        whole_folder = folder / f"{name}-whole"
        begun = time.perf_counter()
        outcome = runs.run(KINDS[name], whole_folder)
        seconds = time.perf_counter() - begun
        if outcome.problems:
            raise SystemExit(f"{name}: the uninterrupted run failed: {outcome.problems}")
        operations, saves = map(int, (whole_folder / "counts").read_text().split())
        whole = Whole(whole_folder, seconds, operations, saves)
        tried = survived = number = 0
        with tqdm.tqdm(total=kills, desc=name, unit=" kills") as bar:
            while tried < kills:
                number += 1
                n, problems = runs.try_once(name, whole, number)
                tried += n
                survived += 0 if problems else n
                for problem in problems:
                    bar.write(f"{name}, try {number}: {problem}", file=sys.stderr)
                bar.update(min(n, bar.total - bar.n))
                if not n and problems:
                    raise SystemExit(f"{name}: a run that nobody killed failed")
        counts[name] = [tried, survived, tried - survived]
        print(f"{name:8}{tried:8}{survived:10}{tried - survived:6}", flush=True)
    return counts


# ------------------------------------------------------------------------------- a rank that dies

# A module of the user's, which every process imports: a rank dies, or stops, at some call.
DIES = """
import os, pkgutil, signal, time

phase, rank, end = (os.environ.get(f"TEST_{name}") for name in ("PHASE", "RANK", "END"))
CALLS = {
    "start": None,
    "tokens": ("preflab.batching.token_store._load_store", 1),
    "reference": ("preflab.modeling.reference_cache._logps_of_groups", 2),
    "step": ("preflab.training.learner.compute_loss", 3),
    "sampling": ("preflab.modeling.decoding.Decoder._decode", 1),
    "saving": ("preflab.training.learner.save_weights", 1),
}

def die():
    with open(os.environ["TEST_NOTE"], "w") as note:
        note.write(f"{time.time()} {os.getpid()}")
    if end == "raise":
        raise RuntimeError("this rank is unwell")
    ends = {"stop": signal.SIGSTOP, "term": signal.SIGTERM, "kill": signal.SIGKILL}
    os.kill(os.getpid(), ends[end])

if phase and os.environ.get("RANK") == rank:
    if CALLS[phase] is None:
        die()
    else:
        (name, at), calls = CALLS[phase], []
        module, _, attribute = name.rpartition(".")
        module = pkgutil.resolve_name(module)
        function = getattr(module, attribute)

        def dies(*arguments, **more):
            calls.append(1)
            if len(calls) == at:
                die()
            return function(*arguments, **more)

        setattr(module, attribute, dies)
"""
DEATHS = [
    ("start", 1, "kill"),
    ("start", 0, "raise"),
    ("tokens", 1, "kill"),
    ("tokens", 0, "raise"),
    ("reference", 1, "kill"),
    ("reference", 0, "raise"),
    ("sampling", 0, "kill"),
    ("step", 1, "raise"),
    ("step", 0, "kill"),
    ("saving", 0, "kill"),
    ("saving", 1, "raise"),
    ("step", 1, "term"),
    ("step", 1, "stop"),
]


class Ranks:
    """Commands of two ranks in a folder."""

    def __init__(self, folder: Path):
        self.campaign = Campaign(folder, 0)
        self.folder, self.note = folder, folder / "note"
        (folder / "dies.py").write_text(DIES)

    def start(self, name: str, *more: str, **death: str) -> subprocess.Popen:
        """Start a command in its own session; death: PHASE, RANK and END."""
        command = self.campaign.command(KINDS["ranks"], self.folder / name, "run")
        command += [f"dataset_module={self.folder / 'dies.py'}", *more]
        self.note.unlink(missing_ok=True)
        environment = {f"TEST_{key}": value for key, value in death.items()}
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *command],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env=os.environ | environment | {"TEST_NOTE": str(self.note)},
        )

    def check_death(self, phase: str, rank: int, end: str) -> list[str]:
        """One death in the run folder `broken`; returns the problems."""
        process = self.start("broken", PHASE=phase, RANK=str(rank), END=end)
        if end == "stop":
            self._continue_after(process, 60)
        _, errors = process.communicate(timeout=600)
        remaining = remaining_of(process.pid)
        died = float(self.note.read_text().split()[0]) if self.note.exists() else time.time()
        print(f"{phase}, rank {rank}, {end}: all gone {time.time() - died:.0f} s later", flush=True)
        problems = [f"process {pid} remains" for pid in remaining]
        if not self.note.exists():
            problems.append("the rank did not die: " + errors[-2000:])
        code, traces, message = {
            "kill": (1, 0, f"worker {rank} was killed by SIGKILL"),
            "raise": (1, 1, f"worker {rank} failed with the error"),
            "term": (128 + signal.SIGTERM, 0, "stopped by SIGTERM"),  # both ranks save and stop
            "stop": (0, 0, ""),  # and goes on after a minute
        }[end]
        if (phase, end) == ("start", "raise"):  # a module of the user's with an error
            code, traces, message = 2, 0, "RuntimeError: this rank is unwell"
        if process.returncode != code or message not in errors:
            problems.append(f"code {process.returncode} instead of {code}: {errors[-2000:]}")
        if errors.count("Traceback") != traces:
            problems.append(f"{errors.count('Traceback')} tracebacks: {errors[-3000:]}")
        return [f"{phase}, rank {rank}, {end}: {problem}" for problem in problems]

    def _continue_after(self, process: subprocess.Popen, seconds: int) -> None:
        while not self.note.exists() and process.poll() is None:
            time.sleep(0.2)
        time.sleep(seconds)
        os.kill(int(self.note.read_text().split()[1]), signal.SIGCONT)

    def check_port(self) -> list[str]:
        with socket.socket() as taken:
            taken.bind(("localhost", 0))
            taken.listen()
            port = taken.getsockname()[1]
            process = self.start("port", f"fsdp_port={port}")
            _, errors = process.communicate(timeout=600)
        expected = process.returncode == 2 and errors.count("error:") == 1
        if expected and f"fsdp_port={port} cannot be used" in errors and "Traceback" not in errors:
            return []
        return [f"a port in use: {process.returncode}, {errors[-2000:]}"]


def remaining_of(session: int) -> list[int]:
    """The processes of a session that are still there two minutes after its leader has ended."""
    for _ in range(240):
        alive = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, _, of = stat.read_text().rpartition(")")[2].split()[:4]
                if int(of) == session and state != "Z":
                    alive.append(int(stat.parent.name))
        if not alive:
            break
        time.sleep(0.5)
    return alive


def kill_ranks(folder: Path, deaths: list[tuple[str, int, str]]) -> list[str]:
    """Let a rank die in each phase of one run, which then ends as an uninterrupted one."""
    ranks = Ranks(folder)
    problems = [] if len(deaths) < len(DEATHS) else ranks.check_port()
    for death in tqdm.tqdm(deaths, unit=" deaths"):
        problems += ranks.check_death(*death)
    for name in ("whole", "broken"):
        process = ranks.start(name)
        _, errors = process.communicate(timeout=600)
        if process.returncode:
            problems.append(f"{name} does not run to its end: {errors[-2000:]}")
    return problems + differences(folder / "whole" / "run", folder / "broken" / "run")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS), help="separated by commas")
    parser.add_argument("--ranks", action="store_true", help="let ranks die in each phase instead")
    parser.add_argument("--folder", type=Path, help="for the runs; default: a temporary one")
    arguments = parser.parse_args()
    names = arguments.kinds.split(",")
    if unknown := set(names) - KINDS.keys():
        parser.error(f"--kinds: {', '.join(sorted(unknown))}; accepted: {', '.join(KINDS)}")
    torch.set_num_threads(1)
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="kill-campaign-"))
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.ranks:
        problems = kill_ranks(folder, DEATHS)
        print("\n".join(problems) or "every death was noticed, and the run continued")
        lost = len(problems)
    else:
        counts = campaign(names, arguments.kills, arguments.seed, folder)
        lost = sum(n for _, _, n in counts.values())
    if not lost and not arguments.folder:
        shutil.rmtree(folder)
    raise SystemExit(1 if lost else 0)


if __name__ == "__main__":
    main()
