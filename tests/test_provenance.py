"""provenance.json and train.log: what made a run, and what differs when it continues."""

import json
import subprocess

import pytest
from conftest import run_here, small_run

from preflab.training import provenance
from utils import ConfigError


def starts(folder) -> list[dict]:
    return json.loads((folder / "provenance.json").read_text(encoding="utf-8"))["starts"]


def test_a_run_says_what_made_it_and_what_differs_when_it_continues(
    imdb_dir, llama_folder, tmp_path, monkeypatch, capsys
):
    criterion = tmp_path / "criterion.md"
    criterion.write_text("beats DPO in 5 of 5 seeds", encoding="utf-8")
    folder, more = tmp_path / "run", ("do_first_eval=false", f"criterion={criterion}")
    run_here(*small_run(llama_folder, imdb_dir, folder, "n_examples=8", *more))
    [first] = starts(folder)
    assert first["packages"]["torch"] and first["command"] and first["hardware"]["cores"]
    assert first["criterion"]["content"] == "beats DPO in 5 of 5 seeds"
    assert all(len(of["content"]) > 8 for of in first["data"]["train"])
    log = (folder / "train.log").read_text(encoding="utf-8")
    assert f"INFO run folder: {folder}" in log and "report.html" in log
    assert "since the last start" not in log

    monkeypatch.setattr(provenance, "describe_code", lambda: {"commit": "abc", "dirty": True})
    run_here(*small_run(llama_folder, imdb_dir, folder, "n_examples=16", *more))
    assert len(starts(folder)) == 2 and starts(folder)[1]["code"]["commit"] == "abc"
    said = capsys.readouterr().err
    assert "since the last start of this run, commit was" in said and "is now abc" in said
    assert "is now abc" in (folder / "train.log").read_text(encoding="utf-8")


@pytest.mark.parametrize("error", [FileNotFoundError(), subprocess.TimeoutExpired("git", 10)])
def test_without_git_there_is_no_commit(monkeypatch, error):
    def fails(*arguments, **more):
        raise error

    monkeypatch.setattr(subprocess, "run", fails)
    assert provenance.describe_code() == {"commit": None, "dirty": None}


@pytest.mark.parametrize("content", ["", "[]", '{"starts": {}}', '{"starts": [5]}'])
def test_a_damaged_file_is_set_aside_and_written_again(tmp_path, content):
    (tmp_path / "provenance.json").write_text(content, encoding="utf-8")
    said = provenance.write_provenance(tmp_path, provenance.describe({}))
    assert said == "provenance.json was damaged and is now damaged-provenance.json"
    assert (tmp_path / "damaged-provenance.json").read_text() == content
    assert provenance.write_provenance(tmp_path, provenance.describe({})) == ""
    assert len(starts(tmp_path)) == 2


def test_a_missing_criterion_is_refused(imdb_dir, llama_folder, tmp_path):
    overrides = small_run(llama_folder, imdb_dir, tmp_path / "run", "criterion=nowhere.md")
    with pytest.raises(ConfigError, match=r"criterion=nowhere\.md: no such file"):
        run_here(*overrides)
