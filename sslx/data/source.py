"""Sources: random access to records, whatever the storage. All of data/ builds on this file.

A source is a value: it prints, compares, hashes and pickles as its fields, and opens its files on
first use in each process.
"""

import abc
import importlib
import os
from bisect import bisect_right
from dataclasses import fields
from typing import Any, ClassVar

import numpy as np

Record = dict[str, Any]
Example = dict[str, np.ndarray | np.generic]  # what a decoder makes of a record
Shapes = dict[str, tuple[tuple[int, ...], np.dtype | type]]  # of the arrays of an example

RESIDENT = 1 << 30  # bytes of a file's records that a process keeps in memory


class DataError(ValueError):
    """An error in the data and not in the program; the message names the file and the fix."""


class Source(abc.ABC):
    """Random access to records, each a dict of what it holds and its `name`, for messages.

    Pictures are {"image": encoded bytes or uint8 [H, W, C]}, text is {"tokens": ids [n], "starts":
    where each document in them begins}; `label` is an int, absent where none is known. Handles are
    cached properties, so they are opened lazily and never compared or pickled.
    """

    leaves: ClassVar[tuple[str, ...]] = ()  # what records hold, beside label and name
    decoder: ClassVar[str] = ""  # the one that usually reads them, for messages
    resident: ClassVar[bool] = False  # decoded arrays in memory: not worth a worker process

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Record: ...

    def records(self, indices: list[int]) -> list[Record]:
        """Many records at once, where that is faster than one by one."""
        return [self[index] for index in indices]

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


def place(ends: list[int], index: int) -> tuple[int, int]:
    """(part, number within it) of a record among consecutive parts."""
    if not 0 <= index < ends[-1]:
        raise IndexError(f"record {index} of {ends[-1]}")
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def matches(scheme: str, pattern: str) -> list[str]:
    import glob

    paths = sorted(glob.glob(os.path.expanduser(pattern), recursive=True))
    if any(os.path.isdir(path) for path in paths):
        raise DataError(f"{scheme}:{pattern} is a folder: name its files, {scheme}:{pattern}/*")
    if not paths:
        raise DataError(f"{scheme}:{pattern} matches no file (seen from {os.getcwd()})")
    return paths


def needs(module: str, package: str):
    """A module, imported on first use; raises DataError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DataError(f"this source needs {package}: pip install {package}") from error
