"""scripts/d2po/: every variable of D2PO becomes the key it stands for, or is refused; what is
printed is what runs."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, read_rows, run_here
from omegaconf import OmegaConf
from safetensors.torch import load_file

from preflab.checks import check_config
from preflab.settings.compose import compose

FOLDER = ROOT / "scripts" / "d2po"
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.sh") if path.stem != "common")
KNOWN = re.search(
    r'^known="(.*?)"', (FOLDER / "common.sh").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)[1].split()
HARMLESS = {
    "CRATIO": "1",
    "KEEPLONG": "0",
    "LTYPE": "normal",
    "ONLYOLDUPDATES": "0",
    "REINIT": "False",
    "USEDPO": "0",
}

# What D2PO's instructions export before each of its scripts.
EXPORTED = {
    "train_rm": {
        "LR": "1e-4",
        "NOLORA": "False",
        "REINIT": "False",
        "LTYPE": "normal",
        "EVFIRST": "0",
        "BSIZE": "2",
        "BASEMODEL": "tiny",
    },
    "train_dpo": {"BASEMODEL": "tiny", "BETA": "0.05"},
    "opo": {
        "SUPDATES": "10000000",
        "SEED": "3",
        "KEEPLONG": "0",
        "MLEN": "50",
        "BASEMODEL": "tiny",
        "PPOUPDATES": "1",
        "DPOBATCHSIZE": "32",
        "MBSIZE": "32",
        "GBSIZE": "32",
        "STEPS": "2000",
    },
    "eval": {
        "BASEMODEL": "tiny",
        "BOTTOM": "0",
        "TOP": "200",
        "MLEN": "50",
        "BSIZE": "1",
        "DSET": str(ROOT / "data" / "ten_pairs"),
        "GBATCH": "32",
        "GREWARD": "bagofwords",
    },
}
EXPORTED["d2po"] = EXPORTED["opo"] | {
    "ATYPE": "conf",
    "APBSIZE": "16",
    "GREWARD": "bagofwords",
    "ULR": "1e-4",
    "UEPOCHS": "4",
    "SFREQ": "25",
    "SAMPN": "256",
    "RELABELS": "16",
}


def run_script(name: str, *arguments, **variables) -> subprocess.CompletedProcess:
    environment = {key: value for key, value in os.environ.items() if key not in KNOWN} | {
        "PYTHON": sys.executable,
        **variables,
    }
    return subprocess.run(
        ["bash", str(FOLDER / f"{name}.sh"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=600,
    )


def dry(name: str, *arguments, **variables) -> tuple[dict[str, str], list[str]]:
    """What a script says of each variable, and the overrides it would give to train.py."""
    result = run_script(name, *arguments, DRYRUN="1", **variables)
    assert result.returncode == 0, result.stderr
    *lines, command = result.stdout.splitlines()
    python, script, *overrides = shlex.split(command)
    assert (python, script) == ("python", "train.py") and all(" -> " in line for line in lines)
    return dict(line.split(" -> ") for line in lines), overrides


MAPPED = [
    ("train_rm", "LR", "3e-4", {"lr": 3e-4}),
    ("train_rm", "NOLORA", "False", {"model.lora.r": 32, "model.lora.alpha": 32}),
    ("train_rm", "NOLORA", "True", {"model.lora.r": 0}),
    ("train_rm", "REINIT", "True", {"model.from_scratch": True}),
    ("train_rm", "REINIT", "False", {"model.from_scratch": False}),
    ("train_rm", "LTYPE", "normal", {"loss.margin": None}),
    ("train_rm", "LTYPE", "mag", {"loss.margin": "magnitude"}),
    ("train_rm", "EVFIRST", "1", {"do_first_eval": True}),
    ("train_rm", "EVFIRST", "0", {"do_first_eval": False}),
    ("train_rm", "BSIZE", "2", {"batch_size": 8}),
    ("train_rm", "BASEMODEL", "some/where", {"model.name_or_path": "some/where"}),
    (
        "train_rm",
        "BASEMODEL",
        "pythia28",
        {"model.name_or_path": "EleutherAI/pythia-2.8b", "model.block_name": "GPTNeoXLayer"},
    ),
    (
        "train_rm",
        "BASEMODEL",
        "runs/loss=dpo,seed=1 it's/hf",
        {"model.name_or_path": "runs/loss=dpo,seed=1 it's/hf"},
    ),
    ("train_rm", "SEED", "5", {"seed": 5}),
    ("train_dpo", "BETA", "0.3", {"loss.beta": 0.3}),
    ("train_dpo", "BSIZE", "3", {"batch_size": 12}),
    ("train_dpo", "NOLORA", "0", {"model.lora.r": 16}),
    ("d2po", "SUPDATES", "500", {"online.stop_labels": 500}),
    ("opo", "MLEN", "64", {"online.max_new_tokens": 64, "max_new_tokens": 64}),
    ("opo", "PPOUPDATES", "4", {"online.updates_per_round": 4}),
    ("opo", "DPOBATCHSIZE", "16", {"online.prompts_per_round": 16}),
    ("opo", "MBSIZE", "8", {"batch_size": 8}),
    ("opo", "GBSIZE", "24", {"eval_batch_size": 24}),
    ("opo", "STEPS", "700", {"online.rounds": 700}),
    ("opo", "SFREQ", "13", {"online.save_every": 13}),
    ("opo", "GREWARD", "unique_nns", {"reward.name": "unique_nns", "online.discriminator": None}),
    ("opo", "BETA", "0.2", {"loss.beta": 0.2}),
    ("opo", "LR", "2e-5", {"lr": 2e-5}),
    ("d2po", "ATYPE", "rand", {"online.select": "rand"}),
    ("d2po", "APBSIZE", "4", {"online.discriminator_batch_size": 4}),
    ("d2po", "ULR", "3e-5", {"online.discriminator_lr": 3e-5}),
    ("d2po", "UEPOCHS", "2", {"online.discriminator_epochs": 2}),
    ("d2po", "SAMPN", "320", {"online.relabel_every": 320}),
    ("d2po", "RELABELS", "5", {"online.relabels": 5}),
    ("d2po", "USEDPO", "1", {"online.discriminator": {"name": "dpo", "beta": 0.05}}),
    ("eval", "BSIZE", "3", {"samples_per_prompt": 3}),
    ("eval", "MLEN", "20", {"max_new_tokens": 20}),
    ("eval", "GBSIZE", "5", {"eval_batch_size": 5}),
    ("eval", "GBATCH", "6", {"eval_batch_size": 6}),
    ("eval", "TOP", "30", {"n_eval_examples": 30}),
    ("eval", "DSET", "some/held out", {"datasets": ["some/held out"]}),
    ("eval", "GREWARD", "math", {"reward.name": "math", "function": "eval"}),
]


@pytest.mark.parametrize(
    "script, variable, value, expected", MAPPED, ids=lambda v: v if isinstance(v, str) else ""
)
def test_a_variable_becomes_its_key(script, variable, value, expected):
    lines, overrides = dry(script, **{variable: value})
    assert list(lines) == [f"{variable}={value}"]
    config = compose(overrides)
    assert {key: OmegaConf.select(config, key) for key in expected} == expected
    said = lines[f"{variable}={value}"]
    if " " not in value and "nothing" not in said:
        assert set(said.split(" ")) <= set(overrides)


def test_every_variable_that_is_not_refused_outright_is_tried_above():
    outright = {"BOTTOM", "CFG", "EXTRAEVAL", "DPOBASEAPI"} | set(HARMLESS)
    assert {variable for _, variable, _, _ in MAPPED} | outright == set(KNOWN)


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_d2pos_instructions_export_makes_a_run_that_passes_all_checks(script, tmp_path):
    lines, overrides = dry(script, f"local_run_dir={tmp_path}", **EXPORTED[script])
    assert {line.split("=")[0] for line in lines} == EXPORTED[script].keys()
    loss, sources = check_config(compose(overrides))
    assert loss.name == ("bradley_terry" if script == "train_rm" else "dpo") and sources


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_asks_for_nothing_is_accepted_everywhere(script):
    lines, _ = dry(script, **HARMLESS)
    assert {line.split("=")[0] for line in lines} == HARMLESS.keys()
    assert dry(script) == ({}, dry(script)[1])


@pytest.mark.parametrize(
    "script, variables, message",
    [
        (
            "d2po",
            {"KEEPLONG": "10"},
            "KEEPLONG=10 takes 20 from the reward of responses that have fewer words",
        ),
        ("opo", {"CFG": "src/configs/ppo_2gpu.yaml"}, "trainer=FSDPTrainer world_size=2"),
        (
            "opo",
            {"RELABELS": "16"},
            "RELABELS=16 is about the discriminator, which only d2po.sh has",
        ),
        ("d2po", {"BSIZE": "2"}, "DPOBATCHSIZE and MBSIZE are the batches of online learning"),
        ("d2po", {"REINIT": "True"}, "REINIT=True gives a reward model random weights"),
        ("d2po", {"ONLYOLDUPDATES": "1"}, "which is not implemented"),
        ("d2po", {"DPOBASEAPI": "facebook/opt-125m"}, "here it has the policy's"),
        ("d2po", {"CRATIO": "2"}, "here it learns whenever labels were bought"),
        (
            "train_rm",
            {"LTYPE": "prefoverpref"},
            "prefoverpref, which compares pairs with pairs, is not implemented",
        ),
        ("train_rm", {"NOLORA": "perhaps"}, "NOLORA=perhaps is neither True nor False"),
        ("train_rm", {"BSIZE": "two"}, "BSIZE=two is not a whole number"),
        ("train_rm", {"GREWARD": "math"}, "the labels are those of datasets="),
        ("train_rm", {"BETA": "0.1"}, "BETA=0.1 is about a policy's loss"),
        ("train_dpo", {"EXTRAEVAL": "x"}, "run function=eval on that set afterwards"),
        ("train_dpo", {"STEPS": "5"}, "STEPS=5 is about online learning (opo.sh, d2po.sh)"),
        ("eval", {"LR": "1"}, "nothing is trained here"),
        ("eval", {"BOTTOM": "200", "TOP": "400"}, "BOTTOM=200 skips prompts to sample for"),
        ("train_rm", {"TOP": "200"}, "TOP=200 is about the samples of eval.sh"),
        ("opo", {"DSET": "x"}, "DSET=x is about the samples of eval.sh"),
    ],
)
def test_a_variable_without_a_counterpart_is_refused(script, variables, message):
    result = run_script(script, DRYRUN="1", **variables)
    assert result.returncode == 2 and message in result.stderr
    assert "python train.py" not in result.stdout
    assert all(line.startswith("error: ") for line in result.stderr.splitlines())


def test_all_that_is_refused_is_said_at_once():
    result = run_script("train_dpo", "bagofwords", DRYRUN="1", CFG="x", MLEN="50", LR="")
    assert [line.split("=")[0].split(":")[1] for line in result.stderr.splitlines()] == [
        " CFG",
        " MLEN",
        " bagofwords",
    ]
    assert "arguments are KEY=VALUE here" in result.stderr


def test_arguments_are_passed_on_and_win():
    lines, overrides = dry(
        "d2po",
        "lr=7",
        "online.rounds=3",
        "datasets=[a b,c]",
        "-m",
        "--config-dir",
        "some folder",
        LR="1e-4",
        STEPS="9",
    )
    assert overrides[-6:] == [
        "lr=7",
        "online.rounds=3",
        "datasets=[a b,c]",
        "-m",
        "--config-dir",
        "some folder",
    ]
    config = compose(overrides[:-3])
    assert (config.lr, config.online.rounds, list(config.datasets)) == (7, 3, ["a b", "c"])
    lines, overrides = dry("train_rm", "model=tiny", BASEMODEL="some/where")
    assert lines["BASEMODEL=some/where"] == "replaced by the argument model=tiny"
    assert compose(overrides).model.name_or_path == compose([]).model.name_or_path


def test_paths_belong_to_the_folder_a_script_is_started_from(tmp_path):
    """It changed to the repository, where datasets=[pairs.jsonl] is another file or none."""
    result = subprocess.run(
        ["bash", ROOT / "scripts" / "d2po" / "eval.sh", "datasets=[pairs.jsonl]"],
        capture_output=True, text=True, cwd=tmp_path, check=True,
        env={"PATH": os.environ["PATH"], "BASEMODEL": "tiny", "MLEN": "8", "DRYRUN": "1"},
    )  # fmt: skip
    line = result.stdout.splitlines()[-1]
    assert line.startswith(f"python {ROOT / 'train.py'} function=eval") and " model=tiny" in line


def test_reinit_leaves_nothing_of_the_base_model(tmp_path):
    _, overrides = dry("train_rm", REINIT="True", NOLORA="True", BASEMODEL="tiny", BSIZE="2")
    run_here(
        *overrides,
        "n_examples=8",
        "n_eval_examples=8",
        "wandb.enabled=false",
        f"local_run_dir={tmp_path / 'run'}",
        f"cache_dir={tmp_path / 'cache'}",
    )
    before, after = (
        load_file(folder / "model.safetensors")
        for folder in (ROOT / "data" / "tiny", tmp_path / "run" / "LATEST" / "hf")
    )
    drawn = [name for name in before.keys() & after if before[name].ndim > 1]
    assert len(drawn) > 10 and all(
        (after[name] - before[name]).std() > 0.5 * before[name].std() for name in drawn
    )


def test_the_table_of_the_documentation_has_every_variable():
    rows = re.findall(
        r"^\| `([A-Z]+)` \|.*\|\s*([^|]*?)\s*\|$",
        (ROOT / "docs" / "online.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert {variable for variable, _ in rows} == set(KNOWN)
    takes = {variable: set() for variable in KNOWN}
    for variable, scripts in rows:
        takes[variable] |= {"all": set(SCRIPTS), "all but eval": set(SCRIPTS) - {"eval"}}.get(
            scripts
        ) or set(filter(None, scripts.split(", ")))
    values = {variable: value for _, variable, value, _ in MAPPED} | {
        "BOTTOM": "0",
        "LTYPE": "mag",
        "REINIT": "True",
    }
    for variable in KNOWN:
        refused = {
            script
            for script in SCRIPTS
            if run_script(script, DRYRUN="1", **{variable: values.get(variable, "7")}).returncode
        }
        assert refused == set(SCRIPTS) - takes[variable], variable


def test_a_reward_model_then_d2po_with_it(tmp_path):
    """A LoRA reward model of the shipped data, two rounds with it as discriminator, an evaluation;
    each script runs its command."""
    folders = {name: tmp_path / name for name in ("rm", "d2po", "eval")}
    small = ["n_eval_examples=16", "n_eval_model_samples=4", "wandb.enabled=false"]
    small.append(f"cache_dir={tmp_path / 'cache'}")

    def run(script: str, folder: str, *arguments: str, **variables) -> str:
        place = f"local_run_dir={folders[folder]}"
        result = run_script(script, *arguments, place, *small, BASEMODEL="tiny", **variables)
        assert result.returncode == 0, result.stderr
        return result.stdout

    output = run(
        "train_rm", "rm", "n_examples=16", "eval_every=16", LR="1e-3", BSIZE="2", EVFIRST="0"
    )
    assert output.startswith("BASEMODEL=tiny -> model=tiny\nLR=1e-3 -> lr=1e-3\n")
    rows = read_rows(folders["rm"] / "metrics.jsonl")
    assert [row["examples"] for row in rows if row["split"] == "train"] == [8, 16]
    assert rows[0]["examples"] > 0  # EVFIRST=0
    assert (folders["rm"] / "LATEST" / "adapter" / "adapter_config.json").exists()

    rounds = {"STEPS": "2", "MLEN": "16", "DPOBATCHSIZE": "16", "MBSIZE": "8", "PPOUPDATES": "1"}
    labels = {"SAMPN": "32", "RELABELS": "3", "UEPOCHS": "1"}
    start = f"online.discriminator_path={folders['rm']}"
    output = run("d2po", "d2po", start, "online.eval_every=2", **rounds, **labels)
    assert f"from {folders['rm']}" in output
    rows = [row for row in read_rows(folders["d2po"] / "metrics.jsonl") if row["split"] == "online"]
    assert [row["online/labels_bought"] for row in rows] == [3, 6]
    assert max(row["examples"] for row in rows) > 16  # two rounds of up to 16 pairs

    run("eval", "eval", f"model.archive={folders['d2po']}", MLEN="16", BSIZE="2")
    [row] = read_rows(folders["eval"] / "eval.jsonl")
    assert (row["temperature"], row["top_p"], row["samples_per_prompt"]) == (0.9, 0.9, 2)
    assert len(read_rows(folders["eval"] / "samples.jsonl")) == 32
