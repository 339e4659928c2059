"""Tables and pictures from run folders made by hand."""

import csv
import json
import math
import subprocess
import sys

import pytest
from conftest import ROOT, write_jsonl
from omegaconf import OmegaConf

import report
from report import (
    find_runs,
    smooth,
    summary_table,
    verdict,
    write_comparison,
    write_report,
)
from utils import DataError

SUMMARY = {
    "finished": True, "loss": "dpo", "reward": "lexicon", "policy_reward": 1.31, "policy_reward_se": 0.02, "reference_reward": 1.0, "reference_reward_se": 0.03,
    "reward_gain": 0.31, "reward_gain_se": 0.04, "kl": 2.125, "kl_se": 0.1, "eval_accuracy": 0.71, "eval_loss": 0.5, "pairs_per_second": 123.4, "examples": 128,
}  # fmt: skip


def make_run(folder, *, loss="dpo", seed=0, beta=0.1, summary=SUMMARY, sampled=True, pairs=True):
    folder.mkdir(parents=True)
    config = {"exp_name": "exp", "seed": seed, "loss": {"name": loss, "beta": beta}, "reward": {"name": "lexicon"}, "local_run_dir": str(folder)}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    rows = []
    for step in range(5):
        row = {"examples": 32 * step, "step": step, "split": "eval", "loss/eval": 0.7 - step / 10}
        if pairs:
            row |= {"rewards_eval/accuracies": 0.5 + step / 10, "rewards_eval/chosen": step / 10, "rewards_eval/rejected": -step / 10}
        if sampled:
            row |= {"samples_eval/kl": step / 2, "samples_eval/policy_reward": 1 + step / 10, "samples_eval/policy_reward_se": 0.02, "samples_eval/reference_reward": 1.0}
        rows += [row, {"examples": 32 * step + 32, "step": step + 1, "split": "train", "loss/train": 0.7 - step / 10, "grad_norm": 1.0, "unknown": None}]
    write_jsonl(folder / "metrics.jsonl", rows)
    if sampled:
        sample = {"prompt": "p<script>alert(1)</script>", "policy": "good", "reference": "bad", "chosen": None, "policy_reward": {"lexicon": 1.5}, "reference_reward": {"lexicon": 0.5}, "kl": 1.25}
        write_jsonl(folder / "samples.jsonl", [sample | {"examples": 0, "policy": "an early one"}, sample | {"examples": 128}])
    if summary:
        (folder / "summary.json").write_text(json.dumps(summary | {"loss": loss}))
    return folder


def pixels(path):
    from matplotlib.image import imread

    return imread(path)


def test_a_run_gets_its_table_page_and_pictures(tmp_path):
    folder = make_run(tmp_path / "run")
    histogram = {"edges": [0, 1, 2], "counts": [3, 1]}
    split = {"datasets": [{"name": "imdb", "split": "train", "rows": 1234, "prompts": 9, "skipped": {"odd rows": 7}}], "histograms": {"prompt_tokens": histogram}}
    (folder / "data.json").write_text(json.dumps({"train": split}))
    table = write_report(folder)
    for wanted in ("1.310 ± 0.020", "1.000 ± 0.030", "2.12 ± 0.10", "0.710", "123.4", "128"):
        assert wanted in table
    page = (folder / "report.html").read_text()
    assert "<script>alert" not in page and "p&lt;script&gt;alert(1)" in page
    assert "src=\"http" not in page and "href=\"http" not in page and page.count("data:image/png;base64,") == 3
    assert "good" in page and "an early one" not in page  # samples of the last evaluation only
    assert "1,234" in page and "skipped 7, odd rows" in page
    for name in ("curves", "reward_kl", "data"):
        image = pixels(folder / f"{name}.png")
        assert image.shape[0] > 200 and image.std() > 0.02


@pytest.mark.parametrize("options", [{"sampled": False}, {"summary": None}, {"pairs": False, "sampled": False}])
def test_runs_with_less_in_them(tmp_path, options):
    folder = make_run(tmp_path / "run", **options)
    table = write_report(folder)
    page = (folder / "report.html").read_text()
    assert ("has not finished" in page) == (options.get("summary", True) is None)
    if options.get("summary", True) is None:
        assert "1.400 ± 0.020" in table and "0.900" in table  # of the last evaluation
    assert (folder / "reward_kl.png").exists() == options.get("sampled", True)


def test_a_last_line_cut_short_is_left_out_and_one_in_the_middle_is_an_error(tmp_path):
    folder = make_run(tmp_path / "run")
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole + '{"examples": 16')
    assert "1.310" in write_report(folder)
    (folder / "metrics.jsonl").write_text('{"broken\n' + whole)
    with pytest.raises(DataError, match="metrics.jsonl:1"):
        write_report(folder)


def test_verdict_claims_no_more_than_the_error_allows():
    assert "score higher" in verdict(SUMMARY) and "+0.310 ± 0.040" in verdict(SUMMARY)
    assert "within two standard errors" in verdict(SUMMARY | {"reward_gain": 0.07})
    assert "score lower" in verdict(SUMMARY | {"reward_gain": -0.31})
    assert "No samples" in verdict({})


def test_missing_values_are_dashes():
    lines = summary_table({"eval_loss": 0.5}).splitlines()
    assert [line.split()[-1] for line in lines].count("-") == len(lines) - 1


def test_smoothing_by_hand():
    assert smooth([1.0, 3.0], 0.5) == pytest.approx([1.0, (0.25 * 1 + 0.5 * 3) / 0.75])


def test_a_sweep_is_compared_with_seeds_aggregated(tmp_path):
    for seed, reward in ((0, 1.2), (1, 1.4)):
        make_run(tmp_path / f"a{seed}", seed=seed, summary=SUMMARY | {"policy_reward": reward})
    make_run(tmp_path / "b", loss="odpo", summary=None)
    make_run(tmp_path / "c" / "step-5" / ".hidden")
    runs = find_runs(tmp_path)
    assert len(runs) == 3
    table = write_comparison(tmp_path, runs)
    with open(tmp_path / "comparison.csv") as f:
        rows = list(csv.DictReader(f))
    assert [row["loss.name"] for row in rows] == ["dpo", "odpo"]
    error = math.sqrt(2 * 0.1**2 / 1 / 2)
    assert rows[0]["policy_reward"] == f"1.300 ± {error:.3f}" and rows[0]["seeds"] == "0 1" and rows[0]["state"] == "finished"
    assert rows[1]["state"] == "0 of 1 finished" and rows[1]["policy_reward"] == "1.400"
    assert "loss.name" in table and "loss.beta" not in table
    assert pixels(tmp_path / "frontier.png").std() > 0.02
    assert "| loss.name |" in (tmp_path / "comparison.md").read_text()


def test_settings_that_differ_make_rows_of_their_own(tmp_path):
    for beta in (0.1, 1.0):
        make_run(tmp_path / f"{beta}", beta=beta)
    write_comparison(tmp_path, find_runs(tmp_path))
    with open(tmp_path / "comparison.csv") as f:
        assert [row["loss.beta"] for row in csv.DictReader(f)] == ["0.1", "1.0"]


def test_the_command_needs_no_torch_and_says_what_it_looked_for(tmp_path):
    make_run(tmp_path / "run")
    code = f"import sys; sys.argv = ['report.py', {str(tmp_path / 'run')!r}]; import report; report.main(); assert 'torch' not in sys.modules"
    assert "1.310" in subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (tmp_path / "empty").mkdir()
    refused = subprocess.run([sys.executable, ROOT / "report.py", tmp_path / "empty"], capture_output=True, text=True)
    assert refused.returncode == 2 and "looked for folders with a config.yaml and a metrics.jsonl" in refused.stderr


def test_long_runs_are_thinned(tmp_path):
    folder = make_run(tmp_path / "run")
    write_jsonl(folder / "metrics.jsonl", [{"examples": i, "split": "train", "loss/train": 1.0} for i in range(50_000)])
    x, y = report.Run(folder).series("train", "loss/train")
    assert 1000 < len(x) == len(y) <= 3 * report.MAX_POINTS
