"""Recipes of config/experiment/: each is what was published, composes with either spelling, is
checked, and runs a step."""

import json
from pathlib import Path

import hydra
import pytest
from conftest import (
    architecture_of,
    make_tokenizer,
    read_rows,
    run_here,
    save_model,
    scored_rows,
    write_jsonl,
)
from omegaconf import OmegaConf
from transformers import AutoModelForSequenceClassification

from preflab.settings.command_line import check_arguments
from preflab.settings.keys import CONFIG_DIR, options
from preflab.settings.run_folder import register_resolvers
from utils import ConfigError

RECIPES = sorted(options("experiment"))
HH = (
    "gradient_accumulation_steps=2 batch_size=64 eval_batch_size=32 trainer=FSDPTrainer"
    " sample_during_eval=false model.fsdp_policy_mp=bfloat16"
)
OF_ODPO = (
    " n_examples=5000 max_length=1024 max_prompt_length=256 max_new_tokens=100"
    " reward=classifier reward.include_prompt=true"
)
OF_CAL_DPO = f"{HH} optimizer=AdamW lr_schedule=cosine warmup_steps=0.1"
# The command lines of the papers' repositories, with what their configs and code set besides.
PUBLISHED = {
    "odpo_imdb": (
        "model=gpt2-large datasets=[imdb] loss=odpo seed=1 loss.beta=0.7 loss.alpha=0.5"
        " exp_name=imdb gradient_accumulation_steps=2 batch_size=32 eval_batch_size=32"
        " trainer=FSDPTrainer sample_during_eval=false"
        f"{OF_ODPO} reward.path=lvwerra/distilbert-imdb reward.label=POSITIVE"
    ),
    "odpo_toxicity": (
        "model=gpt-neo datasets=[toxicity] loss=odpo seed=1 loss.beta=0.05 loss.alpha=1."
        " exp_name=toxicity gradient_accumulation_steps=2 batch_size=32 eval_batch_size=32"
        " trainer=FSDPTrainer sample_during_eval=false"
        f"{OF_ODPO} reward.path=facebook/roberta-hate-speech-dynabench-r4-target"
        " reward.label=nothate"
    ),
    "odpo_tldr": (
        "model=gptj datasets=[tldr] loss=odpo seed=0 loss.beta=0.5 exp_name=tldr"
        " gradient_accumulation_steps=2 batch_size=16 max_prompt_length=512 max_length=1024"
        " eval_batch_size=16 trainer=FSDPTrainer sample_during_eval=false"
    ),
    "sft_hh": f"model=pythia28 datasets=[hh] loss=sft exp_name=hh_pythia28 {HH}",
    "cal_dpo_hh": (
        f"model=pythia28 datasets=[hh] loss=cal-dpo loss.beta=0.1 exp_name=hh_pythia28 {OF_CAL_DPO}"
    ),
    "dpo_hh": f"model=pythia28 datasets=[hh] loss=dpo loss.beta=0.1 exp_name=hh_pythia28 {HH}",
    "tdpo2_hh": (
        "model=pythia28 datasets=[hh] loss=tdpo2 loss.alpha=0.5 loss.beta=0.1 exp_name=hh_pythia28"
        f" {HH}"
    ),
    "tdpo1_hh": f"model=pythia28 datasets=[hh] loss=tdpo1 loss.beta=0.1 exp_name=hh_pythia28 {HH}",
    "sft_tldr": f"model=pythia28 datasets=[tldr_filtered] loss=sft exp_name=sft_tldr_pythia28 {HH}",
    "cal_dpo_tldr": (
        "model=pythia28 datasets=[tldr] loss=cal-dpo loss.beta=0.001 exp_name=align_tldr_pythia28"
        f" {OF_CAL_DPO}"
    ),
    "dpo_risk_averse": (
        "model=phi2 datasets=[risk_averse_dpo.json] loss=dpo loss.beta=0.5 n_epochs=3 batch_size=4"
        " lr=1e-5 wandb.project=risk-averse-phi2 exp_name=risk_averse"
    ),
}
# D2PO's settings (arXiv:2405.01511): of every run, of those with a discriminator, and of each task.
OF_OPO = {
    "function": "online",
    "loss.name": "dpo",
    "loss.beta": 0.05,
    "optimizer": "AdamW",
    "lr": 5e-5,
    "temperature": 1.0,
    "online.responses_per_prompt": 2,
    "online.max_new_tokens": 50,
}
OF_D2PO = OF_OPO | {
    "online.discriminator": "bradley_terry",
    "online.discriminator_lr": 1e-4,
    "online.discriminator_batch_size": 16,
    "online.discriminator_epochs": 4,
    "online.relabel_every": 256,
    "online.relabels": 16,
    "online.select": "conf",
}
ONLINE = {
    "opo": OF_OPO,
    "d2po": OF_D2PO,
    "d2po_bagofwords": (
        OF_D2PO | {"reward.name": "bagofwords", "model.name_or_path": "facebook/opt-125m"}
    ),
    "d2po_unique_nns": (
        OF_D2PO | {"reward.name": "unique_nns", "model.name_or_path": "facebook/opt-125m"}
    ),
    "d2po_contrastivedistill": (
        OF_D2PO
        | {
            "reward.name": "contrastivedistill",
            "reward.large": "facebook/opt-1.3b",
            "reward.small": "facebook/opt-125m",
            "model.name_or_path": "facebook/opt-125m",
        }
    ),
    "d2po_math": (
        OF_D2PO
        | {
            "reward.name": "math",
            "model.name_or_path": "facebook/opt-1.3b",
            "online.max_new_tokens": 100,
        }
    ),
    "d2po_ultrafeedback": (
        OF_D2PO
        | {
            "reward.name": "eurusrm",
            "model.name_or_path": "allenai/tulu-2-7b",
            "online.max_new_tokens": 256,
        }
    ),
}


def compose(*overrides):
    register_resolvers()
    with hydra.initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return hydra.compose("config", overrides=list(overrides))


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_is_its_published_command(name):
    assert compose(f"experiment={name}") == compose(*PUBLISHED[name].split())


@pytest.mark.parametrize("name", sorted(ONLINE))
def test_a_recipe_of_d2po_has_its_settings(name):
    config = compose(f"experiment={name}")
    assert {key: OmegaConf.select(config, key) for key in ONLINE[name]} == ONLINE[name]
    assert (config.online.discriminator is None) == (name == "opo")


# ------------------------------------------------------------------------------------ command lines


def test_both_spellings_compose_and_the_command_line_wins():
    overrides = ["loss.alpha=0.7", "model=tiny", "lr=1"]
    for recipe in ("experiment=odpo_imdb", "+experiment=odpo_imdb"):
        check_arguments([recipe, *overrides])
        config = compose(recipe, *overrides)
        assert (config.loss.name, config.loss.beta, config.loss.alpha, config.lr, config.seed) == (
            "odpo",
            0.7,
            0.7,
            1,
            1,
        )
        assert config.model.name_or_path == compose().model.name_or_path
    assert (
        compose("experiment=odpo_imdb", "loss=dpo").loss
        == compose("loss=dpo", "loss.beta=0.7", "+loss.alpha=0.5").loss
    )  # hydra keeps what a recipe sets


def test_recipes_stack_and_the_last_wins():
    check_arguments(["experiment=[d2po_math,smoke]", "reward=bagofwords"])
    config = compose("experiment=[d2po_math,smoke]")
    assert (
        config.reward.name,
        config.function,
        config.online.rounds,
        config.online.max_new_tokens,
        config.wandb.enabled,
    ) == ("math", "online", 1, 16, False)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["+experiment=odpo_imbd"],
            "experiment=odpo_imbd: no such file in config/experiment/; did you mean odpo_imdb",
        ),
        (["experiment=d2po_bagofword"], "did you mean d2po_bagofwords"),
        (["experiment=[smoke,overfi]"], "did you mean overfit"),
        (["experiment=dpo_hh,tdpo3_hh"], "did you mean tdpo2_hh"),
        (["experiment=dpo_hh", "loss.alpha=1"], "unknown key loss.alpha"),  # dpo has none
        (["experiment=d2po_math", "reward.path=x"], "unknown key reward.path"),
        (["experiment=odpo_imdb", "loss=dpo", "loss.alpha=1"], "unknown key loss.alpha"),
        (["experiment.lr=1"], "unknown key experiment.lr"),
    ],
)
def test_what_does_not_fit_a_recipe_is_refused_with_the_nearest(overrides, message):
    with pytest.raises(ConfigError, match=message.replace("[", "\\[")):
        check_arguments(overrides)


def test_keys_of_a_recipes_own_options_are_accepted():
    for overrides in (
        ["+experiment=odpo_imdb", "loss.alpha=1", "loss.offset=none"],
        ["experiment=tdpo2_hh", "loss.alpha=1"],
        ["experiment=cal_dpo_tldr", "loss.cal_weight=0.5"],  # two recipes further down
        [
            "experiment=d2po_contrastivedistill",
            "reward.large=x",
            "reward.small=y",
            "loss.label_smoothing=0.1",
        ],
        ["-m", "experiment=odpo_imdb,cal_dpo_hh", "seed=0,1"],
    ):
        check_arguments(overrides)


# ------------------------------------------------------------------------------------------- a step


def blocks_of_recipes() -> dict[str, str]:
    """The model.block_name of every recipe; those with the shipped model run as they come."""
    models = {name: compose(f"experiment={name}").model for name in RECIPES}
    return {
        name: model.block_name
        for name, model in models.items()
        if not Path(model.name_or_path).is_dir()
    }


BLOCKS = blocks_of_recipes()
STEP = [
    "batch_size=8",
    "n_examples=8",
    "eval_batch_size=8",
    "n_eval_examples=8",
    "n_eval_model_samples=4",
    "eval_every=8",
    "wandb.enabled=false",
    "online.rounds=1",
    "online.relabel_every=4",
    "online.relabels=4",
    "online.discriminator_epochs=1",
    "online.eval_every=1",
]
SMALL = ["max_length=64", "max_prompt_length=32", "max_new_tokens=8", "online.max_new_tokens=8"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Small models, and all the data that recipes read, the hub's among them."""
    folder = tmp_path_factory.mktemp("recipes")
    of_rewards = {"gpt2", "llama", "opt"}
    for architecture in of_rewards | {architecture_of(block) for block in BLOCKS.values()}:
        save_model(folder / architecture, architecture, scale=1.0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    tokenizer.save_pretrained(folder / "llama")
    AutoModelForSequenceClassification.from_pretrained(
        folder / "llama", num_labels=1
    ).save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    data = folder / "data"
    for split in ("train", "test"):
        write_jsonl(data / f"imdb-sft-{split}.jsonl", scored_rows())
        write_jsonl(data / f"toxicity-sft-{split}-reward.jsonl", scored_rows())
        turns = [
            {
                "chosen": f"\n\nHuman: q{i}\n\nAssistant: yes",
                "rejected": f"\n\nHuman: q{i}\n\nAssistant: no",
            }
            for i in range(12)
        ]
        write_jsonl(data / "Anthropic" / "hh-rlhf" / f"{split}.jsonl", turns)
        (data / "tldr").mkdir(exist_ok=True), (data / "tldr_filtered").mkdir(exist_ok=True)
        (data / "tldr" / f"{split}.json").write_text(
            json.dumps([{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(12)])
        )
        (data / "tldr_filtered" / f"{split}.json").write_text(
            json.dumps([{"prompt": f"p{i}", "chosen": " a"} for i in range(12)])
        )
        write_jsonl(
            data / "trl-lib" / "ultrafeedback-prompt" / f"{split}.jsonl",
            [{"prompt": [{"role": "user", "content": f"question {i}"}]} for i in range(12)],
        )
    write_jsonl(
        data / "openbmb" / "UltraFeedback" / "train.jsonl",
        [{"source": "x", "instruction": f"instruction {i}"} for i in range(24)],
    )
    write_jsonl(
        data / "risk_averse_dpo.json.jsonl",
        [{"prompt": f"p{i}", "chosen": " a", "rejected": " b"} for i in range(12)],
    )
    write_jsonl(data / "prompts.jsonl", [{"prompt": f"({i % 9 + 1}+2) = "} for i in range(24)])
    return folder


def swapped(name: str, place) -> list[str]:
    """Overrides that put small things in the place of what a recipe asks a hub or a user for."""
    more = {
        "odpo_tldr": ["datasets=[imdb]"],  # pairs without ratings are there under its own name
        "dpo_risk_averse": [f"datasets=[{place / 'data' / 'risk_averse_dpo.json.jsonl'}]"],
        "d2po_contrastivedistill": [
            f"datasets=[{place / 'data' / 'prompts.jsonl'}]",
            f"reward.large={place / 'opt'}",
            f"reward.small={place / 'gpt2'}",
        ],
        "d2po_math": [f"datasets=[{place / 'data' / 'prompts.jsonl'}]"],
        "d2po_ultrafeedback": [f"reward.path={place / 'judge'}", "reward.head=null"],
    }.get(name, [])
    return [
        *STEP,
        *SMALL,
        f"model.name_or_path={place / architecture_of(BLOCKS[name])}",
        f"data_dir={place / 'data'}",
        *more,
    ]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_runs_a_step(name, place, tmp_path):
    overrides = [
        f"+experiment={name}",
        *(swapped(name, place) if name in BLOCKS else STEP),
        f"local_run_dir={tmp_path / 'run'}",
        f"cache_dir={place / 'cache'}",
    ]
    check_arguments(overrides)
    summary = run_here(*overrides)
    assert summary["finished"] and (tmp_path / "run" / "LATEST" / "hf").is_dir()
    assert summary["examples"] == 8 or summary["function"] == "online"
    if "d2po" in name:
        assert summary["rounds"] == 1 and summary["labels_bought"] == 4
        [row] = (
            row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["split"] == "online"
        )
        assert row["online/pairs"] > 0 and summary["steps"] == 1
    if name == "opo":
        assert summary["rounds"] == 1 and summary["labels_bought"] == 8 and summary["steps"] == 1


def test_ten_pairs_are_overfitted(tmp_path):
    """The shipped model and data, as `python train.py experiment=overfit` has them."""
    summary = run_here(
        "experiment=overfit", f"local_run_dir={tmp_path / 'run'}", f"cache_dir={tmp_path / 'cache'}"
    )
    assert (
        summary["steps"] == 50 and summary["eval_accuracy"] == 1.0 and summary["eval_loss"] < 0.01
    )
    assert (
        read_rows(tmp_path / "run" / "metrics.jsonl")[0]["rewards_eval/accuracies"] == 0.5
    )  # policy and reference are one there
