"""What the processes of a run settle together, so that none goes on alone and waits forever.

With one process there is nothing to settle: no device work, no waiting.
"""

import itertools
import json
import socket
import time
from collections.abc import Callable, Mapping

import jax
import numpy as np
from jax.experimental import multihost_utils

from sslx.exits import FAILED, code_of


class Failed(OSError):
    """Another process could not do its part; `code` is the exit code of a command that it ends."""

    def __init__(self, why: str, code: int = FAILED):
        super().__init__(why)
        self.code = code


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
    code = int(of_first(np.asarray(0 if error is None else code_of(error))))
    if code:
        raise error or Failed("process 0 could not go on; its message says why", code)


def hosts() -> list[str]:
    """The name of the host of each process, in their order."""
    name = np.frombuffer(socket.gethostname().encode()[:64].ljust(64), np.uint8)
    if jax.process_count() == 1:
        return [socket.gethostname()]
    return [row.tobytes().decode().strip() for row in multihost_utils.process_allgather(name)]


# ---- by way of the coordination service: no device work, from any thread ----


class Shared:
    """Values by key, shared by the processes of a run: the store of jax's coordination service."""

    def __init__(self, prefix: str):
        from jax._src import distributed  # no public way

        self.client, self.prefix = distributed.global_state.client, prefix

    def put(self, key: str, value: Mapping) -> None:
        self.client.key_value_set(f"{self.prefix}/{key}", json.dumps(value), allow_overwrite=True)

    def under(self, folder: str) -> list[dict]:
        """All values whose keys begin with `folder`."""
        return [json.loads(v) for _, v in self.client.key_value_dir_get(f"{self.prefix}/{folder}/")]

    def remove(self, folder: str) -> None:
        self.client.key_value_delete(f"{self.prefix}/{folder}/")


class Own:
    """The values of a process alone."""

    def __init__(self):
        self.values: dict[str, dict] = {}

    def put(self, key: str, value: Mapping) -> None:
        self.values[key] = dict(value)

    def under(self, folder: str) -> list[dict]:
        return [v for key, v in self.values.items() if key.startswith(f"{folder}/")]

    def remove(self, folder: str) -> None:
        self.values = {k: v for k, v in self.values.items() if not k.startswith(f"{folder}/")}


def store(prefix: str) -> Shared | Own:
    """The values under `prefix` of all processes of this run."""
    return Shared(prefix) if jax.process_count() > 1 else Own()


class Attempts:
    """Work that processes do together, one piece after another, each of which fails in all of them
    where it fails in one. All call `begin` for every piece; `meet` and `fail` in any thread."""

    _all = itertools.count()

    def __init__(self):
        self.index, self.count = jax.process_index(), jax.process_count()
        self.store, self.number = None, 0

    def begin(self) -> None:
        if self.store is None:  # a number that all draw: a process may make one of these alone
            self.store = store(f"sslx/attempts/{next(self._all)}")
        self.number += 1
        if self.index == 0:  # all have left the one before the last
            self.store.remove(str(self.number - 2))

    def fail(self, why: str) -> None:
        """Tell the others that this process could not do its part."""
        why = f"process {self.index}: {why}" if self.count > 1 else why
        self.store.put(f"{self.number}/failed/{self.index}", {"why": why})

    def meet(self, name: str, timeout: float) -> None:
        """Wait until all processes are here. Raises Failed as soon as one of them failed, and
        TimeoutError after `timeout` seconds."""
        place, end, pause = f"{self.number}/{name}", time.monotonic() + timeout, 0.01
        self.store.put(f"{place}/here/{self.index}", {"index": self.index})
        while not self.store.under(f"{place}/all"):
            if failed := self.store.under(f"{self.number}/failed"):
                raise Failed(failed[0]["why"])
            if self.index == 0 and len(self.store.under(f"{place}/here")) == self.count:
                self.store.put(f"{place}/all/0", {})
                continue
            if time.monotonic() > end:
                here = {told["index"] for told in self.store.under(f"{place}/here")}
                missing = ", ".join(map(str, sorted({*range(self.count)} - here)))
                raise TimeoutError(f"{name}: process {missing} did not come in {timeout:,.0f} s")
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
