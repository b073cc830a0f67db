"""One writer for each run directory.

The lock is the kernel's, on RUN/.lock: it ends with its process, on NFS also with its host, and the
file says whose it is. On a disk that keeps such locks to one host, or has none, the file's time
tells a living writer, who touches it every few seconds, from one that was killed.

A bucket has no locks, but replaces an object only if nobody else did meanwhile: a writer replaces
RUN/.lock every few seconds, and is alive as long as the object changes. (On stores other than
Amazon's and Google's, two who start within milliseconds may both get it.)
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
from sslx.paths import Place, Remote
from sslx.processes import by_first

BEAT = 5.0  # seconds between two touches
LOOKING = "%s: looking for %.0f s whether %s still writes"
HINT = "is there such a bucket, and may you write to it? Else choose another --workdir."

log = logging.getLogger("sslx")


@contextlib.contextmanager
def writing(run: Place, force: bool = False) -> Iterator[None]:
    """A context in which this process, with others of its job, alone writes to a run directory.

    The directory is made. With `force` it does not matter who else says to write there. Raises
    ValueError where someone does, where nobody can, or where checkpoints could not be read again.
    """
    check_path(run)
    with contextlib.ExitStack() as stack:
        by_first(lambda: stack.enter_context(_lock(run, force)))
        yield


def refuse_second(run: Place, force: bool = False) -> None:
    """Raise ValueError now where `writing` would because someone writes; makes no directory."""

    def look() -> None:
        if (run / ".lock").exists():
            with _lock(run, force):
                pass

    check_path(run)
    by_first(look)


def _lock(run: Place, force: bool) -> contextlib.AbstractContextManager[None]:
    return _claimed(run, force) if isinstance(run, Remote) else _locked(run, force)


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
            raise _refusal(run, _read(path))
        mine = _myself()
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
    log.warning(LOOKING, path, 3 * BEAT, _shown(owner))
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
        return _parsed(path.read_bytes())
    except OSError:
        return {}


# ---- in a bucket ----


@contextlib.contextmanager
def _claimed(run: Remote, force: bool) -> Iterator[None]:
    """`_locked` where RUN/.lock is an object, removed at the end."""
    import tensorstore

    retries = {"max_retries": 3}
    try:
        context = tensorstore.Context(
            {"s3_request_retries": retries, "gcs_request_retries": retries}
        )
        store = tensorstore.KvStore.open(run.store, context=context).result()
        seen = store.read(".lock").result()
        owner = _parsed(seen.value)
        if owner and not force:
            log.warning(LOOKING, run / ".lock", 3 * BEAT, _shown(owner))
            if _changes(store, seen):
                raise _refusal(run, owner)
        mine = _myself()
        free = {} if force else {"if_equal": seen.stamp.generation}
        stamp = store.write(".lock", json.dumps(mine), **free).result()
    except ConfigError:
        raise
    except Exception as error:
        reason = _first(error)
        if reason.startswith(("NOT_FOUND", "PERMISSION_DENIED")):
            raise ConfigError(f"Cannot write to {run} ({reason}): {HINT}") from error
        raise OSError(f"Cannot write to {run} ({reason}).") from error
    if not stamp.generation:  # another was quicker, or there is no bucket
        now = store.read(".lock").result()
        if now.state == "missing":
            raise ConfigError(f"Cannot write to {run}: {HINT}")
        raise _refusal(run, _parsed(now.value))
    ended, last = threading.Event(), [stamp.generation]
    beating = threading.Thread(target=_beat, args=(store, mine, last, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with contextlib.suppress(Exception):
            if last[0]:
                store.write(".lock", None, if_equal=last[0]).result()


def _changes(store, seen) -> bool:
    """Whether another process replaces the object."""
    for _ in range(13):
        time.sleep(BEAT / 4)
        if store.read(".lock").result().stamp.generation != seen.stamp.generation:
            return True
    return False


def _beat(store, mine: dict, last: list[bytes], ended: threading.Event) -> None:
    """Replace the object until the end; `last` holds its generation, an empty one once another
    process has taken over."""
    while last[0] and not ended.wait(BEAT):
        with contextlib.suppress(Exception):  # a store that is out of reach for a while
            text = json.dumps({**mine, "at": time.time()})
            last[0] = store.write(".lock", text, if_equal=last[0]).result().generation
            if not last[0]:  # or what was written before without an answer
                now = store.read(".lock").result()
                last[0] = (
                    now.stamp.generation if mine.items() <= _parsed(now.value).items() else b""
                )


# ---- whose it is ----


def _myself() -> dict[str, str | int]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%F %T")}


def _parsed(data: bytes) -> dict[str, str | int]:
    try:
        owner = json.loads(data)
    except ValueError:
        owner = None
    return owner if isinstance(owner, dict) else {}


def _shown(owner: dict[str, str | int]) -> str:
    owner = {"pid": "?", "host": "unknown", "since": "?"} | owner
    return "process {pid} on {host}, since {since}".format(**owner)


def _refusal(run: Place, owner: dict[str, str | int]) -> ConfigError:
    return ConfigError(
        f"{run} is written to by {_shown(owner)}: wait for its end, use another directory, "
        "or take over with --force (force=True)."
    )


def _first(error: Exception) -> str:
    """The first line of an error of tensorstore, without its details."""
    return str(error).partition(" [")[0].partition("\n")[0]
