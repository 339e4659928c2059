"""Tables of evaluated checkpoints and of win rates: by loss and temperature, means over seeds."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from preflab.reports.run_files import is_number
from preflab.reports.runs import SAMPLER, other_sampler, training_names
from preflab.reports.statistics import over_seeds
from preflab.reports.tables import Table, plus_minus
from utils import mean_and_error

# What a row records of a training run and does not name a checkpoint by, beside its loss.
NOT_NAMING = ("loss", "seed", "exp_name")

# What it records whatever the value is; other settings only where the run has changed them. Rows of
# earlier versions have fewer of either.
RECORDED = (
    *("lr", "n_epochs", "batch_size", "datasets", "model.name_or_path", "reward.name"),
    *("model.lora.r", "model.lora.alpha", "model.lora.target_modules"),
)

EVALUATION_COLUMNS = {  # head of the column -> metric of eval.jsonl
    "reward": "samples_eval/policy_reward",
    "reference's": "samples_eval/reference_reward",
    "KL": "samples_eval/kl",
    "KL along samples": "samples_eval/kl along samples",
    "tokens": "samples_eval/policy_length",
    "ended": "samples_eval/policy_ended",
    "entropy": "samples_eval/entropy",
    "repetition": "samples_eval/repetition",
    "distinct-2": "samples_eval/policy_distinct_2",
    "accuracy": "rewards_eval/accuracies",
}
DIGITS = {"tokens": 1, "KL": 2, "KL along samples": 2}  # 3 for other columns

ERRORS = (
    "± is the standard error over seeds where a row has several, and over prompts where it has one."
)
WHICH_KL = "KL is KL(policy || reference) of the policy's samples, in nats."
WHICH_OTHER_KL = (
    "KL along samples is the same sum along samples at another temperature, top-p, top-k or min-p:"
    " the KL neither of the policy nor of that sampler."
)


def short_names(names: Sequence[str]) -> list[str]:
    """Paths without the folders that all of them begin or end with."""
    distinct = [name.split("/") for name in dict.fromkeys(names)]
    if len(distinct) < 2:
        return [_run_of(name) for name in names]
    room = min(map(len, distinct)) - 1  # at least one part of each remains
    first = min(_n_equal(distinct), room)
    last = min(_n_equal([parts[::-1] for parts in distinct]), room - first)
    parts = (name.split("/") for name in names)
    return ["/".join(of[first : len(of) - last]) for of in parts]


def _n_equal(lists: Sequence[Sequence[str]]) -> int:
    """With how many equal parts all begin."""
    columns = list(zip(*lists, strict=False))
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), len(columns))


def _run_of(path: str) -> str:
    """The folder of the run in the path of a checkpoint."""
    folders = [part for part in path.split("/") if part not in ("", "LATEST", "hf", "policy.pt")]
    return folders[-1] if folders else path


class Trained(NamedTuple):
    """What evaluations are grouped by; their rows differ in the seed of the training run only.

    step: None where each run was evaluated at one step.
    """

    name: str
    step: int | None
    sampler: tuple

    @property
    def title(self) -> str:
        """The name, with the step where it has one, and how samples were drawn beside the
        temperature."""
        step = "" if self.step is None else f"step {self.step}"
        sampler = dict(zip(SAMPLER, self.sampler, strict=True)) | {"temperature": 1}
        return ", ".join(filter(None, [self.name, step, other_sampler(sampler)]))


# The key of a row, or of a win rate, that names the folder of its evaluation; only reports that
# read several folders add it.
FOLDER = "evaluated in"


def place_in(row: dict) -> tuple:
    """Which checkpoint of which evaluation a row, or a win rate, is of."""
    return row.get(FOLDER), row.get("checkpoint")


def trained(evaluations: Sequence[dict]) -> list[Trained]:
    """The group of each row of eval.jsonl. No group has two rows of a seed at one step: two
    checkpoints, or two evaluations of one in different folders."""
    labels = _labels(evaluations)
    steps = defaultdict(set)
    for label, row in zip(labels, evaluations, strict=True):
        steps[label, row.get("run")].add(row.get("step"))
    has_steps = any(len(of_run) > 1 for of_run in steps.values())
    groups = [
        Trained(
            label,
            row.get("step") if has_steps else None,
            tuple(row.get(name, plain) for name, plain in SAMPLER.items()),
        )
        for label, row in zip(labels, evaluations, strict=True)
    ]
    return _told_apart(groups, evaluations)


def _told_apart(groups: Sequence[Trained], evaluations: Sequence[dict]) -> list[Trained]:
    """The groups; the names of those with two rows of a seed at one step are extended by the first
    of these that tells them apart: `exp_name`, short names of the checkpoints, and those of the
    folders of the evaluations."""
    groups = list(groups)
    exp_names = [f"exp_name={(row.get('training') or {}).get('exp_name')}" for row in evaluations]
    places = short_names([_place_of(row) for row in evaluations])
    folders = [f"in {name}" for name in short_names([str(row.get(FOLDER)) for row in evaluations])]
    both = [f"{place} {folder}" for place, folder in zip(places, folders, strict=True)]
    several = _with_several_of_a_seed(groups, evaluations)
    for further in (exp_names, places, folders, both):
        if not several:
            break
        longer = [
            group._replace(name=f"{group.name} {text}") if group.name in several else group
            for group, text in zip(groups, further, strict=True)
        ]
        still = _with_several_of_a_seed(longer, evaluations)
        several = {old.name for old, new in zip(groups, longer, strict=True) if new.name in still}
        groups = [
            old if old.name in several else new for old, new in zip(groups, longer, strict=True)
        ]
    return groups


def _with_several_of_a_seed(groups: Sequence[Trained], evaluations: Sequence[dict]) -> set[str]:
    """Names of groups that have two checkpoints of one seed at one step, or evaluations of it in
    two folders with one sampler."""
    checkpoints, folders = defaultdict(set), defaultdict(set)
    for group, row in zip(groups, evaluations, strict=True):
        checkpoint = row.get("stamp") or _place_of(row)
        checkpoints[group.name, group.step, seed_of(row)].add(checkpoint)
        folders[group.name, group, seed_of(row)].add(row.get(FOLDER))
    counted = [*checkpoints.items(), *folders.items()]
    return {name for (name, *_), found in counted if len(found) > 1}


def _place_of(row: dict) -> str:
    """The path of a checkpoint, from the root where its run is known: two runs can have been
    evaluated under one relative path."""
    name, run = str(row.get("name")), row.get("run")
    if not run:
        return name
    inside = f"{name}/".rpartition(f"{run.rpartition('/')[2]}/")[2].strip("/")
    return f"{run}/{inside}".rstrip("/")


def _labels(evaluations: Sequence[dict]) -> list[str]:
    """`training_names`, with further settings that differ, and short names of checkpoints that no
    training is known of."""
    named = short_names([_place_of(row) for row in evaluations])
    names = training_names(evaluations)
    further = [_further(row) for row in evaluations]
    keys = dict.fromkeys(key for of_row in further for key in of_row)
    of_runs = [of_row for of_row in further if of_row]  # a base model has no settings of a training
    differing = [key for key in keys if _differs(key, of_runs)]
    labels = []
    for name, short, row, of_row in zip(names, named, evaluations, further, strict=True):
        if name == str(row.get("name")):
            labels.append(short)
            continue
        shown = [f"{key}={of_row[key]}" for key in differing if key in of_row]
        labels.append(" ".join([name, *shown]))
    return labels


def _further(row: dict) -> dict:
    """Settings of a training run beside those of its loss that its checkpoint is named by."""
    training = row.get("training") or {}
    return {key: value for key, value in training.items() if key not in NOT_NAMING}


def _differs(key: str, further: Sequence[dict]) -> bool:
    """Whether rows have different values of a setting, or one that only some runs have changed."""
    values = {str(of_row[key]) for of_row in further if key in of_row}
    is_default_in_some = key not in RECORDED and any(key not in of_row for of_row in further)
    return len(values) > 1 or is_default_in_some


def evaluation_tables(evaluations: Sequence[dict], reward: str | None = None) -> list[Table]:
    """A table with a row for each loss and temperature of eval.jsonl, and where it has means over
    seeds, one with a row for each checkpoint, folded.

    The KL of the policy's samples and that along samples of another sampler are in columns of their
    own. reward: its name, for the head of its column.
    """
    if not evaluations:
        return []
    groups = trained(evaluations)
    evaluations = [_with_kl_named(row) for row in evaluations]
    columns = _columns(evaluations)
    members = defaultdict(list)
    for group, row in zip(groups, evaluations, strict=True):
        members[group].append(row)
    notes = [ERRORS, *([WHICH_KL] if "KL" in columns else [])]
    notes += [WHICH_OTHER_KL] if "KL along samples" in columns else []
    heads = [f"reward ({reward})" if name == "reward" and reward else name for name in columns]
    tables = [_grouped("Evaluations", members, heads, columns, notes)]
    if len(members) < len(evaluations):
        names = short_names([_place_of(row) for row in evaluations])
        named = [
            group._replace(name=name, step=row.get("step"))
            for name, group, row in zip(names, groups, evaluations, strict=True)
        ]
        single = defaultdict(list)
        for group, row in zip(_told_apart(named, evaluations), evaluations, strict=True):
            single[group].append(row)
        by_checkpoint = _grouped("Each checkpoint", single, heads, columns, [], folded=True)
        tables.append(by_checkpoint)
    return tables


def _columns(evaluations: Sequence[dict]) -> dict[str, str]:
    """Heads of the columns and their metrics, of those that some row has."""
    metrics = list(dict.fromkeys(key for row in evaluations for key in row if is_number(row[key])))
    further_rewards = {
        metric.removeprefix("samples_eval/policy_reward"): metric
        for metric in metrics
        if metric.startswith("samples_eval/policy_reward[") and metric.endswith("]")
    }
    accuracies = {
        f"accuracy on {metric.split('@')[1]}": metric
        for metric in metrics
        if metric.startswith("rewards_eval/accuracies@")
    }
    columns = EVALUATION_COLUMNS | further_rewards | accuracies
    return {name: metric for name, metric in columns.items() if metric in metrics}


def _grouped(
    title: str,
    members: dict[Trained, list[dict]],
    heads: Sequence[str],
    columns: dict[str, str],
    notes: Sequence[str],
    *,
    folded: bool = False,
) -> Table:
    """A row for each group, sorted by name (as they come), step and temperature."""
    order = {name: i for i, name in enumerate(dict.fromkeys(group.name for group in members))}
    limits, has_steps, has_seeds = _shown(members)
    rows = []
    for group in sorted(members, key=lambda of: (order[of.name], of.step or 0, of.sampler[0])):
        of_group = members[group]
        cells = [group.name, *([_steps_of(of_group)] if has_steps else [])]
        cells += [len({seed_of(row) for row in of_group})] if has_seeds else []
        cells += [_plain(group.sampler[i]) for i in limits]
        rows.append([*cells, *(_cell(of_group, *column) for column in columns.items())])
    names = list(SAMPLER)
    return Table(
        title=title,
        head=[
            "checkpoint" if folded else "trained with",
            *(["step"] if has_steps else []),
            *(["seeds"] if has_seeds else []),
            *(names[i].replace("_", "-") for i in limits),
            *heads,
        ],
        rows=rows,
        notes=notes,
        keys=1 + has_steps + has_seeds + len(limits),
        folded=folded,
    )


def _shown(members: dict[Trained, list[dict]]) -> tuple[list[int], bool, bool]:
    """Which settings of the sampler have a column, and whether steps and seeds have one."""
    plain = list(SAMPLER.values())
    limits = [
        i
        for i in range(len(plain))
        if i == 0 or any(group.sampler[i] not in (None, plain[i]) for group in members)
    ]
    has_steps = any(group.step is not None for group in members) or any(
        len({row.get("step") for row in rows}) > 1 for rows in members.values()
    )
    has_seeds = any(len({seed_of(row) for row in rows}) > 1 for rows in members.values())
    return limits, has_steps, has_seeds


def _steps_of(rows: Sequence[dict]) -> Any:
    """The step of a group, such as `300`, or `100 to 300` where its seeds are at different ones."""
    steps = sorted({row["step"] for row in rows if is_number(row.get("step"))})
    if len(steps) < 2:
        return steps[0] if steps else None
    return f"{steps[0]} to {steps[-1]}"


def _plain(value: Any) -> str:
    return f"{value:g}" if is_number(value) else "-"


def seed_of(row: dict) -> str:
    """The seed of the training run of a checkpoint; its run where the seed is not known."""
    return str((row.get("training") or {}).get("seed", row.get("run") or row.get("checkpoint")))


def _cell(rows: Sequence[dict], head: str, metric: str) -> str:
    """The mean over seeds with its standard error, or the value of one with that over prompts."""
    digits = DIGITS.get(head, 3)
    by_seed = defaultdict(list)
    for row in rows:
        if is_number(row.get(metric)):
            by_seed[seed_of(row)].append(row[metric])
    if len(rows) == 1 or not by_seed:
        error = rows[0].get(f"{metric}_se")
        return plus_minus(rows[0].get(metric), error if is_number(error) else None, digits)
    means = [mean_and_error(of_seed)[0] for of_seed in by_seed.values()]
    return plus_minus(*mean_and_error(means), digits)


def _with_kl_named(row: dict) -> dict:
    """A row whose KL is that along samples, under this name, unless they are the policy's."""
    if not other_sampler(row):
        return row
    kl, along = (EVALUATION_COLUMNS[name] for name in ("KL", "KL along samples"))
    renamed = {kl: along, f"{kl}_se": f"{along}_se"}
    return {renamed.get(key, key): value for key, value in row.items()}


# ---------------------------------------------------------------------------------------- win rates

WINRATE_COUNTS = ("wins", "ties", "losses", "contradictions", "unjudged")


RATES = {  # head of the column -> keys of winrates.json: the rate and its interval
    "win rate [95%]": ("win_rate", "low", "high"),
    "of equal lengths [95%]": tuple(f"length_controlled_{key}" for key in ("rate", "low", "high")),
}


def winrate_table(winrates: Sequence[dict], evaluations: Sequence[dict] = ()) -> Table | None:
    """A row of winrates.json for each loss, temperature, opponent and judge: the mean over seeds.

    evaluations: rows of eval.jsonl, which say what the checkpoints were trained with. A rate with a
    "seed" is of a training run, and its "checkpoint" is the name of the run's group.
    """
    if not winrates:
        return None
    of_checkpoint = {
        place_in(row): (group.name, group.step, seed_of(row), row)
        for row, group in zip(evaluations, trained(evaluations), strict=True)
    }
    names = _opponents([rate.get("checkpoint") or "policy" for rate in winrates])
    against = _opponents([rate["against"] for rate in winrates])
    members, evaluated = defaultdict(list), defaultdict(list)
    for rate, name, opponent in zip(winrates, names, against, strict=True):
        unknown = (name, None, name, {})
        if "seed" in rate:
            unknown = (rate["checkpoint"], None, str(rate["seed"]), {})
        label, step, seed, row = of_checkpoint.get(place_in(rate), unknown)
        key = (label, step, rate.get("temperature"), opponent, rate["by"])
        members[key].append((seed, rate))
        evaluated[key].append(row)
    steps = {key: _steps_of(rows) for key, rows in evaluated.items()}
    has_steps = any(
        step is not None or isinstance(steps[label, step, *others], str)
        for label, step, *others in members
    )
    counted = [name for name in WINRATE_COUNTS if any(rate.get(name) for rate in winrates)]
    shown = {
        head: keys
        for head, keys in RATES.items()
        if head == "win rate [95%]" or any(is_number(rate.get(keys[0])) for rate in winrates)
    }
    rows = []
    for key, rates in members.items():
        label, _, temperature, opponent, by = key
        step = [steps[key]] if has_steps else []
        where = [label, *step, _plain(temperature), opponent, by]
        counts = [sum(rate.get(name) or 0 for _, rate in rates) for name in counted]
        cells = [_rate_cell(rates, *keys) for keys in shown.values()]
        rows.append([*where, *cells, *counts])
    return Table(
        title="Win rates",
        head=[
            "",
            *(["step"] if has_steps else []),
            *("temperature", "against", "by", *shown, *counted),
        ],
        rows=rows,
        notes=_winrate_notes(members, has_lengths=len(shown) > 1),
        keys=4 + has_steps,
    )


def _winrate_notes(members: dict[tuple, list], *, has_lengths: bool) -> list[str]:
    notes = [
        "A tie counts one half, and so does a pair whose two orders contradict each other."
        " Intervals are over prompts, of one policy and its samples."
    ]
    if has_lengths:
        notes.append(
            "Of equal lengths: the length-controlled win rate (arXiv:2404.04475), sigmoid(theta) of"
            " P(win) = sigmoid(theta + phi tanh(difference in characters / its standard"
            " deviation))."
        )
    if any(len(rates) > 1 for rates in members.values()):
        notes.append(
            "Rows of several seeds have means over seeds, with t intervals over them from three"
            " seeds on, and counts of all seeds together."
        )
    return notes


def _opponents(names: Sequence[str]) -> list[str]:
    """Short names of those that are paths."""
    paths = [name for name in names if "/" in name]
    short = dict(zip(paths, short_names(paths), strict=True)) if paths else {}
    return [short.get(name, name) for name in names]


def _rate_cell(rates: Sequence[tuple[str, dict]], value: str, low: str, high: str) -> str:
    """A win rate with its interval: over prompts of one row, over seeds of several."""
    known = [(seed, rate) for seed, rate in rates if is_number(rate.get(value))]
    if not known:
        return "-"
    if len(known) == 1:
        [(_, rate)] = known
        if not (is_number(rate.get(low)) and is_number(rate.get(high))):
            return f"{rate[value]:.3f}"
        return f"{rate[value]:.3f} [{rate[low]:.3f}, {rate[high]:.3f}]"
    by_seed = defaultdict(list)
    for seed, rate in known:
        by_seed[seed].append(rate[value])
    of = over_seeds(mean_and_error(of_seed)[0] for of_seed in by_seed.values())
    interval = f" [{of.low:.3f}, {of.high:.3f}]" if of.low is not None else ""
    return f"{of.mean:.3f}{interval}"
