"""Losses, rewards and datasets in files outside the project: their import, and a run with one of
each."""

import sys
import textwrap

import pytest
from conftest import read_rows, run_here, small_run, write_jsonl
from omegaconf import OmegaConf

from preflab.objective.registry import LOSSES, bind_loss
from preflab.readers.registry import DATASETS, open_dataset
from preflab.rewards.registry import REWARDS
from utils import ConfigError, load_module

LOSS = """
    from __future__ import annotations

    from dataclasses import dataclass
    from typing import TYPE_CHECKING, Annotated

    from losses import Between, LossOutput, register_loss
    from margins_of_theirs import squared_hinge

    if TYPE_CHECKING:
        from losses import Pair


    @dataclass
    class Sides:
        chosen: float
        rejected: float


    @register_loss("theirs", reads={"reference"})
    def theirs(pair: Pair, *, alpha: float, margin: Annotated[float, Between(1, 3)]) -> LossOutput:
        rewards = Sides(alpha * pair.chosen_logratio, alpha * pair.rejected_logratio)
        losses = squared_hinge(margin, rewards.chosen - rewards.rejected)
        return LossOutput(losses, rewards.chosen, rewards.rejected)
"""
HELPER = """
    import torch.nn.functional as F


    def squared_hinge(margin, gap):
        return F.relu(margin - gap) ** 2
"""
REWARD = """
    from __future__ import annotations

    from dataclasses import dataclass

    from rewards import register_reward


    @dataclass
    class Length:
        most: int

        def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
            return [float(min(len(response), self.most)) for response in responses]


    @register_reward("length_of_theirs")
    def length_of_theirs(*, most: int = 3):
        return Length(most)
"""
DATASET = """
    from pathlib import Path

    from preference_datasets import Reader, file_rows, pairs_record, register_dataset, text


    @register_dataset("questions")
    class Questions(Reader):
        provides = frozenset({"pairs"})

        def rows(self, split, options):
            return file_rows(Path(options.data_dir) / f"questions-{split}.jsonl")

        def prompt(self, row, where):
            text(row, "good", where), text(row, "bad", where)
            return f"Q: {text(row, 'question', where)}"

        def record(self, prompt, rows, source, pair):
            return pairs_record(prompt, [(row["good"], row["bad"]) for row in rows], source)
"""


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.py").write_text(textwrap.dedent(content), encoding="utf-8")
    return folder


@pytest.fixture
def theirs(tmp_path, monkeypatch):
    """A folder for a user's files; what they register and import is forgotten afterwards."""
    before = [(registry, dict(registry)) for registry in (LOSSES, REWARDS, DATASETS)]
    monkeypatch.setattr(sys, "path", list(sys.path))
    modules = set(sys.modules)
    yield tmp_path / "theirs"
    for registry, entries in before:
        registry.clear()
        registry.update(entries)
    for name in set(sys.modules) - modules:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def test_a_run_with_a_loss_a_reward_and_a_dataset_of_a_folder_outside(theirs, llama_folder):
    write(theirs, my_loss=LOSS, margins_of_theirs=HELPER, my_reward=REWARD, my_data=DATASET)
    for group, name, settings in (
        ("loss", "theirs", {"module": theirs / "my_loss.py", "alpha": 0.1, "margin": 2.0}),
        ("reward", "length_of_theirs", {"module": theirs / "my_reward.py", "most": 3}),
    ):
        path = theirs / "conf" / group / f"{name}.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(f"name: {name}\n" + "".join(f"{k}: {v}\n" for k, v in settings.items()))
    rows = [{"question": f"{i}?", "good": f" yes {i}", "bad": " no"} for i in range(16)]
    for split in ("train", "test"):
        write_jsonl(theirs / "data" / f"questions-{split}.jsonl", rows)
    run_dir = theirs / "run"
    overrides = [
        f"hydra.searchpath=[file://{theirs / 'conf'}]",
        *small_run(
            llama_folder,
            theirs / "data",
            run_dir,
            "loss=theirs",
            "reward=length_of_theirs",
            "reward.most=2",
            f"dataset_module={theirs / 'my_data.py'}",
            "datasets=[questions]",
        ),
    ]
    summary = run_here(*overrides)
    assert summary["examples"] == 16
    evaluations = [row for row in read_rows(run_dir / "metrics.jsonl") if row["split"] == "eval"]
    assert evaluations[0]["loss/eval"] == pytest.approx(4.0)
    assert evaluations[-1]["loss/eval"] < 3.9
    for row in read_rows(run_dir / "samples.jsonl"):
        assert row["policy_reward"] == {"length_of_theirs": min(len(row["policy"]), 2)}
    config = OmegaConf.load(run_dir / "config.yaml")
    assert config.dataset_module == str(theirs / "my_data.py")
    other = write(theirs, other_data=DATASET.replace('"questions"', '"others"')) / "other_data.py"
    with pytest.raises(ConfigError, match=r"dataset_module was .*my_data\.py and is now"):
        run_here(*overrides, f"dataset_module={other}", "n_epochs=2")


def test_edits_of_a_reader_of_a_users_own_do_not_meet_tokens_of_the_version_before(theirs):
    path = write(theirs, my_data=DATASET) / "my_data.py"
    write_jsonl(theirs / "questions-train.jsonl", [{"question": "?", "good": "a", "bad": "b"}])
    load_module(str(path), "dataset_module")
    before = open_dataset("questions", "train", data_dir=str(theirs))
    assert next(before.records()).prompt == "Q: ?"
    fingerprint = before.fingerprint()
    write(theirs, my_data=DATASET.replace("Q: ", "A: "))
    load_module(str(path), "dataset_module")
    now = open_dataset("questions", "train", data_dir=str(theirs))
    assert next(now.records()).prompt == "A: ?" and now.fingerprint() != fingerprint


def test_a_file_is_executed_once_until_it_changes(theirs):
    path = write(theirs, counted="import itertools\nVALUE = 1\n") / "counted.py"
    first = load_module(str(path), "loss.module")
    assert load_module(str(path), "reward.module") is first
    assert sys.modules[first.__name__] is first and first.__file__ == str(path)
    write(theirs, counted="import itertools\nVALUE = 2\n")  # the same size, in the same second
    second = load_module(str(path), "loss.module")
    assert (first.VALUE, second.VALUE) == (1, 2)
    same_name = write(theirs / "b", counted="VALUE = 3\n") / "counted.py"
    assert load_module(str(same_name), "loss.module").__name__ != second.__name__


def test_a_helper_does_not_take_the_place_of_an_installed_module(theirs):
    write(theirs, colorsys="def mine(): ...\n", asks="import colorsys\n")
    sys.modules.pop("colorsys", None)
    assert hasattr(load_module(str(theirs / "asks.py"), "loss.module").colorsys, "rgb_to_hsv")


@pytest.mark.parametrize(
    "source, message",
    [
        ("x = 1\ny = x.nothing\n", r"broken\.py:2: AttributeError: .*'nothing'"),
        ("x = 1\ndef f(:\n    pass\n", r"broken\.py:2: SyntaxError: invalid syntax"),
        ("\n\nimport not_installed\n", r"broken\.py:3: ModuleNotFoundError: .*'not_installed'"),
        ("import worse\n", r"worse\.py:2: ZeroDivisionError"),
        (
            "from losses import register_loss\n\n@register_loss('dpo')\ndef dpo(pair): ...\n",
            r"broken\.py:3: a loss named 'dpo' is already registered in .*losses\.py",
        ),
        (
            "from losses import register_loss\nregister_loss('a', examples='pear')\n",
            r"broken\.py:2: ValueError: .*accepted: pairs, targets, responses",
        ),
    ],
    ids=["attribute", "syntax", "import", "helper", "taken", "refused"],
)
@pytest.mark.parametrize("by_name", [False, True])
def test_errors_name_file_and_line(theirs, source, message, by_name, monkeypatch):
    write(theirs, broken=source, worse="y = 0\nx = 1 / y\n")
    monkeypatch.chdir(theirs)
    module = "broken" if by_name else str(theirs / "broken.py")
    with pytest.raises(ConfigError, match=rf"loss\.module='.*broken.*': .*{message}"):
        load_module(module, "loss.module")
    assert not [name for name in sys.modules if name.startswith("broken")]


def test_modules_that_do_not_exist_are_named(theirs, monkeypatch):
    write(theirs / "package", __init__="")
    monkeypatch.chdir(theirs)
    for module in ("nowhere", "nowhere.at_all", "package.nowhere"):
        with pytest.raises(ConfigError, match=rf"loss\.module='{module}' cannot be imported"):
            load_module(module, "loss.module")
    with pytest.raises(ConfigError, match=r"'nowhere\.py': no such file \(looked in .*theirs\)"):
        load_module("nowhere.py", "loss.module")


def test_settings_are_checked_under_postponed_annotations(theirs):
    write(theirs, my_loss=LOSS, margins_of_theirs=HELPER)
    config = {"name": "theirs", "module": str(theirs / "my_loss.py"), "alpha": -0.5, "margin": 2.0}
    assert bind_loss(config).settings == {"alpha": -0.5, "margin": 2.0}
    with pytest.raises(ConfigError, match=r"loss.margin=3.0 of loss=theirs must be in \[1, 3\)"):
        bind_loss(config | {"margin": 3.0})
