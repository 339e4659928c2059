"""The card of an exported model: what it was trained from, on what, and how."""

import dataclasses
import json
import os
import re
from pathlib import Path

import yaml

from preflab.objective.registry import LOSSES
from preflab.settings.schema import Settings
from preflab.settings.values import dataset_names
from utils import TRAINING_CONFIG

# Metrics of the last evaluation that a card shows, with what they are.
RESULTS = {
    "rewards_eval/accuracies": "accuracy on held-out pairs",
    "loss/eval": "loss on held-out examples",
    "samples_eval/policy_reward": "mean reward of samples",
    "samples_eval/reference_reward": "mean reward of the reference's samples",
    "samples_eval/kl": "KL to the reference, nats per response",
}


def write_model_card(folder: Path, settings: Settings, step: int, metrics: dict) -> None:
    """Write README.md and the training config to the folder of an exported model.

    Names of local files are written without their folders, which are nobody else's business.
    metrics: of the last evaluation.
    """
    config = _without_folders(json.loads(json.dumps(dataclasses.asdict(settings), default=str)))
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    (folder / TRAINING_CONFIG).write_text(text, encoding="utf-8")
    (folder / "README.md").write_text(_card(settings, step, metrics), encoding="utf-8")


def _card(settings: Settings, step: int, metrics: dict) -> str:
    base, loss = _name(settings.model.name_or_path or "a random model"), settings.loss["name"]
    data = [_name(name) for name in dataset_names(settings)]
    head = {
        "library_name": "transformers",
        "tags": ["preflab", "preference-optimization", loss],
        **({"base_model": base} if _is_hub_name(settings.model.name_or_path) else {}),
    }
    if on_hub := [name for name in dataset_names(settings) if "/" in name and _is_hub_name(name)]:
        head["datasets"] = on_hub
    if license_of_base := _license(settings.model.name_or_path):
        head["license"] = license_of_base
    results = [
        f"| {label} | {metrics[key]:.4g} |"
        for key, label in RESULTS.items()
        if metrics.get(key) is not None
    ]
    table = ["| last evaluation | |", "| --- | --- |", *results] if results else []
    given = {key: value for key, value in settings.loss.items() if value is not None}
    options = {key: value for key, value in given.items() if key not in ("name", "module")}
    lines = [
        "---",
        yaml.safe_dump(head, sort_keys=False).strip(),
        "---",
        f"# {base} after {step:,} steps of {loss}",
        "",
        f"* **Base model**: {base}",
        f"* **Data**: {', '.join(data)}",
        f"* **Loss**: {loss} ({_settings(options)})",
        f"* **Training**: {_settings(_training(settings))}",
        f"* **Reward of samples**: {settings.reward['name']}",
        "",
        *table,
        *([""] if table else []),
        f"All settings are in [{TRAINING_CONFIG}]({TRAINING_CONFIG}).",
        "",
        "## Loss",
        "",
        _description(loss),
        "",
        "## Citation",
        "",
        f"Trained with PrefLab; cite it by its CITATION.cff, and {_paper(loss)}.",
        "",
        "## License",
        "",
        f"{_sentence_on_license(license_of_base)} The terms of the data apply too.",
    ]
    return "\n".join(lines) + "\n"


def _training(settings: Settings) -> dict:
    keys = ("optimizer", "lr", "batch_size", "lr_schedule", "warmup_steps", "max_length", "seed")
    shown = {key: getattr(settings, key) for key in keys} | settings.optimizer_args
    return shown | ({"lora r": settings.model.lora.r} if settings.model.lora.r else {})


def _settings(values: dict) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items()) or "no settings"


def _description(loss: str) -> str:
    """What the loss says of itself, with its source."""
    said = LOSSES[loss].function.__doc__ if loss in LOSSES else None
    return " ".join((said or "A loss of the user's own.").split())


def _paper(loss: str) -> str:
    """The papers that the loss names as its source."""
    papers = list(dict.fromkeys(re.findall(r"arXiv:(\d{4}\.\d{4,5})", _description(loss))))
    links = (f"[arXiv:{paper}](https://arxiv.org/abs/{paper})" for paper in papers)
    return " and ".join(links) or "the paper of the loss"


def _license(base: str | None) -> str | None:
    """The license that the card of a local base model states; None without a card."""
    card = Path(base or "") / "README.md"
    try:
        head = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8"), flags=re.DOTALL)
        stated = yaml.safe_load(head[1]) if head else None
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    found = stated.get("license") if isinstance(stated, dict) else None
    return found if isinstance(found, str) else None


def _sentence_on_license(of_base: str | None) -> str:
    if of_base:
        return f"That of the base model, {of_base}."
    return "That of the base model, which its card states."


def _is_hub_name(name: str | None) -> bool:
    return bool(name) and not os.path.exists(name) and not os.path.isabs(name)


def _name(name: str) -> str:
    """A hub name as it is; the last part of a path."""
    return name if _is_hub_name(name) else Path(name).name


def _without_folders(value):
    if isinstance(value, dict):
        return {key: _without_folders(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return Path(value).name if isinstance(value, str) and os.path.isabs(value) else value
