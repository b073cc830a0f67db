"""Files of a folder that several processes write to: whole or not at all, one writer at a time."""

import contextlib
import errno
import fcntl
import json
import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from sslx.data.formats.arrayrecord import counted
from sslx.data.source import DataError, needs

log = logging.getLogger("sslx")


@contextlib.contextmanager
def alone(out: Path, what: int) -> Iterator[None]:
    """Hold the lock of that number, which all hosts that share `out` respect and which ends with
    its process.

    A file system that knows no locks lets all pass, and says so: then two of the same command at
    once may fail, as they write the same files.
    """
    with (out / ".lock").open("ab") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, what)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            log.warning("%s cannot be locked: see that no part is written twice at once", out)
        yield


@contextlib.contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Another name for a file: what is there at the end becomes `path`, after an error nothing."""
    new = path.with_name(f"{path.name}.new")
    try:
        yield new
        if new.exists():
            new.replace(path)
        else:
            path.unlink(missing_ok=True)
    finally:
        new.unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Errors within, as of a full disk, name the file and say what to do."""
    try:
        yield
    except (OSError, RuntimeError, DataError) as error:  # the latter two are ArrayRecord's
        reason = str(getattr(error, "strerror", None) or error).split(";")[0]
        raise OSError(
            f"{path} cannot be written ({reason}): mend that, then the same command goes on"
        ) from error


def write_records(path: Path, records: Iterable[bytes]) -> int:
    """Write an ArrayRecord file; returns its bytes, 0 where there are no records and so no file."""
    writer = needs("array_record.python.array_record_module", "array_record").ArrayRecordWriter
    file, count = None, 0
    with appearing(path) as new:
        for data in records:
            with writing(path):
                file = file or writer(os.fsencode(new), "group_size:1,uncompressed")
                file.write(data)
            count += 1
        if not file:
            return 0
        with writing(path):
            file.close()
            if counted(str(new)).end != count:
                raise OSError("it does not hold what was written")
            return new.stat().st_size


def write_bytes(path: Path, data: bytes) -> None:
    with writing(path), appearing(path) as new:
        new.write_bytes(data)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Names of files that are no UTF-8 are written as escapes of JSON."""
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_bytes(path, text.encode(errors="backslashreplace"))


def read_json(path: Path, mend: str) -> dict[str, Any]:
    """The object that a file of JSON holds. Raises DataError, which ends with `mend`, if it holds
    none."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing: {mend}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is no JSON, or damaged ({error}): {mend}") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is no JSON object, but of type {type(value).__name__}: {mend}")
    return value
