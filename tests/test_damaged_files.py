"""Files that were cut, emptied, deleted or changed: built again, passed over, or one error."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import (
    change,
    cut,
    delete,
    empty,
    final_weights,
    read_rows,
    run_here,
    same_weights,
    small_run,
    untimed,
    write_imdb,
)

from preflab.batching.token_store import prepare
from preflab.readers.registry import open_dataset
from preflab.training.checkpoints import damage_of, latest_checkpoint
from utils import ConfigError, DataError, atomic_directory, atomic_write, remove_leftovers

# ------------------------------------------------------------------------------------- token cache


@pytest.fixture
def tokens(tmp_path, tokenizer):
    data = write_imdb(tmp_path / "data")

    def tokens():
        source = open_dataset("imdb", "train", data_dir=str(data))
        cache = tmp_path / "cache"
        return prepare(
            source, tokenizer, max_length=64, max_prompt_length=32, cache_dir=cache
        ), cache

    return tokens


@pytest.mark.parametrize("damage", [cut, empty, delete, change])
def test_a_damaged_cache_is_built_again(tokens, damage, caplog):
    store, cache = tokens()
    before = {name: np.array(getattr(store, name)) for name in ("tokens", "responses", "pairs")}
    [folder] = (cache / "tokens").iterdir()
    names = [path.name for path in folder.iterdir()]
    assert {"tokens.bin", "pairs.npy", "meta.json", "checksums.json"} <= set(names)
    for name in names:
        damage(folder / name)
        with caplog.at_level(logging.WARNING):
            again, _ = tokens()
        assert name in caplog.text and "tokenised again" in caplog.text
        for field, values in before.items():
            assert np.array_equal(getattr(again, field), values)
        caplog.clear()
    tokens()
    assert not caplog.text  # a whole cache is read in silence


# ------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def two_steps(llama_folder, tmp_path_factory):
    """The folder of a run with checkpoints of steps 1 and 2, and of one with a third; what copies
    the first, and what continues a copy."""
    folder = tmp_path_factory.mktemp("damaged")
    data = write_imdb(folder / "data")

    def go(name, *more):
        overrides = small_run(
            llama_folder, data, folder / name, "keep_checkpoints=null", "eval_every=8",
            "sample_during_eval=false", *more,
        )  # fmt: skip
        return run_here(*overrides)

    go("run", "n_examples=16")
    go("whole", "n_examples=24")

    def copy(name):
        shutil.copytree(folder / "run", folder / name, symlinks=True)
        return folder / name

    return folder, copy, go


@pytest.mark.parametrize("damage", [cut, empty, delete])
@pytest.mark.parametrize(
    "file",
    ["hf/model.safetensors", "training_state.pt", "optimizer/.metadata", "optimizer/__0_0.distcp"],
)
def test_a_run_continues_from_the_checkpoint_before_a_damaged_one(two_steps, file, damage, caplog):
    folder, copy, go = two_steps
    name = f"{damage.__name__}-{file.replace('/', '-')}"
    run = copy(name)
    damage(run / "step-2" / file)
    with caplog.at_level(logging.WARNING):
        go(name, "n_examples=24")
    assert "continuing from step-1" in caplog.text and file in caplog.text
    assert (run / "damaged-step-2").is_dir() and (run / "step-2" / "hf").is_dir()
    assert (run / "LATEST").resolve().name == "step-3"
    assert same_weights(final_weights(run), final_weights(folder / "whole"))


def test_a_run_whose_checkpoints_are_all_damaged_names_them(two_steps):
    _, copy, go = two_steps
    run = copy("all")
    for step in (1, 2):
        cut(run / f"step-{step}" / "hf" / "model.safetensors")
    with pytest.raises(ConfigError, match=r"no checkpoint .* complete .*step-2: hf/model\.\S+ has"):
        go("all", "n_examples=24")
    assert sorted(path.name for path in run.glob("step-*")) == ["step-1", "step-2"]


def test_exports_may_be_deleted_and_old_checkpoints_have_no_sizes(two_steps):
    _, copy, _ = two_steps
    run = copy("exports")
    (run / "step-2" / "hf" / "README.md").unlink()
    (run / "step-2" / "hf" / "tokenizer.json").write_text("edited")
    assert latest_checkpoint(run).name == "step-2"
    (run / "step-2" / "sizes.json").unlink()
    assert damage_of(run / "step-2") == "it has no sizes.json"
    (run / "step-2" / "policy.pt").touch()
    assert damage_of(run / "step-2") == ""
    (run / "step-2" / "sizes.json").write_text(json.dumps(["policy.pt"]))
    assert damage_of(run / "step-2") == "sizes.json is not what was saved"


# -------------------------------------------------------------------------------------- text files


@pytest.mark.parametrize(
    "content", [b"", b"\x80\xff\0[", b"[" * 100_000, b"[]", b'"text"', b"{3: 4}"]
)
@pytest.mark.parametrize("file", ["config.yaml", "summary.json", "data.json", "metrics.jsonl"])
def test_a_resume_with_a_damaged_text_file_is_an_error_that_names_it(two_steps, file, content):
    folder, copy, go = two_steps
    run = folder / "text"
    if not run.is_dir():
        copy("text")
    before = (run / file).read_bytes()
    last_line = content if file != "metrics.jsonl" else content + b"\n" + before
    (run / file).write_bytes(last_line)
    # A finished run prints its report, which leaves damaged rows of metrics.jsonl out.
    n_examples = 24 if file == "metrics.jsonl" else 16
    try:
        if (file, content) == ("metrics.jsonl", b""):
            return  # a blank line
        with pytest.raises((ConfigError, DataError), match=rf"{file}:") as refused:
            go("text", f"n_examples={n_examples}")
        assert "\n" not in str(refused.value)
    finally:
        (run / file).write_bytes(before)


def test_a_last_line_that_a_kill_cut_short_is_passed_over(two_steps):
    folder, copy, go = two_steps
    run = copy("last-line")
    with open(run / "metrics.jsonl", "a") as f:
        f.write('{"examples": 16, "spl')
    go("last-line", "n_examples=24")
    assert untimed(read_rows(run / "metrics.jsonl")) == untimed(
        read_rows(folder / "whole" / "metrics.jsonl")
    )


# ---------------------------------------------------------------------- leftovers of killed writers


def test_what_killed_writers_left_is_cleared_and_what_is_being_written_stays(tmp_path):
    leftovers = [tmp_path / name for name in (".a.json.abcd1234", ".b.json.0123_xyz", ".kept.swp")]
    for path in leftovers:
        path.write_text("half")
    (tmp_path / ".folder.abcd1234" / "inner").mkdir(parents=True)
    with atomic_write(tmp_path / "a.json") as f, atomic_directory(tmp_path / "folder") as temporary:
        assert sorted(path.name for path in leftovers if path.exists()) == [
            ".b.json.0123_xyz",
            ".kept.swp",
        ]
        assert not (tmp_path / ".folder.abcd1234").exists()
        remove_leftovers(tmp_path)  # as the run that owns the folder, or another process would
        assert Path(f.name).exists() and temporary.is_dir()
        f.write("{}")
        (temporary / "file").touch()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".kept.swp", "a.json", "folder"]
    assert (tmp_path / "a.json").read_text() == "{}" and (tmp_path / "folder" / "file").exists()
