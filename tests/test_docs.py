"""What the documentation promises: commands compose, blocks of code run, links lead somewhere,
quoted messages are printed."""

import argparse
import ast
import contextlib
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_rows, run_here, save_model, small_run, write_jsonl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from test_commands import readme_commands
from test_configuration import compose

import train_risk_preferences
from preflab.objective.registry import LOSSES, bind_loss
from preflab.objective.types import FIELDS, NEEDS
from preflab.readers.registry import DATASETS, open_dataset
from preflab.rewards.registry import REWARDS, all_rewards, check_reward
from preflab.settings.command_line import check_arguments
from preflab.settings.load import load_settings
from utils import DataError

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXTENDING = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
HYDRA = {
    "train.py": [],
    "generate.py": ["function=eval", "loss=sft"],
    "serve_reward.py": ["function=online"],
}  # and what they put in front
FOLDERS = (
    "",
    "benchmarks/",
    "config/**/",
    "docs/",
    "experiments/",
    "preflab/**/",
    "scripts/**/",
    "tests/",
)
FILES = [
    path.relative_to(ROOT).as_posix() for folder in FOLDERS for path in ROOT.glob(f"{folder}*.*")
]
OF_BLOCKS = set(re.findall(r"(?m)^# (\S+\.(?:py|yaml))$", EXTENDING))


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[list[str]]:
    """Commands of the bash blocks, and of `python ...` in a sentence, as words without their
    comments."""
    lines = [
        line.split(" #")[0].strip() for block in blocks(text, "bash") for line in block.splitlines()
    ]
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return [
        shlex.split(line)
        for line in [*filter(None, lines), *re.findall(r"`(python [^`]+)`", prose)]
    ]


def distinct_commands() -> list[list[str]]:
    """Those of all pages, each once; those of the README and docs/commands.md are run by
    test_commands.py."""
    known = {("python", *command) for command in readme_commands()}
    found = {tuple(words) for page in PAGES for words in commands(page.read_text(encoding="utf-8"))}
    return [list(words) for words in sorted(found - known)]


@pytest.fixture
def extension(tmp_path, monkeypatch):
    """A folder with the files of docs/extending.md, as the current one; what they register is
    forgotten afterwards."""
    before = [(registry, dict(registry)) for registry in (LOSSES, REWARDS, DATASETS)]
    for language in ("python", "yaml"):
        for block in blocks(EXTENDING, language):
            name = re.match(r"# (\S+)\n", block)[1]
            if not (
                ROOT / name
            ).exists():  # what goes into a file of the project is not to be imported in its place
                (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
                (tmp_path / name).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for registry, entries in before:
        registry.clear()
        registry.update(entries)


# ----------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize("words", distinct_commands(), ids=" ".join)
def test_a_command_of_the_documentation_is_accepted(words, extension, monkeypatch):
    environment = {}
    while "=" in words[0]:
        name, _, environment[name] = words.pop(0).partition("=")
    words = [
        word
        for word in words
        if word != "..." and not (words[0] == "sbatch" and word.startswith("--"))
    ]
    program, script, *arguments = words
    if (program, script) == ("python", "-m"):
        assert arguments[0] == "pytest" and (ROOT / arguments[1]).is_file()
        return
    assert (ROOT / script).is_file(), f"no file {script}"
    if script.startswith("scripts/d2po/"):  # which say what train.py is asked for
        printed = subprocess.run(
            [program, ROOT / script, *arguments],
            env=os.environ | environment | {"DRYRUN": "1"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        _, script, *arguments = shlex.split(printed.splitlines()[-1])
    if program in ("bash", "sbatch"):
        beside = Path(script).with_suffix(".py")  # gets the arguments of a script of its name
        script = beside.as_posix() if (ROOT / beside).is_file() else "train.py"
    if script in HYDRA:
        composes(HYDRA[script], arguments)
    elif script == "train_risk_preferences.py":
        composes([], train_risk_preferences.translate(arguments))
    elif "argparse" in (ROOT / script).read_text(encoding="utf-8"):
        composes([], left_by_argparse(script, arguments, monkeypatch))
    else:
        assert not [word for word in arguments if word.startswith("-")]


def composes(before: list[str], arguments: list[str]) -> None:
    """The overrides, or the first and the last run of a sweep, compose to a config whose loss and
    rewards bind."""
    check_arguments(arguments)
    if "--config-dir" in arguments:
        at = arguments.index("--config-dir")
        arguments[at : at + 2] = [f"hydra.searchpath=[file://{Path(arguments[at + 1]).resolve()}]"]
    words = [word for word in arguments if "=" in word and "glob(" not in word]
    overrides = OverridesParser.create().parse_overrides([*before, *words])
    [runs] = BasicSweeper.split_arguments(overrides, max_batch_size=None)
    for run in (runs[0], runs[-1])[: len(runs)]:
        config = compose(*run)
        bind_loss(load_settings(config).loss)
        for settings in all_rewards(config).values():
            check_reward(settings)


def left_by_argparse(script: str, arguments: list[str], monkeypatch) -> list[str]:
    """What a script's parser leaves to be an override of train.py. Nothing behind the parser
    runs."""
    left = []
    known = argparse.ArgumentParser.parse_known_args

    class Parsed(Exception):  # noqa: N818, a way out of the script, no error
        pass

    def parse_known_args(self, args=None, namespace=None):
        left.extend(known(self, args, namespace)[1])
        raise Parsed

    def parse_args(self, args=None, namespace=None):
        if more := known(self, args, namespace)[1]:
            self.error(f"unrecognized arguments: {more}")
        raise Parsed

    with monkeypatch.context() as patch, contextlib.suppress(Parsed):
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", [script, *arguments])
        patch.setattr(sys, "path", [str((ROOT / script).parent), *sys.path])
        runpy.run_path(str(ROOT / script), run_name="__main__")
        pytest.fail(f"{script} reads no arguments")
    return left


def test_commands_are_found_and_wrong_ones_are_not_accepted(monkeypatch):
    assert commands(
        "```bash\nA=1 python x.py b=c   # d\n```\n`python y.py` and ```python\nz\n```"
    ) == [["A=1", "python", "x.py", "b=c"], ["python", "y.py"]]
    assert len(distinct_commands()) > 30
    for wrong in (["bta=1"], ["loss=dop"], ["loss=dpo", "loss.alpha=1"], ["reward=classifier"]):
        with pytest.raises(ValueError):
            composes([], wrong)
    for script, wrong in (
        ("judge.py", ["EVAL", "--by", "dice"]),
        ("report.py", ["DIR", "--basline", "x"]),
    ):
        with pytest.raises(SystemExit):
            left_by_argparse(script, wrong, monkeypatch)


def test_settings_that_bring_theirs_back_compose():
    rows = re.findall(
        r"(?m)^\|.*\|(.*)\|$", (ROOT / "docs" / "differences.md").read_text(encoding="utf-8")
    )
    settings = [code.split() for cell in rows for code in re.findall(r"`([\w.]+=[^`]+)`", cell)]
    assert len(settings) > 8
    for words in settings:
        composes([], words)


# -------------------------------------------------------------------------------- docs/extending.md


def shown(script: str, section: str) -> list[str]:
    """The arguments of a script's command in a section of docs/extending.md, for `run_here`."""
    [body] = re.findall(rf"(?ms)^## {section}$(.*?)(?=^## |\Z)", EXTENDING)
    [arguments] = [words[2:] for words in commands(body) if words[1] == script]
    return [
        f"hydra.searchpath=[file://{Path.cwd() / 'my_config'}]" if word == "my_config" else word
        for word in arguments
        if word != "--config-dir"
    ]


def small(llama_folder: Path, folder: Path, *more: str) -> list[str]:
    return [
        o
        for o in small_run(llama_folder, folder / "data", folder / "run", *more)
        if not o.startswith(("model=", "datasets=")) or o in more
    ]


def test_the_loss_trains(extension, llama_folder):
    run_here(
        *shown("train.py", "A loss"),
        f"local_run_dir={extension / 'run'}",
        f"cache_dir={extension / 'cache'}",
        "n_epochs=12",
        "eval_every=60",
    )
    rows = [row for row in read_rows(extension / "run" / "metrics.jsonl") if row["split"] == "eval"]
    assert rows[0]["loss/eval"] == pytest.approx(4.0)  # margin 2.0, squared
    assert rows[-1]["rewards_eval/accuracies"] == 1.0 and rows[-1]["loss/eval"] < 2.0


def test_the_readme_shows_the_same_loss():
    [block] = blocks((ROOT / "README.md").read_text(encoding="utf-8"), "python")
    assert block in EXTENDING


def test_all_that_a_loss_may_read_is_in_the_table():
    rows = re.findall(r"(?m)^\| `(\w+)` \| `(\w+)` \| (.+) \|$", EXTENDING)
    read = [(need.name, field, need.doc) for field, need in FIELDS.items() if need.name in NEEDS]
    assert [(name, field, doc.replace("\\|", "|")) for name, field, doc in rows] == read


def test_the_reward_scores(extension, llama_folder, imdb_dir, monkeypatch, capsys):
    run_here(
        *small(
            llama_folder,
            extension,
            *shown("train.py", "A reward"),
            "function=eval",
            "datasets=[imdb]",
            "model=blank_model",
        )
    )
    for row in read_rows(extension / "run" / "samples.jsonl"):
        assert row["policy_reward"] == {"exclamations": min(row["policy"].count("!"), 5)}
    write_jsonl(
        extension / "outs.jsonl", [{"prompt": "p", "response": r} for r in ("", "a!", "!!!!")]
    )
    [body] = re.findall(r"python scripts/score_rewards.py (.*)", EXTENDING)
    monkeypatch.setattr(sys, "argv", ["score_rewards.py", *shlex.split(body)])
    runpy.run_path(str(ROOT / "scripts" / "score_rewards.py"), run_name="__main__")
    assert [row["score"] for row in read_rows(extension / "outs.scored.jsonl")] == [0, 1, 3]


def test_the_dataset_is_read(extension, llama_folder):
    [rows] = blocks(EXTENDING, "json")
    for split in ("train", "test"):
        write_jsonl(
            extension / "data" / f"forum-{split}.jsonl", list(map(json.loads, rows.splitlines()))
        )
    run_here(
        *small(
            llama_folder,
            extension,
            *shown("train.py", "A dataset"),
            "model=blank_model",
            "loss=odpo",
        )
    )
    counts = json.loads((extension / "run" / "data.json").read_text())["train"]["datasets"][0]
    assert (counts["prompts"], counts["responses"], counts["pairs"]) == (2, 5, 4)
    [first, _] = open_dataset("forum", "train", data_dir=str(extension / "data")).records()
    assert first.prompt == "Question: How long do I boil an egg?\nAnswer:" and first.scores == [
        12.0,
        3.0,
        0.0,
    ]
    assert (
        first.pairs == [(0, 1), (0, 2), (1, 2)]
        and first.responses[first.sft_target] == " Eight minutes."
    )
    write_jsonl(
        extension / "data" / "forum-train.jsonl",
        [{"question": "q", "answers": [{"text": "a", "votes": "many"}]}],
    )
    with pytest.raises(DataError, match=r"forum-train\.jsonl:1: 'votes' is .*, expected a number"):
        list(open_dataset("forum", "train", data_dir=str(extension / "data")).records())


def test_the_model_trains(extension, tmp_path_factory):
    folder = save_model(tmp_path_factory.mktemp("models") / "mistral", "mistral")
    places = [
        f"model.name_or_path={folder}",
        f"local_run_dir={extension / 'run'}",
        f"cache_dir={extension / 'cache'}",
    ]
    summary = run_here(
        *shown("train.py", "A model"),
        *places,
        "max_length=96",
        "max_prompt_length=48",
        "n_examples=10",
    )
    config = OmegaConf.load(extension / "run" / "config.yaml").model
    assert (
        summary["examples"] == 10
        and config.block_name == "MistralDecoderLayer"
        and config.lora.r == 16
    )


# ---------------------------------------------------------------------------------- links and names


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    found: list[str] = []
    for heading in re.findall(r"(?m)^#+ (.+)$", text):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return set(found)


@pytest.mark.parametrize(
    "page",
    [*PAGES, ROOT / "experiments" / "README.md"],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_links_and_named_files_exist(page):
    text = page.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if not link.startswith(("http://", "https://")):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"`([\w./-]+\.(?:py|sh|sbatch|yaml|md))`", text):
        assert (
            name in OF_BLOCKS
            or "NAME" in name
            or any(f"/{file}".endswith(f"/{name}") for file in FILES)
        ), name


def test_the_index_has_every_page():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert not [
        page.name
        for page in (ROOT / "docs").glob("*.md")
        if f"]({page.name})" not in index and page.name != "README.md"
    ]


def test_the_words_of_the_index_lead_to_keys_that_exist():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    [words] = re.findall(r"(?ms)^## Words you may know it by$(.*?)^## ", index)
    named = re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)(?:=[^`]*)?`", words)
    config = compose("loss=dpo")
    missing = [
        key
        for key in named
        if not key.endswith((".jsonl", ".py"))
        and key != "experiment"
        and OmegaConf.select(config, key, default="absent") == "absent"
    ]
    assert len(named) > 40 and not missing


# -------------------------------------------------------------------------- docs/troubleshooting.md


def messages() -> list[str]:
    """The strings of the source, with a null character for what is filled in."""
    found = []
    for file in [*ROOT.glob("*.py"), *ROOT.glob("preflab/**/*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append(
                    "".join(
                        part.value if isinstance(part, ast.Constant) else "\0"
                        for part in node.values
                    )
                )
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_messages_are_quoted_as_they_are_printed():
    source = messages()
    quoted = [
        line
        for block in blocks(
            (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8"), "text"
        )
        for line in block.splitlines()
    ]
    assert len(quoted) > 20
    for line in quoted:
        parts = [part.strip() for part in line.split("...")]
        assert max(map(len, parts)) >= 7, line
        inner = "[^\0]*\0.*".join(re.escape(part) for part in parts if part)
        pattern = re.compile(
            ("^" if parts[0] else "") + inner + ("$" if parts[-1] else ""), re.DOTALL
        )
        assert any(pattern.search(text) for text in source), line
