"""Reports of run folders that the tests write: tables, figures and pages."""

import contextlib
import csv
import json
import math
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, read_rows, write_jsonl
from matplotlib.image import imread
from omegaconf import OmegaConf

from preflab.evaluation.worklist import describe
from preflab.reports import plots, sweep_plots
from preflab.reports.evaluation_tables import evaluation_tables, short_names, winrate_table
from preflab.reports.plot_style import KL_LABEL, smooth
from preflab.reports.run import write_report
from preflab.reports.run_files import read_jsonl
from preflab.reports.runs import (
    MAX_POINTS,
    Run,
    differing_settings,
    find_runs,
    group_runs,
    training_names,
)
from preflab.reports.sample_cards import Origin, sample_cards
from preflab.reports.statistics import envelope, over_seeds_and_prompts, paired_difference
from preflab.reports.sweep import write_comparison
from preflab.reports.tables import CONSOLE_WIDTH, Table, latex, summary_table, verdict
from utils import ConfigError, DataError, mean_and_error

SUMMARY = {
    "finished": True,
    "loss": "dpo",
    "reward": "lexicon",
    "policy_reward": 1.31,
    "policy_reward_se": 0.02,
    "reference_reward": 1.0,
    "reference_reward_se": 0.03,
    "reward_gain": 0.31,
    "reward_gain_se": 0.04,
    "kl": 2.125,
    "kl_se": 0.1,
    "eval_accuracy": 0.71,
    "eval_loss": 0.5,
    "pairs_per_second": 123.4,
    "examples": 128,
}


def make_run(folder, *, loss="dpo", seed=0, beta=0.1, summary=SUMMARY, sampled=True, pairs=True):
    """A run folder with five evaluations and training steps; summary=None leaves it unfinished."""
    folder.mkdir(parents=True)
    config = {
        "exp_name": "exp",
        "seed": seed,
        "loss": {"name": loss, "beta": beta},
        "reward": {"name": "lexicon"},
        "local_run_dir": str(folder),
    }
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    rows = []
    for step in range(5):
        row = {"examples": 32 * step, "step": step, "split": "eval", "loss/eval": 0.7 - step / 10}
        if pairs:
            row |= {
                "rewards_eval/accuracies": 0.5 + step / 10,
                "rewards_eval/chosen": step / 10,
                "rewards_eval/rejected": -step / 10,
            }
        if sampled:
            row |= {
                "samples_eval/kl": step / 2,
                "samples_eval/policy_reward": 1 + step / 10,
                "samples_eval/policy_reward_se": 0.02,
                "samples_eval/reference_reward": 1.0,
            }
        rows += [
            row,
            {
                "examples": 32 * step + 32,
                "step": step + 1,
                "split": "train",
                "loss/train": 0.7 - step / 10,
                "grad_norm": 1.0,
                "unknown": None,
            },
        ]
    write_jsonl(folder / "metrics.jsonl", rows)
    if sampled:
        sample = {
            "prompt": "p<script>alert(1)</script>",
            "policy": "good",
            "reference": "bad",
            "chosen": None,
            "policy_reward": {"lexicon": 1.5},
            "reference_reward": {"lexicon": 0.5},
            "kl": 1.25,
        }
        write_jsonl(
            folder / "samples.jsonl",
            [
                sample | {"examples": 0, "policy": "an early one"},
                sample | {"examples": 128, "policy_tokens": 3},
                sample | {"examples": 128, "policy_tokens": 5},
            ],
        )
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary | {"loss": loss}))
    return folder


def is_drawn(path):
    """Whether an image is more than a blank page."""
    image = imread(path)
    return image.shape[0] > 200 and image.std() > 0.02


def read_csv(path):
    with open(path) as f:
        return list(csv.DictReader(f))


def change_config(folder, **values):
    config = OmegaConf.load(folder / "config.yaml")
    config.update(values)
    OmegaConf.save(config, folder / "config.yaml")


def run_report(*arguments):
    return subprocess.run(
        [sys.executable, ROOT / "report.py", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_run_gets_its_table_page_and_pictures(tmp_path):
    folder = make_run(tmp_path / "run")
    histogram = {"edges": [0, 1, 2], "counts": [3, 1]}
    dataset = {
        "name": "imdb",
        "split": "train",
        "rows": 1234,
        "prompts": 9,
        "skipped": {"rows without a label": 7},
    }
    split = {"datasets": [dataset], "histograms": {"prompt_tokens": histogram}}
    (folder / "data.json").write_text(json.dumps({"train": split}))
    table = write_report(folder)
    for number in ("1.310 ± 0.020", "1.000 ± 0.030", "2.12 ± 0.10", "0.710", "123.4", "128"):
        assert number in table
    page = (folder / "report.html").read_text()
    assert "<script>alert" not in page and "p&lt;script&gt;alert(1)" in page
    assert 'src="http' not in page and 'href="http' not in page
    assert page.count('<section class="chart') == 3 and page.count("<polyline") > 10
    assert (folder / "curves.svg").read_text().startswith("<?xml")
    assert "good" in page and "an early one" not in page  # samples of the last evaluation only
    assert "1,234" in page and "skipped 7, rows without a label" in page
    for name in ("curves", "reward_kl", "data"):
        assert is_drawn(folder / f"{name}.png")


@pytest.mark.parametrize(
    "options", [{"sampled": False}, {"summary": None}, {"pairs": False, "sampled": False}]
)
def test_runs_without_samples_summary_or_pairs(tmp_path, options):
    folder = make_run(tmp_path / "run", **options)
    table = write_report(folder)
    page = (folder / "report.html").read_text()
    is_unfinished = "summary" in options
    assert ("has not finished" in page) == is_unfinished
    if is_unfinished:
        assert "1.400 ± 0.020" in table and "0.900" in table  # of the last evaluation
    assert (folder / "reward_kl.png").exists() == options.get("sampled", True)


def test_damaged_rows_of_metrics_are_left_out_and_named_and_of_other_files_an_error(tmp_path):
    folder = make_run(tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole + '{"examples": 16')
    assert "1.310" in write_report(folder)
    (folder / "metrics.jsonl").write_text('{"broken\n{}\n' + whole)
    text = write_report(folder)
    assert "metrics.jsonl:1: not JSON" in text and "this row is left out" in text
    assert "metrics.jsonl:2: the row has no 'split'" in text and "1.310" in text
    page = (folder / "report.html").read_text()
    assert "metrics.jsonl:1: not JSON" in page and (folder / "curves.png").exists()
    with pytest.raises(DataError, match=r"metrics\.jsonl:1: not JSON.*remove this one"):
        read_jsonl(folder / "metrics.jsonl")  # of a resume
    samples = (folder / "samples.jsonl").read_text()
    (folder / "samples.jsonl").write_text('{"broken\n' + samples)
    with pytest.raises(DataError, match=r"samples\.jsonl:1: not JSON.*remove this one"):
        write_report(folder)


WRONG = (None, True, "text", "\ud800", 10**400, float("nan"), -1, [], [[1]], {"a": [None]})


def _damages(path, rng):
    """What a disk, a kill or an editor makes of a file: (name, content)."""
    content = path.read_bytes()
    yield "empty", b""
    yield "rubbish", bytes(rng.integers(0, 256, 400, dtype=np.uint8))
    yield "deep", b"[" * 100_000
    yield "digits", b'{"examples": ' + b"9" * 5000 + b', "split": "eval"}\n' + content
    for _ in range(3):
        yield "cut", content[: rng.integers(len(content))]
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << rng.integers(8)
        yield "flipped", bytes(flipped)
    yield from ((f"{key}={value!r:.20}", new) for key, value, new in _edits(path, content))


def _edits(path, content):
    """The content with one value after the other of the wrong type, and without it."""
    read, write = {
        ".yaml": (lambda text: OmegaConf.to_container(OmegaConf.create(text)), json.dumps),
        ".jsonl": (
            lambda text: [json.loads(line) for line in text.splitlines()],
            lambda rows: "".join(json.dumps(row) + "\n" for row in rows),
        ),
    }.get(path.suffix, (json.loads, json.dumps))
    places = list(_places(read(content.decode())))
    for place in places[:: max(1, len(places) // 12)]:
        for value in (*WRONG, "missing"):
            tree = read(content.decode())
            *outer, key = place
            target = tree
            for step in outer:
                target = target[step]
            if value == "missing":
                del target[key]
            else:
                target[key] = value
            with contextlib.suppress(ValueError):  # YAML has no surrogates
                yield place, value, write(tree).encode()


def _places(tree, prefix=()):
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    for key, value in items:
        yield (*prefix, key)
        if isinstance(value, (dict, list)):
            yield from _places(value, (*prefix, key))


@pytest.mark.parametrize(
    "name",
    [
        *("config.yaml", "summary.json", "status.json", "data.json", "winrates.json"),
        *("metrics.jsonl", "samples.jsonl", "eval.jsonl"),
    ],
)
def test_a_damaged_file_is_an_error_that_names_it_or_does_no_harm(tmp_path, name, monkeypatch):
    run = make_run(tmp_path / "run")
    row = {"name": "a", "checkpoint": "a", "stamp": "b", "temperature": 1.0, "step": 3}
    row |= {"training": {"loss": {"name": "dpo", "beta": 0.1}}, "samples_eval/policy_reward": 1.0}
    write_jsonl(run / "eval.jsonl", [row | {"samples_eval/kl": 1.0}, row | {"temperature": 0.5}])
    rate = {"checkpoint": "a", "temperature": 1.0, "against": "reference", "by": "labels"}
    rate |= {"win_rate": 0.5, "low": 0.4, "high": 0.6, "wins": 2, "prompts": 4}
    counts = {"name": "imdb", "split": "train", "rows": 3, "skipped": {"empty": 1}, "note": "n"}
    histogram = {"edges": [0.5, 1.5, 2.5], "counts": [1, 2]}
    data = {"train": {"datasets": [counts], "histograms": {"prompt_tokens": histogram}}}
    status = {"state": "failed", "error": "x", "pid": 1, "host": "h", "time": 1.0}
    for file, content in (("winrates", [rate]), ("data", data), ("status", status)):
        (run / f"{file}.json").write_text(json.dumps(content))
    # Drawing takes most of the time, and not each of the damages is drawn differently.
    monkeypatch.setattr("preflab.reports.page.png", lambda figure: b"")
    monkeypatch.setattr("preflab.reports.page.svg", lambda figure: b"")
    write_report(run)
    whole, refused, n = (run / name).read_bytes(), 0, 0
    rng = np.random.default_rng(0)
    damages = list(_damages(run / name, rng))
    some = rng.permutation(len(damages))[: int(os.environ.get("FUZZ_EXAMPLES", 5))]
    for damage, content in (damages[i] for i in some):
        (run / name).write_bytes(content)
        n += 1
        try:
            write_report(run)
        except DataError as error:
            refused += 1
            assert name in str(error) and "\n" not in str(error), damage
        except Exception as error:
            raise AssertionError(f"{name}, {damage}: {content[:300]}") from error
    assert refused < n and (refused > 0) == (name != "metrics.jsonl")  # its bad rows are left out
    (run / name).write_bytes(whole)
    write_report(run)


def test_verdict_claims_no_more_than_the_error_allows():
    assert "score higher" in verdict(SUMMARY) and "+0.310 ± 0.040" in verdict(SUMMARY)
    assert "within two standard errors" in verdict(SUMMARY | {"reward_gain": 0.07})
    assert "score lower" in verdict(SUMMARY | {"reward_gain": -0.31})
    assert "There are no samples" in verdict({})


def test_a_summary_has_no_rows_of_what_was_not_measured():
    assert summary_table({"eval_loss": 0.5, "policy_reward": None}) == f"eval loss{'0.5000':>18}"
    assert summary_table({}) == "no number yet"


def test_a_value_that_rounds_to_zero_has_no_sign_and_a_kl_its_temperature():
    table = summary_table({"kl": -0.001, "kl_se": 0.0, "temperature": 1.0})
    assert "KL to the reference (nats), samples at temperature 1  0.00 ± 0.00" in " ".join(
        table.split(" " * 6)
    ).replace("   ", "  ")
    assert "-0.00" not in table


def test_a_table_fits_a_terminal():
    head = [f"column {i}" for i in range(20)]
    rows = [["a/" * 90 + "name", *range(100_000, 100_019)] for _ in range(2)]
    text = Table(rows, head=head, title="long " * 50, notes=["long " * 50]).with_notes()
    lines = text.splitlines()
    assert 110 < max(map(len, lines)) <= CONSOLE_WIDTH
    assert all(text.count(f" {n}") == 2 for n in range(100_000, 100_019))
    # Each row begins with its name again in every block of columns.
    assert text.count("/a/name ") == 2 * sum(line.startswith("column 0") for line in lines) > 2


def test_names_of_checkpoints_are_what_differs():
    paths = [
        f"/a/runs/{loss}-{seed}/LATEST/policy.pt" for loss in ("dpo", "ipo") for seed in (0, 1)
    ]
    assert short_names(paths) == ["dpo-0", "dpo-1", "ipo-0", "ipo-1"]
    assert short_names(["x/step-1", "x/step-1/policy.pt"]) == ["step-1", "step-1/policy.pt"]
    assert short_names(["/a/run/LATEST/policy.pt"] * 2) == ["run", "run"]


def evaluated_rows(losses=("dpo", "ipo"), seeds=(0, 1, 2), temperatures=(0.5, 1.0)):
    """Rows of eval.jsonl: the reward is 1, plus 1 for the second loss, plus a tenth of the seed."""
    return [
        {
            "checkpoint": f"runs/{loss}-{seed}/LATEST/policy.pt",
            "name": f"runs/{loss}-{seed}/LATEST/policy.pt",
            "step": 100 + seed,  # an early stop
            "run": f"/somewhere/runs/{loss}-{seed}",
            "training": {"loss": {"name": loss, "beta": 0.1}, "seed": seed, "lr": 1e-5},
            "temperature": temperature,
            "samples_eval/policy_reward": 1 + i + seed / 10,
            "samples_eval/policy_reward_se": 7.0,
            "samples_eval/kl": -0.0001,
        }
        for i, loss in enumerate(losses)
        for seed in seeds
        for temperature in temperatures
    ]


def test_evaluations_are_a_row_for_each_loss_and_temperature():
    table, checkpoints = evaluation_tables(evaluated_rows())
    assert table.head == [
        "trained with",
        "step",
        "seeds",
        "temperature",
        "reward",
        "KL",
        "KL along samples",
    ]
    error = math.sqrt(0.01 / 3)  # standard deviation 0.1 over three seeds
    assert table.rows == [
        ["dpo beta=0.1", "100 to 102", 3, "0.5", f"1.100 ± {error:.3f}", "-", "0.00 ± 0.00"],
        ["dpo beta=0.1", "100 to 102", 3, "1", f"1.100 ± {error:.3f}", "0.00 ± 0.00", "-"],
        ["ipo beta=0.1", "100 to 102", 3, "0.5", f"2.100 ± {error:.3f}", "-", "0.00 ± 0.00"],
        ["ipo beta=0.1", "100 to 102", 3, "1", f"2.100 ± {error:.3f}", "0.00 ± 0.00", "-"],
    ]
    assert checkpoints.folded and len(checkpoints.rows) == 12
    assert checkpoints.rows[0][:2] == ["dpo-0", 100] and "± 7.000" in checkpoints.rows[0][3]
    rows = evaluated_rows(losses=("dpo",), seeds=(0, 1))
    for row in rows[2:]:
        row["training"] = row["training"] | {"lr": 1e-4}
    names = [row[0] for row in evaluation_tables(rows)[0].rows]
    assert names == ["dpo beta=0.1 lr=1e-05"] * 2 + ["dpo beta=0.1 lr=0.0001"] * 2


def test_win_rates_are_a_row_for_each_loss_and_temperature():
    evaluations = evaluated_rows()
    rates = [
        {"checkpoint": row["checkpoint"], "temperature": row["temperature"], "by": "reward lexicon"}
        | {"against": "reference", "win_rate": rate, "low": 0.1, "high": 0.9, "wins": 2}
        for row, rate in zip(evaluations, [0.5, 0.4, 0.6, 0.4, 0.7, 0.4] * 2, strict=True)
    ]
    table = winrate_table(rates, evaluations)
    half = 4.302652729749464 * 0.1 / math.sqrt(3)  # t with two degrees of freedom
    where = ["dpo beta=0.1", "100 to 102", "0.5", "reference", "reward lexicon"]
    assert table.rows[0][:5] == where
    assert table.rows[0][5:] == [f"0.600 [{0.6 - half:.3f}, {0.6 + half:.3f}]", 6]
    assert len(table.rows) == 4
    assert winrate_table(rates[:1]).rows[0][:1] == ["dpo-0"]
    assert max(map(len, winrate_table(rates).as_text().splitlines())) <= CONSOLE_WIDTH


def test_two_checkpoints_of_one_seed_are_not_averaged():
    def shown(**further):
        """Names and rewards of two checkpoints of seed 0 whose training differs in `further`."""
        rows = evaluated_rows(losses=("dpo", "dpo"), seeds=(0,), temperatures=(1.0,))
        for i, (row, place) in enumerate(zip(rows, ("hh", "shp"), strict=True)):
            row |= {"run": f"/runs/{place}/dpo-0", "name": "dpo-0/LATEST", "checkpoint": place}
            row["training"] |= {key: values[i] for key, values in further.items()}
        rates = [
            {"checkpoint": row["checkpoint"], "temperature": 1.0, "by": "r", "against": "reference"}
            | {"win_rate": row["samples_eval/policy_reward"] / 4}
            for row in rows
        ]
        cells = [row[:1] + row[2:3] for row in evaluation_tables(rows)[0].rows]
        of_rates = winrate_table(rates, rows).rows
        assert [(row[0], row[4]) for row in of_rates] == [
            (cells[0][0], "0.250"),
            (cells[1][0], "0.500"),
        ]
        assert [reward[:5] for _, reward in cells] == ["1.000", "2.000"]
        return [name for name, _ in cells]

    dpo = "dpo beta=0.1"
    assert shown() == [f"{dpo} hh", f"{dpo} shp"]  # rows of before, which say no more
    assert shown(exp_name=("a", "b")) == [f"{dpo} exp_name=a", f"{dpo} exp_name=b"]
    both = {"exp_name": ("a", "b"), "datasets": (["hh"], ["shp"])}
    assert shown(**both) == [f"{dpo} datasets=['hh']", f"{dpo} datasets=['shp']"]
    ends = shown(exp_name=("a", "b"), max_grad_norm=(1, 2), topp=(0.9, 0.9))
    assert ends == [f"{dpo} max_grad_norm=1", f"{dpo} max_grad_norm=2"]
    ranks = {"model.lora.r": (0, 8), "batch_size": (64, 64)}
    assert shown(**ranks) == [f"{dpo} model.lora.r=0", f"{dpo} model.lora.r=8"]


def test_a_base_model_adds_no_setting_to_the_names_of_others():
    [run] = evaluated_rows(losses=("dpo",), seeds=(0,), temperatures=(1.0,))
    run["training"]["eval_every"] = 32
    base = {key: value for key, value in run.items() if key not in ("training", "run", "step")}
    base |= {"checkpoint": None, "name": "base"}
    names = [row[0] for row in evaluation_tables([run, base])[0].rows]
    assert names == ["dpo beta=0.1", "base"]


def legend_of(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_lines_of_figures_are_rows_of_the_tables():
    rows = evaluated_rows(losses=("dpo",), seeds=(0, 1))
    for row in rows[2:]:
        row["training"] = row["training"] | {"lr": 1e-4}
    rates = [
        {"checkpoint": row["checkpoint"], "temperature": row["temperature"], "by": "r"}
        | {"against": "reference", "win_rate": row["samples_eval/policy_reward"] / 2}
        for row in rows
    ]
    names = ["dpo beta=0.1 lr=1e-05", "dpo beta=0.1 lr=0.0001"]
    figure = plots.temperature_figure(rows, rates)
    assert legend_of(figure) == names
    heights = [[line[0].get_ydata()[0] for line in ax.containers] for ax in figure.axes]
    assert heights == [[0.5, 0.55], [1.0, 1.1]]
    temperatures = [f"{name}, T={t}" for name in names for t in ("0.5", "1")]
    assert legend_of(plots.checkpoints_figure(rows)) == temperatures
    for row in rows[2:]:
        row["training"] |= {"lr": 1e-5, "seed": 0}
        row |= {key: rows[0][key] for key in ("run", "name", "checkpoint", "step")}
        row["top_p"] = 0.9
    assert legend_of(plots.temperature_figure(rows, [])) == [
        "dpo beta=0.1",
        "dpo beta=0.1, top-p 0.9",
    ]


def test_a_setting_that_one_run_has_changed_names_its_checkpoints():
    rows = evaluated_rows(losses=("dpo",), seeds=(0, 1), temperatures=(1.0,))
    rows[1]["training"] |= {"warmup_steps": 7}
    assert [row[0] for row in evaluation_tables(rows)[0].rows] == [
        *("dpo beta=0.1", "dpo beta=0.1 warmup_steps=7")
    ]
    rows[1]["training"] = rows[0]["training"] | {"seed": 1, "model.lora.r": 0}
    [row] = evaluation_tables(rows)[0].rows  # the other row is of an earlier version
    assert row[0] == "dpo beta=0.1"


def test_one_checkpoint_that_was_evaluated_in_two_folders_is_two_rows(tmp_path):
    """They can have other prompts, another reward or other settings of the evaluation."""
    for i, name in enumerate(("all-prompts", "hard-prompts")):
        folder = make_evaluation(tmp_path / name, {("x/LATEST", 1.0): 1.25 + i / 2})
        rate = {"against": "reference", "by": "r", "checkpoint": "x/LATEST", "temperature": 1.0}
        (folder / "winrates.json").write_text(json.dumps([rate | {"win_rate": 0.25 + i / 2}]))
    text = write_comparison(tmp_path, find_runs(tmp_path)[0])
    lines = [line.split() for line in text.splitlines() if "-prompts" in line]
    assert len(lines) == 4  # two evaluations, two win rates
    for name, reward, rate in (("all", "1.250", "0.250"), ("hard", "1.750", "0.750")):
        evaluation, win_rate = (line for line in lines if f"{name}-prompts" in line)
        assert reward in evaluation and rate in win_rate
    assert "1.500" not in text and "0.500" not in text


def test_a_row_of_a_checkpoint_says_what_tells_it_from_others(tmp_path):
    folder = make_run(tmp_path / "run")
    model = {"name_or_path": "gpt2", "lora": {"r": 8, "alpha": 16}, "archive": "start"}
    changed = {"warmup_steps": 7, "eval_every": 20_000, "cache_dir": "elsewhere"}
    change_config(folder, datasets=["hh"], batch_size=32, model=model, **changed)
    (folder / "step-3").mkdir()
    (folder / "step-3" / "policy.pt").touch()
    training = describe(str(folder / "step-3" / "policy.pt")).about["training"]
    known = {"exp_name": "exp", "datasets": ["hh"], "batch_size": 32, "model.name_or_path": "gpt2"}
    assert training | known | {"model.lora.r": 8, "reward.name": "lexicon"} == training
    assert training["warmup_steps"] == 7
    unsaid = {"model", "model.archive", "eval_every", "cache_dir", "local_run_dir"}
    assert not training.keys() & unsaid  # unchanged, or no setting of the training


def test_win_rates_of_training_runs_are_a_row_for_each_group(tmp_path):
    rate = {"checkpoint": None, "temperature": 1.0, "against": "reference", "by": "reward lexicon"}
    for loss, seed, win_rate in (("dpo", 0, 0.2), ("ipo", 0, 0.85), ("ipo", 1, 0.95)):
        folder = make_run(tmp_path / f"{loss}-{seed}", loss=loss, seed=seed, pairs=False)
        (folder / "winrates.json").write_text(json.dumps([rate | {"win_rate": win_rate}]))
    text = write_comparison(tmp_path, find_runs(tmp_path)[0])
    rows = [line.split() for line in text.partition("Win rates")[2].splitlines()]
    found = {row[0]: row[-1] for row in rows if "reference" in row}
    assert found == {"dpo": "0.200", "ipo": "0.900"}


def test_smoothing_by_hand():
    assert smooth([1.0, 3.0], 0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])


def test_a_sweep_is_compared_with_seeds_aggregated(tmp_path):
    for seed, reward in ((0, 1.2), (1, 1.4)):
        make_run(tmp_path / f"a{seed}", seed=seed, summary=SUMMARY | {"policy_reward": reward})
    make_run(tmp_path / "b", loss="odpo", summary=None)
    make_run(tmp_path / "c" / "step-5" / ".hidden")
    runs, problems = find_runs(tmp_path)
    assert len(runs) == 3 and not problems
    table = write_comparison(tmp_path, runs)
    dpo, odpo = read_csv(tmp_path / "comparison.csv")
    error = math.sqrt(2 * 0.1**2 / 1 / 2)
    assert (dpo["loss.name"], dpo["seeds"], dpo["state"]) == ("dpo", "2", "finished")
    assert float(dpo["policy_reward"]) == pytest.approx(1.3)
    assert float(dpo["policy_reward_se"]) == pytest.approx(error)
    assert dpo["policy_reward_low"] == dpo["policy_reward_high"] == ""  # two seeds: no interval
    assert (odpo["loss.name"], odpo["state"]) == ("odpo", "0 of 1 finished, unknown")
    assert float(odpo["policy_reward"]) == pytest.approx(1.4)
    assert odpo["policy_reward_se"] == ""
    assert f"1.300 ± {error:.3f}" in table
    assert r"1.300 $\pm$ 0.100" in (tmp_path / "comparison.tex").read_text()
    assert "loss.name" in table and "loss.beta" not in table
    assert is_drawn(tmp_path / "frontier.png")
    assert "| loss.name |" in (tmp_path / "comparison.md").read_text()


def test_several_runs_of_a_seed_count_once_with_their_mean(tmp_path):
    for name, seed, reward in (("a", 0, 1.0), ("again", 0, 2.0), ("b", 1, 1.7)):
        make_run(tmp_path / name, seed=seed, summary=SUMMARY | {"policy_reward": reward})
    [group] = group_runs(find_runs(tmp_path)[0], ["loss.name"])
    assert group.by_seed("policy_reward") == {"0": pytest.approx(1.5), "1": 1.7}


def test_an_online_run_has_rounds_in_its_table_and_figure(tmp_path):
    summary = SUMMARY | {
        "labels_bought": 60,
        "rounds": 20,
        "seconds_sampling": 6.0,
        "seconds_learning": 1.0,
        "seconds_evaluating": 1.0,
    }
    folder = make_run(tmp_path / "run", summary=summary)
    rounds = [
        {
            "examples": r,
            "split": "online",
            "round": r,
            "online/gold_reward": r / 20,
            "online/kl": r / 5,
            "online/labels_bought": 3 * r,
            "online/label_accuracy": None,
        }
        for r in range(1, 21)
    ]
    write_jsonl(folder / "metrics.jsonl", read_rows(folder / "metrics.jsonl") + rounds)
    table = write_report(folder)
    for text in ("rounds", "gold labels bought", "time sampling", "75%", "time evaluating", "12%"):
        assert text in table
    assert re.search(r"seconds of a round +0\.35\n", table)
    assert is_drawn(folder / "online.png")
    figure = plots.online_figure({"a": [Run(folder)]})
    visible = [ax for ax in figure.axes if ax.get_visible()]
    assert len(visible) == 3  # no panel for the label accuracy, which is null
    assert [ax.lines[0].get_xdata()[-1] for ax in visible] == [20, 60, 4.0]


def test_runs_with_different_settings_are_separate_groups(tmp_path):
    for beta in (0.1, 1.0):
        make_run(tmp_path / f"{beta}", beta=beta)
    write_comparison(tmp_path, find_runs(tmp_path)[0])
    rows = read_csv(tmp_path / "comparison.csv")
    assert [row["loss.beta"] for row in rows] == ["0.1", "1.0"]


def test_the_command_does_not_import_torch(tmp_path):
    make_run(tmp_path / "run")
    code = (
        f"import sys; sys.argv = ['report.py', {str(tmp_path / 'run')!r}]; import report;"
        " report.main(); assert 'torch' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "1.310" in done.stdout


def test_a_folder_without_a_run_is_refused(tmp_path):
    done = run_report(tmp_path)
    assert done.returncode == 2
    assert "A run folder has a config.yaml, and a metrics.jsonl or a status.json" in done.stderr


def test_long_runs_are_thinned(tmp_path):
    folder = make_run(tmp_path / "run")
    write_jsonl(
        folder / "metrics.jsonl",
        [{"examples": i, "split": "train", "loss/train": 1.0} for i in range(50_000)],
    )
    x, y = Run(folder).series("train", "loss/train")
    assert 1000 < len(x) == len(y) <= 3 * MAX_POINTS


def test_mean_and_error_against_numpy():
    values = [0.3, 0.9, 0.1, 0.5]
    mean, error = mean_and_error(values)
    assert mean == pytest.approx(np.mean(values))
    assert error == pytest.approx(np.std(values, ddof=1) / 2)
    assert mean_and_error([]) == (None, None)
    assert mean_and_error([2.0]) == (2.0, None)


def test_differences_are_paired_by_seed():
    difference = paired_difference({"0": 1.0, "1": 5.0, "2": 9.0}, {"0": 0.5, "1": 4.0, "3": 0.0})
    assert difference["mean"] == pytest.approx(0.75)
    assert difference["se"] == pytest.approx(0.25)
    assert difference["seeds"] == 2 and difference["low"] is None
    assert paired_difference({"0": 1.0}, {"1": 1.0}) is None


def test_a_difference_is_over_seeds_and_prompts_where_they_share_them(tmp_path):
    rewards = {"dpo": [[1.0, 2.0], [2.0, 2.0], [1.0, 3.0]], "odpo": [[2, 3], [3, 3.5], [2, 4.5]]}
    for loss, of_loss in rewards.items():
        for seed, of_seed in enumerate(of_loss):
            mean = sum(of_seed) / 2
            folder = make_run(
                tmp_path / f"{loss}{seed}",
                loss=loss,
                seed=seed,
                summary=SUMMARY | {"policy_reward": mean, "eval_loss": 0.5 + seed / 10},
            )
            row = {"split": "eval", "examples": 9, "samples_eval/kl": 1.0}
            write_jsonl(folder / "metrics.jsonl", [row | {"samples_eval/policy_reward": mean}])
            samples = [
                {"prompt": p, "examples": 9, "kl": 1.0, "policy_reward": {"lexicon": reward}}
                for p, reward in zip("ab", of_seed, strict=True)
            ]
            write_jsonl(folder / "samples.jsonl", samples)
    text = write_comparison(tmp_path, find_runs(tmp_path)[0])
    [reward] = [r for r in read_csv(tmp_path / "differences.csv") if r["metric"] == "policy_reward"]
    gaps = np.array([[1, 1], [1, 1.5], [1, 1.5]])
    expected = over_seeds_and_prompts(gaps)
    assert float(reward["low"]) == pytest.approx(expected.low) and reward["prompts"] == "2"
    assert "policy_reward: over seeds and prompts." in text
    assert "All runs share" in text and "the data" in text
    # ... and losses on different scales are not subtracted.
    assert "eval_loss" not in {r["metric"] for r in read_csv(tmp_path / "differences.csv")}
    assert "Held-out losses are compared where the loss" in text


def test_the_envelope_is_the_running_maximum_and_ends_with_the_data():
    points = [(0.0, 1.0), (2.0, 3.0), (1.0, 2.0), (3.0, 2.5)]
    assert envelope(points, [0.0, 0.5, 2.0, 3.0, 3.1]) == [1.0, 1.5, 3.0, 3.0, None]
    assert envelope([], [1.0]) == [None]


def test_a_sweep_reports_differences_and_frontiers_by_seed(tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.2), (2, 0.1)):
        make_run(tmp_path / f"a{seed}", seed=seed, summary=SUMMARY | {"policy_reward": 1.0 + shift})
        make_run(
            tmp_path / f"b{seed}",
            loss="odpo",
            seed=seed,
            summary=SUMMARY | {"policy_reward": 1.3 + shift},
        )
    runs = find_runs(tmp_path)[0]
    assert "+0.300 ± 0.000 [+0.300, +0.300]" in write_comparison(tmp_path, runs)
    assert "-0.300 ± 0.000" in write_comparison(tmp_path, runs, {"loss.name": "odpo"})
    with pytest.raises(ConfigError, match=r"they differ in loss\.name"):
        write_comparison(tmp_path, runs, {"loss.beta": "0.1"})
    with pytest.raises(ConfigError, match=r"loss\.name=kto: .* the groups are dpo, odpo"):
        write_comparison(tmp_path, runs, {"loss.name": "kto"})
    rows = read_csv(tmp_path / "frontier.csv")
    assert [(row["loss"], row["seed"]) for row in rows] == [
        (loss, seed) for loss in ("dpo", "odpo") for seed in "012"
    ]
    assert {row["kl=1.0"] for row in rows} == {"1.2"}
    assert {row["kl=3.0"] for row in rows} == {""}
    for name in ("frontier", "bands", "lengths"):
        assert is_drawn(tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.svg").stat().st_size > 1000
    page = (tmp_path / "report.html").read_text()
    assert page.count('<section class="chart') == 3
    assert ">odpo</td>" in page and "http://" not in page


def test_a_frontier_ends_at_the_largest_kl_that_a_loss_reaches(tmp_path):
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", loss="odpo", sampled=False)
    table = write_comparison(tmp_path, find_runs(tmp_path)[0])
    assert "KL 2" in table and "KL 3" not in table


def test_finished_running_killed_and_failed_runs_have_different_states(tmp_path):
    here = {"host": socket.gethostname(), "time": 0.0}
    states = {
        "running": {"state": "running", "pid": os.getpid(), **here},
        "killed": {"state": "running", "pid": 2**22 + 1, **here},
        "elsewhere": {"state": "running", "pid": 2**22 + 1, "host": "another machine"},
        "failed": {"state": "failed", "error": "RuntimeError: no memory", **here},
    }
    for name, status in states.items():
        folder = make_run(tmp_path / name, loss=name, summary=None)
        (folder / "status.json").write_text(json.dumps(status))
    make_run(tmp_path / "finished", loss="finished")
    runs = find_runs(tmp_path)[0]
    assert {run.loss: run.state for run in runs} == {
        "running": "running",
        "killed": "killed",
        "elsewhere": "running",
        "failed": "failed: RuntimeError: no memory",
        "finished": "finished",
    }
    table = write_comparison(tmp_path, runs)
    assert "no memory" in table and "0 of 1 finished, killed" in table


def test_broken_runs_are_named_and_the_rest_is_reported(tmp_path):
    make_run(tmp_path / "good")
    make_run(tmp_path / "unreadable")
    (tmp_path / "unreadable" / "metrics.jsonl").write_text('{"broken\n{}\n')
    make_run(tmp_path / "list")
    (tmp_path / "list" / "config.yaml").write_text("- a list")
    diverged = make_run(tmp_path / "nan", loss="ipo")
    with open(diverged / "metrics.jsonl", "a") as f:
        f.write('{"examples": 160, "split": "eval", "samples_eval/kl": NaN}\n{"examples": 16')
    runs, problems = find_runs(tmp_path)
    assert sorted(run.loss for run in runs) == ["dpo", "dpo", "ipo"] and len(problems) == 1
    table = write_comparison(tmp_path, runs, problems=problems)
    for text in ("unreadable/metrics.jsonl:1", "list/config.yaml", "NaN or infinite", "1.310"):
        assert text in table
    assert "unreadable/metrics.jsonl:1" in (tmp_path / "report.html").read_text()


def test_runs_that_are_not_comparable_get_a_warning(tmp_path):
    summary = {"finished": True, "eval_loss": 0.5}
    for name in ("hh", "shp"):
        folder = make_run(tmp_path / name, sampled=False, summary=summary)
        change_config(folder, datasets=[name])
    table = write_comparison(tmp_path, find_runs(tmp_path)[0])
    assert "on different data (['hh'], ['shp'])" in table
    assert "There is no reward to compare" in table
    assert not (tmp_path / "frontier.png").exists()


def test_latex_escapes_special_characters():
    assert r"a\_b & 50\% & 1 $\pm$ 2 \\" in latex([["a_b", "50%", "1 ± 2"]])


def make_evaluation(folder, rewards):
    """An evaluation of checkpoints with rewards {(checkpoint, temperature): reward}."""
    make_run(folder, summary={"finished": True})
    change_config(folder, function="eval")
    rows = [
        {
            "checkpoint": name,
            "name": name,
            "step": i,
            "training": {"loss": {"name": "dpo", "beta": 0.1}},
            "temperature": t,
            "samples_eval/policy_reward": reward,
            "samples_eval/policy_reward_se": 0.01,
            "samples_eval/kl": 1.0 + i,
        }
        for i, ((name, t), reward) in enumerate(rewards.items())
    ]
    write_jsonl(folder / "eval.jsonl", rows)
    samples = [
        {
            "checkpoint": name,
            "temperature": t,
            "prompt": "p",
            "policy": f"{name} at {t}",
            "reference": "r",
            "chosen": "c",
            "policy_reward": {"lexicon": 1.0},
        }
        for name, t in rewards
    ]
    write_jsonl(folder / "samples.jsonl", samples)
    return folder


def test_an_evaluation_of_checkpoints_has_a_table_and_figures(tmp_path):
    folder = make_evaluation(
        tmp_path / "eval", {("a", 0): 1.25, ("a", 1.0): 1.5, ("b", 0): 1.75, ("b", 1.0): 1.0}
    )
    winrates = [
        {
            "checkpoint": "a",
            "temperature": t,
            "against": "reference",
            "by": "reward lexicon",
            "win_rate": 0.5 + t / 4,
            "low": 0.4,
            "high": 0.9,
            "pairs": 9,
            "wins": 5,
            "ties": 0,
            "losses": 4,
            "unjudged": 0,
        }
        for t in (0, 1.0)
    ]
    (folder / "winrates.json").write_text(json.dumps(winrates))
    table = write_report(folder)
    assert all(f"{reward:.3f} ± 0.010" in table for reward in (1.25, 1.5, 1.75, 1.0))
    page = (folder / "report.html").read_text()
    assert "0.750 [0.400, 0.900]" in page
    assert page.index("a at 0") < page.index("b at 0")
    assert "a at 1.0" in page
    for name in ("checkpoints", "temperature"):
        assert is_drawn(folder / f"{name}.png")


def test_the_kl_of_samples_that_are_not_the_policys_is_named_so(tmp_path):
    folder = make_evaluation(tmp_path / "eval", {("a", 1.0): 1.5, ("b", 1): 1.0, ("a", 0.5): 1.75})
    rows = read_rows(folder / "eval.jsonl")
    assert "reward (lexicon)" in evaluation_tables(rows, "lexicon")[0].head
    [table] = evaluation_tables(rows)
    place = table.head.index("KL")
    assert table.head[place + 1] == "KL along samples"
    shown = [row[place : place + 2] for row in table.rows]
    assert shown == [["1.00", "-"], ["2.00", "-"], ["-", "3.00"]]
    for values, expected in (
        ({"temperature": 1.0, "top_p": 1.0}, (True, False)),
        ({"temperature": 1.0, "top_p": 0.9}, (False, True)),
        ({"temperature": 1.0, "top_p": 1.0, "top_k": 50}, (False, True)),
        ({"temperature": 1.0, "top_p": 1.0, "min_p": 0.1}, (False, True)),
    ):
        head = evaluation_tables([row | values for row in rows])[0].head
        assert ("KL" in head, "KL along samples" in head) == expected
        assert ("top-p" in head) == (values["top_p"] < 1)
    figure = plots.checkpoints_figure(rows)
    left, right = figure.axes
    assert [len(ax.lines) for ax in (left, right)] == [2, 1]  # temperatures 0.5 and 1, and 1
    assert "1 evaluation at another temperature" in right.get_title(loc="left")
    assert not plots.checkpoints_figure([rows[2]]).axes[1].get_visible()
    sample = {"prompt": "p", "policy": "a", "kl": 2.0, "temperature": 0.5, "top_p": 0.9}
    [card] = sample_cards([(Origin("policy"), sample)]).cards
    assert card.texts[0].scores == "KL 2.00 along a sample at temperature 0.5, top-p 0.9"


def test_a_run_says_which_kl_it_shows(tmp_path):
    folder = make_run(tmp_path / "run")
    assert "KL to the reference (nats)" in summary_table(Run(folder).latest())
    for more in ({}, {"summary": None}):
        folder = make_run(tmp_path / f"cold{len(more)}", **more)
        change_config(folder, temperature=0.5, topp=0.9)
        if not more:
            (folder / "summary.json").write_text(json.dumps(SUMMARY | {"temperature": 0.5}))
        assert "KL to the reference along samples at temperature 0.5" in write_report(folder)
        page = (folder / "report.html").read_text()
        assert "5 evaluations at another temperature, top-p, top-k or min-p left out" in page
    assert "nats along samples at temperature 0.5" in verdict(SUMMARY | {"temperature": 0.5})
    labels = {
        name: {ax.get_xlabel() for ax in plots.online_figure({"a": [run]}).axes}
        for name, run in {
            "own": _online(tmp_path / "b"),
            "other": _online(tmp_path / "c", online={"sampler": "reference"}, top_k=5),
        }.items()
    }
    assert KL_LABEL in labels["own"]
    along = "KL(policy || reference) along samples at sampler reference, top-k 5 (nats)"
    assert along in labels["other"] and KL_LABEL not in labels["other"]


def _online(folder, **values):
    make_run(folder)
    change_config(folder, **values)
    rows = [
        {"split": "online", "round": i, "online/kl": i, "online/gold_reward": i} for i in (1, 2)
    ]
    write_jsonl(folder / "metrics.jsonl", rows)
    return Run(folder)


def test_a_sweep_leaves_other_samplers_out_of_its_frontier_and_says_so(tmp_path):
    for seed in range(2):
        make_run(tmp_path / f"a{seed}", seed=seed)
        make_run(tmp_path / f"b{seed}", seed=seed, beta=0.5)
        change_config(tmp_path / f"b{seed}", temperature=0.5)
    text = write_comparison(tmp_path, find_runs(tmp_path)[0])
    note = "10 evaluations at another temperature, top-p, top-k or min-p left out"
    assert f"Reward-KL frontier: {note}." in text
    assert "kl along samples at temperature 0.5" in (tmp_path / "comparison.md").read_text()
    samplers = {row["loss.beta"]: row["sampler"] for row in read_csv(tmp_path / "comparison.csv")}
    assert samplers == {"0.1": "policy", "0.5": "temperature 0.5"}
    groups = group_runs(find_runs(tmp_path)[0], ["loss.beta"])
    [ax] = sweep_plots.frontier_figure(groups).axes
    assert ax.get_title(loc="left").endswith(note)
    labels = {ax.get_ylabel() for ax in sweep_plots.bands_figure(groups).axes}
    assert "KL(policy || reference) along samples at temperature 0.5 (nats)" in labels
    assert {ax.get_ylabel() for ax in sweep_plots.bands_figure(groups[:1]).axes} >= {KL_LABEL}
    for seed in range(2):
        change_config(tmp_path / f"a{seed}", temperature=0.5)
    assert note.replace("10", "20") in write_comparison(tmp_path, find_runs(tmp_path)[0])


def test_labels_tell_the_variants_of_a_loss(tmp_path):
    losses = [
        {"name": "tdpo", "beta": 0.1, "alpha": 0.5, "if_tdpo2": False},
        {"name": "tdpo", "beta": 0.1, "alpha": 0.5, "if_tdpo2": True},
        {"name": "dpo", "beta": 0.1, "label_smoothing": 0.0},
        {"name": "dpo", "beta": 0.1, "label_smoothing": 0.1},
        {"name": "tdpo1", "beta": 0.1},
    ]
    rows = [{"name": "x", "training": {"loss": loss}} for loss in losses]
    assert training_names([*rows, {"name": "x"}]) == [
        "tdpo beta=0.1 if_tdpo2=False",
        "tdpo beta=0.1 if_tdpo2=True",
        "dpo beta=0.1 label_smoothing=0.0",
        "dpo beta=0.1 label_smoothing=0.1",
        "tdpo1 beta=0.1",
        "x",
    ]
    assert training_names(rows[:1]) == ["tdpo beta=0.1 if_tdpo2=False"]
    assert training_names(rows[2:3]) == ["dpo beta=0.1"]
    for i in (0, 2):
        make_run(tmp_path / str(i))
        change_config(tmp_path / str(i), loss=losses[i])
    runs = find_runs(tmp_path)[0]
    assert {group.name for group in group_runs(runs, differing_settings(runs))} == {
        "tdpo if_tdpo2=False",
        "dpo",
    }
    assert differing_settings(runs[:1]) == ["loss.name", "loss.if_tdpo2"]


def test_watch_ends_when_no_run_is_running(tmp_path):
    folder = make_run(tmp_path / "run")
    done = run_report(folder, "--watch", "0.1")
    assert done.returncode == 0 and done.stdout.count("report.html") == 1


def test_texts_may_contain_unicode_line_separators(tmp_path):
    folder = make_run(tmp_path / "run")
    text = "a\u2028b\u0085c"
    sample = {"examples": 128, "prompt": text, "policy": text, "policy_reward": {"lexicon": 1.0}}
    with open(folder / "samples.jsonl", "w") as f:
        f.write(json.dumps(sample, ensure_ascii=False) + "\n")
    assert Run(folder).samples()[0]["policy"] == text
    assert "1.310" in write_report(folder)


def test_a_frontier_has_samples_at_temperature_one_only(tmp_path):
    folder = make_run(tmp_path / "run")
    assert len(Run(folder).frontier()) == 5
    change_config(folder, temperature=0.3)
    assert Run(folder).frontier() == []
