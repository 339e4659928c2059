"""The exported folder in EleutherAI's harness, on a task of local data. Needs `pip install
lm-eval==0.4.13`; skipped without."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run_here, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("lm_eval")

TASK = """
task: local_preferences
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_choice: "{{{{[chosen, rejected]}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list:
  - metric: acc
"""


def test_the_harness_reads_an_exported_folder_and_agrees_on_who_is_preferred(tmp_path):
    run_here(
        f"local_run_dir={tmp_path / 'run'}",
        "n_examples=64",
        "n_eval_examples=8",
        "sample_during_eval=false",
        "wandb.enabled=false",
        "do_first_eval=false",
    )
    rows = [
        json.loads(line)
        for line in (ROOT / "data" / "reviews-test.jsonl").read_text().splitlines()[:200]
    ]
    pairs = [
        {"prompt": a["prompt"], "chosen": a["text"], "rejected": b["text"]}
        for a, b in zip(rows[::2], rows[1::2], strict=True)
        if a["text"] and b["text"] and a["text"] != b["text"]
    ]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "local.yaml").write_text(TASK.format(file=tmp_path / "pairs.jsonl"))
    folder = tmp_path / "run" / "LATEST" / "hf"
    command = [
        sys.executable,
        "-m",
        "lm_eval",
        "run",
        "--model",
        "hf",
        "--model_args",
        f"pretrained={folder},dtype=float32",
        "--tasks",
        "local_preferences",
    ]
    command += [
        "--include_path",
        tmp_path / "tasks",
        "--device",
        "cpu",
        "--batch_size",
        "8",
        "--output_path",
        tmp_path / "out",
    ]
    environment = os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    [results] = (tmp_path / "out").rglob("results*.json")
    accuracy = json.loads(results.read_text())["results"]["local_preferences"]["acc,none"]

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )

    @torch.no_grad()
    def log_prob(prompt: str, response: str) -> float:
        head, tail = (
            tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, response)
        )
        logps = model(torch.tensor([head + tail])).logits[0, len(head) - 1 : -1].log_softmax(-1)
        return logps[torch.arange(len(tail)), torch.tensor(tail)].sum().item()

    ours = sum(
        log_prob(p["prompt"], p["chosen"]) > log_prob(p["prompt"], p["rejected"]) for p in pairs
    ) / len(pairs)
    assert accuracy == pytest.approx(
        ours, abs=1.5 / len(pairs)
    )  # where the harness merges tokens at the seam, one pair may differ
    assert 0.2 < accuracy < 0.95
