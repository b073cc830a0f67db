"""Handling of the signals that end a run, between two steps."""

import signal
import threading

import jax
from jax.experimental import multihost_utils

ENDING = (signal.SIGTERM, signal.SIGINT)
# A closed terminal, unless nohup has it ignored, and what Slurm's --signal sends.
ASKING = [s for s in signal.Signals if s.name in ("SIGHUP", "SIGUSR1", "SIGUSR2")]


class Interrupted(RuntimeError):
    """A signal ended the run early; `saved` is the newest checkpoint, usually of that very step."""

    def __init__(self, signum: int, step: int, saved: int):
        there = f"saved at step {step}" if saved == step else f"step {step} could not be saved"
        start = "there" if saved == step else f"step {saved}"
        name = signal.Signals(signum).name
        super().__init__(f"{name}: {there}; the same command goes on from {start}.")
        self.code = 128 + signum


class Signals:
    """Signals that end a run, remembered until the step is over.

    A second SIGTERM or Ctrl-C acts at once. Others often come twice, a closed terminal's from the
    kernel and the shell, or before a SIGTERM, as Slurm's do.

    With several processes SIGTERM is jax's preemption service's: all agree on the step to stop at.
    The others are handed to it too. The handlers from before are back afterwards.
    """

    def __init__(self):
        self.signum = 0

    def __enter__(self) -> "Signals":
        self.alone = jax.process_count() == 1
        here = threading.current_thread() is threading.main_thread()
        self.before = replaced(self.alone) if here else {}
        for signum in self.before:
            signal.signal(signum, self.remember)
        return self

    def remember(self, signum: int, frame) -> None:
        first, self.signum = self.signum, signum
        if first in ENDING and signum in ENDING:
            raise KeyboardInterrupt
        if not (first or self.alone):
            signal.raise_signal(signal.SIGTERM)

    def received(self, step: int) -> int:
        """The signal to stop for after `step`, or 0."""
        if self.alone:
            return self.signum
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0

    def __exit__(self, *exception) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)


def replaced(alone: bool) -> dict[signal.Signals, object]:
    """{signal: handler} of those to catch. A handler that Python did not set is None: it could not
    be set again, and stays."""
    ending = {s: signal.getsignal(s) for s in ENDING if alone or s != signal.SIGTERM}
    asking = {s: signal.getsignal(s) for s in ASKING}
    asking = {s: handler for s, handler in asking.items() if handler != signal.SIG_IGN}
    return {s: handler for s, handler in (ending | asking).items() if handler is not None}
