"""The experiments: `python experiments/run.py NAME` trains, measures, draws, and says whether a
claim held here.

    python experiments/run.py frontier|offset|sequential_kl|calibration|temperature|d2po|all [--work
    DIR] [--seeds 11 12 13]

Each takes some minutes on two cores: a seed is one `python train.py -m ...` after the other, seeds
run side by side. What is there already is not done again. Writes experiments/results/NAME.json and
pictures, and the verdicts in experiments/README.md. The criteria in `CLAIMS` were written before
the runs.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from preflab.evaluation.win_rates import pair_up, win_rate
from preflab.reports import plot_style, plots, sweep_plots
from preflab.reports.runs import Run, differing_settings, find_runs, group_runs
from preflab.reports.statistics import envelope, paired_difference
from utils import atomic_write, mean_and_error

RESULTS = ROOT / "experiments" / "results"
SEEDS = [11, 12, 13]
BETAS = "0.1,0.5,2"
AT_KL = (0.25, 0.5, 1.0, 1.5, 2.0)

CLAIMS = {  # name: the paper's claim, our criterion
    "frontier": (
        (
            "DPO traces a frontier of reward against KL above the model it starts from, and a"
            " smaller beta goes further along it."
        ),
        (
            "In every seed: the reward at the end exceeds the start's by two standard errors at"
            " each beta, and both KL and reward at the end are larger for beta 0.1 than 0.5, and"
            " for 0.5 than 2."
        ),
    ),
    "offset": (
        (
            "ODPO reaches more reward than DPO at equal KL when score gaps differ in size, and what"
            " it gains comes from the sizes."
        ),
        (
            "Envelope of ODPO minus that of DPO, mean over KL 0.5, 1 and 1.5: with gaps of two"
            " sizes positive in every seed; with the smooth gold (the control) within two standard"
            " errors of zero, or below. Also shown: DPO on the large gaps only, and soft labels."
        ),
    ),
    "sequential_kl": (
        "TDPO2 holds the sequential KL along the data's responses down, and TDPO1 does not.",
        (
            "In every seed, on held-out pairs at the end, beta 0.1: KL along chosen responses TDPO1"
            " > DPO > TDPO2, along rejected ones DPO > TDPO1 > TDPO2."
        ),
    ),
    "calibration": (
        (
            "Cal-DPO keeps the log-ratio of chosen responses from falling, when its target 1/(2"
            " beta) is within reach."
        ),
        (
            "In every seed, on the training pairs over the last epoch: at beta 0.1 the chosen"
            " log-ratio is above zero for Cal-DPO and below zero for DPO, with random pairs and"
            " with pairs that differ in one word. Shown with it: beta 0.01, and the reward at"
            " equal KL."
        ),
    ),
    "temperature": (
        "What preference training gains holds at every sampling temperature.",
        (
            "In every seed, the win rate against the SFT model's samples by the gold reward is"
            " above 1/2 at temperatures 0, 0.25, 0.5 and 1, for DPO and for ODPO (beta 0.1, gaps of"
            " two sizes)."
        ),
    ),
    "d2po": (
        (
            "With the same number of gold labels, a discriminator that learns from labels of the"
            " policy's own rollouts (D2PO) takes the policy further than a reward model that learnt"
            " from all of them beforehand and stays as it is."
        ),
        (
            "With 240 and with 600 labels, in every seed: the gold reward of samples for held-out"
            " prompts after 240 steps is higher for D2PO (half of the labels up front, the rest"
            " over 20 purchases, the closest pairs of the pool) than for the static reward model."
            " Shown with it: D2PO with pairs drawn at random, and the gold itself labelling every"
            " pair, in 20 rounds with one and with four passes."
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*CLAIMS, "all"])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "experiments", help="where data and runs go"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument(
        "--steps",
        type=int,
        help="optimizer steps instead of each experiment's own, to try it out; writes no results",
    )
    arguments = parser.parse_args()
    for name in CLAIMS if arguments.name == "all" else [arguments.name]:
        place = Place(arguments.work, arguments.seeds, arguments.steps)
        result, figures = EXPERIMENTS[name](place)
        verdict = "holds" if result["holds"] else "does not hold"
        print(f"{name}: {verdict} here\n{result['found']}")
        if arguments.steps is None:
            keep(name, result | {"seeds": arguments.seeds}, figures)


def keep(name: str, result: dict, figures: dict) -> None:
    """The numbers, the pictures, and the verdict in the README."""
    with atomic_write(RESULTS / f"{name}.json") as f:
        f.write(
            json.dumps(result, indent=1).replace(f"{ROOT}/", "") + "\n"
        )  # paths as seen from the repository
    for picture, figure in figures.items():
        if figure is not None:
            with atomic_write(RESULTS / f"{picture}.png", "wb") as f:
                f.write(plot_style.png(figure))
    page = ROOT / "experiments" / "README.md"
    claim, criterion = CLAIMS[name]
    verdict = "**It holds here.**" if result["holds"] else "**It does not hold here.**"
    told = (
        f"<!-- {name} -->\n*Claim.* {claim}\n\n*Criterion, fixed before the run.*"
        f" {criterion}\n\n{verdict} {result['found']}\n<!-- end {name} -->"
    )
    text = re.sub(
        rf"<!-- {name} -->.*<!-- end {name} -->",
        lambda _: told,
        page.read_text(encoding="utf-8"),
        flags=re.DOTALL,
    )
    with atomic_write(page) as f:
        f.write(text)


# ------------------------------------------------------------------------------------ the substrate


class Place:
    """Where an experiment works: data and the SFT model are made when first asked for, runs by
    sweeps of train.py."""

    def __init__(self, work: Path, seeds: list[int], steps: int | None):
        work = (
            work if steps is None else work / f"steps-{steps}"
        )  # a trial leaves nothing that a real run would build on
        self.work, self.seeds, self.steps = work, seeds, steps
        self.words, self.sft = work / "words", work / "sft"

    def command(self, script: str, *arguments) -> None:
        """Run one of the project's commands on one core, its output kept beside the work."""
        log = (
            self.work
            / "logs"
            / (re.sub(r"[^\w=,.-]+", "_", " ".join(map(str, [script, *arguments])))[-150:] + ".log")
        )
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

    def base(self) -> Path:
        """The SFT model that policy and reference start from."""
        if not (self.sft / "summary.json").exists():
            self.command("experiments/words.py", "--output", self.words)
            steps = self.steps or 1500
            self.command(
                "train.py",
                "loss=sft",
                f"datasets=[{self.words / 'sft'}]",
                "model=blank_model",
                f"model.name_or_path={self.words / 'model'}",
                "optimizer=AdamW",
                "lr=2e-3",
                "warmup_steps=50",
                "batch_size=128",
                "n_epochs=null",
                f"n_examples={128 * steps}",
                "max_length=24",
                "max_prompt_length=5",
                "eval_every=64000",
                "eval_batch_size=256",
                f"local_run_dir={self.sft}",
                f"cache_dir={self.work / 'cache'}",
                "wandb.enabled=false",
                "sample_during_eval=false",
            )
        return self.sft / "LATEST" / "hf"

    def gold(self, reward: str) -> list[str]:
        """Overrides that choose a gold; the folder of its yaml is the first word, where it is not
        the project's."""
        own = (
            [f"--config-dir={ROOT / 'experiments' / 'config'}"]
            if reward in ("two_sizes", "collector")
            else []
        )
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
                "model=blank_model",
                f"model.name_or_path={base}",
                "eval_batch_size=512",
                "max_length=24",
                "max_prompt_length=5",
                "seed=1",
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
        common = [
            "-m",
            *self.gold(reward),
            "model=blank_model",
            f"model.name_or_path={base}",
            f"datasets=[{data}]",
            "optimizer=AdamW",
            f"lr={lr}",
            "warmup_steps=10",
            f"batch_size={batch}",
            "n_epochs=null",
            f"n_examples={batch * steps}",
            f"eval_every={batch * max(1, steps // 10)}",
            "max_length=24",
            "max_prompt_length=5",
            "n_eval_model_samples=512",
            "n_eval_examples=512",
            "eval_batch_size=512",
            f"local_run_dir={self.work / name}",
            f"cache_dir={self.work / 'cache'}",
            "keep_checkpoints=1",
            "save_every=1000000",
            "wandb.enabled=false",
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(
                pool.map(
                    lambda seed: self.command("train.py", *common, *overrides, f"seed={seed}"),
                    self.seeds,
                )
            )
        runs = [run for run in find_runs(self.work / name)[0] if run.seed in self.seeds]
        if odd := [
            run.folder
            for run in runs
            if run.config["n_examples"] != batch * steps or not run.finished
        ]:
            raise SystemExit(
                f"{odd[0]} is not a finished run of {steps} steps; delete it, or give another"
                " --work"
            )
        return runs

    def online(self, name: str, rounds: int, *overrides: str) -> list[Run]:
        """Learn online from the gold that counts words, with every seed; returns the runs."""
        base, rounds = self.base(), self.steps or rounds
        common = [
            "-m",
            *self.gold("collector"),
            "function=online",
            "loss=dpo",
            "loss.beta=0.1",
            "model=blank_model",
            f"model.name_or_path={base}",
            f"datasets=[{self.words / 'prompts.jsonl'}]",
            "test_fraction=0.2",
            "optimizer=AdamW",
            "lr=3e-4",
            "warmup_steps=10",
            "max_length=24",
            "max_prompt_length=5",
            "n_eval_model_samples=512",
            "eval_batch_size=512",
            f"online.rounds={rounds}",
            f"online.eval_every={max(1, rounds // 4)}",
            "online.save_every=1000",
            "online.discriminator_lr=5e-4",
            "online.discriminator_epochs=2",
            "online.discriminator_batch_size=32",
            f"local_run_dir={self.work / name}",
            f"cache_dir={self.work / 'cache'}",
            "keep_checkpoints=1",
            "wandb.enabled=false",
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(
                pool.map(
                    lambda seed: self.command("train.py", *common, *overrides, f"seed={seed}"),
                    self.seeds,
                )
            )
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
                "model=blank_model",
                f"model.name_or_path={self.base()}",
                f"datasets=[{data}]",
                "max_length=24",
                "max_prompt_length=5",
                "n_eval_examples=800",
                "eval_batch_size=800",
                f"local_run_dir={folder}",
                f"cache_dir={self.work / 'cache'}",
                "wandb.enabled=false",
                "seed=99",
                *overrides,
            )
        return Run(folder)


def chosen(runs: list[Run], **settings) -> dict[int, Run]:
    """The runs with these settings (loss.beta as loss_beta), by seed."""
    wanted = {key.replace("_", ".", 1): str(value) for key, value in settings.items()}
    return {
        run.seed: run
        for run in runs
        if all(run.setting(key) == value for key, value in wanted.items())
    }


def frontiers(runs: list[Run]) -> dict[int, list[float | None]]:
    """The envelope of each seed at `AT_KL`, over betas and evaluations."""
    seeds = sorted({run.seed for run in runs})
    return {
        seed: envelope([p[:2] for run in runs if run.seed == seed for p in run.frontier()], AT_KL)
        for seed in seeds
    }


def difference(ours: list[Run], theirs: list[Run], at=(0.5, 1.0, 1.5)) -> dict:
    """Between two envelopes, seed by seed: the mean over `at`, of seeds in which both reach all of
    it."""
    a, b = frontiers(ours), frontiers(theirs)
    by_seed = {}
    for seed in a.keys() & b.keys():
        gaps = [
            a[seed][AT_KL.index(kl)] - b[seed][AT_KL.index(kl)]
            for kl in at
            if None not in (a[seed][AT_KL.index(kl)], b[seed][AT_KL.index(kl)])
        ]
        if len(gaps) == len(at):
            by_seed[str(seed)] = sum(gaps) / len(gaps)
    return (
        paired_difference(by_seed, dict.fromkeys(by_seed, 0.0))
        or {"mean": float("nan"), "se": None}
    ) | {"by_seed": by_seed}


def told(d: dict) -> str:
    error = f" ± {d['se']:.3f}" if d.get("se") is not None else ""
    return f"{d['mean']:+.3f}{error} ({', '.join(f'{v:+.3f}' for v in d['by_seed'].values())})"


def of_groups(runs: list[Run], draw):
    return draw(group_runs(runs, differing_settings(runs)))


def table_of(by_seed: dict[int, list]) -> str:
    return ", ".join(
        "-" if not (v := [x for x in column if x is not None]) else f"{mean_and_error(v)[0]:.3f}"
        for column in zip(*by_seed.values())
    )


# ---------------------------------------------------------------------------------- the experiments


def frontier(place: Place) -> tuple[dict, dict]:
    runs = place.sweep(
        "frontier", place.pairs("lexicon"), "lexicon", "loss=dpo", f"loss.beta={BETAS}", steps=81
    )
    holds, ends = True, []
    for seed in place.seeds:
        last = {beta: chosen(runs, loss_beta=beta)[seed].latest() for beta in (0.1, 0.5, 2)}
        ends.append([(values["kl"], values["policy_reward"]) for values in last.values()])
        holds &= all(
            values["reward_gain"] > 2 * values["reward_gain_se"] for values in last.values()
        )
        holds &= (
            ends[-1][0] > ends[-1][1] > ends[-1][2]
            and ends[-1][0][1] > ends[-1][1][1] > ends[-1][2][1]
        )
    start = mean_and_error(run.frontier()[0][1] for run in runs)[0]
    means = [tuple(mean_and_error(of_beta)[0] for of_beta in zip(*column)) for column in zip(*ends)]
    found = (
        f"From {start:.2f} (on a scale of 0 to 2) the reward rises to "
        + ", ".join(
            f"{reward:.2f} at KL {kl:.2f} (beta {beta})"
            for (kl, reward), beta in zip(means, (0.1, 0.5, 2))
        )
        + f"; the best within KL {', '.join(map(str, AT_KL))}: {table_of(frontiers(runs))}."
    )
    result = {
        "holds": bool(holds),
        "found": found,
        "ends": dict(zip(map(str, place.seeds), ends)),
        "at_kl": AT_KL,
        "envelopes": frontiers(runs),
    }
    return result, {
        "frontier": of_groups(runs, sweep_plots.frontier_picture),
        "frontier-training": of_groups(runs, sweep_plots.bands_picture),
    }


def offset(place: Place) -> tuple[dict, dict]:
    data, smooth, beta = place.pairs("two_sizes"), place.pairs("lexicon"), f"loss.beta={BETAS}"
    losses = {
        "dpo": ["loss=dpo"],
        "odpo": ["loss=odpo", "loss.alpha=0.5"],
        "dpo, large gaps only": ["loss=dpo", "min_gap=0.5"],
        "soft labels": ["loss=soft-label", "loss.gamma=3"],
    }
    runs = {
        name: place.sweep(
            f"offset/{re.sub(r'[^a-z]+', '-', name)}",
            data,
            "two_sizes",
            *overrides,
            beta,
            steps=101,
        )
        for name, overrides in losses.items()
    }
    control = {
        name: place.sweep(
            f"offset-control/{name}", smooth, "lexicon", *losses[name], beta, steps=101
        )
        for name in ("dpo", "odpo")
    }
    gain, none = difference(runs["odpo"], runs["dpo"]), difference(control["odpo"], control["dpo"])
    others = {
        name: difference(runs["odpo"], runs[name])
        for name in ("dpo, large gaps only", "soft labels")
    }
    complete = (
        {str(seed) for seed in place.seeds} == gain["by_seed"].keys() == none["by_seed"].keys()
    )
    holds = complete and min(gain["by_seed"].values()) > 0 and none["mean"] < 2 * (none["se"] or 0)
    found = (
        f"ODPO minus DPO at equal KL (mean of KL 0.5, 1 and 1.5; seeds in brackets): {told(gain)}"
        f" with gaps of two sizes, {told(none)} with the smooth gold. "
        + "".join(f"ODPO minus {name}: {told(d)}. " for name, d in others.items())
        + f"Best reward within KL {', '.join(map(str, AT_KL))}: "
        + "; ".join(f"{name} {table_of(frontiers(r))}" for name, r in runs.items())
        + "."
    )
    result = {
        "holds": bool(holds),
        "found": found,
        "gain": gain,
        "control": none,
        "others": others,
        "at_kl": AT_KL,
        "envelopes": {name: frontiers(r) for name, r in runs.items()},
    }
    everything = [run for r in runs.values() for run in r]
    return result, {
        "offset": of_groups(everything, sweep_plots.frontier_picture),
        "offset-control": of_groups(
            [run for r in control.values() for run in r], sweep_plots.frontier_picture
        ),
    }


def sequential_kl(place: Place) -> tuple[dict, dict]:
    data = place.pairs("lexicon")
    runs = place.sweep(
        "sequential_kl", data, "lexicon", "loss=dpo,tdpo1,tdpo2", "loss.beta=0.1", steps=81
    )
    evaluation = place.evaluate(
        "sequential_kl-eval",
        ["sequential_kl"],
        data,
        "lexicon",
        "loss=tdpo2",
        "sample_during_eval=false",
    )
    found: dict[str, dict[int, tuple]] = {}
    for row in evaluation.evaluations:
        kl = tuple(row[f"kl_eval/{side}"] for side in ("chosen", "rejected"))
        found.setdefault(row["training"]["loss"]["name"], {})[row["training"]["seed"]] = kl
    ordered = {"chosen": 0, "rejected": 0}
    for seed in place.seeds:
        (dpo_w, dpo_l), (one_w, one_l), (two_w, two_l) = (
            found[name][seed] for name in ("dpo", "tdpo1", "tdpo2")
        )
        ordered["chosen"] += one_w > dpo_w > two_w
        ordered["rejected"] += dpo_l > one_l > two_l
    holds = set(ordered.values()) == {len(place.seeds)}
    cells = []
    for name in ("tdpo1", "dpo", "tdpo2"):
        sides = [mean_and_error(column) for column in zip(*found[name].values())]
        cells.append(
            f"{name} "
            + " and ".join(
                f"{mean:.2f}" + (f" ± {error:.2f}" if error is not None else "")
                for mean, error in sides
            )
        )
    text = (
        "Sequential KL(reference, policy) along chosen and rejected responses, nats, mean ±"
        f" standard error over seeds: {'; '.join(cells)}. The order claimed is there along chosen"
        f" responses in {ordered['chosen']} of {len(place.seeds)} seeds, along rejected ones in"
        f" {ordered['rejected']}. Best reward within KL {', '.join(map(str, AT_KL))}: "
    )
    text += (
        "; ".join(
            f"{name} {table_of(frontiers([run for run in runs if run.loss == name]))}"
            for name in ("tdpo1", "dpo", "tdpo2")
        )
        + "."
    )
    return {"holds": bool(holds), "found": text, "kl": found}, {
        "sequential_kl": of_groups(runs, sweep_plots.bands_picture),
        "sequential_kl-frontier": of_groups(runs, sweep_plots.frontier_picture),
    }


def one_word_pairs(place: Place, n: int) -> Path:
    """Pairs in which the rejected response is the chosen one with one word of sentiment turned
    round."""
    folder = place.work / "pairs" / "one_word"
    words = json.loads((place.words / "words.json").read_text())
    turned = dict(zip(words["positive"], words["negative"]))
    for split in ("train", "test"):
        rows = []
        for line in (place.pairs("lexicon") / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            tokens = row["text"].split()
            places = [i for i, token in enumerate(tokens) if token in turned]
            if places and (not rows or rows[-1]["prompt"] != row["prompt"]):
                i = places[len(places) // 2]
                rows.append(
                    {
                        "prompt": row["prompt"],
                        "chosen": row["text"],
                        "rejected": (
                            " " + " ".join([*tokens[:i], turned[tokens[i]], *tokens[i + 1 :]])
                        ),
                    }
                )
        with atomic_write(folder / f"{split}.jsonl") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows[:n])
    return folder


def few(place: Place, n: int) -> Path:
    folder = place.work / "pairs" / f"first-{n}"
    for split in ("train", "test"):
        with atomic_write(folder / f"{split}.jsonl") as f:
            f.writelines(
                (place.pairs("lexicon") / f"{split}.jsonl")
                .read_text()
                .splitlines(keepends=True)[: 2 * n]
            )
    return folder


def calibration(place: Place) -> tuple[dict, dict]:
    data = {
        "random pairs": few(place, 440),
        "one-word pairs": one_word_pairs(place, 400),
    }  # some of the random pairs tie
    runs = {
        name: place.sweep(
            f"calibration/{re.sub(r'[^a-z]+', '-', name)}",
            folder,
            "lexicon",
            "loss=dpo,cal-dpo",
            "loss.beta=0.1,0.01",
            steps=200,
            batch=32,
            lr=3e-4,
        )
        for name, folder in data.items()
    }
    holds, texts, numbers = True, [], {}
    for name, of_data in runs.items():
        for beta in (0.1, 0.01):
            ends = {}
            for loss in ("cal-dpo", "dpo"):
                ends[loss] = {
                    seed: mean_and_error(run.series("train", "logratios_train/chosen")[1][-13:])[0]
                    for seed, run in chosen(of_data, loss_name=loss, loss_beta=beta).items()
                }
            if beta == 0.1:
                holds &= all(v > 0 for v in ends["cal-dpo"].values()) and all(
                    v < 0 for v in ends["dpo"].values()
                )
            texts.append(
                f"{name}, beta {beta}: Cal-DPO {mean_and_error(ends['cal-dpo'].values())[0]:+.1f},"
                f" DPO {mean_and_error(ends['dpo'].values())[0]:+.1f}"
            )
            numbers[f"{name}, beta {beta}"] = ends
    cost = {
        name: difference(
            [r for r in of_data if r.loss == "cal-dpo"], [r for r in of_data if r.loss == "dpo"]
        )
        for name, of_data in runs.items()
    }
    found = (
        f"Chosen log-ratio on the training pairs at the end: {'; '.join(texts)}. Reward at equal KL"
        " (0.5 to 1.5), Cal-DPO minus DPO: "
        + "; ".join(f"{name} {told(d)}" for name, d in cost.items())
        + "."
    )
    return {"holds": bool(holds), "found": found, "chosen_logratio": numbers, "cost": cost}, {
        f"calibration-{i}": of_groups(of_data, sweep_plots.bands_picture)
        for i, of_data in enumerate(runs.values())
    }


def temperature(place: Place) -> tuple[dict, dict]:
    data = place.pairs("two_sizes")
    for loss in (
        ["loss=dpo"],
        ["loss=odpo", "loss.alpha=0.5"],
    ):  # as in `offset`, and already there after it
        place.sweep(
            f"offset/{loss[0].removeprefix('loss=')}",
            data,
            "two_sizes",
            *loss,
            f"loss.beta={BETAS}",
            steps=101,
        )
    evaluation = place.evaluate(
        "temperature-eval",
        ["offset/dpo", "offset/odpo"],
        data,
        "two_sizes",
        "temperature=[0,0.25,0.5,1.0]",
    )
    samples, rates = evaluation.samples(), []
    rows = [
        row
        for row in evaluation.evaluations
        if row["training"]["loss"]["beta"] == 0.1 and row["training"]["seed"] in place.seeds
    ]
    for row in rows:
        mine = [
            s
            for s in samples
            if (s["checkpoint"], s["temperature"]) == (row["checkpoint"], row["temperature"])
        ]
        pairs = pair_up(mine, "reference")
        for pair, sample in zip(pairs, mine):
            ours, theirs = (
                next(iter(sample[f"{who}_reward"].values())) for who in ("policy", "reference")
            )
            pair["verdict"] = (1 + (ours > theirs) - (ours < theirs)) / 2
        rates.append(
            win_rate(pairs, "gold")
            | {
                "loss": row["training"]["loss"]["name"],
                "seed": row["training"]["seed"],
            }
        )
    holds = all(rate["win_rate"] > 0.5 for rate in rates)
    against_data = rates_against_data(place, rows, samples)
    texts = []
    for loss in ("dpo", "odpo"):
        by_t = {
            t: [
                rate["win_rate"]
                for rate in rates
                if (rate["loss"], rate["temperature"]) == (loss, t)
            ]
            for t in (0, 0.25, 0.5, 1.0)
        }
        texts.append(f"{loss} " + ", ".join(f"{mean_and_error(v)[0]:.3f}" for v in by_t.values()))
    by_name = {
        name: [rate["win_rate"] for rate in against_data if rate["name"] == name]
        for name in ("sft", "dpo", "odpo")
    }
    data_told = "; ".join(
        f"{name} {', '.join(f'{mean_and_error(v[i::4])[0]:.3f}' for i in range(4))}"
        for name, v in by_name.items()
    )
    found = (
        f"Win rate at temperatures 0, 0.25, 0.5 and 1, mean over seeds: {'; '.join(texts)}. The"
        f" lowest of a seed is {min(rate['win_rate'] for rate in rates):.3f}. "
    )
    found += (
        "Against the better of two samples of the SFT model at temperature 1, as the data has"
        f" them: {data_told}."
    )
    return {
        "holds": bool(holds),
        "found": found,
        "winrates": rates,
        "against_data": against_data,
    }, {"temperature": sweep_plots.temperature_picture(rows, rates + against_data)}


def rates_against_data(place: Place, rows: list[dict], samples: list[dict]) -> list[dict]:
    """Win rates, by the gold, of the SFT model and of each policy against the data's chosen
    responses."""
    from preflab.rewards.registry import build_reward

    score = build_reward(
        {
            "name": "two_sizes",
            "module": str(ROOT / "experiments" / "gold.py"),
            "path": str(place.words / "words.json"),
        }
    )
    rates = []
    for row in rows:
        mine = [
            s
            for s in samples
            if (s["checkpoint"], s["temperature"]) == (row["checkpoint"], row["temperature"])
        ]
        theirs = score([s["prompt"] for s in mine], [s["chosen"] for s in mine])
        for who, name in (
            ("policy", row["training"]["loss"]["name"]),
            *([("reference", "sft")] if row in rows[:4] else []),
        ):
            ours = [next(iter(s[f"{who}_reward"].values())) for s in mine]
            checkpoint = row["checkpoint"] if who == "policy" else "sft"
            pairs = [
                {
                    "checkpoint": checkpoint,
                    "temperature": row["temperature"],
                    "against": "the data",
                    "prompt": s["prompt"],
                    "verdict": (1 + (a > b) - (a < b)) / 2,
                }
                for s, a, b in zip(mine, ours, theirs)
            ]
            rates.append(win_rate(pairs, "gold") | {"name": name})
    return rates


def d2po(place: Place) -> tuple[dict, dict]:
    arms, figures, rewards = {}, {}, {}
    for budget in (240, 600):
        model = [
            "online.discriminator=bradley_terry",
            f"online.budget={budget}",
            "online.prompts_per_round=32",
            "batch_size=32",
        ]
        again = [
            *model,
            f"online.initial_labels={budget // 2}",
            f"online.relabels={budget // 40}",
            "online.relabel_every=768",
            "online.replay=100",
        ]  # of 12 rounds; all that was bought
        gold = [
            f"online.budget={budget}",
            f"online.prompts_per_round={budget // 20}",
            f"batch_size={budget // 120}",
        ]
        arms[budget] = {
            "static": place.online(
                f"d2po/{budget}-static", 240, *model, f"online.initial_labels={budget}"
            ),
            "D2PO": place.online(f"d2po/{budget}-conf", 240, *again),
            "D2PO, random pairs": place.online(
                f"d2po/{budget}-rand", 240, *again, "online.select=rand"
            ),
            "gold, one pass": place.online(f"d2po/{budget}-gold-1", 20, *gold),
            "gold, four passes": place.online(
                f"d2po/{budget}-gold-4", 20, *gold, "online.updates_per_round=4"
            ),
        }
        figures[f"d2po-{budget}"] = plots.online_picture(arms[budget])
        rewards[budget] = {
            arm: {
                run.seed: run.summary["policy_reward"]
                for run in sorted(runs, key=lambda run: run.seed)
            }
            for arm, runs in arms[budget].items()
        }
    start = mean_and_error(run.summary["reference_reward"] for run in arms[240]["static"])[0]
    spent = {
        run.summary["labels_bought"]
        for budget, of in arms.items()
        for runs in of.values()
        for run in runs
        if run.summary["labels_bought"] > budget
    }
    holds = not spent and all(
        of["D2PO"][seed] > of["static"][seed] for of in rewards.values() for seed in place.seeds
    )
    texts = []
    for budget, of in rewards.items():
        told_arms = "; ".join(
            f"{arm} {mean_and_error(values.values())[0]:.2f}"
            f" ({', '.join(f'{v:.2f}' for v in values.values())})"
            for arm, values in of.items()
        )
        gain = paired_difference(
            {str(s): v for s, v in of["D2PO"].items()}, {str(s): v for s, v in of["static"].items()}
        )
        texts.append(f"With {budget} labels: {told_arms}; D2PO minus static {plus_minus(gain)}.")
    accuracy = {
        arm: mean_and_error(_last_accuracy(run) for run in arms[240][arm])[0]
        for arm in ("static", "D2PO")
    }
    found = (
        f"Gold reward at the end, mean over seeds (each seed), from {start:.2f} at the start."
        f" {' '.join(texts)} Over the last 20 rounds, with 240 labels, the discriminator orders"
        f" {100 * accuracy['static']:.0f}% of the round's pairs as the gold does when static,"
        f" {100 * accuracy['D2PO']:.0f}% when it learns on."
    )
    return {"holds": bool(holds), "found": found, "reward": rewards, "accuracy": accuracy}, figures


def plus_minus(d: dict) -> str:
    return f"{d['mean']:+.2f}" + (f" ± {d['se']:.2f}" if d.get("se") is not None else "")


def _last_accuracy(run: Run) -> float:
    return mean_and_error(run.series("online", "online/label_accuracy")[1][-20:])[0]


EXPERIMENTS = {
    function.__name__: function
    for function in (frontier, offset, sequential_kl, calibration, temperature, d2po)
}

if __name__ == "__main__":
    main()
