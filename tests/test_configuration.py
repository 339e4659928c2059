"""Every config composes, every key is commented and checked, wrong ones are refused with the
nearest valid ones."""

import re
from pathlib import Path

import hydra
import pytest
from conftest import ROOT, run_command
from omegaconf import OmegaConf

from preflab.objective.registry import bind_loss
from preflab.rewards.registry import REWARDS, check_reward
from preflab.settings.identity import must_match
from preflab.settings.keys import CONFIG_DIR, flat_keys, options
from preflab.settings.overrides import check_overrides
from preflab.settings.run_folder import choose_run_dir, name_of_run, register_resolvers
from utils import ConfigError

CONTRACT = """seed function exp_name batch_size temperature topp eval_batch_size debug fsdp_port datasets wandb.enabled wandb.entity
wandb.project local_dirs sample_during_eval n_eval_model_samples do_first_eval local_run_dir lr gradient_accumulation_steps
max_grad_norm max_length max_prompt_length n_epochs n_examples n_eval_examples trainer optimizer warmup_steps
activation_checkpointing eval_every minimum_log_interval_secs model.name_or_path model.tokenizer_name_or_path model.archive
model.reference_archive model.block_name model.policy_dtype model.fsdp_policy_mp model.reference_dtype world_size resume""".split()
MODELS = (
    "tiny blank_model gpt2-large gpt2-xl gpt-neo gptj opt pythia28 pythia69 llama7b phi2".split()
)


def compose(*overrides):
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


def test_every_key_of_the_contract_exists():
    assert set(CONTRACT) <= flat_keys(compose())


@pytest.mark.parametrize("name", MODELS)
def test_every_model_composes(name):
    config = compose(f"model={name}")
    assert name == "blank_model" or config.model.name_or_path
    assert config.lr == (5e-7 if name != "tiny" else config.lr)


def test_options_are_the_files_of_the_groups():
    assert options("model") == set(MODELS)
    assert options("reward") == {
        name for name, reward in REWARDS.items() if reward.__module__.startswith("preflab.rewards.")
    }  # not those of a user's file


@pytest.mark.parametrize("reward", sorted(options("reward")))
def test_every_reward_composes_and_fits_its_function(reward):
    needed = {
        "classifier": ["reward.path=x", "reward.label=y"],
        "reward_model": ["reward.path=x"],
        "http": ["reward.url=x"],
        "ultrafeedbackgold": ["reward.base_url=x", "reward.model=x"],
    }.get(reward, [])
    check_reward(compose(f"reward={reward}", *needed).reward)


def test_a_comment_stands_above_every_key_of_config_yaml():
    """`--help` shows these comments. Recipes and options need a comment only where it says
    something."""
    above = ""
    text = (CONFIG_DIR / "config.yaml").read_text(encoding="utf-8")
    for line in text.split("\nhydra:")[0].splitlines():
        if re.match(r"\s*[\w-]+:", line) and line != "defaults:":
            assert above.strip().startswith("# "), f"config.yaml: {line!r}"
        above = line


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "override, told",
    [
        ("lerning_rate=1", "unknown key lerning_rate"),
        ("bach_size=8", "did you mean batch_size"),
        ("loss.bta=0.1", "did you mean loss.beta"),
        ("loss.alpha=0.5", "unknown key loss.alpha"),  # the default loss is dpo, which has none
        ("model.achive=x", "did you mean model.archive"),
        ("wandb.projct=x", "did you mean wandb.project"),
        ("+new_key=1", "unknown key new_key"),
        ("++new_key=1", "unknown key new_key"),
        ("loss=dop", "did you mean dpo"),
        ("model=pythia", "did you mean pythia"),
        ("reward=lexikon", "did you mean lexicon"),
        ("loss=dpo,tdop2", "did you mean tdpo2"),
    ],
)
def test_misspelt_keys_and_options_are_refused_with_the_nearest(override, told):
    with pytest.raises(ConfigError, match=re.escape(told)):
        check_overrides([override])


def test_correct_command_lines_pass():
    check_overrides(["-m", "loss=dpo,odpo,cal-dpo,tdpo2", "seed=0,1", "hydra.sweep.dir=x"])
    check_overrides(
        ["loss=odpo", "loss.alpha=0.5", "loss.ratio=true", "model.lora.r=8", "datasets=[hh,shp]"]
    )
    check_overrides(["loss=tdpo", "loss.if_tdpo2=false", "--cfg", "job"])


def test_the_command_says_it_in_one_line_and_leaves_no_folder(tmp_path):
    folder = tmp_path / "run"
    for arguments, told in (
        (["bach_size=8"], "did you mean batch_size"),
        (["batch_size=7", "gradient_accumulation_steps=2"], "must be divisible"),
        (["datasets=[imbd]"], "did you mean imdb"),
    ):
        result = run_command("train.py", *arguments, f"local_run_dir={folder}", check=False)
        assert result.returncode == 2 and told in result.stderr
        assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
        assert not folder.exists()


def test_must_match_tells_what_differs_and_lets_the_rest_change():
    before = compose()
    must_match(
        before,
        compose("n_epochs=5", "eval_every=7", "wandb.enabled=false", "local_run_dir=elsewhere"),
    )
    for override, told in (
        ("loss.beta=0.5", "loss.beta was 0.1 and is now 0.5"),
        ("seed=1", "seed was 0"),
        ("loss=odpo", "loss.name was dpo"),
        ("datasets=[hh]", "datasets was"),
    ):
        with pytest.raises(ConfigError, match=told):
            must_match(before, compose(override))


# -------------------------------------------------------------------------------------- run folders


def test_run_dir_is_the_first_usable_of_local_dirs(tmp_path):
    (tmp_path / "file").write_text("")
    chosen = Path(
        choose_run_dir(None, None, [str(tmp_path / "file"), str(tmp_path / "good")], "exp")
    )
    assert chosen.parent.parent == tmp_path / "good" and chosen.name.startswith("exp_")
    assert list(chosen.parent.iterdir()) == []
    assert choose_run_dir("given", None, [], "exp") == "given"
    assert choose_run_dir("given", "resumed", [], "exp") == "resumed"
    with pytest.raises(ConfigError, match="none of these can be written"):
        choose_run_dir(None, None, [str(tmp_path / "file")], "exp")


def test_names_of_sweep_runs_are_safe_distinct_and_short():
    a = name_of_run(
        ["loss=odpo", "loss.alpha=0.5", "model.archive=runs/a/policy.pt", "local_run_dir=/x"]
    )
    assert a == "loss=odpo,loss.alpha=0.5,model.archive=runs_a_policy.pt"
    long = [name_of_run([f"exp={i}" + "x" * 300]) for i in range(2)]
    assert long[0] != long[1] and max(map(len, long)) <= 150


def test_a_new_loss_is_one_function_and_one_yaml(tmp_path, imdb_dir, llama_folder):
    """What the documentation promises, from outside the repository: a file, a yaml, and it
    trains."""
    from conftest import read_rows, small_run

    (tmp_path / "conf" / "loss").mkdir(parents=True)
    (tmp_path / "my_losses.py").write_text(
        "import torch.nn.functional as F\nfrom losses import LossOutput, Pair,"
        ' register_loss\n\n@register_loss("hinge2", reads={"reference"})\ndef hinge2(pair: Pair, *,'
        ' beta: float, margin: float = 1.0) -> LossOutput:\n    """max(0, margin - beta h) (SLiC,'
        ' arXiv:2305.10425)."""\n    losses = F.relu(margin - beta * (pair.chosen_logratio -'
        " pair.rejected_logratio))\n    return LossOutput(losses, beta * pair.chosen_logratio, beta"
        " * pair.rejected_logratio)\n"
    )
    (tmp_path / "conf" / "loss" / "hinge2.yaml").write_text(
        f"name: hinge2\nmodule: {tmp_path / 'my_losses.py'}\nbeta: 0.1\nmargin: 2.0\n"
    )
    overrides = small_run(
        llama_folder, imdb_dir, tmp_path / "run", "loss=hinge2", "loss.margin=3.0", "lr=1e-4"
    )
    run_command("train.py", "--config-dir", tmp_path / "conf", *overrides)
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert rows[0]["loss/eval"] == pytest.approx(3.0) and rows[-1]["loss/eval"] < 3.0


def test_no_file_but_the_registry_and_its_yaml_knows_a_losss_name():
    names = [path.stem for path in (CONFIG_DIR / "loss").glob("*.yaml")]
    for file in ROOT.glob("*.py"):
        if file.name not in ("losses.py", "more_losses.py"):
            quoted = [n for n in names if re.search(rf"""["']{n}["']""", file.read_text())]
            assert not quoted, f"{file.name} names {quoted}"


def test_the_saved_config_binds_again():
    config = OmegaConf.create(OmegaConf.to_yaml(compose("loss=tdpo2"), resolve=True))
    assert bind_loss(OmegaConf.to_container(config.loss)).name == "tdpo2"
