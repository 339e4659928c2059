"""The Python entry: the page that shows it runs as a script would, and its errors."""

import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT, small_run

from preflab import evaluate, train
from utils import ConfigError


def test_the_page_runs_from_another_folder(tmp_path):
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert len(blocks) == 5
    shown = "\n".join(blocks)
    checks = """
import json
print(json.dumps({
    "folders": [str(r.folder) for r in runs.values()] + [str(evaluation.folder)],
    "kl": [r.summary["kl"] for r in runs.values()],
    "temperatures": sorted({row["temperature"] for row in evaluation.samples}),
    "steps": len(steps),
    "parameters": sum(p.numel() for p in model.parameters()),
}))
"""
    result = subprocess.run(
        [sys.executable, "-c", shown + checks],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(),
    )
    assert result.returncode == 0, result.stderr[-3000:]
    seen = json.loads(result.stdout.splitlines()[-1])
    assert len(set(seen["folders"])) == 3 and all(
        (tmp_path / folder / "summary.json").is_file() for folder in seen["folders"]
    )
    assert seen["temperatures"] == [0, 1.0] and seen["steps"] == 4 and seen["parameters"] > 1e5
    assert seen["kl"][0] > seen["kl"][1] >= 0  # the smaller beta moves further


def environment() -> dict:
    import os

    return os.environ | {"PYTHONPATH": str(ROOT), "MPLBACKEND": "agg", "WANDB_MODE": "disabled"}


def test_a_mistake_raises_the_error_of_the_command_line(tmp_path):
    with pytest.raises(ConfigError, match="batch_size"):
        train("bach_size=8", local_run_dir=tmp_path / "run")
    with pytest.raises(ConfigError, match="no config"):
        evaluate(tmp_path)
    with pytest.raises(ConfigError, match="local_run_dir"):
        train(resume=tmp_path)
    assert not (tmp_path / "run").exists()


def test_an_evaluation_takes_over_what_its_run_was_trained_with(imdb_dir, llama_folder, tmp_path):
    command = small_run(llama_folder, imdb_dir, tmp_path / "run", "n_examples=8", "seed=3")
    first = train(*command)
    second = train(*command)  # the folder holds the finished run
    assert second == first and first.summary["examples"] == 8
    continued = train(
        *small_run(
            llama_folder,
            imdb_dir,
            tmp_path / "more",
            "n_examples=8",
            f"model.archive={first.folder}",
        )
    )
    result = evaluate(continued, local_run_dir=tmp_path / "evaluated", n_eval_examples=4)
    config = (result.folder / "config.yaml").read_text()
    assert f"archive: {continued.folder}" in config
    assert f"reference_archive: {first.folder}" in config and str(llama_folder) in config
    assert len(result.samples) == 4 and result.summary["function"] == "eval"
