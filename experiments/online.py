"""The experiment with online learning, which experiments/run.py starts."""

from experiments.analysis import interval_text, mean
from experiments.workspace import Workspace
from preflab.reports import plots
from preflab.reports.runs import Run
from preflab.reports.statistics import paired_difference


def d2po(workspace: Workspace) -> tuple[dict, dict]:
    arms = {budget: _d2po_arms(workspace, budget) for budget in (240, 600)}
    figures = {f"d2po-{budget}": plots.online_figure(of) for budget, of in arms.items()}
    rewards = {
        budget: {arm: _final_rewards(runs) for arm, runs in of.items()}
        for budget, of in arms.items()
    }
    within_budget = all(
        run.summary["labels_bought"] <= budget
        for budget, of in arms.items()
        for runs in of.values()
        for run in runs
    )
    holds = within_budget and all(
        of["D2PO"][seed] > of["static"][seed] for of in rewards.values() for seed in workspace.seeds
    )
    texts = []
    for budget, of in rewards.items():
        arm_texts = [
            f"{arm} {mean(values.values()):.2f} ({', '.join(f'{v:.2f}' for v in values.values())})"
            for arm, values in of.items()
        ]
        gain = paired_difference(
            *({str(seed): v for seed, v in of[arm].items()} for arm in ("D2PO", "static"))
        )
        texts.append(
            f"With {budget} labels: {'; '.join(arm_texts)}; D2PO minus static"
            f" {gain['mean']:+.2f}{interval_text(gain, 2)} (95% over seeds)."
        )
    start = mean(run.summary["reference_reward"] for run in arms[240]["static"])
    accuracy = {
        arm: mean(_last_accuracy(run) for run in arms[240][arm]) for arm in ("static", "D2PO")
    }
    findings = (
        f"Gold reward at the end, mean over seeds (each seed), from {start:.2f} at the start."
        f" {' '.join(texts)} Over the last 20 rounds, with 240 labels, the discriminator orders"
        f" {100 * accuracy['static']:.0f}% of the round's pairs as the gold does when static,"
        f" {100 * accuracy['D2PO']:.0f}% when it learns on."
    )
    return {
        "holds": bool(holds),
        "found": findings,
        "reward": rewards,
        "accuracy": accuracy,
    }, figures


def _d2po_arms(workspace: Workspace, budget: int) -> dict[str, list[Run]]:
    """The runs of each arm with this number of gold labels."""
    model = [
        "online.discriminator=bradley_terry",
        f"online.budget={budget}",
        "online.prompts_per_round=32",
        "batch_size=32",
    ]
    relabel = [  # every 12 rounds, with all that was bought so far
        *model,
        f"online.initial_labels={budget // 2}",
        f"online.relabels={budget // 40}",
        "online.relabel_every=768",
        "online.replay=100",
    ]
    gold = [
        f"online.budget={budget}",
        f"online.prompts_per_round={budget // 20}",
        f"batch_size={budget // 120}",
    ]
    arms = {
        "static": ("static", 240, [*model, f"online.initial_labels={budget}"]),
        "D2PO": ("conf", 240, relabel),
        "D2PO, random pairs": ("rand", 240, [*relabel, "online.select=rand"]),
        "gold, one pass": ("gold-1", 20, gold),
        "gold, four passes": ("gold-4", 20, [*gold, "online.updates_per_round=4"]),
    }
    return {
        arm: workspace.online(f"d2po/{budget}-{folder}", rounds, *overrides)
        for arm, (folder, rounds, overrides) in arms.items()
    }


def _final_rewards(runs: list[Run]) -> dict[int, float]:
    by_seed = {run.seed: run.summary["policy_reward"] for run in runs}
    return {seed: by_seed[seed] for seed in sorted(by_seed)}


def _last_accuracy(run: Run) -> float:
    return mean(run.series("online", "online/label_accuracy")[1][-20:])
