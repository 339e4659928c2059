"""What the machine refuses: no space, a read-only disk, no permission, a file in place of a folder,
no file handles. One line, exit code 2, and what was written stays usable."""

import contextlib
import errno
import json
import os
import resource
import runpy
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import (
    ROOT,
    final_weights,
    run_command,
    run_here,
    same_weights,
    save_model,
    small_run,
    write_imdb,
    write_jsonl,
)

from preflab.modeling.placed_weights import on_disk
from preflab.reports.run import write_report
from preflab.settings.command_line import check_command_line, run_config
from preflab.training.checkpoints import damage_of
from scripts.partial_file import PartialFile
from utils import ConfigError, DataError, check_writable, in_use, machine_error


@pytest.fixture
def refused(llama_folder, tmp_path, capsys):
    """Runs a command that the machine refuses; returns the line that it ends with."""
    data = write_imdb(tmp_path / "data")

    def refused(folder, *more):
        overrides = small_run(llama_folder, data, folder, "sample_during_eval=false", *more)
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run_config(lambda: run_here(*overrides))
        assert ended.value.code == 2
        errors = capsys.readouterr().err
        assert "Traceback" not in errors
        assert "error: " in errors, errors
        return errors[errors.index("error: ") :]

    return refused


@contextlib.contextmanager
def mounted(folder, *options):
    folder.mkdir(exist_ok=True)
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting needs root")
    if subprocess.run(["mount", *options, str(folder)], capture_output=True).returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def disk(folder, kib):
    with mounted(folder, "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs"):
        yield folder


def test_a_full_disk_ends_a_run_in_a_line_and_its_checkpoints_continue(
    refused, llama_folder, tmp_path
):
    steps = ("n_examples=32", "save_every=8", "keep_checkpoints=null", "eval_every=8")
    with disk(tmp_path / "disk", 700) as small:
        line = refused(small / "run", *steps)
        assert os.strerror(errno.ENOSPC) in line and "free some space" in line
        run = small / "run"
        whole = sorted(run.glob("step-*"))
        assert whole and not any(map(damage_of, whole)) and not list(run.glob(".step-*"))
        assert (run / "LATEST").resolve() == whole[-1]
        shutil.copytree(run, tmp_path / "run", symlinks=True)  # to a disk with space
        assert "error: " in refused(run, *steps)
    data = tmp_path / "data"
    run_here(*small_run(llama_folder, data, tmp_path / "run", "sample_during_eval=false", *steps))
    run_here(*small_run(llama_folder, data, tmp_path / "all", "sample_during_eval=false", *steps))
    assert same_weights(final_weights(tmp_path / "run"), final_weights(tmp_path / "all"))
    write_report(tmp_path / "run")


def test_a_snapshot_of_weights_on_a_full_disk_is_an_error_and_no_signal(tmp_path):
    with disk(tmp_path / "disk", 64) as small:
        if (pid := os.fork()) == 0:  # a write to a mapped page without space kills the process
            try:
                on_disk(torch.zeros(100_000), small / "weights")
            except OSError as error:
                os._exit(error.errno)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == errno.ENOSPC


@pytest.mark.parametrize("kib", [8, 32])
def test_a_full_disk_for_the_caches_is_a_line(refused, tmp_path, kib):
    with disk(tmp_path / "disk", kib) as small:
        line = refused(tmp_path / "run", f"cache_dir={small}")
        assert os.strerror(errno.ENOSPC) in line
    assert not (tmp_path / "run").exists() or kib > 8


@pytest.mark.parametrize("key", ["local_run_dir", "cache_dir"])
def test_a_read_only_disk_is_refused_at_the_start(refused, tmp_path, key):
    with disk(tmp_path / "disk", 100) as small:
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        folders = {"local_run_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"}
        folders[key] = small / "inner"
        line = refused(folders["local_run_dir"], f"cache_dir={folders['cache_dir']}")
    assert str(small) in line and os.strerror(errno.EROFS) in line
    assert not (tmp_path / "run").exists()


def test_a_complete_cache_on_a_read_only_disk_is_read(refused, llama_folder, tmp_path):
    def command(name, cache, *more):
        given = ("sample_during_eval=false", f"cache_dir={cache}", "n_examples=8", *more)
        return small_run(llama_folder, tmp_path / "data", tmp_path / name, *given)

    with disk(tmp_path / "disk", 2000) as small:
        run_here(*command("first", small))
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        run_here(*command("second", small))
        line = refused(tmp_path / "third", f"cache_dir={small}", "n_examples=16")
        assert line.startswith(f"error: cache_dir={small}: {os.strerror(errno.EROFS)}; name")
        assert "or use reference.cache=false: the reference's log-probs of" in line
        [logps] = [folder / "logps" for folder in small.glob("reference/*/")][:1]
        subprocess.run(["mount", "-o", "remount,rw", str(small)], check=True)
        os.truncate(logps, logps.stat().st_size - 4)
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        line = refused(tmp_path / "fourth", f"cache_dir={small}", "n_examples=8")
        assert "are not there, or damaged" in line
    assert same_weights(final_weights(tmp_path / "first"), final_weights(tmp_path / "second"))


@pytest.mark.parametrize("key", ["local_run_dir", "cache_dir"])
def test_a_file_in_place_of_a_folder_is_refused_at_the_start(refused, tmp_path, key):
    (tmp_path / "file").touch()
    folders = {"local_run_dir": tmp_path / "run", "cache_dir": tmp_path / "cache"}
    folders[key] = tmp_path / "file" / "inner"
    line = refused(folders["local_run_dir"], f"cache_dir={folders['cache_dir']}")
    assert str(tmp_path / "file") in line and "a file stands where a folder is needed" in line
    assert not (tmp_path / "run").exists()


def test_the_command_says_so_before_hydra_does(tmp_path):
    (tmp_path / "file").touch()
    result = run_command("train.py", f"local_run_dir={tmp_path / 'file' / 'run'}", check=False)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path / 'file'}") and "name another folder" in line


def test_no_file_handles(refused, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = len(os.listdir("/dev/fd"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 2, hard))
    try:
        line = refused(tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert os.strerror(errno.EMFILE) in line


def test_no_permission(tmp_path):
    (tmp_path / "folder").mkdir(mode=0o500)
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)  # root may write anywhere
    try:
        with pytest.raises(ConfigError, match=r"cache_dir=.*name a folder that you can write to"):
            check_writable(tmp_path / "folder" / "cache", "cache_dir")
        with pytest.raises(PermissionError) as denied, in_use(tmp_path / "folder" / ".lock"):
            pass
        assert machine_error(denied.value).endswith("name a folder that you can write to")
    finally:
        os.seteuid(before)


def test_what_libraries_say_of_a_full_disk_is_understood(tmp_path):
    with disk(tmp_path / "disk", 64) as small, pytest.raises(RuntimeError) as failed:
        torch.save(torch.zeros(100_000), small / "weights.pt")
    assert "No space left" in machine_error(failed.value)
    wrapped = RuntimeError("of a library")
    wrapped.__cause__ = ValueError("I/O error: No space left on device (os error 28)")
    assert "No space left" in machine_error(wrapped)
    assert machine_error(RuntimeError("a mistake")) == ""


# ----------------------------------------------------------------------------- every other program


@pytest.fixture(scope="module")
def material(tmp_path_factory):
    """What the programs read, and a finished run without its checkpoints."""
    folder = tmp_path_factory.mktemp("material")
    data = write_imdb(folder / "data")
    run_here(*small_run(save_model(folder / "llama"), data, folder / "whole", "n_examples=8"))
    shutil.copytree(
        folder / "whole", folder / "run", ignore=shutil.ignore_patterns("step-*", "LATEST")
    )
    rows = [{"prompt": f"prompt number {i}", "response": "x " * 200} for i in range(40)]
    write_jsonl(folder / "generations.jsonl", rows)
    comparison = {
        "info": {"subreddit": "a", "title": "t", "post": "p" * 400},
        "summaries": [{"text": "one"}, {"text": "two"}],
        "choice": 1,
    }
    for split in ("train", "test"):
        (folder / f"{split}.json").write_text(json.dumps([comparison] * 40))
    return folder


def programs(material, output):
    """The command line of each program that writes to `output`."""
    return {
        "generate.py": small_run(
            material / "llama", material / "data", output / "new", "samples_per_prompt=40"
        ),
        "judge.py": [output / "run", "--by", "reward", "--reward", "length"],
        "report.py": [output / "run"],
        "scripts/score_rewards.py": [
            *("--fname", material / "generations.jsonl", "--reward", "length"),
            *("--output", output / "scored.jsonl"),
        ],
        "scripts/preproc_pref.py": [material, "--output", output / "new"],
        "scripts/make_math_prompts.py": ["--output", output / "prompts.jsonl"],
    }


@pytest.mark.parametrize("refusal", ["full", "read-only"])
@pytest.mark.parametrize("program", programs(ROOT, ROOT))
def test_programs_end_in_a_line_and_leave_what_was_there(
    program, refusal, material, tmp_path, monkeypatch, capsys
):
    with disk(tmp_path / "disk", 2000) as small:
        shutil.copytree(material / "run", small / "run")
        before = {path: path.read_bytes() for path in (small / "run").iterdir() if path.is_file()}
        if refusal == "full":
            with contextlib.suppress(OSError):
                (small / "filled").write_bytes(bytes(3_000_000))
        else:
            subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        arguments = programs(material, small)[program]
        monkeypatch.setattr(sys, "argv", [program, *map(str, arguments)])
        monkeypatch.setattr(sys, "path", [str((ROOT / program).parent), *sys.path])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / program), run_name="__main__")
        errors = capsys.readouterr().err
        assert ended.value.code == 2, errors
        number = errno.ENOSPC if refusal == "full" else errno.EROFS
        assert errors.count("error: ") == 1 and "Traceback" not in errors
        [line] = [line for line in errors.splitlines() if "error: " in line]
        assert os.strerror(number) in line
        assert {path: path.read_bytes() for path in before} == before
        assert not list(small.rglob(".*.????????"))  # no half of a file


def test_a_folder_for_temporary_files_that_cannot_be_used(tmp_path, monkeypatch, capsys):
    def refused():
        with pytest.raises(SystemExit) as ended:
            check_command_line(["lr=1e-5"])
        assert ended.value.code == 2
        [line] = capsys.readouterr().err.splitlines()
        return line

    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    assert refused() == (
        f"error: TMPDIR={tmp_path / 'none'}: no such folder; make it, or set TMPDIR to another one"
    )
    assert not check_command_line(["--cfg", "job"])  # hydra answers, and no run follows
    with disk(tmp_path / "disk", 4) as small:
        monkeypatch.setenv("TMPDIR", str(small))
        assert check_command_line(["lr=1e-5"])
        (small / "filled").write_bytes(bytes(4096))
        assert refused().startswith(f"error: TMPDIR={small}: {os.strerror(errno.ENOSPC)}; free")
        subprocess.run(["mount", "-o", "remount,ro", str(small)], check=True)
        assert refused().startswith(f"error: TMPDIR={small}: {os.strerror(errno.EROFS)}; name")


def test_rows_kept_meanwhile_have_one_writer_and_their_damage_is_named(tmp_path):
    path = tmp_path / "out-partial.jsonl"
    PartialFile(path, {"k": 1})
    assert not path.exists()  # nothing was written yet
    first = PartialFile(path, {"k": 1})
    first.add([{"text": "one"}, {"text": "two"}])
    with pytest.raises(DataError, match=r"out-partial\.jsonl is being written by another process"):
        PartialFile(path, {"k": 1})
    del first
    with open(path, "a") as f:
        f.write('{"text": "thr')  # a kill
    assert PartialFile(path, {"k": 1}).rows == [{"text": "one"}, {"text": "two"}]
    path.write_bytes(path.read_bytes().replace(b'"two"', b'"tw'))
    with pytest.raises(DataError, match=r"out-partial\.jsonl:3: not a row that was written"):
        PartialFile(path, {"k": 1})
