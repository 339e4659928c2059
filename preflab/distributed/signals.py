"""Signals that ask a run to stop."""

import multiprocessing
import os
import signal
import threading

from preflab.distributed.process_group import World

# SIGTERM: preemption, or the end of an allocation. SIGINT: Ctrl-C. SIGUSR1: the warning before a
# time limit (sbatch --signal=USR1@120). SIGUSR2: the same warning from job launchers such as
# submitit.
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class StopSignals:
    """Records the first signal that asks the run to stop. The loop saves and stops after its step.

    A second Ctrl-C stops at once. Signals are sent on to the workers.
    """

    def __init__(self):
        self.received: int | None = None
        self.handlers_before: dict[int, object] = {}

    def anywhere(self, world: World) -> int:
        """The signal that some rank received, the same on all ranks; 0 for none."""
        return int(world.max([self.received or 0])[0])

    def listen(self) -> None:
        """Handle the signals until the process ends; does nothing outside the main thread."""
        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                self.handlers_before[signum] = signal.signal(signum, self._on_signal)

    def _on_signal(self, signum, frame) -> None:
        if self.received is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = self.received or signum
        for worker in multiprocessing.active_children():
            # The terminal sends Ctrl-C to the workers too, and a second SIGINT would kill them.
            os.kill(worker.pid, signal.SIGTERM if signum == signal.SIGINT else signum)

    def hand_over(self) -> None:
        """Call the handler of a job launcher such as submitit, which requeues the job.

        Call it once everything is saved.
        """
        handler = self.handlers_before.get(signal.SIGUSR2)
        if self.received in (signal.SIGUSR1, signal.SIGUSR2) and callable(handler):
            handler(signal.SIGUSR2, None)


class Stopped(Exception):
    """A signal asked the run to stop. Its state is saved, and the same command continues it."""

    def __init__(self, signum: int):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
