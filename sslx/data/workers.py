"""Processes that read and decode beside the training: how many, and how they start and end."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing import resource_tracker


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def off_device(worker: int, workers: int) -> None:
    """In a worker: it ends with its parent, and should anything start jax there, it must not take
    the accelerator."""
    del worker, workers
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # Grain has imported it, and with it read the environment
        sys.modules["jax"].config.update("jax_platforms", "cpu")


def end_with_parent() -> None:
    """End this worker when its parent has ended, which a killed parent announces to nobody."""
    multiprocessing.parent_process().join()
    os._exit(1)


def mark_flags_parsed() -> None:
    """Mark absl's flags as parsed, where they are not; Grain reads them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()


@contextlib.contextmanager
def spawning():
    """Workers started within never hear the signals that end a run, which go to all processes of a
    terminal or job: when they end is for the run to say, once it has saved what it reached."""
    resource_tracker.ensure_running()  # started later, it would let the signals through again
    ending = "SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2"
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, [getattr(signal, name) for name in ending])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)
