"""Every config composes, every key is commented and checked, wrong ones are refused with the
nearest valid ones."""

import copy
import dataclasses
import functools
import itertools
import operator
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from conftest import ROOT, run_command
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf, open_dict

import list_losses  # noqa: F401  registers losses
import losses  # noqa: F401  registers losses
import pair_losses  # noqa: F401  registers losses
import preference_datasets  # noqa: F401  registers the datasets
import token_losses  # noqa: F401  registers losses
import trainers  # noqa: F401  registers the trainers
from preflab.batching.loader import ORDERS
from preflab.batching.packing import LAYOUTS
from preflab.checks import check_config
from preflab.objective.registry import bind_loss
from preflab.readers.records import PAIRINGS
from preflab.rewards.registry import REWARDS, check_reward
from preflab.settings.command_line import check_command_line
from preflab.settings.help_text import help_text
from preflab.settings.identity import must_match, same_settings
from preflab.settings.keys import CONFIG_DIR, GROUPS, flat_keys, options
from preflab.settings.load import _load, load_settings
from preflab.settings.other_words import NOT_SETTINGS, NOTES, OUR_KEYS
from preflab.settings.overrides import Sources, check_overrides
from preflab.settings.run_folder import choose_run_dir, register_resolvers
from preflab.settings.schema import RULES, Settings, parse_value
from utils import ConfigError, DataError

CONTRACT = [
    "seed",
    "function",
    "exp_name",
    "batch_size",
    "temperature",
    "topp",
    "eval_batch_size",
    "debug",
    "fsdp_port",
    "datasets",
    "wandb.enabled",
    "wandb.entity",
    "wandb.project",
    "local_dirs",
    "sample_during_eval",
    "n_eval_model_samples",
    "do_first_eval",
    "local_run_dir",
    "lr",
    "gradient_accumulation_steps",
    "max_grad_norm",
    "max_length",
    "max_prompt_length",
    "n_epochs",
    "n_examples",
    "n_eval_examples",
    "trainer",
    "optimizer",
    "warmup_steps",
    "activation_checkpointing",
    "eval_every",
    "minimum_log_interval_secs",
    "model.name_or_path",
    "model.tokenizer_name_or_path",
    "model.archive",
    "model.reference_archive",
    "model.block_name",
    "model.policy_dtype",
    "model.fsdp_policy_mp",
    "model.reference_dtype",
    "world_size",
    "resume",
]
MODELS = [
    "tiny",
    "blank_model",
    "gpt2-large",
    "gpt2-xl",
    "gpt-neo",
    "gptj",
    "opt",
    "pythia28",
    "pythia69",
    "llama7b",
    "phi2",
    "smollm2",
    "qwen3-0.6b",
    "llama32-1b",
    "gemma3-1b",
    "olmo2-1b",
]


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


# ------------------------------------------------------------------------------------------- schema


# Keys of every loss, and of every reward, that are none of the schema.
COMMON = {"loss.module", "loss.weight", "loss.sft_weight", "loss.all_pairs", "reward.module"}
COMMON |= {"loss.divergence", "loss.divergence_alpha"}
COMMON |= {"loss.calibration", "loss.calibration_decay"}


def test_the_schema_and_config_yaml_have_the_same_keys():
    config = OmegaConf.load(CONFIG_DIR / "config.yaml")
    keys = {key for key in flat_keys(config) if not key.startswith(("hydra", "defaults"))}
    assert keys - COMMON == set(RULES)


def test_every_default_is_valid_and_settings_have_the_names_of_the_config():
    config = compose()
    settings = load_settings(config)
    assert settings.model.lora.r == 0 and settings.loss["beta"] == 0.1
    assert settings.reward["name"] == "lexicon" and settings.online.select == "conf"
    # hydra adds keys to null, and not to {}
    given = OmegaConf.to_container(config, resolve=True)
    given |= {"optimizer_args": {}, "chat_template_kwargs": {}}
    given["model"]["quantization_args"] = {}
    assert dataclasses.asdict(settings) == given


def test_choices_are_those_of_the_code_that_reads_them():
    for key, names in (
        ("layout", ("auto", *LAYOUTS)),
        ("order", ORDERS),
        ("pairing", PAIRINGS),
    ):
        accepted = str(RULES[key].accepts).removeprefix("one of ").split(", ")
        assert set(accepted) - {"or null"} == set(names)


@pytest.mark.parametrize("word", ["yes", "on", "true", "True", "1", 1, True])
def test_words_for_true(word):
    assert parse_value("sample_during_eval", word) is True
    assert parse_value("reference.cache", word) is True


@pytest.mark.parametrize("word", ["no", "off", "false", "FALSE", "0", 0, False])
def test_words_for_false(word):
    assert parse_value("wandb.enabled", word) is False


def test_the_checked_config_has_the_parsed_values():
    config = compose(
        "sample_during_eval=no", "wandb.enabled=off", "batch_size=64.0", "n_examples=1e3", "lr=1"
    )
    check_config(config)
    assert config.sample_during_eval is False and config.wandb.enabled is False
    assert type(config.batch_size) is int and type(config.n_examples) is int
    assert config.n_examples == 1000 and type(config.lr) is float
    assert OmegaConf.to_container(config)["data_dir"] == "${here:data}"


@pytest.mark.parametrize(
    "override, message",
    [
        ("sample_during_eval=flase", "must be true or false; did you mean false?"),
        ("sample_during_eval=null", "sample_during_eval=null must be true or false"),
        ("batch_size=abc", "batch_size=abc must be an integer of at least 1"),
        ("batch_size='64'", "batch_size='64' must be an integer"),
        ("batch_size=1.5", "must be an integer"),
        ("batch_size=true", "batch_size=true must be an integer"),
        ("batch_size=[8]", "batch_size=[8] must be an integer"),
        ("n_examples=inf", "must be an integer of at least 1, or null"),
        ("lr=nan", "lr=nan must be a number above 0"),
        ("lr=1e400", "lr=inf must be a number above 0"),
        ("lr={a:1}", "lr={a: 1} must be a number"),
        ("seed=-1", "from 0 to 4294967295"),
        ("seed=4294967296", "from 0 to 4294967295"),
        ("port=70000", "from 1 to 65535"),
        ("max_grad_norm=null", "for no clipping"),
        ("test_fraction=1", "in (0, 1)"),
        ("exp_name=true", "type \"exp_name='true'\""),
        ("local_dirs=runs", "type local_dirs=[runs]"),
        ("wandb=5", "the name of a group of settings"),
        ("wandb={enabled:maybe}", "wandb.enabled=maybe must be true or false"),
        ("wandb={enable:true}", "unknown key wandb.enable; did you mean wandb.enabled"),
        ("model.policy_dtype=float8", "accepted: float32, bfloat16, float16, float64"),
        ("model.fsdp_policy_mp=bf16", "did you mean bfloat16?"),
        ("seed=0,-1", "seed=-1 must be"),
        ("lr=range(0,3)", "lr=0"),
    ],
)
def test_a_value_of_another_type_or_range_is_refused_on_the_command_line(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_overrides([override])


def test_values_that_are_resolved_later_are_checked_then():
    check_overrides(["n_epochs=${seed}"])
    with pytest.raises(ConfigError, match="n_epochs=0 must be an integer of at least 1"):
        load_settings(compose("n_epochs=${seed}"))
    with pytest.raises(ConfigError, match="n_epochs: its value cannot be resolved"):
        load_settings(compose("n_epochs=${sed}"))
    with pytest.raises(ConfigError, match=r"loss.module=\.\./x must be the name of a module"):
        load_settings(compose("loss.module=../x"))
    with pytest.raises(ConfigError, match="seed: its value cannot be resolved"):
        load_settings(compose("seed=???"))


WRONG = [
    "null",
    "true",
    "flase",
    "''",
    "abc",
    "'64'",
    "-1",
    "0",
    "1.5",
    "64.0",
    "1e400",
    "-inf",
    "nan",
    "99999999999999999999999",
    "[]",
    "[1,x]",
    "[[1]]",
    "{}",
    "{a:1}",
    "[{b:null}]",
    "/no/such/path",
    "'a b'",
    "../x",
    "${seed}",
    "${no_such_key}",
]


def test_no_value_of_any_key_leads_to_an_exception_that_is_not_ours():
    """Every key with values of every form, drawn with a fixed seed: accepted, or refused by us."""
    rng = random.Random(0)
    accepted = refused = 0
    default = compose()
    parser = OverridesParser.create()
    keys = [*sorted(RULES), "loss.beta", "loss.sft_weight", "loss.name", "reward.scale"]
    keys += ["loss.all_pairs", "loss.divergence", "loss.divergence_alpha"]
    keys += ["loss.calibration", "loss.calibration_decay"]
    for key, value in ((key, value) for key in keys for value in rng.sample(WRONG, 4)):
        if key in GROUPS:
            continue
        override = f"{key}={value}"
        config = copy.deepcopy(default)
        try:
            check_overrides([override])
            given = parser.parse_overrides([override])[0].value()
            OmegaConf.update(config, key, given, merge=True)
            check_config(config)
            accepted += 1
        except (ConfigError, DataError) as error:
            assert "\n" not in str(error) and len(str(error)) < 1500
            refused += 1
        except Exception as error:
            pytest.fail(f"{override}: {type(error).__name__}: {error}")
    assert accepted > 40 and refused > 200


# ------------------------------------------------------------------------------------ command lines


def test_nothing_of_the_settings_imports_torch():
    names = [path.stem for path in (ROOT / "preflab" / "settings").glob("[a-z]*.py")]
    code = "import sys\n" + "".join(f"import preflab.settings.{name}\n" for name in names)
    code += "import train, generate, serve_reward, judge\n"
    code += "assert not {'torch', 'transformers'} & set(sys.modules)\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize(
    "arguments, code, text",
    [
        (["--help"], 0, "lr=5e-07"),
        (["--cfg", "job"], 0, "exp_name: default"),
        (["bach_size=8"], 2, "did you mean batch_size"),
        (["-sc", "install=bash"], 0, "complete -o nospace"),
        (["dpo"], 2, "did you mean loss=dpo"),
        (["--learning_rate", "1"], 2, "without dashes; here it is lr"),
        (["--config-dir", "/no/such/folder"], 2, "no such folder"),
    ],
)
def test_questions_and_slips_are_answered_without_torch(arguments, code, text):
    program = (
        "import sys, train\ntry:\n    train.main()\nfinally:\n"
        "    assert not {'torch', 'transformers'} & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == code, result.stderr
    assert text in result.stdout + result.stderr
    assert code == 0 or result.stderr.startswith("error: ")


def test_help_says_of_every_key_what_it_accepts_and_means():
    text = help_text("train.py", ["loss=tdpo"], Sources())
    assert max(map(len, text.splitlines())) <= 100
    for key, rule in RULES.items():
        assert rule.accepts is None or key in GROUPS or f"  {key}=" in text, key
    assert "  batch_size=64                     an integer of at least 1\n      examples" in text
    assert "loss.if_tdpo2=true" in text and "loss.label_smoothing" not in text


def test_words_of_other_tools_point_to_keys_that_exist():
    of_groups = ("loss.beta", "loss.label_smoothing", "loss.path")
    keys = {*RULES, *of_groups, *(key.replace("loss", "reward") for key in of_groups)}
    assert set(OUR_KEYS.values()) <= keys and set(NOTES) <= set(OUR_KEYS.values())
    assert not (set(OUR_KEYS) | set(NOT_SETTINGS)) & set(RULES)


def test_a_shell_that_split_or_expanded_braces_is_answered_with_the_word_in_quotes():
    for words in (
        ["online.discriminator={name:", "dpo,", "beta:", "0.1}"],
        ["online.discriminator=name:dpo", "online.discriminator=beta:0.1"],
    ):
        with pytest.raises(ConfigError, match=r'quotes: "online.*{name:.*beta:.*0.1}"'):
            check_overrides(words)
    with pytest.raises(ConfigError, match="type lr=3"):
        check_overrides(["lr", "=", "3"])


def test_a_folder_of_the_users_adds_options_and_keys_and_the_rest_is_checked(tmp_path):
    (tmp_path / "loss").mkdir()
    (tmp_path / "experiment").mkdir()
    (tmp_path / "loss" / "mine.yaml").write_text("defaults: [dpo]\nname: mine\ngain: 1.0\n")
    (tmp_path / "experiment" / "try.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /loss: mine\n"
    )
    own = Sources((CONFIG_DIR, tmp_path))
    check_overrides(["loss=mine", "loss.gain=2", "loss.beta=0.3"], own)
    check_overrides(["experiment=try", "loss.gain=2"], own)
    check_overrides(["loss=mine", f"hydra.searchpath=[file://{tmp_path}]", "loss.gain=2"])
    for words, message in (
        (["loss=mine", "loss.gian=2"], "did you mean loss.gain"),
        (["loss=mien"], "did you mean mine"),
        (["bach_size=2"], "did you mean batch_size"),
        (["loss.gain=2"], "unknown key loss.gain"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_overrides(words, own)


@pytest.mark.parametrize("key", ["model.name_or_path={}", "datasets=[{}]", "model.archive={}"])
def test_a_mistyped_path_is_called_a_path(key, tmp_path):
    with pytest.raises((ConfigError, DataError), match="no such f"):
        check_config(compose(key.format(tmp_path / "nothing")))


# ----------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "override, message",
    [
        ("lerning_rate=1", "unknown key lerning_rate; here it is lr"),
        ("bach_size=8", "did you mean batch_size"),
        ("loss.bta=0.1", "did you mean loss.beta"),
        ("loss.alpha=0.5", "unknown key loss.alpha"),  # the default loss is dpo, which has none
        ("model.achive=x", "did you mean model.archive"),
        ("wandb.projct=x", "did you mean wandb.project"),
        ("+new_key=1", "unknown key new_key"),
        ("++new_key=1", "unknown key new_key; the nearest are "),
        ("loss.alpha=1", "settings of loss=dpo: beta, label_smoothing"),
        ("name_or_path=x", "did you mean model.name_or_path"),
        ("learning_rate=1", "here it is lr"),
        ("weight_decay=1", "here it is optimizer_args='{weight_decay: VALUE}'"),
        ("optimizer_args.eps=1", 'set as a whole: "optimizer_args={eps: VALUE}"'),
        ("lr_scheduler_type=cosine", "here it is lr_schedule (constant, linear"),
        ("beta=1", "here it is loss.beta"),
        ("max_steps=1", "here it is n_examples (it counts examples"),
        ("per_device_train_batch_size=1", "here it is batch_size"),
        ("bf16=true", "model.fsdp_policy_mp=bfloat16"),
        ("training.gradient_checkpointing=true", "here it is activation_checkpointing"),
        ("dpo", "dpo has no key; did you mean loss=dpo?"),
        ("evl", "evl has no key; did you mean function=eval?"),
        ("batch_size", "batch_size has no value; type batch_size=VALUE"),
        ("exp_name=größe", "type \"exp_name='größe'\""),
        ("datasets=[größe.json,hh]", "type \"datasets=['größe.json',hh]\""),
        ("exp_name={a}", "type \"exp_name='{a}'\""),
        ("model.archive=runs/loss=dpo", "type \"model.archive='runs/loss=dpo'\""),
        ("loss=dop", "did you mean dpo"),
        ("online.discriminator.beta=1", "online.discriminator is set as a whole"),
        ("model=pythia", "did you mean pythia"),
        ("reward=lexikon", "did you mean lexicon"),
        ("loss=dpo,tdop2", "did you mean tdpo2"),
    ],
)
def test_misspelt_keys_and_options_are_refused_with_the_nearest(override, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_overrides([override])


def test_correct_command_lines_pass():
    check_overrides(["loss=dpo,odpo,cal-dpo,tdpo2", "seed=0,1", "hydra.sweep.dir=x"])
    check_overrides(
        ["loss=odpo", "loss.alpha=0.5", "loss.ratio=true", "model.lora.r=8", "datasets=[hh,shp]"]
    )
    check_overrides(["loss=tdpo", "loss.if_tdpo2=false"])
    check_overrides(["loss=glob(d*)", "loss.beta=1"])
    check_overrides(["lr=1e-5,1e-6", "temperature=choice([0,0.5],1)", "seed=range(0,4)"])
    assert check_command_line(["-m", "loss=dpo,odpo"])
    assert not check_command_line(["loss=tdpo", "loss.if_tdpo2=false", "--cfg", "job"])


def test_the_command_says_it_in_one_line_and_leaves_no_folder(tmp_path):
    folder = tmp_path / "run"
    for arguments, message in (
        (["bach_size=8"], "did you mean batch_size"),
        (["batch_size=7", "gradient_accumulation_steps=2"], "must be divisible"),
        (["datasets=[imbd]"], "did you mean imdb"),
    ):
        result = run_command("train.py", *arguments, f"local_run_dir={folder}", check=False)
        assert result.returncode == 2 and message in result.stderr
        assert result.stderr.startswith("error: ") and "Traceback" not in result.stderr
        assert not folder.exists()


def test_a_run_from_before_a_key_was_added_is_the_run_with_its_default():
    older, now = compose(), compose()
    for key in ("choose_responses", "loss.all_pairs", "online.oracle", "online"):
        group, _, last = key.rpartition(".")
        with open_dict(older):
            del (OmegaConf.select(older, group) if group else older)[last]
        must_match(older, now)
        assert same_settings(older, now), key
    with pytest.raises(ConfigError, match=r"online\.oracle was comparisons and is now scores"):
        must_match(older, compose("online.oracle=scores"))
    assert not same_settings(older, compose("choose_responses=stratified"))
    # rounds are none of a run that has none
    assert same_settings(now, compose("online.rounds=7"))
    online = compose("function=online")
    assert not same_settings(online, compose("function=online", "online.rounds=7"))


def test_must_match_tells_what_differs_and_lets_the_rest_change():
    before = compose()
    must_match(
        before,
        compose("n_epochs=5", "eval_every=7", "wandb.enabled=false", "local_run_dir=elsewhere"),
    )
    for override, message in (
        ("loss.beta=0.5", "loss.beta was 0.1 and is now 0.5"),
        ("seed=1", "seed was 0"),
        ("loss=odpo", "loss.name was dpo"),
        ("datasets=[hh]", "datasets was"),
    ):
        with pytest.raises(ConfigError, match=message):
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
    good = [str(tmp_path / "good")]
    assert Path(choose_run_dir(None, None, good, "exp", "eval")).name.startswith("eval_exp_")
    named = choose_run_dir(None, None, good, "exp", "eval", purpose="generate")
    assert Path(named).name.startswith("generate_exp_")
    with pytest.raises(ConfigError, match="none of these can be written"):
        choose_run_dir(None, None, [str(tmp_path / "file")], "exp")


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
        if file.name not in ("losses.py", "pair_losses.py", "list_losses.py", "token_losses.py"):
            quoted = [n for n in names if re.search(rf"""["']{n}["']""", file.read_text())]
            assert not quoted, f"{file.name} names {quoted}"


def test_the_saved_config_binds_again():
    config = OmegaConf.create(OmegaConf.to_yaml(compose("loss=tdpo2"), resolve=True))
    assert bind_loss(OmegaConf.to_container(config.loss)).name == "tdpo2"


# ------------------------------------------------------------------------- values of a wrong kind

# As a command line has them.
WORDS = (
    *("x", "''", "' '", "null", "true", "0", "-1", "64.0", "1.5", "1e400", "-1e400", "nan", "inf"),
    *("18446744073709551616", "18446744073709551615", "9223372036854775807", "9" * 5000, "0x10"),
    *("[]", "[[]]", "[1,x]", "[null]", "{}", "{a:1}", "{a:{b:[1]}}", "{1:2}", "[" * 50 + "]" * 50),
    *("'${seed}'", "'${nope}'", "'${seed'", "'${.}'", "'${loss}'", "'${oc.env:NOPE}'", "'a\nb'"),
    *("'\0'", "é", "\ud800", "../..", "2026-01-01", "1:30", "a,b", "range(3)", "glob(*)", "int(x)"),
)
# As a yaml file, or an edited config.yaml, has them.
VALUES = (
    *(None, True, False, 0, -1, 1, 2**31, 2**32, 2**63, 2**64 - 1, 2**64, 10**400, -(10**400)),
    *(0.5, 64.0, 1e308, float("nan"), float("inf"), -float("inf"), 5e-324, "", " ", "x", "null"),
    *("\0", "\n", "\ud800", "~", "[", "1e5", "nan", b"x", [], [[]], [None], ["", 1, {}], {}),
    *({"a": 1}, {1: 2}, {None: None}, {"": []}, {"name": None}, {"name": ["dpo"], "module": 3}),
)


def test_a_word_of_any_kind_for_any_key_is_accepted_or_refused_in_a_line(composed):
    words = [f"{sign}{key}={value}" for key in RULES for value in WORDS for sign in ("", "+", "~")]
    refused, n = 0, int(os.environ.get("FUZZ_EXAMPLES", 120))
    for word in random.Random(0).sample(words, n):
        config = copy.deepcopy(composed)
        try:
            check_overrides([word])
            [override] = OverridesParser.create().parse_overrides([word])
            if not override.is_sweep_override() and override.key_or_group not in GROUPS:
                ConfigLoaderImpl._apply_overrides_to_config([override], config)
                load_settings(config)
        except (ConfigError, DataError) as error:
            refused += 1
            assert "\n" not in str(error) and len(str(error)) < 4000, word
        except Exception as error:
            raise AssertionError(f"{word[:200]!r}") from error
    assert n // 2 < refused < n


def test_a_value_of_any_kind_for_any_key_is_accepted_or_refused(composed):
    plain = OmegaConf.to_container(composed, resolve=True)
    refused = 0
    for key, value in itertools.product(RULES, VALUES):
        tree = copy.deepcopy(plain)
        *groups, name = key.split(".")
        functools.reduce(operator.getitem, groups, tree)[name] = value
        try:
            settings = _load(Settings, tree, "")
        except ConfigError as error:
            refused += 1
            assert str(error).startswith(key) and "\n" not in str(error), (key, value)
        except Exception as error:
            raise AssertionError(f"{key}={value!r:.200}") from error
        else:
            assert functools.reduce(getattr, groups, settings) is not None
    assert len(RULES) * len(VALUES) > 4000 and refused > 2000


@pytest.mark.parametrize(
    "word",
    [
        *(
            "model=[null]",
            "dataset_columns=x",
            "reference.cache=1e400",
            "max_grad_norm=null",
            "lr=nan",
        ),
        *("seed=18446744073709551616", "seed=18446744073709551615", "seed='${seed'", "~seed"),
        *("+seed=1", "seed=glob(*)", f"seed={'9' * 5000}", "datasets='a\nb'", "cache_dir='a\nb'"),
    ],
)
def test_a_wrong_word_ends_the_command_with_a_line_and_code_2(word, capsys):
    with pytest.raises(SystemExit) as ended:
        check_command_line([word])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    assert word.lstrip("+~").split("=")[0] in message


@pytest.fixture(scope="module")
def composed():
    return compose()
