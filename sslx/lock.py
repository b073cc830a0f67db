"""One writer for each run directory.

The lock is the kernel's, on RUN/.lock: it ends with its process, on NFS also with its host, and the
file says whose it is. On a disk that keeps such locks to one host, or has none, the file's time
tells a living writer, who touches it every few seconds, from one that was killed.
"""

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from sslx.checkpoint import check_path
from sslx.config import ConfigError
from sslx.processes import by_first

BEAT = 5.0  # seconds between two touches

log = logging.getLogger("sslx")


@contextlib.contextmanager
def writing(run: Path, force: bool = False) -> Iterator[None]:
    """A context in which this process, with others of its job, alone writes to a run directory.

    The directory is made. With `force` it does not matter who else says to write there. Raises
    ValueError where someone does, where nobody can, or where checkpoints could not be read again.
    """
    check_path(run)
    with contextlib.ExitStack() as stack:
        by_first(lambda: stack.enter_context(_locked(run, force)))
        yield


def refuse_second(run: Path, force: bool = False) -> None:
    """Raise ValueError now where `writing` would because someone writes; makes no directory."""

    def look() -> None:
        if (run / ".lock").exists():
            with _locked(run, force):
                pass

    check_path(run)
    by_first(look)


@contextlib.contextmanager
def _locked(run: Path, force: bool) -> Iterator[None]:
    path, ended = run / ".lock", threading.Event()
    try:
        run.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise ConfigError(f"Cannot write to {run} ({error}): choose another --workdir.") from error
    try:
        locked = _locks(fd)
        if not force and _taken(path, locked):
            raise ConfigError(
                f"{run} is written to by {_owner(path)}: wait for its end, use another directory, "
                "or take over with --force (force=True)."
            )
        mine = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}
        with contextlib.suppress(OSError):  # a full disk
            os.truncate(fd, 0)
            os.pwrite(fd, json.dumps(mine).encode(), 0)
        touching = threading.Thread(target=_touch, args=(fd, ended), daemon=True)
        touching.start()
        try:
            yield
        finally:
            ended.set()
            touching.join()
            with contextlib.suppress(OSError):
                if _read(path) == mine:  # else it was taken over
                    os.truncate(fd, 0)
    finally:
        os.close(fd)


def _locks(fd: int) -> bool | None:
    """Whether this process has the lock of a file now; None on a disk without locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _taken(path: Path, locked: bool | None) -> bool:
    """Whether another process writes to the run."""
    if locked is False:
        return True
    owner = _read(path)
    if not owner or (locked and owner.get("host") == socket.gethostname()):
        return False
    log.warning("%s: looking for %.0f s whether %s still writes", path, 3 * BEAT, _owner(path))
    return _touched(path)


def _touched(path: Path) -> bool:
    """Whether a file's time changes; opened each time, for NFS to ask its server."""
    times = set()
    for _ in range(13):
        with path.open() as file:
            times.add(os.fstat(file.fileno()).st_mtime_ns)
        if len(times) > 1:
            return True
        time.sleep(BEAT / 4)
    return False


def _touch(fd: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT):
        with contextlib.suppress(OSError):
            os.utime(fd)


def _read(path: Path) -> dict[str, str | int]:
    """Who wrote the file; empty where its writer came to an end."""
    try:
        owner = json.loads(path.read_text())
    except (ValueError, OSError):
        owner = None
    return owner if isinstance(owner, dict) else {}


def _owner(path: Path) -> str:
    owner = {"pid": "?", "host": "unknown", "since": "?"} | _read(path)
    return "process {pid} on {host}, since {since}".format(**owner)
