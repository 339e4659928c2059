"""run.sh and test.sh with a python that only pretends to install, and the files that say what is
installed, which must agree."""

import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT
from setuptools import Distribution

# Answers the questions of scripts/env.sh as a python of version FAKE_VERSION would, and writes each
# environment it makes and fills to $FAKE_LOG. FAKE_PIP: what pip does, see the last lines.
PYTHON = f"""#!/usr/bin/env bash
case "$*" in
"-c "*version_info*) echo "${{FAKE_VERSION:-3.11}} $(realpath "$0")" ;;
"-c "*) exec {sys.executable} "$@" ;;
"-m venv "*)
    echo "venv begins" >>"$FAKE_LOG"
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
"-m pip download "*)
    case "$FAKE_PIP" in
    cancelled) trap "exit 1" INT; : >"$FAKE_LOG.hangs"; sleep 60 ;;
    offline) echo "Retrying (Retry(total=0)) after 'NewConnectionError(no name)'" ;;
    slow) echo "Retrying (Retry(total=0)) after 'ReadTimeoutError(timeout=5)'"; exit 1 ;;
    flickers) echo "Retrying (Retry(total=1)) after 'NewConnectionError(no name)'" ;;
    esac ;;
"-m pip install "*)
    sleep "${{FAKE_SECONDS:-0}}"
    if [ "$FAKE_PIP" = fails ]; then echo "ERROR: no wheel for you" >&2; exit 1; fi
    if [ "$FAKE_PIP" = hangs ]; then : >"$FAKE_LOG.hangs"; exec sleep 60; fi
    echo "pip ends" >>"$FAKE_LOG" ;;
*) echo "in $PWD: $*" ;;
esac
"""


class Checkout:
    """A copy of the scripts in a folder with a space in its name, and a fake python3 on PATH."""

    def __init__(self, folder: Path):
        self.root, self.log = folder / "my checkout", folder / "log"
        self.venv = self.root / ".venv"
        (self.root / "scripts").mkdir(parents=True)
        (self.root / "requirements").mkdir()
        files = ["run.sh", "test.sh", "scripts/env.sh", "requirements.txt", "constraints.txt"]
        files += [f"requirements/{path.name}" for path in (ROOT / "requirements").iterdir()]
        for name in files:
            (self.root / name).write_bytes((ROOT / name).read_bytes())
        (folder / "bin").mkdir()
        for name in ("python3", "python3.12"):
            (folder / "bin" / name).write_text(PYTHON)
            (folder / "bin" / name).chmod(0o755)
        self.environment = {key: value for key, value in os.environ.items() if key != "PYTHON"}
        self.environment |= {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "FAKE_LOG": str(self.log),
            "FAKE_PIP": "ok",
        }

    def start(self, script: str, *arguments: str, cwd=None, **environment: str):
        return subprocess.Popen(
            ["bash", str(self.root / script), *arguments],
            cwd=cwd or self.root,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # a shell that starts tests in the background has them ignore Ctrl-C
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, script: str, *arguments: str, cwd=None, **environment: str):
        process = self.start(script, *arguments, cwd=cwd, **environment)
        out, err = process.communicate(timeout=30)
        return process.returncode, out, err

    def events(self) -> list[str]:
        return self.log.read_text().splitlines() if self.log.exists() else []

    def folders(self) -> set[str]:
        return {path.name for path in self.root.iterdir() if path.is_dir()}


def wait_for(condition) -> None:
    """Until `condition()` holds; fails after 30 seconds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end, condition
        time.sleep(0.01)


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


def test_the_environment_is_set_up_once_and_again_when_the_requirements_change(checkout):
    code, out, _ = checkout.run("run.sh", "loss=ipo")
    assert code == 0 and "setting up .venv with Python 3.11" in out and "train.py loss=ipo" in out
    code, out, _ = checkout.run("test.sh", "-k", "losses")
    assert code == 0 and "setting up" not in out
    assert "-m pytest -n 2 --dist loadfile --no-loadscope-reorder -k losses" in out
    assert checkout.events() == ["venv begins", "pip ends"]

    with open(checkout.root / "requirements" / "tests.txt", "a") as f:
        f.write("another==1.0\n")
    assert "setting up .venv" in checkout.run("run.sh")[1]
    assert checkout.folders() == {".venv", "requirements", "scripts"}


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.10", "3.14"])
def test_another_python_is_refused_in_one_line(checkout, version):
    code, out, err = checkout.run("run.sh", FAKE_VERSION=version)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: python3 is Python {version}; PrefLab runs on Python 3.11, 3.12")
    assert "PYTHON=python3.12 bash" in err and err.count("\n") == 1
    assert not checkout.venv.exists()


def test_a_python_that_does_not_start_is_refused_in_one_line(checkout):
    code, _, err = checkout.run("run.sh", PYTHON="python3.99")
    assert code == 2 and err.startswith("error: python3.99 does not start; PrefLab runs on")
    assert err.count("\n") == 1


def test_python_names_another_version_and_the_environment_keeps_it(checkout):
    for version in ("3.11", "3.12", "3.13"):
        out = checkout.run("run.sh", PYTHON="python3.12", FAKE_VERSION=version)[1]
        assert f"setting up .venv with Python {version}" in out
    # without PYTHON the environment is used as it is, whatever python3 is
    code, out, _ = checkout.run("run.sh", FAKE_VERSION="3.14")
    assert code == 0 and "setting up" not in out


def test_two_commands_at_once_set_up_one_environment(checkout):
    first = checkout.start("run.sh", FAKE_SECONDS="1")
    wait_for(lambda: "venv begins" in checkout.events())
    code, out, _ = checkout.run("test.sh")
    assert code == 0 and first.wait(30) == 0
    assert "waiting for another command that sets up .venv" in out and "setting up" not in out
    assert checkout.events() == ["venv begins", "pip ends"]
    first.communicate()


def test_a_run_holds_no_lock_while_it_trains(checkout):
    checkout.run("run.sh")
    trains = f"#!/usr/bin/env bash\ntouch '{checkout.log}.trains'\nsleep 60\n"
    checkout.venv.joinpath("bin", "python").write_text(trains)
    running = checkout.start("run.sh")
    wait_for(checkout.log.with_name("log.trains").exists)
    try:
        with open(checkout.root / "constraints.txt", "a") as f:
            f.write("another==1.0\n")
        code, out, _ = checkout.run("test.sh")
        assert code == 0 and "waiting" not in out
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.communicate()


@pytest.mark.parametrize(
    "pip, message", [("offline", "no package index"), ("fails", "pip could not")]
)
def test_a_failed_installation_says_so_and_leaves_no_environment(checkout, pip, message):
    code, _, err = checkout.run("run.sh", FAKE_PIP=pip)
    assert code == 2 and err.splitlines()[-1].startswith(f"error: {message}")
    assert checkout.folders() == {"requirements", "scripts"}
    if pip == "offline":
        assert err.count("\n") == 1 and "PIP_INDEX_URL" in err
        assert "NewConnectionError" in (checkout.root / ".venv.log").read_text()
    code, _, _ = checkout.run("run.sh")
    assert code == 0


@pytest.mark.parametrize("pip", ["slow", "flickers"])
def test_a_bad_network_is_no_reason_to_stop(checkout, pip):
    code, _, err = checkout.run("run.sh", FAKE_PIP=pip)
    assert (code, err) == (0, "")
    assert not (checkout.root / ".venv.log").exists()


def test_a_failed_installation_leaves_the_environment_that_was_there(checkout):
    checkout.run("run.sh")
    (checkout.venv / "mark").touch()
    before = (checkout.root / "constraints.txt").read_bytes()
    (checkout.root / "constraints.txt").write_bytes(before + b"another==1.0\n")
    code, _, _ = checkout.run("run.sh", FAKE_PIP="offline")
    assert code == 2 and checkout.folders() == {".venv", "requirements", "scripts"}
    assert (checkout.venv / "mark").exists()

    (checkout.root / "constraints.txt").write_bytes(before)
    assert "setting up" not in checkout.run("run.sh")[1]


# after Ctrl-C pip ends with an ordinary error, which the check of the network passes over
@pytest.mark.parametrize(
    "pip, signum",
    [
        ("hangs", signal.SIGINT),
        ("hangs", signal.SIGTERM),
        ("hangs", signal.SIGKILL),
        ("cancelled", signal.SIGINT),
    ],
)
def test_an_interrupted_installation_is_not_used(checkout, pip, signum):
    process = checkout.start("run.sh", FAKE_PIP=pip)
    wait_for(checkout.log.with_name("log.hangs").exists)
    os.killpg(process.pid, signum)
    process.communicate(timeout=30)
    assert process.returncode != 0
    if signum != signal.SIGKILL:
        assert checkout.folders() == {"requirements", "scripts"}
    code, out, _ = checkout.run("run.sh")
    assert code == 0 and "setting up" in out and "waiting" not in out


def test_an_environment_whose_python_is_gone_is_set_up_again(checkout):
    checkout.run("run.sh")
    (checkout.venv / "bin" / "python").unlink()
    (checkout.venv / "bin" / "python").symlink_to("/nowhere/python3.11")
    code, out, _ = checkout.run("run.sh")
    assert code == 0 and "setting up" in out


def test_run_sh_stays_in_the_folder_of_its_caller_and_test_sh_goes_to_the_repository(
    checkout, tmp_path
):
    (tmp_path / "mine").mkdir()
    for command in (checkout.root / "run.sh", Path("..", "my checkout", "run.sh")):
        done = subprocess.run(
            ["bash", str(command), "local_run_dir=x", "datasets=[mine.json]"],
            cwd=tmp_path / "mine",
            env=checkout.environment | {"CDPATH": str(tmp_path)},
            capture_output=True,
            text=True,
            check=True,
        )
        train = checkout.root / "train.py"
        last = f"in {tmp_path / 'mine'}: {train} local_run_dir=x datasets=[mine.json]"
        assert done.stdout.splitlines()[-1] == last
    assert not list((tmp_path / "mine").iterdir())
    out = checkout.run("test.sh", cwd=tmp_path / "mine")[1]
    assert out.startswith(f"in {checkout.root}: -m pytest")


def test_train_py_reads_and_writes_below_the_current_folder(tmp_path):
    command = [sys.executable, str(ROOT / "train.py"), "--cfg", "job", "--resolve"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "local_dirs:\n- runs\n" in done.stdout
    for key in ("data_dir", "cache_dir", "  name_or_path"):
        assert re.search(rf"(?m)^{key}: {re.escape(str(ROOT))}/", done.stdout), key


# --------------------------------------------------------------------------- what is installed


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    found = [line.split("==") for line in lines if line and not line.startswith(("#", "-r "))]
    return {name.lower().replace("_", "-"): version for name, version in found}


def test_constraints_pin_what_the_requirements_pin():
    listed = re.findall(r"(?m)^-r (.+)$", (ROOT / "requirements.txt").read_text(encoding="utf-8"))
    optional = [f"requirements/{name}.txt" for name in ("quantization", "search", "trackers")]
    there = {f"requirements/{p.name}" for p in (ROOT / "requirements").iterdir()}
    assert {*listed, *optional} == there
    files = [*listed, *optional]
    required = {name: version for file in files for name, version in pins(file).items()}
    constraints = pins("constraints.txt")
    # torch is not among the constraints: builds for a CPU and for CUDA have versions of their own
    assert required.pop("torch") and "torch" not in constraints
    assert required.items() <= constraints.items()
    assert tuple(map(int, required["hydra-core"].split("."))) > (1, 3, 3), "CVE-2026-68508"


def test_what_is_installed_fits_together():
    done = subprocess.run([sys.executable, "-m", "pip", "check"], capture_output=True, text=True)
    if "No module named pip" in done.stderr:
        pytest.skip("this environment has no pip")
    assert done.returncode == 0, done.stdout


def test_the_package_reads_its_dependencies_from_the_requirements(monkeypatch):
    monkeypatch.chdir(ROOT)
    package = Distribution()
    package.parse_config_files(["pyproject.toml"])
    assert package.metadata.name == "preflab"
    declared = {"base": package.install_requires}
    declared |= {name: package.extras_require[name] for name in ("tests", "search", "trackers")}
    for name, requirements in declared.items():
        listed = pins(f"requirements/{name}.txt")
        assert dict(requirement.split("==") for requirement in requirements) == listed
    assert all((ROOT / f"{module}.py").is_file() for module in package.py_modules)


def test_the_package_ships_every_file_it_holds(monkeypatch):
    monkeypatch.chdir(ROOT)
    package = Distribution()
    package.parse_config_files(["pyproject.toml"])
    package.include_package_data = False  # what is declared, whatever a manifest adds
    build = package.get_command_obj("build_py")
    build.ensure_finalized()
    shipped = {Path(source) / name for _, source, _, names in build.data_files for name in names}
    files = (path for path in Path("preflab").rglob("*") if path.is_file())
    data = {path for path in files if path.suffix not in (".py", ".pyc")}
    assert data and data <= shipped
    assert {str(path.parent) for path in data} <= {p.replace(".", "/") for p in package.packages}


def test_versions_and_supported_pythons_agree():
    with open(ROOT / "pyproject.toml", "rb") as f:
        project = tomllib.load(f)["project"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"(?m)^## (\S+)", changelog)[1] == project["version"]
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {project['version']}\n" in citation
    classified = [c.split()[-1] for c in project["classifiers"] if "Python :: 3." in c]
    env = (ROOT / "scripts" / "env.sh").read_text(encoding="utf-8")
    assert f"    {' | '.join(classified)}) ;;\n" in env
    assert project["requires-python"] == ">=3.11,<3.14"
