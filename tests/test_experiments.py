"""The language of the experiments, its gold, and that the README says what the results say."""

import json
import math

import pytest
from conftest import ROOT, read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import run as experiments
from experiments import verdict_page, words
from experiments.claims import OF_STUDIES, WITH_MODEL
from experiments.gold import HALF
from experiments.workspace import RedrawnWorkspace, Workspace
from preflab.rewards.registry import build_reward


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    folder = tmp_path_factory.mktemp("words")
    words.write(folder, 3000, 200, seed=0)
    return folder


def test_the_language_is_as_described(language, tmp_path):
    rows = read_rows(language / "sft" / "train.jsonl")
    prompts = {row["prompt"] for row in read_rows(language / "prompts.jsonl")}
    assert len(rows) == 3000 and not prompts & {row["prompt"] for row in rows}
    texts = [row["chosen"].split() for row in rows]
    assert all(row["chosen"].startswith(" ") and len(row["prompt"].split()) == 3 for row in rows)
    assert {len(text) for text in texts} == set(range(8, 17))
    n = sum(map(len, texts))
    sentiment = [
        [1 if w in words.POSITIVE else -1 for w in text if w not in words.NEUTRAL] for text in texts
    ]
    assert sum(map(len, sentiment)) / n == pytest.approx(0.45, abs=4 * math.sqrt(0.45 * 0.55 / n))
    # two words of one text agree when both or neither follow the latent sentiment
    same = [a == b for text in sentiment for a, b in zip(text[::2], text[1::2], strict=False)]
    assert sum(same) / len(same) == pytest.approx(
        0.8**2 + 0.2**2, abs=4 * math.sqrt(0.25 / len(same))
    )
    words.write(tmp_path / "again", 3000, 200, seed=0)
    assert (tmp_path / "again" / "sft" / "train.jsonl").read_bytes() == (
        language / "sft" / "train.jsonl"
    ).read_bytes()


def test_a_word_is_a_token_and_the_model_is_small(language):
    tokenizer, model = (
        AutoTokenizer.from_pretrained(language / "model"),
        AutoModelForCausalLM.from_pretrained(language / "model"),
    )
    assert len(tokenizer) == 48 and 100_000 < model.num_parameters() < 120_000
    assert len(tokenizer("worda goodb badc")["input_ids"]) == 3


def test_the_gold_of_two_sizes_by_hand(language):
    half, other = sorted(HALF)[0], next(w for w in words.NEUTRAL if w not in HALF)
    score = build_reward(
        {
            "name": "two_sizes",
            "module": str(ROOT / "experiments" / "gold.py"),
            "path": str(language / "words.json"),
        }
    )
    texts = [
        "gooda goodb goodc",
        f"gooda goodb goodc bada {half}",
        f"{half} {other} {other} {half}",
        f"gooda goodb goodc goodd {other} {half}",
        "",
    ]
    assert score([""] * 5, texts) == pytest.approx([1.0, 0.05, 0.025, 1.025, 0.0])


@pytest.mark.parametrize("name", sorted(experiments.CLAIMS | OF_STUDIES))
def test_the_readme_says_what_the_results_say(name):
    page = (ROOT / "experiments" / "README.md").read_text()
    assert all(text in page for text in (experiments.CLAIMS | OF_STUDIES)[name])
    results = ROOT / "experiments" / "results" / f"{name}.json"
    if name in OF_STUDIES and not results.is_file():
        assert "**Not measured yet.**" in page.split(f"<!-- {name} -->")[1].split("<!--")[0]
        return
    result = json.loads(results.read_text())
    verdict = "**It holds here.**" if result["holds"] else "**It does not hold here.**"
    assert f"{verdict} {result['found']}" in page
    assert len(result["seeds"]) >= (1 if name in WITH_MODEL else 3)


def written(command: list[str]) -> dict[str, str]:
    return dict(word.split("=", 1) for word in command if "=" in word)


def test_redrawn_seeds_share_nothing(tmp_path, monkeypatch):
    """Language, SFT model, pairs and runs of each seed are drawn by it; without --redraw all seeds
    have those of the seed that no command names."""
    commands = []
    monkeypatch.setattr(Workspace, "command", lambda self, *words: commands.append(words))
    monkeypatch.setattr("os.replace", lambda *paths: None)
    monkeypatch.setattr(Workspace, "_runs", lambda self, name: [])

    def of(workspace) -> list[list[str]]:
        commands.clear()
        data = workspace.across(lambda part: part.pairs("lexicon"))
        workspace.sweep("frontier", data, "lexicon", "loss=dpo", steps=8)
        return [list(map(str, command)) for command in commands]

    redrawn = of(RedrawnWorkspace(tmp_path, [11, 12], None))
    for seed, other in ((11, 12), (12, 11)):
        own = [c for c in redrawn if f"seed-{seed}" in " ".join(c)]
        assert not any(f"seed-{other}" in " ".join(command) for command in own)
        assert {command[0] for command in own} == {
            *("experiments/words.py", "train.py", "scripts/build_preferences.py")
        }
        for command in own:
            named = written(command).get("seed") or command[command.index("--seed") + 1]
            assert named == str(seed)
        [run] = [written(c) for c in own if "loss=dpo" in c]
        folder = tmp_path / "redrawn" / f"seed-{seed}"
        assert run["datasets"] == f"[{folder / 'pairs' / 'lexicon'}]"
        assert run["model.name_or_path"] == str(folder / "sft" / "LATEST" / "hf")
        assert run["local_run_dir"] == str(folder / "frontier")
    assert not any("{seed}" in " ".join(command) for command in redrawn)
    shared = of(Workspace(tmp_path, [11, 12], None))
    runs = [written(c) for c in shared if "loss=dpo" in c]
    assert [run["seed"] for run in runs] == ["11", "12"]
    assert len({(run["datasets"], run["model.name_or_path"]) for run in runs}) == 1
    assert not any("--seed" in c or str(tmp_path / "redrawn") in " ".join(c) for c in shared)


def test_the_verdict_of_redrawn_seeds_stands_beside_the_old_one():
    page = "before <!-- frontier -->earlier verdict<!-- end frontier --> after"
    result = {"holds": False, "found": "First.", "seeds": [11, 12, 13]}
    once = verdict_page.with_verdict(page, "frontier", result, redrawn=True)
    twice = verdict_page.with_verdict(
        once, "frontier", result | {"holds": True, "found": "Second."}, redrawn=True
    )
    assert "First." in once and "First." not in twice and twice.count("Second.") == 1
    assert twice.startswith("before <!-- frontier -->earlier verdict<!-- end frontier -->\n\n")
    assert "**It holds here with language, SFT model, data and prompts drawn again" in twice
    old = verdict_page.with_verdict(twice, "frontier", result | {"found": "Third."})
    assert (
        "earlier verdict" not in old and "Third." in old and "Second." in old and "*Claim.*" in old
    )
