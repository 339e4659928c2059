"""Where an experiment works, and the commands that it runs there.

In a `Workspace` all seeds share the SFT model, the data and the prompts. In a `RedrawnWorkspace`
each seed has its own, so that intervals over seeds are about these too.
"""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from preflab.reports.runs import Run, find_runs

ROOT = Path(__file__).resolve().parents[1]

MODEL_LENGTHS = ("max_length=24", "max_prompt_length=5")


class Workspace:
    """A folder for data, models and runs, which are made when an experiment first needs them.

    steps: optimizer steps (or rounds) instead of each experiment's own number, for a trial. model:
    a folder with a language model, for the experiments with a real one. drawn_by: the seed that
    draws language, SFT model and data; None for those that all seeds share.
    """

    redrawn = False

    def __init__(
        self,
        work: Path,
        seeds: list[int],
        steps: int | None,
        model: Path | None = None,
        drawn_by: int | None = None,
    ):
        # A trial works in its own folder, so that a real run builds on nothing of it.
        self.work = work if steps is None else work / f"steps-{steps}"
        self.seeds, self.steps, self._model_folder = seeds, steps, model
        self.words, self.sft = self.work / "words", self.work / "sft"
        self.drawn_by = drawn_by

    def of(self, seed: int) -> "Workspace":
        """The workspace that holds the model and the data of a seed."""
        return self

    def across(self, make: Callable[["Workspace"], Path]) -> Path:
        """What `make` makes in this workspace."""
        return make(self)

    def runs_folder(self, name: str) -> Path:
        """Where the runs of a sweep are."""
        return self.work / name

    def model(self) -> list[str]:
        """Overrides that choose the given language model."""
        return _model(self._model_folder)

    def tokenizer(self) -> dict[str, str]:
        """Arguments of `from_pretrained` for the tokenizer of the given language model."""
        folder = self._model_folder
        if folder.suffix == ".gguf":
            return {"pretrained_model_name_or_path": str(folder.parent), "gguf_file": folder.name}
        return {"pretrained_model_name_or_path": str(folder)}

    def command(self, script: str, *arguments) -> None:
        """Run one of the project's commands on one core, and save its output in logs/."""
        name = re.sub(r"[^\w=,.-]+", "_", " ".join(map(str, [script, *arguments])))[-150:]
        log = self.work / "logs" / f"{name}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
        }
        with open(log, "w") as f:
            code = subprocess.run(
                [sys.executable, script, *map(str, arguments)],
                cwd=ROOT,
                stdout=f,
                stderr=f,
                env=environment,
            ).returncode
        if code:
            raise SystemExit(f"{script} failed with {code}; see {log}\n{log.read_text()[-2000:]}")

    def for_each_seed(self, *overrides: str) -> None:
        """Run train.py once for each seed, the seeds in parallel."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(self.command, "train.py", *overrides, f"seed={seed}")
                for seed in self.seeds
            ]
        for job in jobs:
            job.result()

    def base(self) -> Path:
        """The SFT model that policy and reference start from."""
        if not (self.sft / "summary.json").exists():
            drawn = [] if self.drawn_by is None else ["--seed", self.drawn_by]
            self.command("experiments/words.py", "--output", self.words, *drawn)
            self.command(
                "train.py",
                "loss=sft",
                f"datasets=[{self.words / 'sft'}]",
                *_model(self.words / "model"),
                "optimizer=AdamW",
                "lr=2e-3",
                "warmup_steps=50",
                "batch_size=128",
                "n_epochs=null",
                f"n_examples={128 * (self.steps or 1500)}",
                *MODEL_LENGTHS,
                "eval_every=64000",
                "eval_batch_size=256",
                *self._folders(self.sft),
                "sample_during_eval=false",
                *([] if self.drawn_by is None else [f"seed={self.drawn_by}"]),
            )
        return self.sft / "LATEST" / "hf"

    def _folders(self, run_dir: Path) -> list[str]:
        return [
            f"local_run_dir={run_dir}",
            f"cache_dir={self.work / 'cache'}",
            "wandb.enabled=false",
        ]

    def gold(self, reward: str) -> list[str]:
        """Overrides that choose a gold reward. If its yaml is not among the project's, they start
        with the folder that has it."""
        own = []
        if reward in ("two_sizes", "collector"):
            own = [f"--config-dir={ROOT / 'experiments' / 'config'}"]
        return [*own, f"reward={reward}", f"reward.path={self.words / 'words.json'}"]

    def pairs(self, reward: str) -> Path:
        """Two samples of the SFT model for each of 3,200 training and 800 test prompts, scored."""
        folder = self.work / "pairs" / reward
        if not (folder / "test.jsonl").exists():
            base = self.base()
            self.command(
                "scripts/build_preferences.py",
                "--prompts",
                self.words / "prompts.jsonl",
                "--output",
                folder / "made",
                "--k",
                2,
                "--n_test",
                800,
                *self.gold(reward),
                *_model(base),
                "eval_batch_size=512",
                *MODEL_LENGTHS,
                f"seed={1 if self.drawn_by is None else self.drawn_by}",
            )
            for split in ("train", "test"):
                os.replace(folder / f"made-{split}.jsonl", folder / f"{split}.jsonl")
        return folder

    def sweep(
        self,
        name: str,
        data: Path,
        reward: str,
        *overrides: str,
        steps: int,
        batch: int = 64,
        lr: float = 1e-4,
    ) -> list[Run]:
        """Train every combination of `overrides` (comma-separated values) with every seed; returns
        the runs."""
        base, steps = self.base(), self.steps or steps
        self.for_each_seed(
            "-m",
            *self.gold(reward),
            *_model(base),
            f"datasets=[{data}]",
            "optimizer=AdamW",
            f"lr={lr}",
            "warmup_steps=10",
            f"batch_size={batch}",
            "n_epochs=null",
            f"n_examples={batch * steps}",
            f"eval_every={batch * max(1, steps // 10)}",
            *MODEL_LENGTHS,
            "n_eval_model_samples=512",
            "n_eval_examples=512",
            "eval_batch_size=512",
            *self._folders(self.runs_folder(name)),
            "keep_checkpoints=1",
            "save_every=1000000",
            *overrides,
        )
        runs = self._runs(name)
        for run in runs:
            if run.config["n_examples"] != batch * steps or not run.finished:
                raise SystemExit(
                    f"{run.folder} is not a finished run of {steps} steps;"
                    " delete it, or give another --work"
                )
        return runs

    def online(self, name: str, rounds: int, *overrides: str) -> list[Run]:
        """Learn online from the gold reward that counts words, with every seed; returns the
        runs."""
        base, rounds = self.base(), self.steps or rounds
        self.for_each_seed(
            "-m",
            *self.gold("collector"),
            "function=online",
            "loss=dpo",
            "loss.beta=0.1",
            *_model(base),
            f"datasets=[{self.words / 'prompts.jsonl'}]",
            "test_fraction=0.2",
            "optimizer=AdamW",
            "lr=3e-4",
            "warmup_steps=10",
            *MODEL_LENGTHS,
            "n_eval_model_samples=512",
            "eval_batch_size=512",
            f"online.rounds={rounds}",
            f"online.eval_every={max(1, rounds // 4)}",
            "online.save_every=1000",
            "online.discriminator_lr=5e-4",
            "online.discriminator_epochs=2",
            "online.discriminator_batch_size=32",
            *self._folders(self.runs_folder(name)),
            "keep_checkpoints=1",
            *overrides,
        )
        return self._runs(name)

    def _runs(self, name: str) -> list[Run]:
        return [run for run in find_runs(self.work / name)[0] if run.seed in self.seeds]

    def evaluate(
        self, name: str, sweeps: list[str], data: Path, reward: str, *overrides: str
    ) -> Run:
        """One evaluation of the newest checkpoints of all runs of some sweeps."""
        archives = ",".join(str(self.work / sweep) for sweep in sweeps)
        folder = self.work / f"{name}-seeds-{'-'.join(map(str, self.seeds))}"
        if not (folder / "summary.json").exists():
            self.command(
                "train.py",
                *self.gold(reward),
                "function=eval",
                f"model.archive=[{archives}]",
                *_model(self.base()),
                f"datasets=[{data}]",
                *MODEL_LENGTHS,
                "n_eval_examples=800",
                "eval_batch_size=800",
                *self._folders(folder),
                "seed=99",
                *overrides,
            )
        return Run(folder)


class Evaluated(NamedTuple):
    """What several evaluations have written."""

    evaluations: list[dict]
    rows: list[dict]

    def samples(self) -> list[dict]:
        return self.rows


class RedrawnWorkspace(Workspace):
    """A workspace in which the language, the SFT model, the data and the prompts of each seed are
    its own. In its paths `{seed}` stands for the seed."""

    redrawn = True

    def __init__(self, work: Path, seeds: list[int], steps: int | None, model: Path | None = None):
        super().__init__(work / "redrawn", seeds, steps, model)
        self.parts = {
            seed: Workspace(self.work / f"seed-{seed}", [seed], None, drawn_by=seed)
            for seed in seeds
        }
        for part in self.parts.values():
            part.steps = steps
        self.words = self.work / "seed-{seed}" / "words"

    def of(self, seed: int) -> Workspace:
        return self.parts[seed]

    def across(self, make: Callable[[Workspace], Path]) -> Path:
        """What `make` makes in the workspace of each seed, the seeds in parallel."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            made = dict(zip(self.parts, pool.map(make, self.parts.values()), strict=True))
        seed, path = next(iter(made.items()))
        return self.work / "seed-{seed}" / path.relative_to(self.of(seed).work)

    def runs_folder(self, name: str) -> Path:
        return self.work / "seed-{seed}" / name

    def base(self) -> Path:
        return self.across(lambda part: part.base())

    def pairs(self, reward: str) -> Path:
        return self.across(lambda part: part.pairs(reward))

    def for_each_seed(self, *overrides: str) -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(part.for_each_seed, *(_for(seed, word) for word in overrides))
                for seed, part in self.parts.items()
            ]
        for job in jobs:
            job.result()

    def _runs(self, name: str) -> list[Run]:
        return [run for part in self.parts.values() for run in part._runs(name)]

    def evaluate(
        self, name: str, sweeps: list[str], data: Path, reward: str, *overrides: str
    ) -> Evaluated:
        """An evaluation for each seed, with its own data and reference."""
        runs = [
            part.evaluate(name, sweeps, Path(_for(seed, str(data))), reward, *overrides)
            for seed, part in self.parts.items()
        ]
        rows = [row for run in runs for row in run.evaluations]
        return Evaluated(rows, [sample for run in runs for sample in run.samples()])


def _for(seed: int, text: str) -> str:
    return text.replace("{seed}", str(seed))


def _model(folder: Path) -> list[str]:
    return ["model=blank_model", f"model.name_or_path={folder}"]
