"""What the processes of a run settle together, so that none goes on alone and waits forever.

With one process there is nothing to settle: no device work, no waiting.
"""

import socket
from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils


def of_first(x: np.ndarray) -> np.ndarray:
    """The array of process 0, on every process; all give one of the same shape and dtype."""
    return multihost_utils.broadcast_one_to_all(x) if jax.process_count() > 1 else x


def agreed(ok: bool) -> bool:
    """Whether `ok` holds on every process."""
    if jax.process_count() == 1:
        return ok
    return bool(multihost_utils.process_allgather(np.asarray(ok)).all())


def by_first(act: Callable[[], None]) -> None:
    """Call `act` on process 0; where that raises there, every process raises."""
    error: Exception | None = None
    if jax.process_index() == 0:
        try:
            act()
        except Exception as raised:
            error = raised
    if not agreed(error is None):
        raise error or OSError("process 0 could not go on; its message says why")


def hosts() -> list[str]:
    """The name of the host of each process, in their order."""
    name = np.frombuffer(socket.gethostname().encode()[:64].ljust(64), np.uint8)
    if jax.process_count() == 1:
        return [socket.gethostname()]
    return [row.tobytes().decode().strip() for row in multihost_utils.process_allgather(name)]
