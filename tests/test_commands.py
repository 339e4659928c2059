"""The commands that users type: those of the README and docs/commands.md, and the published recipes
on a small model and small data."""

import contextlib
import json
import re
import shlex
import socket
import subprocess
import sys
import time

import httpx
import pytest
from conftest import (
    ROOT,
    architecture_of,
    read_rows,
    run_command,
    run_here,
    save_model,
    scored_rows,
    small_run,
    write_jsonl,
)
from omegaconf import OmegaConf

from preflab.settings.command_line import check_arguments
from preflab.settings.keys import CONFIG_DIR

QUICK = [
    "n_examples=64",
    "n_eval_examples=32",
    "n_eval_model_samples=8",
    "eval_every=64",
    "wandb.enabled=false",
]


def readme_commands() -> list[list[str]]:
    """Every python command of the README and of docs/commands.md, once, without its comment."""
    pages = [ROOT / "README.md", ROOT / "docs" / "commands.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    commands = dict.fromkeys(line for line in lines if line.startswith("python "))
    return [shlex.split(line)[1:] for line in commands]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A finished small run of the default experiment, a small Pythia and a few dialogues, for the
    commands to find."""
    folder, reward_model = (
        tmp_path_factory.mktemp("commands"),
        tmp_path_factory.getbasetemp() / "commands-RM",
    )
    run_command("train.py", f"local_run_dir={folder / 'RUN'}", *QUICK)
    run_command("train.py", f"local_run_dir={reward_model}", "loss=bradley_terry", *QUICK)
    write_jsonl(
        folder / "my_pairs.jsonl",
        [{"prompt": f"film {i}", "chosen": " good", "rejected": " bad"} for i in range(80)],
    )
    save_model(folder / "pythia", "gpt_neox", scale=1.0)
    for split in ("train", "test"):
        turns = [
            {
                "chosen": f"\n\nHuman: q{i}\n\nAssistant: yes",
                "rejected": f"\n\nHuman: q{i}\n\nAssistant: no",
            }
            for i in range(20)
        ]
        write_jsonl(folder / "data" / "Anthropic" / "hh-rlhf" / f"{split}.jsonl", turns)
    return folder


@pytest.mark.parametrize("command", readme_commands(), ids=" ".join)
def test_readme_command_runs(command, workplace, tmp_path):
    script, *arguments = command
    places = {
        "RUN": workplace / "RUN",
        "DIR": workplace if "function=eval" in arguments else tmp_path / "sweep",
        "EVAL": workplace / "RUN" if script == "judge.py" else tmp_path / "eval",
    }
    places |= {
        "RM": (
            tmp_path / "run"
            if "local_run_dir=RM" in arguments
            else workplace.parent / "commands-RM"
        ),
        "my_pairs": workplace / "my_pairs",
    }
    for name, place in places.items():
        arguments = [re.sub(rf"\b{name}\b", str(place), a) for a in arguments]
    small = [
        a for a in QUICK if a.split("=")[0] not in {given.split("=")[0] for given in arguments}
    ]
    if "model=pythia28" in arguments:
        small += [
            f"model.name_or_path={workplace / 'pythia'}",
            f"data_dir={workplace / 'data'}",
            "max_length=64",
            "max_prompt_length=32",
        ]
        arguments = [a for a in arguments if not a.startswith("model.archive")]
    if "function=online" in arguments:
        small += [
            "online.rounds=2",
            "online.prompts_per_round=8",
            "batch_size=8",
            "max_new_tokens=8",
        ]
    if script == "serve_reward.py":
        return answers(script, *arguments, f"local_run_dir={tmp_path / 'state'}")
    if script == "report.py":
        for seed in (0, 1):
            run_command(
                "train.py",
                f"local_run_dir={tmp_path / 'sweep' / str(seed)}",
                f"seed={seed}",
                *QUICK,
            )
        small = []
    elif script == "judge.py" or script.startswith("scripts/"):
        small = []
    elif "-m" in arguments:
        small = [
            "n_examples=32",
            "n_eval_examples=8",
            "n_eval_model_samples=4",
            "eval_every=64",
            "wandb.enabled=false",
        ]
    elif not any(a.startswith(("local_run_dir", "resume")) for a in arguments):
        small.append(f"local_run_dir={tmp_path / 'run'}")
    result = run_command(script, *arguments, *small)
    if script == "judge.py":
        rows = [line.split()[:3] for line in result.stdout.splitlines()]
        assert all(["policy", "1", against] in rows for against in ("reference", "chosen"))
        assert (workplace / "RUN" / "winrates.json").exists()
    elif script == "report.py":
        assert (tmp_path / "sweep" / "frontier.png").exists() and "policy_reward" in result.stdout
    elif "-m" in arguments:
        runs = sorted(p.parent.name for p in (tmp_path / "sweep").glob("*/summary.json"))
        assert (
            len(runs) == 8
            and len(
                {
                    tuple(
                        row["loss/eval"]
                        for row in read_rows(tmp_path / "sweep" / r / "metrics.jsonl")
                        if row["split"] == "eval"
                    )
                    for r in runs
                }
            )
            == 8
        )
    elif "function=plan" in arguments:
        assert "plan.gpu_gib=80: fits" in result.stdout and not (tmp_path / "run").exists()
    elif script == "generate.py":
        assert len(read_rows(tmp_path / "run" / "generations.jsonl")) == 32
    elif script == "scripts/inspect_data.py":
        assert "80" in result.stdout and "pairs" in result.stdout
    elif "temperature=[0,0.5,1.0]" in arguments:
        assert [row["temperature"] for row in read_rows(tmp_path / "eval" / "eval.jsonl")] == [
            0,
            0.5,
            1.0,
        ]
    else:
        ends = ("reward of the policy's samples", "eval loss", "already finished")
        assert any(end in result.stdout for end in ends)
    return None


def answers(script: str, *arguments: str) -> None:
    """Start a service, ask it whether it is well, and end it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    service = subprocess.Popen(
        [sys.executable, script, *arguments, f"port={port}"], cwd=ROOT, stdout=subprocess.DEVNULL
    )
    try:
        for _ in range(600):
            assert service.poll() is None
            with contextlib.suppress(httpx.ConnectError):
                assert httpx.get(f"http://127.0.0.1:{port}/health").json()["ok"]
                return
            time.sleep(0.1)
        pytest.fail("no answer in a minute")
    finally:
        service.kill()


def test_the_readme_shows_commands():
    assert len(readme_commands()) >= 16


def test_the_default_experiment_raises_the_reward_and_a_larger_beta_stays_closer(tmp_path):
    """A fifth of the default run, by sampling and scoring; the whole run with three seeds is in the
    README."""
    run_command(
        "train.py",
        "-m",
        f"local_run_dir={tmp_path}",
        "loss.beta=0.1,1.0",
        "n_examples=1280",
        "n_eval_model_samples=128",
        "wandb.enabled=false",
    )
    summaries = {}
    for path in tmp_path.glob("*/summary.json"):
        beta = OmegaConf.load(path.with_name("config.yaml")).loss.beta
        summary = summaries[beta] = json.loads(path.read_text())
        assert summary["reward_gain"] > 4 * summary["reward_gain_se"]
        assert summary["eval_accuracy"] > 0.7
        rows = read_rows(path.with_name("samples.jsonl"))
        by_hand = [row["policy_reward"]["lexicon"] for row in rows if row["examples"] == 1280]
        assert summary["policy_reward"] == pytest.approx(sum(by_hand) / len(by_hand))
    assert summaries[1.0]["kl"] + 2 * summaries[1.0]["kl_se"] < summaries[0.1]["kl"]


# What the papers' repositories document, without sizes that need GPUs.
RECIPES = [
    (
        "model=gpt2-large datasets=[imdb] loss=odpo seed=1 loss.beta=0.7 loss.alpha=0.5"
        " exp_name=imdb trainer=FSDPTrainer gradient_accumulation_steps=2 sample_during_eval=false"
    ),
    (
        "model=gpt-neo datasets=[toxicity] loss=odpo seed=1 loss.beta=0.05 loss.alpha=1."
        " exp_name=toxicity trainer=FSDPTrainer gradient_accumulation_steps=2"
        " sample_during_eval=false"
    ),
    (
        "model=gptj datasets=[tldr] loss=odpo seed=0 loss.beta=0.5 exp_name=tldr"
        " trainer=FSDPTrainer gradient_accumulation_steps=2 sample_during_eval=false"
    ),
    (
        "function=eval model=gptj datasets=[tldr] loss=odpo seed=0 loss.beta=0.5 temperature=0.25"
        " n_eval_examples=100 exp_name=tldr_test trainer=FSDPTrainer sample_during_eval=false"
    ),
    (
        "model=pythia28 datasets=[hh] loss=sft exp_name=hh_pythia28 gradient_accumulation_steps=2"
        " trainer=FSDPTrainer sample_during_eval=false model.fsdp_policy_mp=bfloat16"
    ),
    (
        "model=pythia28 datasets=[hh] loss=cal-dpo loss.beta=0.1 exp_name=hh_pythia28"
        " gradient_accumulation_steps=2 trainer=FSDPTrainer sample_during_eval=false"
        " model.fsdp_policy_mp=bfloat16"
    ),
    "model=pythia28 datasets=[hh] loss=tdpo loss.alpha=0.5 loss.beta=0.1 sample_during_eval=false",
    (
        "model=pythia28 datasets=[hh] loss=tdpo loss.alpha=0.5 loss.beta=0.1 loss.if_tdpo2=false"
        " sample_during_eval=false"
    ),
    "model=pythia28 datasets=[tldr_filtered] loss=sft exp_name=sft_tldr_pythia28",
    "model=opt datasets=[hh] loss=ipo loss.average_log_prob=true",
    "model=llama7b datasets=[hh] loss=dpo loss.label_smoothing=0.1",
    (
        "model=phi2 datasets=[PAIRS] loss=dpo loss.beta=0.5 n_epochs=3 lr=1e-5"
        " wandb.project=risk-averse-phi2"
    ),
]


@pytest.fixture(scope="module")
def public_data(tmp_path_factory, workplace):
    folder = workplace / "data"
    for split in ("train", "test"):
        write_jsonl(folder / f"imdb-sft-{split}.jsonl", scored_rows())
        write_jsonl(folder / f"toxicity-sft-{split}-reward.jsonl", scored_rows())
        posts = {
            f"post {i}": {"responses": [" a", " b", " c"], "rewards": [i % 3 + 1, 5, 7]}
            for i in range(12)
        }
        (folder / f"tldr-sft-{split}-rel.json").write_text(json.dumps(posts))
        (folder / "tldr_filtered").mkdir(exist_ok=True)
        (folder / "tldr_filtered" / f"{split}.json").write_text(
            json.dumps([{"prompt": f"p{i}", "chosen": " a"} for i in range(12)])
        )
    write_jsonl(
        folder / "pairs.jsonl",
        [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(12)],
    )
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_published_recipe(recipe, public_data, tmp_path):
    overrides = recipe.replace("PAIRS", str(public_data / "pairs.jsonl")).split()
    check_arguments(overrides)
    model = next(o for o in overrides if o.startswith("model=")).split("=")[1]
    block_name = OmegaConf.load(CONFIG_DIR / "model" / f"{model}.yaml").block_name
    folder = save_model(tmp_path / "model", architecture_of(block_name), scale=1.0)
    summary = run_here(*small_run(folder, public_data, tmp_path / "run", *overrides))
    assert summary["finished"] and (summary["examples"] > 0) == ("function=eval" not in overrides)


def test_wandb_runs_offline_without_a_key_and_never_asks(imdb_dir, llama_folder, tmp_path):
    import os

    environment = {
        key: value for key, value in os.environ.items() if not key.startswith("WANDB")
    } | {"HOME": str(tmp_path)}
    overrides = small_run(
        llama_folder, imdb_dir, tmp_path / "run", "wandb.enabled=true", "n_examples=16"
    )
    run_command("train.py", *overrides, env=environment, stdin=None)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))


def test_a_broken_wandb_does_not_stop_a_run(imdb_dir, llama_folder, tmp_path, monkeypatch, capsys):
    import wandb

    monkeypatch.setattr(
        wandb, "init", lambda **options: (_ for _ in ()).throw(RuntimeError("no service"))
    )
    run_here(
        *small_run(llama_folder, imdb_dir, tmp_path / "run", "wandb.enabled=true", "n_examples=16")
    )
    assert "continues without it: no service" in capsys.readouterr().err


def test_a_second_start_does_not_tokenise_again(imdb_dir, llama_folder, tmp_path, monkeypatch):
    run_here(*small_run(llama_folder, imdb_dir, tmp_path / "one", "n_examples=8"))
    monkeypatch.setattr(
        "preflab.batching.token_store._write_store", lambda *a: pytest.fail("tokenised again")
    )
    run_here(*small_run(llama_folder, imdb_dir, tmp_path / "two", "n_examples=8", "loss=odpo"))
