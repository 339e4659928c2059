"""Signals that ask a run to stop."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path

# SIGTERM: preemption, or the end of an allocation. SIGINT: Ctrl-C. SIGUSR1: the warning before a
# time limit (sbatch --signal=USR1@120). SIGUSR2: the same warning from job launchers such as
# submitit. SIGHUP: the terminal was closed.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)


class StopSignals:
    """Records the first signal that asks the run to stop. `World.stop_if_asked`, which all loops
    over batches call, obeys it.

    A second Ctrl-C stops at once. Signals are sent on to the workers.

    held: True, on all ranks, where what is going on cannot be abandoned: the signal is obeyed
    later. note: a file for the signal, for workers that have not started yet.
    """

    def __init__(self):
        self.received: int | None = None
        self.held = False
        self.note: Path | None = None
        self.handlers_before: dict[int, object] = {}
        # Looked up now: a closed terminal is none.
        self._on_terminal = [stream for stream in (0, 1, 2) if os.isatty(stream)]

    def listen(self) -> None:
        """Handle the signals until the process ends; does nothing outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                if signum == signal.SIGHUP and signal.getsignal(signum) == signal.SIG_IGN:
                    continue  # started by nohup, which asks to go on without a terminal
                self.handlers_before[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum, frame) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signum
        if signum == signal.SIGHUP:
            self._leave_terminal()
        if self.note is not None:
            self.note.write_text(str(signum), encoding="utf-8")
        for worker in multiprocessing.active_children():
            # The terminal sends Ctrl-C to the workers too, and a second SIGINT would kill them.
            os.kill(worker.pid, signal.SIGTERM if signum == signal.SIGINT else signum)

    def _leave_terminal(self) -> None:
        """Print to nowhere from here on: a write to a closed terminal raises OSError."""
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in self._on_terminal:
            os.dup2(nowhere, stream)
        os.close(nowhere)

    def hand_over(self) -> None:
        """Call the handler of a job launcher such as submitit, which requeues the job.

        Call it once everything is saved.
        """
        handler = self.handlers_before.get(signal.SIGUSR2)
        if self.received in (signal.SIGUSR1, signal.SIGUSR2) and callable(handler):
            handler(signal.SIGUSR2, None)


class Stopped(Exception):
    """A signal asked the run to stop. The loop saves its state on the way out, and the same command
    continues it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
