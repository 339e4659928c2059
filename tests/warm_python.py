"""Scripts in forks of a Python that has imported the project already.

Importing torch and transformers takes longer than most commands of the tests. A fork is the
script's process in all else: it is `__main__`, with its own streams, environment and exit code.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

# What most commands import. Nothing of it starts a thread, which a fork would lose.
IMPORTED = ["preflab.execution", "preflab.reports.run", "transformers.models.llama.modeling_llama"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(IMPORTED)


class Script:
    """A running `python SCRIPT ARGUMENTS`, with as much of subprocess.Popen as the tests use."""

    def __init__(self, command: list[str], cwd: Path):
        self.args = command
        self._folder = tempfile.TemporaryDirectory()
        self._streams = [Path(self._folder.name) / name for name in ("out", "error")]
        self._process = FORKS.Process(
            target=_be, args=(command, str(cwd), dict(os.environ), *map(str, self._streams))
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    poll = returncode.fget

    def send_signal(self, number: int) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; returns what it wrote to stdout and stderr."""
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        # as text: newlines of every system are "\n"
        return tuple(stream.read_text(encoding="utf-8") for stream in self._streams)


def run_script(command: list[str], cwd: Path, timeout: float) -> subprocess.CompletedProcess:
    """Run `python SCRIPT ARGUMENTS`; command: the script and its arguments."""
    script = Script(command, cwd)
    try:
        output = script.communicate(timeout)
    except subprocess.TimeoutExpired:
        script.kill()
        raise
    return subprocess.CompletedProcess(command, script.returncode, *output)


def _be(command: list[str], cwd: str, environment: dict, output: str, errors: str) -> None:
    """Be a script, until it ends."""
    gc.freeze()  # as train.py does with what it imports
    os.setsid()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests may run under nohup, which ignores it
    os.chdir(cwd)
    for path, stream in ((os.devnull, 0), (output, 1), (errors, 2)):
        opened = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, stream)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = command
    sys.path.insert(0, str(Path(command[0]).parent))
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # a fork of multiprocessing leaves them out
