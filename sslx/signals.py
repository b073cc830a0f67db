"""Handling of SIGTERM and Ctrl-C between two steps."""

import signal
import threading

import jax
from jax.experimental import multihost_utils


class Interrupted(RuntimeError):
    """A signal ended the run early; `saved` is the newest checkpoint, usually of that very step."""

    def __init__(self, signum: int, step: int, saved: int):
        there = f"saved at step {step}" if saved == step else f"step {step} could not be saved"
        start = "there" if saved == step else f"step {saved}"
        name = signal.Signals(signum).name
        super().__init__(f"{name}: {there}; the same command goes on from {start}.")
        self.code = 128 + signum


class Signals:
    """SIGTERM and Ctrl-C, remembered until the step is over; a second one acts at once.

    With several processes SIGTERM is jax's preemption service's: all agree on the step to stop at.
    Ctrl-C is handed to it too.
    """

    def __init__(self):
        self.signum = 0

    def __enter__(self) -> "Signals":
        self.alone = jax.process_count() == 1
        here = threading.current_thread() is threading.main_thread()
        caught = (signal.SIGTERM, signal.SIGINT) if self.alone else (signal.SIGINT,)
        self.before = {s: signal.getsignal(s) for s in caught if here}
        for signum in self.before:
            signal.signal(signum, self.remember)
        return self

    def remember(self, signum: int, frame) -> None:
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum
        if not self.alone:
            signal.raise_signal(signal.SIGTERM)

    def received(self, step: int) -> int:
        """The signal to stop for after `step`, or 0."""
        if self.alone:
            return self.signum
        return signal.SIGTERM if multihost_utils.reached_preemption_sync_point(step) else 0

    def __exit__(self, *exception) -> None:
        for signum, handler in self.before.items():
            signal.signal(signum, handler)
