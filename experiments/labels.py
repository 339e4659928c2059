"""The experiment on which labels to buy, which experiments/run.py starts.

A discriminator learns from labels that a selection buys of samples of the SFT model, 40 at a time.
What it is worth is the gold reward of the sample that it ranks first among 16: the policy is best
of 16 by the discriminator, so every method is at the same KL, log 16 - 15/16 at most, and differs
in the labels alone. No policy is trained, and everything else is the code of D2PO's rounds.
"""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import NormalDist

import numpy as np
import torch
from matplotlib.figure import Figure

from experiments.workspace import MODEL_LENGTHS, ROOT, Workspace
from preflab.distributed.process_group import ALONE
from preflab.modeling.generation import sample
from preflab.modeling.loading import build_policy
from preflab.online.discriminator import build_discriminator
from preflab.online.labelers import DiscriminatorLabels
from preflab.online.ledger import Ledger
from preflab.online.rollouts import Rollouts
from preflab.online.selection import bind_selection
from preflab.reports.plot_style import label_axes, panel_grid, style
from preflab.rewards.registry import build_reward
from preflab.settings.compose import compose
from preflab.settings.load import load_settings
from preflab.settings.values import changed
from utils import Progress, atomic_write, mean_and_error

SELECTIONS = {
    "rand": "rand",
    "conf": "conf",
    "delta_ucb": "delta_ucb",
    "double_thompson": "double_thompson",
    "d_optimal": "d_optimal",
    "sharpe": {"name": "sharpe", "heads": 16},  # without heads it is conf
}
PURCHASES, LABELS, POOL = 6, 40, 300  # prompts of a pool, two responses each
HALF, ALL = LABELS * PURCHASES // 2, LABELS * PURCHASES
N_TEST, BEST_OF = 192, 16  # held-out prompts, responses to each
# The 97.5% quantiles of Student's t by degrees of freedom, for the intervals over seeds.
T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def labels(workspace: Workspace) -> tuple[dict, dict]:
    """The curves of all selections and seeds. Those that exist already are not repeated."""
    torch.set_num_threads(1)
    curves: dict[str, dict[int, dict[int, float]]] = {name: {} for name in SELECTIONS}
    bounds: dict[int, dict[str, float]] = {}
    bar = Progress(
        total=len(SELECTIONS) * len(workspace.seeds), initial=0, unit=" curves", desc="labels"
    )
    for seed in workspace.seeds:
        trial = Trial(workspace.of(seed), seed)
        bounds[seed] = trial.bounds()
        for name in SELECTIONS:
            curves[name][seed] = trial.curve(name)
            bar.update()
    bar.close()
    result = verdict(curves, workspace.seeds, ALL if workspace.steps is None else None)
    return result | {"curves": curves, "bounds": bounds}, {"labels": figure(curves)}


class Trial:
    """Pools and held-out samples of one seed, and the curves of the selections on them."""

    def __init__(self, workspace: Workspace, seed: int):
        self.seed, self.purchases = seed, workspace.steps or PURCHASES
        self.folder = workspace.work / "labels" / f"seed-{seed}"
        self.folder.mkdir(parents=True, exist_ok=True)
        base = workspace.base()
        self.settings = _settings(base, workspace.words, self.folder, seed)
        self.gold = build_reward(self.settings.reward)
        lines = (workspace.words / "prompts.jsonl").read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        drawn = np.random.default_rng(seed).permutation(len(prompts))
        chosen = [prompts[i] for i in drawn[: PURCHASES * POOL + N_TEST]]
        self.test, self.train = chosen[:N_TEST], chosen[N_TEST:]
        samples = self._samples()
        self.test_responses, self.train_responses = samples["test"], samples["train"]
        flat = self.gold(
            [prompt for prompt in self.test for _ in range(BEST_OF)],
            [text for of_prompt in self.test_responses for text in of_prompt],
        )
        self.test_gold = np.array(flat).reshape(N_TEST, BEST_OF)

    def _samples(self) -> dict[str, list[list[str]]]:
        """Responses to the held-out prompts, (N_TEST, BEST_OF), and to the others, (n, 2)."""
        path = self.folder / "samples.json"
        if not path.is_file():
            responses = {
                "test": self._draw(self.test, BEST_OF),
                "train": self._draw(self.train, 2),
            }
            with atomic_write(path) as f:
                json.dump(responses, f)
        return json.loads(path.read_text())

    def _draw(self, prompts: list[str], k: int) -> list[list[str]]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.settings.model.name_or_path)
        tokens = [tokenizer(prompt)["input_ids"] for prompt in prompts for _ in range(k)]
        drawn = sample(
            build_policy(self.settings.model, trainable=False),
            tokenizer,
            tokens,
            keys=[(i, j) for i in range(len(prompts)) for j in range(k)],
            max_new_tokens=16,
            seed=self.seed * 2 + (k > 2),  # prompts are numbered from 0 in both
            batch_size=512,
        )
        texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in drawn]
        return [texts[i : i + k] for i in range(0, len(texts), k)]

    def bounds(self) -> dict[str, float]:
        """The mean gold reward of one sample, and of the best of 16 by gold itself."""
        return {
            "one": float(self.test_gold.mean()),
            "best": float(self.test_gold.max(1).mean()),
        }

    def curve(self, name: str) -> dict[int, float]:
        """The reward of best of 16 by a discriminator, by the number of labels that it learned
        from."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            measured = self._measure(name)
            with atomic_write(path) as f:
                json.dump(measured, f)
        return {int(bought): reward for bought, reward in json.loads(path.read_text()).items()}

    def _measure(self, name: str) -> dict[int, float]:
        from trainers import BasicTrainer

        run = self.folder / name
        shutil.rmtree(run, ignore_errors=True)  # what a kill left behind
        run.mkdir()
        online = changed(self.settings.online, select=SELECTIONS[name])
        settings = changed(self.settings, online=online)
        discriminator = build_discriminator(BasicTrainer, settings, run, ALONE)
        discriminator.prepare()
        ledger = Ledger(run / "labels.jsonl", None)
        labeler = DiscriminatorLabels(self.gold, ledger, discriminator, online, self.seed)
        selection, labeler.selection = labeler.selection, bind_selection("rand")
        labeler.begin(self._rollouts(0, LABELS))  # the same start for every selection
        labeler.selection = selection
        rewards = {}
        for number in range(1, self.purchases + 1):
            if number > 1:
                labeler.label(self._rollouts(number - 1, POOL))
            rewards[ledger.bought] = self._reward(discriminator)
        return rewards

    def _rollouts(self, number: int, n: int) -> Rollouts:
        begin = number * POOL
        responses = self.train_responses[begin : begin + n]
        return Rollouts(
            number,
            keys=list(range(begin, begin + n)),
            prompts=self.train[begin : begin + n],
            prompt_tokens=[[] for _ in responses],
            responses=responses,
            tokens=[[[] for _ in texts] for texts in responses],
        )

    def _reward(self, discriminator) -> float:
        """The mean gold reward of the response that the discriminator ranks first."""
        scores = np.array(discriminator.score_responses(self.test, self.test_responses))
        first = scores.argmax(1)
        return float(self.test_gold[np.arange(N_TEST), first].mean())


def _settings(base: Path, words: Path, folder: Path, seed: int):
    """Those of the d2po experiment's discriminator; every pool is followed by a purchase."""
    from preflab.execution import register_built_in

    register_built_in()
    overrides = [
        "function=online",
        "model=blank_model",
        f"model.name_or_path={base}",
        "reward=collector",
        f"reward.path={words / 'words.json'}",
        *MODEL_LENGTHS,
        "online.discriminator=bradley_terry",
        "online.discriminator_lr=5e-4",
        "online.discriminator_epochs=2",
        "online.discriminator_batch_size=32",
        "online.replay=100",
        f"online.relabels={LABELS}",
        f"online.relabel_every={2 * POOL}",
        "eval_batch_size=256",
        f"local_run_dir={folder}",
        f"seed={seed}",
    ]
    return load_settings(compose(overrides, ROOT / "experiments" / "config"))


# ---------------------------------------------------------------------------------- what they say


def interval(values: Sequence[float]) -> tuple[float, float]:
    """The mean of values of seeds, and half of the width of its 95% t interval."""
    mean, error = mean_and_error(values)
    return mean, T[len(values) - 1] * error


def verdict(
    curves: dict[str, dict[int, dict[int, float]]], seeds: Sequence[int], most: int | None
) -> dict:
    """Whether the criterion holds, and the power that the runs had. most: the labels of the end;
    None for those of a trial."""
    most = most or max(next(iter(curves["rand"].values())))
    half = min(curves["rand"][seeds[0]], key=lambda bought: abs(bought - most / 2))
    theirs = {seed: curves["rand"][seed][most] for seed in seeds}
    others = [name for name in curves if name != "rand"]
    gaps = {name: [curves[name][seed][half] - theirs[seed] for seed in seeds] for name in others}
    n_reached = {name: sum(gap >= 0 for gap in gaps[name]) for name in others}
    needed = len(seeds) - 1
    spread = float(np.sqrt(np.mean([np.var(gap, ddof=1) for gap in gaps.values()])))
    found_at = spread * NormalDist().inv_cdf(_share_for_power(len(seeds), needed))
    growth = [theirs[seed] - curves["rand"][seed][half] for seed in seeds]
    ends = {name: [curves[name][seed][most] - theirs[seed] for seed in seeds] for name in others}
    texts = [
        f"{name} {_with_interval([curves[name][seed][half] for seed in seeds])} with {half} labels"
        f" and {_with_interval([curves[name][seed][most] for seed in seeds])} with {most}"
        + ("" if name == "rand" else f", {n_reached[name]} of {len(seeds)} seeds")
        for name in curves
    ]
    differences = "; ".join(f"{name} {_with_interval(ends[name], '+')}" for name in others)
    findings = (
        f"Gold reward of best of {BEST_OF}, mean over {len(seeds)} seeds ± its 95% t interval, and"
        f" in how many seeds it reaches with {half} labels what random pairs reach with {most}:"
        f" {'; '.join(texts)}. With {most} labels, minus random pairs: {differences}. Random pairs"
        f" gain {_with_interval(growth, '+')} from {half} to {most} labels. Power: a difference"
        f" between a selection with {half} labels and random pairs with {most} varies over seeds"
        f" with a standard deviation of {spread:.2f}, so the criterion finds with a chance of 80% a"
        f" selection that is {found_at:.2f} above, and one that is exactly twice as efficient with"
        f" {100 * _power(0.5, len(seeds), needed):.0f}%; a t interval of {len(seeds)} seeds"
        f" excludes zero with 80% at a difference of {_detectable(spread, len(seeds)):.2f}."
    )
    return {
        "holds": max(n_reached.values()) >= needed,
        "found": findings,
        "reached": n_reached,
        "standard_deviation": spread,
    }


def _with_interval(values: Sequence[float], sign: str = "") -> str:
    mean, half_width = interval(values)
    return f"{mean:{sign}.2f} ± {half_width:.2f}"


def _power(p: float, n: int, needed: int) -> float:
    """The chance that at least `needed` of `n` seeds succeed, each with chance p."""
    return sum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(needed, n + 1))


def _share_for_power(n: int, needed: int, power: float = 0.8) -> float:
    """The chance of a seed at which `needed` of `n` succeed with chance `power`, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _power(middle, n, needed) < power else (low, middle)
    return low


def _detectable(spread: float, n: int) -> float:
    """The mean of `n` normal differences whose t interval excludes zero with a chance of 80%, by
    simulation."""
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(20_000, n))
    errors = draws.std(1, ddof=1) / math.sqrt(n)
    # the interval of draws + mean lies above zero where the mean exceeds this
    return spread * float(np.quantile(T[n - 1] * errors - draws.mean(1), 0.8))


def figure(curves: dict[str, dict[int, dict[int, float]]]) -> Figure:
    """Reward against labels, each selection beside random pairs, with 95% t intervals."""
    others = [name for name in curves if name != "rand"]
    picture, axes = panel_grid(len(others), row_height=2.8)
    for ax, name in zip(axes, others, strict=True):
        for i, shown in enumerate(("rand", name)):
            by_seed = list(curves[shown].values())
            bought = sorted(by_seed[0])
            points = [interval([curve[n] for curve in by_seed]) for n in bought]
            means, widths = (np.array(column) for column in zip(*points, strict=True))
            ax.plot(bought, means, **style(i), marker=".", linewidth=1.4, label=shown)
            ax.fill_between(
                bought, means - widths, means + widths, color=style(i)["color"], alpha=0.15, lw=0
            )
        label_axes(ax, name, "labels", f"gold reward, best of {BEST_OF}")
    return picture
