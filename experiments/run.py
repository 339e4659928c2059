"""The experiments: `python experiments/run.py NAME` trains, measures, draws, and says whether a
claim holds here.

    python experiments/run.py frontier|offset|sequential_kl|calibration|temperature|d2po|labels|all
        [--work DIR] [--seeds 11 12 13] [--redraw]
    python experiments/run.py real|real_chat|real_turns --model FOLDER

Each takes some minutes on two cores: a seed is a sequence of `python train.py -m ...`, and the
seeds run in parallel. Runs that exist already are not repeated. The results are
experiments/results/NAME.json and pictures, and the verdicts in experiments/README.md. The claims
and the criteria are in claims.py. Seeds share a language, an SFT model and the data; with --redraw
each draws its own, and the results are those of NAME-redrawn.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.analysis import (
    AT_KL,
    difference,
    difference_text,
    envelope_text,
    frontiers,
    mean,
    picture_of,
    select_runs,
)
from experiments.claims import CLAIMS, WITH_MODEL
from experiments.labels import labels
from experiments.online import d2po
from experiments.real import real, real_chat, real_turns
from experiments.verdict_page import write_results
from experiments.workspace import ROOT, RedrawnWorkspace, Workspace
from preflab.evaluation.win_rates import pair_up, win_rate
from preflab.reports import plots, sweep_plots
from preflab.reports.runs import Run
from utils import atomic_write, mean_and_error

SEEDS = [11, 12, 13]
OWN_SEEDS = {"labels": [51, 52, 53, 54, 55]}
BETAS = (0.1, 0.5, 2)
BETA_SWEEP = "loss.beta=0.1,0.5,2"
TEMPERATURES = (0, 0.25, 0.5, 1.0)
KLS = ", ".join(map(str, AT_KL))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=[*CLAIMS, "all"])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "runs" / "experiments", help="where data and runs go"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="default: 11 12 13, labels 51 to 55")
    parser.add_argument(
        "--steps",
        type=int,
        help="optimizer steps instead of each experiment's own, for a trial; writes no results",
    )
    parser.add_argument(
        "--model",
        type=Path,
        help=f"for {', '.join(WITH_MODEL)}: a folder or a GGUF file of a chat model",
    )
    parser.add_argument(
        "--redraw",
        action="store_true",
        help="draw language, SFT model, data and prompts for each seed again; a verdict beside the"
        " one with shared ones",
    )
    arguments = parser.parse_args()
    names = [name for name in CLAIMS if name not in WITH_MODEL]
    if arguments.name != "all":
        names = [arguments.name]
    if arguments.name in WITH_MODEL and arguments.model is None:
        parser.error(f"{arguments.name} needs --model; experiments/real.py says how to get one")
    if arguments.redraw and arguments.name in WITH_MODEL:
        parser.error(f"--redraw draws the models of the language; {arguments.name} is given one")
    for name in names:
        model = arguments.model and arguments.model.resolve()
        seeds = arguments.seeds or OWN_SEEDS.get(name, SEEDS)
        kind = RedrawnWorkspace if arguments.redraw else Workspace
        workspace = kind(arguments.work, seeds, arguments.steps, model)
        result, figures = EXPERIMENTS[name](workspace)
        verdict = "holds" if result["holds"] else "does not hold"
        print(f"{name}: {verdict} here\n{result['found']}")
        if arguments.steps is None:
            result |= {"seeds": seeds}
            write_results(name, result, figures, redrawn=arguments.redraw)


# ------------------------------------------------------------------------------ offline experiments


def frontier(workspace: Workspace) -> tuple[dict, dict]:
    data = workspace.pairs("lexicon")
    runs = workspace.sweep("frontier", data, "lexicon", "loss=dpo", BETA_SWEEP, steps=81)
    holds, ends = True, []  # ends: (KL, reward) at the end, (seeds, betas)
    for seed in workspace.seeds:
        last = [select_runs(runs, loss_beta=beta)[seed].latest() for beta in BETAS]
        kls = [values["kl"] for values in last]
        rewards = [values["policy_reward"] for values in last]
        gained = all(values["reward_gain"] > 2 * values["reward_gain_se"] for values in last)
        holds &= gained and kls[0] > kls[1] > kls[2] and rewards[0] > rewards[1] > rewards[2]
        ends.append(list(zip(kls, rewards, strict=True)))
    start = mean(run.frontier()[0][1] for run in runs)
    texts = []
    for beta, of_beta in zip(BETAS, zip(*ends, strict=True), strict=True):
        kl, reward = (mean(column) for column in zip(*of_beta, strict=True))
        texts.append(f"{reward:.2f} at KL {kl:.2f} (beta {beta})")
    envelopes = frontiers(runs)
    findings = (
        f"From {start:.2f} (on a scale of 0 to 2) the reward rises to {', '.join(texts)};"
        f" the best within KL {KLS}: {envelope_text(envelopes)}."
    )
    result = {
        "holds": bool(holds),
        "found": findings,
        "ends": dict(zip(map(str, workspace.seeds), ends, strict=True)),
        "at_kl": AT_KL,
        "envelopes": envelopes,
    }
    return result, {
        "frontier": picture_of(runs, sweep_plots.frontier_figure),
        "frontier-training": picture_of(runs, sweep_plots.bands_figure),
    }


OFFSET_LOSSES = {
    "dpo": ["loss=dpo"],
    "odpo": ["loss=odpo", "loss.alpha=0.5"],
    "dpo, large gaps only": ["loss=dpo", "min_gap=0.5"],
    "soft labels": ["loss=soft-label", "loss.gamma=3"],
}


def _offset_runs(workspace: Workspace, names) -> dict[str, list[Run]]:
    data = workspace.pairs("two_sizes")
    return {
        name: workspace.sweep(
            f"offset/{_slug(name)}",
            data,
            "two_sizes",
            *OFFSET_LOSSES[name],
            BETA_SWEEP,
            steps=101,
        )
        for name in names
    }


def _all(runs: dict[str, list[Run]]) -> list[Run]:
    return [run for of_loss in runs.values() for run in of_loss]


def _slug(name: str) -> str:
    return re.sub(r"[^a-z]+", "-", name)


def offset(workspace: Workspace) -> tuple[dict, dict]:
    runs = _offset_runs(workspace, OFFSET_LOSSES)
    smooth = workspace.pairs("lexicon")
    control = {}
    for name in ("dpo", "odpo"):
        overrides = [*OFFSET_LOSSES[name], BETA_SWEEP]
        control[name] = workspace.sweep(
            f"offset-control/{name}", smooth, "lexicon", *overrides, steps=101
        )
    gain = difference(runs["odpo"], runs["dpo"])
    control_gain = difference(control["odpo"], control["dpo"])
    others = {
        name: difference(runs["odpo"], runs[name])
        for name in ("dpo, large gaps only", "soft labels")
    }
    seeds = {str(seed) for seed in workspace.seeds}
    complete = seeds == gain["by_seed"].keys() == control_gain["by_seed"].keys()
    holds = (
        complete
        and min(gain["by_seed"].values()) > 0
        and control_gain["mean"] < 2 * (control_gain["se"] or 0)
    )
    envelopes = {name: frontiers(of_loss) for name, of_loss in runs.items()}
    others_text = "".join(
        f"ODPO minus {name}: {difference_text(d)}. " for name, d in others.items()
    )
    best = "; ".join(f"{name} {envelope_text(by_seed)}" for name, by_seed in envelopes.items())
    findings = (
        "ODPO minus DPO at equal KL (mean of KL 0.5, 1 and 1.5; 95% interval over"
        " seeds, each seed):"
        f" {difference_text(gain)} with gaps of two sizes,"
        f" {difference_text(control_gain)} with the smooth gold."
        f" {others_text}Best reward within KL {KLS}: {best}."
    )
    result = {
        "holds": bool(holds),
        "found": findings,
        "gain": gain,
        "control": control_gain,
        "others": others,
        "at_kl": AT_KL,
        "envelopes": envelopes,
    }
    return result, {
        "offset": picture_of(_all(runs), sweep_plots.frontier_figure),
        "offset-control": picture_of(_all(control), sweep_plots.frontier_figure),
    }


def sequential_kl(workspace: Workspace) -> tuple[dict, dict]:
    data = workspace.pairs("lexicon")
    overrides = ["loss=dpo,tdpo1,tdpo2", "loss.beta=0.1"]
    runs = workspace.sweep("sequential_kl", data, "lexicon", *overrides, steps=81)
    evaluation = workspace.evaluate(
        "sequential_kl-eval",
        ["sequential_kl"],
        data,
        "lexicon",
        "loss=tdpo2",
        "sample_during_eval=false",
    )
    kls: dict[str, dict[int, tuple]] = {}  # (chosen, rejected) by loss and seed
    for row in evaluation.evaluations:
        both = tuple(row[f"kl_eval/{side}"] for side in ("chosen", "rejected"))
        kls.setdefault(row["training"]["loss"]["name"], {})[row["training"]["seed"]] = both
    ordered = {"chosen": 0, "rejected": 0}
    for seed in workspace.seeds:
        dpo, tdpo1, tdpo2 = (kls[name][seed] for name in ("dpo", "tdpo1", "tdpo2"))
        ordered["chosen"] += tdpo1[0] > dpo[0] > tdpo2[0]
        ordered["rejected"] += dpo[1] > tdpo1[1] > tdpo2[1]
    n = len(workspace.seeds)
    losses = ("tdpo1", "dpo", "tdpo2")
    cells = "; ".join(f"{name} {_both_sides(kls[name])}" for name in losses)
    best = "; ".join(
        f"{name} {envelope_text(frontiers([run for run in runs if run.loss == name]))}"
        for name in losses
    )
    findings = (
        "Sequential KL(reference, policy) along chosen and rejected responses, nats, mean ±"
        f" standard error over seeds: {cells}. The order claimed is there along chosen responses in"
        f" {ordered['chosen']} of {n} seeds, along rejected ones in {ordered['rejected']}."
        f" Best reward within KL {KLS}: {best}."
    )
    result = {"holds": set(ordered.values()) == {n}, "found": findings, "kl": kls}
    return result, {
        "sequential_kl": picture_of(runs, sweep_plots.bands_figure),
        "sequential_kl-frontier": picture_of(runs, sweep_plots.frontier_figure),
    }


def _both_sides(by_seed: dict[int, tuple]) -> str:
    sides = []
    for column in zip(*by_seed.values(), strict=True):
        value, error = mean_and_error(column)
        sides.append(f"{value:.2f}" + (f" ± {error:.2f}" if error is not None else ""))
    return " and ".join(sides)


def one_word_pairs(workspace: Workspace, n: int) -> Path:
    """Pairs in which the rejected response is the chosen one with one word of sentiment replaced by
    its opposite."""
    folder = workspace.work / "pairs" / "one_word"
    words = json.loads((workspace.words / "words.json").read_text())
    opposite = dict(zip(words["positive"], words["negative"], strict=True))
    for split in ("train", "test"):
        rows = []
        for line in (workspace.pairs("lexicon") / f"{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            tokens = row["text"].split()
            places = [i for i, token in enumerate(tokens) if token in opposite]
            if places and (not rows or rows[-1]["prompt"] != row["prompt"]):
                i = places[len(places) // 2]
                changed = [*tokens[:i], opposite[tokens[i]], *tokens[i + 1 :]]
                rejected = " " + " ".join(changed)
                rows.append({"prompt": row["prompt"], "chosen": row["text"], "rejected": rejected})
        with atomic_write(folder / f"{split}.jsonl") as f:
            f.writelines(json.dumps(row) + "\n" for row in rows[:n])
    return folder


def first_pairs(workspace: Workspace, n: int) -> Path:
    """The first `n` pairs of the smooth gold, of which there are two lines each."""
    folder = workspace.work / "pairs" / f"first-{n}"
    for split in ("train", "test"):
        text = (workspace.pairs("lexicon") / f"{split}.jsonl").read_text()
        with atomic_write(folder / f"{split}.jsonl") as f:
            f.writelines(text.splitlines(keepends=True)[: 2 * n])
    return folder


def calibration(workspace: Workspace) -> tuple[dict, dict]:
    data = {
        # More than 400 random pairs, since some of them tie.
        "random pairs": workspace.across(lambda part: first_pairs(part, 440)),
        "one-word pairs": workspace.across(lambda part: one_word_pairs(part, 400)),
    }
    overrides = ["loss=dpo,cal-dpo", "loss.beta=0.1,0.01"]
    runs = {
        name: workspace.sweep(
            f"calibration/{_slug(name)}",
            folder,
            "lexicon",
            *overrides,
            steps=200,
            batch=32,
            lr=3e-4,
        )
        for name, folder in data.items()
    }
    holds, texts, numbers = True, [], {}
    for name, of_data in runs.items():
        for beta in (0.1, 0.01):
            ends = {loss: _last_logratios(of_data, loss, beta) for loss in ("cal-dpo", "dpo")}
            cal_dpo, dpo = ends["cal-dpo"].values(), ends["dpo"].values()
            if beta == 0.1:
                holds &= all(v > 0 for v in cal_dpo) and all(v < 0 for v in dpo)
            texts.append(f"{name}, beta {beta}: Cal-DPO {mean(cal_dpo):+.1f}, DPO {mean(dpo):+.1f}")
            numbers[f"{name}, beta {beta}"] = ends
    cost = {}
    for name, of_data in runs.items():
        cal_dpo, dpo = ([r for r in of_data if r.loss == loss] for loss in ("cal-dpo", "dpo"))
        cost[name] = difference(cal_dpo, dpo)
    cost_text = "; ".join(f"{name} {difference_text(d)}" for name, d in cost.items())
    findings = (
        f"Chosen log-ratio on the training pairs at the end: {'; '.join(texts)}. Reward at equal KL"
        f" (0.5 to 1.5), Cal-DPO minus DPO (95% interval over seeds, each seed): {cost_text}."
    )
    result = {"holds": bool(holds), "found": findings, "chosen_logratio": numbers, "cost": cost}
    return result, {
        f"calibration-{i}": picture_of(of_data, sweep_plots.bands_figure)
        for i, of_data in enumerate(runs.values())
    }


def _last_logratios(runs: list[Run], loss: str, beta: float) -> dict[int, float]:
    """The chosen log-ratio over the last epoch, of 13 steps, by seed."""
    return {
        seed: mean(run.series("train", "logratios_train/chosen")[1][-13:])
        for seed, run in select_runs(runs, loss_name=loss, loss_beta=beta).items()
    }


# ------------------------------------------------------------------------------------- temperatures


def temperature(workspace: Workspace) -> tuple[dict, dict]:
    _offset_runs(workspace, ("dpo", "odpo"))
    evaluation = workspace.evaluate(
        "temperature-eval",
        ["offset/dpo", "offset/odpo"],
        workspace.pairs("two_sizes"),
        "two_sizes",
        "temperature=[0,0.25,0.5,1.0]",
    )
    rows = [
        row
        for row in evaluation.evaluations
        if row["training"]["loss"]["beta"] == 0.1 and row["training"]["seed"] in workspace.seeds
    ]
    samples = evaluation.samples()
    rates = [_rate_against_reference(row, _samples_of(row, samples)) for row in rows]
    against_data = rates_against_data(workspace, rows, samples)

    texts = []
    for loss in ("dpo", "odpo"):
        means = [
            mean(rate["win_rate"] for rate in rates if _is_of(rate, loss, t)) for t in TEMPERATURES
        ]
        texts.append(f"{loss} {', '.join(f'{value:.3f}' for value in means)}")
    data_texts = []
    for name in ("sft", "dpo", "odpo"):
        values = [rate["win_rate"] for rate in against_data if rate["name"] == name]
        means = [mean(values[i :: len(TEMPERATURES)]) for i in range(len(TEMPERATURES))]
        data_texts.append(f"{name} {', '.join(f'{value:.3f}' for value in means)}")
    findings = (
        "Win rate at temperatures 0, 0.25, 0.5 and 1, mean over seeds:"
        f" {'; '.join(texts)}. The lowest of a seed is"
        f" {min(rate['win_rate'] for rate in rates):.3f}. Against the better of two samples of the"
        f" SFT model at temperature 1, as the data has them: {'; '.join(data_texts)}."
    )
    result = {
        "holds": all(rate["win_rate"] > 0.5 for rate in rates),
        "found": findings,
        "winrates": rates,
        "against_data": against_data,
    }
    return result, {"temperature": plots.temperature_figure(rows, rates + against_data)}


def _samples_of(row: dict, samples: list[dict]) -> list[dict]:
    """The samples of one row of eval.jsonl."""
    key = row["checkpoint"], row["temperature"]
    return [s for s in samples if (s["checkpoint"], s["temperature"]) == key]


def _is_of(rate: dict, loss: str, t: float) -> bool:
    return (rate["loss"], rate["temperature"]) == (loss, t)


def _gold(sample: dict, model: str) -> float:
    return next(iter(sample[f"{model}_reward"].values()))


def _verdict(a: float, b: float) -> float:
    return (1 + (a > b) - (a < b)) / 2


def _rate_against_reference(row: dict, samples: list[dict]) -> dict:
    pairs = pair_up(samples, "reference")
    for pair, sample in zip(pairs, samples, strict=True):
        pair["verdict"] = _verdict(_gold(sample, "policy"), _gold(sample, "reference"))
    training = row["training"]
    return win_rate(pairs, "gold") | {"loss": training["loss"]["name"], "seed": training["seed"]}


def rates_against_data(workspace: Workspace, rows: list[dict], samples: list[dict]) -> list[dict]:
    """Win rates, by the gold, of the SFT model and of each policy against the data's chosen
    responses."""
    from preflab.rewards.registry import build_reward

    gold_file = ROOT / "experiments" / "gold.py"
    words = workspace.of(workspace.seeds[0]).words / "words.json"  # the same for all seeds
    score = build_reward({"name": "two_sizes", "module": str(gold_file), "path": str(words)})
    rates, references = [], set()  # references: those that were compared already
    for row in rows:
        mine = _samples_of(row, samples)
        theirs = score([s["prompt"] for s in mine], [s["chosen"] for s in mine])
        models = [("policy", row["training"]["loss"]["name"], row["checkpoint"])]
        seed = row["training"]["seed"] if workspace.redrawn else None
        if (seed, row["temperature"]) not in references:
            references.add((seed, row["temperature"]))
            models.append(("reference", "sft", "sft"))
        for model, name, checkpoint in models:
            pairs = [
                {
                    "checkpoint": checkpoint,
                    "temperature": row["temperature"],
                    "against": "the data",
                    "prompt": sample["prompt"],
                    "verdict": _verdict(_gold(sample, model), chosen),
                }
                for sample, chosen in zip(mine, theirs, strict=True)
            ]
            rates.append(win_rate(pairs, "gold") | {"name": name})
    return rates


EXPERIMENTS = {
    function.__name__: function
    for function in (
        frontier,
        offset,
        sequential_kl,
        calibration,
        temperature,
        d2po,
        labels,
        real,
        real_chat,
        real_turns,
    )
}

if __name__ == "__main__":
    main()
