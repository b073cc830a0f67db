"""Sources: random access to records, whatever the storage. All of data/ builds on this file.

A source is a value: it prints, compares, hashes and pickles as its fields, and opens its files on
first use in each process.
"""

import abc
import difflib
import errno
import functools
import importlib
import logging
import operator
import os
import stat
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import fields
from typing import Any, ClassVar, TypeVar

import numpy as np

log = logging.getLogger("sslx")
T = TypeVar("T")

Record = dict[str, Any]
Example = dict[str, np.ndarray | np.generic]  # what a decoder makes of a record
Shapes = dict[str, tuple[tuple[int, ...], np.dtype | type]]  # of the arrays of an example

RESIDENT = 1 << 30  # bytes of a file's records that a process keeps in memory
PATIENCE = 60.0  # seconds for which a read that fails for want of a disk or memory is tried again

# Errors of one file as it is, and not of a disk; those of decoders, as Pillow's, have no number.
OWN = {
    None,
    errno.EACCES,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,
    errno.EPERM,
}


class DataError(ValueError):
    """An error in the data and not in the program; the message names the file and the fix."""


class Unreachable(DataError):
    """Data cannot be read now, and may be the next time: a lost disk, no memory, a killed reader.
    `code` is the exit code of a command that it ends."""

    code = 1


class Source(abc.ABC):
    """Random access to records, each a dict of what it holds and its `name`, for messages.

    Pictures are {"image": encoded bytes or uint8 [H, W, C]}, text is {"tokens": ids [n], "starts":
    where each document in them begins}; `label` is an int from 0, absent where none is known.
    Handles are cached properties, so they are opened lazily and never compared or pickled.

    A record that cannot be read raises what it likes and counts as corrupt; but a DataError ends
    the run, and what is `lost` is tried again first.
    """

    leaves: ClassVar[tuple[str, ...]] = ()  # what records hold, beside label and name
    decoder: ClassVar[str] = ""  # the one that usually reads them, for messages
    listed: ClassVar[tuple[str, ...]] = ()  # cached properties that are listings and counts
    resident: ClassVar[bool] = False  # decoded arrays in memory: not worth a worker process

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    def records(self, indices: list[int]) -> list[Record]:
        """Many records at once, where that is faster than one by one."""
        return [self[index] for index in indices]

    @property
    def classes(self) -> list[str]:
        """The names of the labels 0, 1, ...; empty where labels are numbers alone."""
        return []

    @property
    def unlabelled(self) -> str:
        """Why records have no labels; empty if they have, be it that of some is unknown."""
        return "" if "label" in self[0] else "its first record has no `label`"

    @property
    def shapes(self) -> Shapes:
        """Shape and dtype of each leaf, of a source whose records are arrays of one shape."""
        hint = f"give the pipeline a decoder, such as {self.decoder or 'one of your own'}"
        raise DataError(f"{self} does not hold arrays of one known shape: {hint}")

    def gather(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The leaves of many records as arrays with the example as axis 0."""
        records = self.records(indices.tolist())
        return {name: np.stack([r[name] for r in records]) for name in self.shapes}

    def check(self) -> None:
        """Raise DataError now, before any device work, if there is nothing here to read."""
        if not len(self):
            raise DataError(f"{self} holds no records")

    def suits(self, decode: Any) -> None:
        """Raise DataError if `decode` reads what these records do not hold."""
        missing = [name for name in decode.reads if name not in self.leaves]
        if self.leaves and missing:
            right = f": use {self.decoder}" if self.decoder else ""
            raise DataError(
                f"{self} gives {', '.join(self.leaves)}, which {decode} cannot read{right}"
            )

    def __getstate__(self):
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def listings(self) -> dict[str, Any]:
        """What was listed and counted so far: `adopt` spares a copy doing it again."""
        return {name: vars(self)[name] for name in self.listed if name in vars(self)}

    def adopt(self, listings: dict[str, Any]) -> None:
        """Take the listings of another copy for one's own."""
        vars(self).update(listings)


def within(ends: list[int], index: int) -> tuple[int, int]:
    """(part, number within it) of a record among consecutive parts."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"record {index} of {ends[-1]}")
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def matches(scheme: str, pattern: str) -> list[str]:
    """The files of a glob, sorted. Brackets that match nothing as a pattern stand for themselves.

    Raises DataError where there is none, and for a folder, a pipe or a device.
    """
    import glob

    whole = os.path.expanduser(pattern)
    paths: list[str] = []
    for text in (whole, escaped(whole), whole.replace("[", "[[]")):
        paths = paths or sorted(glob.glob(text, recursive=True))
    if not paths:
        raise DataError(f"{scheme}:{pattern} matches no file (seen from {os.getcwd()})")
    for path in paths:
        try:
            mode = os.stat(path).st_mode
        except OSError as error:
            raise DataError(f"{scheme}:{pattern}: {path} cannot be opened: {error}") from error
        if stat.S_ISDIR(mode):
            raise DataError(f"{scheme}:{path} is a folder: name its files, {scheme}:{path}/*")
        if not stat.S_ISREG(mode):
            raise DataError(f"{scheme}:{pattern}: {path} is no file, but a pipe or a device")
    return paths


def escaped(pattern: str) -> str:
    """A glob whose folders, as far as they exist by these very names, stand for themselves."""
    import glob

    head = os.path.dirname(pattern)
    while head and not os.path.lexists(head):
        head = os.path.dirname(head)
    return glob.escape(head) + pattern[len(head) :]


def labelled(value: Any, name: str) -> dict[str, int]:
    """{"label": value} for a record, {} if it is None or below 0, which stand for no label.

    Raises DataError, with the record's name, for what is no whole number of 31 bits.
    """
    try:
        number = -1 if value is None else operator.index(value)
    except TypeError as error:
        raise DataError(f"{name}: label {value!r} is no whole number") from error
    if number >= 1 << 31:
        raise DataError(f"{name}: label {number} is beyond 31 bits: number the classes from 0")
    return {} if number < 0 else {"label": number}


def unlabelled_among(names: Iterable[str]) -> str:
    """Why there are no labels where none of these columns is called `label`."""
    lower = {name.lower(): name for name in names}
    near = [lower[name] for name in difflib.get_close_matches("label", lower, 3)]
    hint = f": rename {' or '.join(f'`{name}`' for name in near)}" if near else ""
    return f"it has no `label`, only {', '.join(lower.values())}{hint}"


def lost(error: Exception) -> bool:
    """Whether an error is of memory or a disk, and says nothing of the record that was read."""
    if isinstance(error, OSError):
        return error.errno not in OWN or isinstance(error, ConnectionError | TimeoutError)
    return isinstance(error, MemoryError)


def patiently(source: Source, index: int, read: Callable[..., T], *args: Any) -> T:
    """read(*args) for a record, tried again for PATIENCE seconds while memory or a disk is `lost`.

    Raises Unreachable after that, and at once what else `read` raises.
    """
    start, pause = time.monotonic(), 0.1
    while True:
        try:
            return read(*args)
        except (OSError, MemoryError) as error:
            if not lost(error):
                raise
            reason, waited = f"{type(error).__name__}: {error}", time.monotonic() - start
            if waited >= PATIENCE:
                raise Unreachable(
                    f"{source}: record {index} could not be read for {waited:.0f} s ({reason}); "
                    "restore the file, the disk or the memory and resume"
                ) from error
        warned(f"{source}: records cannot be read; trying again for {PATIENCE:.0f} s: {reason}")
        time.sleep(min(pause, PATIENCE))
        pause = min(2 * pause, 10.0)


@functools.cache
def warned(text: str) -> None:
    """Log a warning, once in each process."""
    log.warning("%s", text)


def needs(module: str, package: str):
    """A module, imported on first use; raises DataError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"this source needs {package}: pip install {package}") from error
