"""Signals that ask a run to stop."""

import multiprocessing
import os
import signal
import threading

from preflab.distributed.process_group import World

# SIGTERM: preemption, or the end of an allocation; SIGUSR1: the warning before a time limit (sbatch
# --signal=USR1@120); SIGUSR2: the same where a launcher of jobs such as submitit uses it; SIGINT:
# Ctrl-C.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """Remembers the first signal that asks the run to stop; the loop saves and stops after the
    running step.

    A second Ctrl-C stops at once. Workers are told as well.
    """

    def __init__(self):
        self.received: int | None = None
        self.handlers_before: dict[int, object] = {}

    def anywhere(self, world: World) -> int:
        """The signal that any rank received, the same on all ranks; 0 for none."""
        return int(world.max([self.received or 0])[0])

    def listen(self) -> None:
        """Take the signals over, to the end of the process; only its main thread can."""
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                self.handlers_before[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum, frame) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signum
        for worker in multiprocessing.active_children():
            # A Ctrl-C reaches the workers by the terminal too, and a second one would kill them.
            os.kill(worker.pid, signal.SIGTERM if signum == signal.SIGINT else signum)

    def hand_over(self) -> None:
        """Once all is saved: if a launcher of jobs (submitit) waited for this signal, let it put
        the job back in the queue."""
        handler = self.handlers_before.get(signal.SIGUSR2)
        if self.received in (signal.SIGUSR1, signal.SIGUSR2) and callable(handler):
            handler(signal.SIGUSR2, None)


class Stopped(Exception):
    """A signal asked the run to stop; its state is saved and the same command continues it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
