"""Sweeps: grids for each loss, names of folders, runs that fail beside runs that do not, and shares
of a machine."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, run_command, small_run
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from preflab.settings.command_line import check_command_line, words_for_hydra
from preflab.settings.sweep_words import folder_names, grids_of, runs_of, settings_in
from preflab.sweeps.grid import check_runs
from preflab.sweeps.objective import objective_of
from preflab.sweeps.pool import reason_of, shares
from utils import ConfigError

GRID = "loss=odpo loss.alpha=0.5,1.0"


def test_a_word_with_several_settings_is_a_grid_and_a_text_with_an_equals_sign_is_not():
    assert settings_in(GRID) == ["loss=odpo", "loss.alpha=0.5,1.0"]
    for word in ("loss=dpo,odpo", "prompt_template='Q: x y=1'", "lr=tag(log, interval(1, 2))"):
        assert settings_in(word) == [word]


def test_plain_words_go_with_every_grid_that_does_not_set_their_key():
    words = ["loss=dpo,ipo", "loss.beta=0.1,0.5", "seed=0", f"{GRID} loss.beta=1"]
    runs = [sorted(run) for grid in grids_of(words) for run in runs_of(grid)]
    plain = [
        ["loss.beta=" + b, "loss=" + x, "seed=0"] for x in ("dpo", "ipo") for b in (".1", ".5")
    ]
    plain = [[w.replace("=.", "=0.") for w in run] for run in plain]
    odpo = [["loss.alpha=" + a, "loss.beta=1", "loss=odpo", "seed=0"] for a in ("0.5", "1.0")]
    assert sorted(runs) == sorted(plain + odpo)


def test_a_sweep_of_a_loss_without_a_setting_is_refused_and_says_how_to_write_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "-m"])
    with pytest.raises(ConfigError, match=r"settings of loss=dpo: .*one word in quotes"):
        check_runs(runs_of(["loss=dpo,odpo", "loss.alpha=0.5,1.0"]))
    check_runs([run for grid in grids_of(["loss=dpo", GRID]) for run in runs_of(grid)])


def test_a_misspelt_key_inside_a_grid_is_refused(capsys):
    with pytest.raises(SystemExit):
        check_command_line(["-m", "loss=dpo", "loss=odpo loss.alhpa=1"])
    assert "did you mean loss.alpha" in capsys.readouterr().err


def test_hydra_reads_the_rewritten_command_line_and_gets_every_word_back():
    words = ["-m", "seed=0,1", "loss.beta=0.1", GRID, "loss=ipo reward.path='a b'"]
    *others, held = words_for_hydra(words)
    assert others == ["-m", "seed=0,1"]
    assert OverridesParser.create().parse_override(held).value() is not None
    read = OverridesParser.create().parse_override(held).value()
    assert [str(word) for word in read] == words[2:]


def test_names_hold_what_varies_and_need_no_quotes():
    runs = [
        ["loss=dpo", "n_examples=8", "model.archive=/a b/x=1.pt"],
        ["loss=odpo", "loss.alpha=0.5", "n_examples=8", "model.archive=/a b/x,1.pt"],
        ["loss=odpo", "loss.alpha=0.5", "n_examples=8", "model.archive=/a b/x=1.pt"],
    ]
    names = folder_names(runs)
    assert names[0] == "loss-dpo_model.archive--a-b-x-1.pt" and len(set(names)) == 3
    for name in [*names, *folder_names([["exp_name=" + "x" * 300], ["exp_name=y"]])]:
        read = OverridesParser.create().parse_override(f"model.archive=DIR/{name}")
        assert read.value() == f"DIR/{name}" and len(name) <= 150
    assert folder_names([["seed=0"]]) == ["seed-0"]


def test_a_machine_is_shared_out():
    assert shares(2, [0, 1, 2, 3, 4], ["0", "1"]) == [([0, 1], ["0"]), ([2, 3], ["1"])]
    assert shares(3, [0, 1], []) == [([0], []), ([1], []), ([0], [])]
    assert shares(2, [0, 1], ["7"]) == [([0], ["7"]), ([1], ["7"])]


def test_the_reason_of_a_failed_run_is_its_error(tmp_path):
    log = tmp_path / "a.log"
    log.write_text("error: lr=-1: at least 0\nwandb: bye\n")
    assert reason_of(2, log).startswith("lr=-1: at least 0;")
    assert reason_of(-9, log).startswith("killed by SIGKILL")


def test_the_objective_is_a_number_of_the_summary_or_none():
    summary = {"kl": 1.5, "policy_reward": float("nan"), "eval_loss": 2}
    assert objective_of("kl", summary) == 1.5
    assert objective_of(["eval_loss", "kl"], summary) == [2, 1.5]
    assert objective_of("policy_reward", summary) is None
    on_sides = {"kl": 1.5, "dev/kl": 1.25, "test/kl": 1.75, "seconds": 9.0}
    assert objective_of(["kl", "seconds"], on_sides) == [
        1.25,
        9.0,
    ]  # the test prompts choose nothing
    assert objective_of(OmegaConf.create({"o": ["kl", "missing"]}).o, summary) is None


@pytest.mark.parametrize(
    "launcher", [[], ["hydra/launcher=local", "hydra.launcher.n_jobs=2"]], ids=["one", "two"]
)
def test_a_refused_run_does_not_stop_the_others(launcher, imdb_dir, llama_folder, tmp_path):
    words = small_run(llama_folder, imdb_dir, tmp_path / "sweep", "n_examples=8", "debug=true")
    words = [*words, "sample_during_eval=false"]
    refused = "loss=ipo loss.beta=0.1 batch_size=7 gradient_accumulation_steps=2"
    done = run_command("train.py", "-m", *launcher, refused, "loss=dpo", *words, check=False)
    assert done.returncode == 1, done.stderr
    finished = [path.parent.name for path in (tmp_path / "sweep").glob("*/summary.json")]
    assert finished == ["batch_size-8_loss-dpo"]
    assert "1 of 2 runs did not finish" in done.stderr and "must be divisible" in done.stderr
    assert "Final evaluations" in done.stdout


POOL = """
import sys
from pathlib import Path
from types import SimpleNamespace
from preflab.sweeps import pool

RUN = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"
pool.command_of = lambda *_: [sys.executable, "-c", RUN]
pool.visible_gpus = list
folder = Path(sys.argv[1])

def load(config, overrides):
    sweep = SimpleNamespace(dir=str(folder), subdir=overrides[0])
    return SimpleNamespace(hydra=SimpleNamespace(sweep=sweep))

hydra = SimpleNamespace(overrides=SimpleNamespace(hydra=[]))
loader = SimpleNamespace(load_sweep_config=load)
runs = pool.Pool(2)
runs.setup(
    hydra_context=SimpleNamespace(config_loader=loader),
    task_function=None,
    config=SimpleNamespace(hydra=hydra),
)
runs.launch([["one"], ["two"], ["three"]], 0)
"""


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_runs_end_with_the_pool_that_started_them(signum, tmp_path):
    logs = [tmp_path / f"{name}.log" for name in ("one", "two")]
    pool = subprocess.Popen(
        [sys.executable, "-c", POOL, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    _wait(lambda: all(log.is_file() and log.read_text().endswith("\n") for log in logs))
    runs = [int(log.read_text()) for log in logs]
    assert all(map(_is_alive, runs))
    pool.send_signal(signum)
    _, errors = pool.communicate(timeout=60)
    _wait(lambda: not any(map(_is_alive, runs)))
    assert not (tmp_path / "three.log").exists()
    if signum != signal.SIGKILL:
        assert pool.returncode == 128 + signum and "1 runs were not started" in errors


def _is_alive(pid: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked for does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


def _wait(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)
